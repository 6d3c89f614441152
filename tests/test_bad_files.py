"""Whatever is wrong with a file or variable that is read back: one line that names it, or the values of the undamaged file."""

import errno
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import params
from experiments.__main__ import main
from experiments.adversarial_pruning_defense import arms
from medsec.core import files, parallel, paths
from medsec.core.errors import InputError, command
from medsec.evidence import cells, claims, record, tables

TREE = files.read_yaml(paths.PARAMS)
SECTION = (
    paths.PARAMS.read_text(encoding="utf-8").split("\nfedgan:")[0] + "\n"
)  # of the real file, short enough for many runs
LEDGER = (paths.CLAIMS / "1-fedgan.yaml").read_text(encoding="utf-8").split("\n  - id:")[:4]
TABLE = (
    (paths.ROOT / "results" / "phantom" / "01_backdoor_fedgan.csv").read_text(encoding="utf-8").splitlines(True)[:12]
)
ABOUT = (paths.ROOT / "records" / "phantom" / "01_backdoor_fedgan.json").read_text(encoding="utf-8")
NOTE = {"cell": "a-seed0", "identity": "0" * 16, "seconds": 1.5, "peak_mb": 7}


def outcome(function, *args, names: str):
    """What a function returns; None where it refuses, in one line that names the file."""
    try:
        return function(*args)
    except InputError as error:
        said = str(error)
    assert "\n" not in said
    assert names in said
    return None


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A file with wrong bytes, cut, empty, in another encoding, with lines twice or missing, or quite another one."""
    at = draw(st.integers(0, len(content) - 1))
    lines = content.splitlines(keepends=True)
    line = draw(st.integers(0, len(lines) - 1))
    text = content.decode("utf-8", "replace")
    kinds = {
        "flip": lambda: content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :],
        "cut": lambda: content[:at],
        "latin": lambda: text.replace("e", "é").encode("latin-1", "replace"),
        "utf-16": lambda: text.encode(draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32"]))),
        "twice": lambda: b"".join([*lines[: line + 1], lines[line], *lines[line + 1 :]]),
        "lost": lambda: b"".join(lines[:line] + lines[line + 1 :]),
        "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "other": lambda: draw(st.binary(max_size=40)),
    }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


def stored(name: str, content: bytes) -> Path:
    file = Path(tempfile.mkdtemp(dir=FOLDER.name)) / name
    file.write_bytes(content)
    return file


FOLDER = tempfile.TemporaryDirectory()


@pytest.fixture(autouse=True, scope="module")
def _folder():
    yield
    FOLDER.cleanup()


# Text, YAML, JSON, tables ---------------------------------------------------------------------------------------------


@pytest.mark.fuzz
@settings(deadline=None)
@given(damaged(SECTION.encode()))
def test_damaged_parameters(content):
    file = stored("params.yaml", content)
    found = outcome(files.read_yaml, file, names="params.yaml")
    if isinstance(found, dict):
        outcome(params.validate, params.merge(TREE, found), names="params.yaml")


@pytest.mark.fuzz
@settings(deadline=None)
@given(damaged("\n  - id:".join(LEDGER).encode()))
def test_damaged_claims(content):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CLAIMS", stored("1-fedgan.yaml", content).parent)
        found = outcome(claims.load, "1-fedgan", names="1-fedgan.yaml")
    assert found is None or all(isinstance(claim["where"], dict) for claim in found["claims"])


@pytest.mark.fuzz
@settings(deadline=None)
@given(damaged("".join(TABLE).encode()))
def test_damaged_tables(content):
    found = outcome(tables.read, stored("01.csv", content), names="01.csv")
    if found is not None and "metric" in found:
        assert {"variant", "scenario", "value", "low", "high", "n"} <= set(found) or "seed" in found
        assert found.drop(columns=["value", "low", "high"], errors="ignore").notna().all(axis=None)


@pytest.mark.fuzz
@settings(deadline=None)
@given(damaged(files.packed("".join(TABLE), "01.csv")))
def test_a_damaged_packed_table_is_never_taken_for_another(content):
    found = outcome(tables.read, stored("01.csv.gz", content), names="01.csv.gz")
    if found is not None:  # bytes of the header do not count
        pd.testing.assert_frame_equal(found, tables.read(stored("01.csv", "".join(TABLE).encode())))


@pytest.mark.fuzz
@settings(deadline=None)
@given(damaged(ABOUT.encode()))
def test_damaged_records(content):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "records", lambda cohort: stored("01.json", content).parent)
        found = outcome(record.about, "01", "phantom", names="01.json")
    assert found is None or isinstance(found.get("cells_planned", 0), int)


@pytest.mark.parametrize("name", ["x.yaml", "x.json", "x.csv", "x.csv.gz"])
def test_a_byte_order_mark_is_no_part_of_a_file_and_a_folder_is_none(tmp_path, name):
    read = {"x.yaml": files.read_yaml, "x.json": files.read_json}.get(name, tables.read)
    text = '{"a": "1"}' if "csv" not in name else "".join(TABLE)
    wrote = [files.packed(start + text, name) if "gz" in name else (start + text).encode() for start in ("", "\ufeff")]
    found = [read(stored(name, content)) for content in wrote]
    assert str(found[0]) == str(found[1])
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"^{name} is a folder"):
        read(tmp_path / name)


def test_json_that_is_nested_too_deeply_or_says_something_twice():
    for text in ("[" * 100_000, '{"a": 1, "a": 1}'):
        with pytest.raises(InputError, match=r"^x\.json is no JSON"):
            files.read_json(stored("x.json", text.encode()))


# YAML that means something else than it says ----------------------------------------------------------------------------

PLAIN = [i for i, line in enumerate(SECTION.splitlines()) if ": " in line.split("#")[0] and "{" not in line]


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.sampled_from(PLAIN))
def test_a_key_that_stands_twice_is_named(at):
    lines = SECTION.splitlines()
    key = lines[at].split(":")[0].strip()
    file = stored("params.yaml", "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]]).encode())
    with pytest.raises(InputError, match=rf"params\.yaml line \d+: the key {key} stands twice in this section"):
        files.read_yaml(file)


@pytest.mark.parametrize("number", ["020", "-017", "1:20", "190:20:30", "1:20.5", "0_7", "9" * 70])
def test_an_ambiguous_number_is_named_and_a_text_is_none(number):
    with pytest.raises(InputError, match=r"x\.yaml line 2: .* may mean another number"):
        files.read_yaml(stored("x.yaml", f"a: 1\nb: {number}\n".encode()))
    assert files.read_yaml(stored("x.yaml", f"b: '{number}'\n".encode())) == {"b": number}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "more than 100000 values"),
        ("a: &a {b: *a}", "more than 100000 values"),
        ("&a [x, x]", ""),
        ("\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}x]" for i in range(1, 9))]), "more than 100000"),
        ("[" * 600, "nested too deeply"),
        ("a: 2020-13-45", "not valid YAML"),
        ("!!int ''", "not valid YAML"),
        ("!!python/object:os.system x", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML at line 2"),
        ('a: "\\0"', "a sign that is none"),
    ],
)  # fmt: skip
def test_yaml_that_unfolds_or_is_none(text, said):
    file = stored("x.yaml", text.encode())
    if not said:
        assert files.read_yaml(file) == ["x", "x"]
        return
    with pytest.raises(InputError, match=rf"^x\.yaml [^\n]*{said}"):
        files.read_yaml(file)


def numbers(tree, path=()):
    """Where numbers stand in the parameters: paths of keys, to a number or a list of them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from numbers(value, (*path, key))
        elif type(value[0] if isinstance(value, list) and value else value) in (int, float):
            yield (*path, key)


STRANGE = [".inf", "-.inf", ".nan", "1.0e+999", "1e999", "1000000000000", "-1", "text", "[[]]", "{a: {b: 1}}", "020"]


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.sampled_from(list(numbers(TREE))), st.sampled_from(STRANGE))
def test_a_strange_number_is_refused_wherever_it_stands(path, number):
    value = TREE
    for key in path:
        value = value[key]
    text = f"[{number}]" if isinstance(value, list) else number
    overlay = stored("mine.yaml", ("".join(f"{{{key}: " for key in path) + text + "}" * len(path)).encode())
    with pytest.raises(InputError) as caught:
        params.validate(params.merge(TREE, files.read_yaml(overlay)), "mine.yaml")
    said = str(caught.value)
    assert said.startswith("mine.yaml")
    assert "\n" not in said
    assert path[-1] in said or "may mean another number" in said


def test_what_a_record_changes_is_checked_as_what_it_becomes(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    for change, said in (
        ("{inversion: {victms: 3}}", "change.inversion: unknown key victms; did you mean victims?"),
        ("{inversion: {attack: {iterations: .nan}}}", "change.inversion: attack.iterations = nan"),
        ("{evasion: {sweep: [2.0, 2.0]}}", "change.evasion: sweep [2.0, 2.0] names an eps twice"),
    ):
        file.write_text(f"record: {{other_modality: {{change: {change}}}}}", encoding="utf-8")
        assert main(["params", "--profile", str(file)]) == 2
        error = capsys.readouterr().err
        assert f"error: mine.yaml: record.other_modality.{said}" in error
        assert error.count("\n") == 1


# Cells and networks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cell() -> bytes:
    rows = tables.read(paths.ROOT / "results" / "phantom" / "01_backdoor_fedgan_runs.csv.gz").head(3)
    file = Path(tempfile.mkdtemp(dir=FOLDER.name)) / f"a-seed0.{NOTE['identity']}.npz"
    cells.write(file, (rows, {"noise": np.arange(6.0)}), NOTE)
    return file.read_bytes()


def same_cell(content: bytes, whole: bytes, name: str = f"a-seed0.{NOTE['identity']}.npz") -> bool:
    """Whether a cell is read as the whole one; False where it is set aside."""
    read, expected = (cells.read(stored(name, each)) for each in (content, whole))
    if read is None:
        return False
    pd.testing.assert_frame_equal(read[0][0], expected[0][0])
    np.testing.assert_array_equal(read[0][1]["noise"], expected[0][1]["noise"])
    assert read[1] == expected[1] == NOTE
    return True


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.data())
def test_a_damaged_cell_counts_as_unfinished_or_says_the_same(cell, data):
    same_cell(data.draw(damaged(cell)), cell)


def test_a_picture_whose_name_is_damaged_is_missed(cell):
    """The name stands twice in the file; that in its table of contents is what readers go by."""
    at = cell.rindex(b"picture noise")
    assert not same_cell(cell[:at] + b"q" + cell[at + 1 :], cell)


def test_a_cell_under_the_name_of_another_is_set_aside(cell, capsys):
    assert same_cell(cell, cell)
    file = stored("a-seed0.1111111111111111.npz", cell)
    assert cells.read(file) is None
    assert capsys.readouterr().err.startswith(f"{file.name}.damaged: this cell cannot be read")


@pytest.fixture(scope="module")
def network():
    """An untrained network as a record leaves it: its weights, the content of its file, and what a content is read as."""
    cohort = type("Tiny", (), {"name": "tiny", "channels": 1, "n_classes": 2, "fingerprint": "f"})()
    setup = arms.Setup(params.load(), cohort, {})
    model = arms._untrained(setup, False, 0).half().float()

    def read(content=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paths, "ROOT", Path(FOLDER.name))
            file = arms.checkpoint("tiny", "base", 0)
            if content is None:
                return arms.save(model, setup, "base", 0).read_bytes()
            file.write_bytes(content)
            return arms.load(setup, "base", 0)

    return model.state_dict(), read(), read


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.data())
def test_a_damaged_network_is_trained_anew_or_is_the_same(network, data):
    state, whole, read = network
    if found := read(data.draw(damaged(whole))):
        torch.testing.assert_close(found.state_dict(), state, rtol=0, atol=0)


def test_one_wrong_bit_in_the_weights_of_a_network_is_said(network, capsys):
    _, whole, read = network
    assert read(whole) is not None
    assert read(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]) is None
    said = "base-seed0.safetensors cannot be read (altered weights); the network is trained anew\n"
    assert capsys.readouterr().err == said


def test_a_network_without_a_hash_is_compared_with_the_list_of_dvc(tmp_path):
    committed = paths.networks("phantom") / "base-seed0.safetensors"
    if not committed.is_file():
        pytest.skip("the committed networks are not here: dvc pull")
    (tmp_path / "phantom").mkdir()
    file = Path(shutil.copy(committed, tmp_path / "phantom"))
    assert arms._as_committed(file)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not arms._as_committed(file)


# Writing ----------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_whole_and_leaves_nothing_behind(tmp_path, monkeypatch):
    file, old, young = (tmp_path / name for name in ("a.csv", "1.partial", "2.partial"))
    files.write(file, "whole")
    for left in (old, young):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))

    def killed(self, content):
        self.open("wb").write(content[:2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            files.write(file, "another")
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"a.csv": "whole", "2.partial": "half"}


@pytest.mark.parametrize(
    "place", ["file/x.csv", "n" * 300, "ä #%{x}/-x.csv", " .csv"], ids=["file", "long", "odd", "blank"]
)
def test_odd_places_are_written_to_or_named_in_one_line(tmp_path, capsys, place):
    (tmp_path / "file").write_text("no folder")
    status = command(lambda: files.write(tmp_path / place, "x") or 0)()
    said = capsys.readouterr().err
    assert (status, said.count("\n")) == ((0, 0) if (tmp_path.joinpath(place[:200]).is_file()) else (2, 1))
    assert status == (2 if place[0] in "fn" else 0)
    assert place[:4] in said or status == 0


def test_a_full_disk_is_one_line_and_other_faults_of_the_system_are_not_hidden(capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert command(full)() == 2
    assert capsys.readouterr().err == "error: a file: No space left on device; what was finished before is kept\n"
    with pytest.raises(BrokenPipeError):
        command(broken)()


# The environment --------------------------------------------------------------------------------------------------------


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.one_of(st.text("0123456789 -+.e²٣x", max_size=6), st.integers(-5, 2000).map(str), st.floats().map(str)))
def test_a_number_of_processes(value):
    found = outcome(parallel.count, value, "MEDSEC_PROCESSES", names="MEDSEC_PROCESSES")
    assert found is None or 1 <= found <= 1024
    assert found is not None or value.strip() not in map(str, range(1, 1025))


def test_variables_that_are_no_number_and_no_switch(monkeypatch, capsys):
    monkeypatch.setenv("MEDSEC_PROCESSES", "abc")
    with pytest.raises(InputError, match="MEDSEC_PROCESSES = 'abc'"):
        parallel.run_cells(len, [("a",)])
    monkeypatch.setenv("MEDSEC_FRESH", "yes")
    with pytest.raises(InputError, match="MEDSEC_FRESH=yes in the environment: set it to 1 or 0"):
        paths.flag("MEDSEC_FRESH")
    with pytest.raises(SystemExit):
        main(["record", "01_backdoor_fedgan", "--plan", "--processes", "0"])
    assert "argument --processes" in capsys.readouterr().err


def test_an_archive_without_git_is_told_so_before_anything(tmp_path):
    shutil.copy(paths.ROOT / "Makefile", tmp_path)
    done = subprocess.run(["make", "repro"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode
    assert done.stderr.splitlines()[0].startswith(
        "error: this folder is no git repository: clone it, or here: git init"
    )
    assert [f.name for f in tmp_path.iterdir()] == ["Makefile"]
