"""medsec.core.params: every mistake in the parameters is one line that names the key."""

import re

import pytest
import yaml

from experiments import params
from experiments.__main__ import main
from medsec.core import paths
from medsec.core.errors import InputError


def change(dotted, value):
    """The tree of params.yaml with one key set, e.g. ``change("seeds.tuning", [1])``."""
    tree = yaml.safe_load(paths.PARAMS.read_text(encoding="utf-8"))
    section, *_, key = (tree, *dotted.split("."))
    for part in dotted.split(".")[:-1]:
        section = section[part]
    section[key] = value
    return tree


def message(tree):
    with pytest.raises(InputError) as caught:
        params.validate(tree)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("params.yaml: ")
    return text


@pytest.mark.parametrize("file", sorted(paths.PROFILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_shipped_profiles_are_valid_and_change_something(file):
    assert params.load(file.stem) != params.load()


@pytest.mark.parametrize(
    ("dotted", "value", "hint"),
    [
        ("fedgam", {}, "did you mean fedgan?"),
        ("seeds.evalation", [1], "did you mean evaluation?"),
        ("fedgan.round", 5, "did you mean rounds?"),
        ("fedgan.gan.zzzzzz", 5, "known: z_dim, "),
    ],
)
def test_a_misspelt_key_names_the_nearest(dotted, value, hint):
    text = message(change(dotted, value))
    assert f"unknown key {dotted}; " in text
    assert hint in text


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        # of the wrong type
        ("seeds.tuning", 101),
        ("threats.gallery", "8"),
        ("fedgan.gan.beta1", None),
        # impossible
        ("seeds.tuning", []),
        ("cohorts.phantom.size", 27),
        ("threats.dirichlet_alpha", float("nan")),
        ("fedgan.partition", "idd"),
        ("fedgan.gan.beta1", 1.0),
        ("fedgan.gan.batch", 1),
    ],
)
def test_a_wrong_value_names_key_and_value(dotted, value):
    text = message(change(dotted, value))
    assert re.search(rf"{re.escape(dotted)}(\.0)? = ", text), text  # of a list: the position
    assert repr(value[0] if isinstance(value, list) and value else value) in text


@pytest.mark.parametrize(
    ("dotted", "value", "expected"),
    [
        ("seeds.tuning", [1, 2, 101], "seeds: seeds [1, 2] are both tuning and evaluation seeds"),
        ("seeds.evaluation", [0, 0], "seeds: evaluation seeds repeat"),
        ("cohorts.medmnist.shares.client", 0.6, "cohorts.medmnist.shares: client + public + reference must be 1"),
        ("cohorts.folder.patient_pattern", "_.*", "cohorts.folder.patient_pattern: '_.*' has 0 groups"),
        ("cohorts.folder.patient_pattern", "(", "cohorts.folder.patient_pattern: '(' is no regular expression"),
        ("fedgan.malicious", [0, 0], "fedgan: malicious names a client twice"),
        ("evasion.sweep", [2.0, 2.0], "evasion: sweep [2.0, 2.0] names an eps twice"),
        ("evasion.hardened.finetune_epochs", 0, "evasion.hardened: ema > 0 with finetune_epochs 0"),
        ("matrix.prune_after", 0.05, "matrix: prune_after 0.05 of 8 rounds is before the first: nothing is pruned"),
        ("fedgan.malicious", [99], "fedgan: malicious client 99 does not exist"),
    ],
)
def test_values_that_do_not_fit_together(dotted, value, expected):
    assert expected in message(change(dotted, value))


def test_autoattack_runs_at_an_eps_once():
    """The quick profile does not run it, and may have any headline."""
    tree = change("evasion.eps", 8.0)
    assert params.validate(tree).evasion.eps in tree["evasion"]["attacks"]["autoattack_more"]
    tree["evasion"]["attacks"]["scenarios"].append("autoattack")
    assert "evasion: attacks.autoattack_more names 8, the headline's eps, which is run anyway" in message(tree)


def test_a_number_that_yaml_reads_as_text_is_explained():
    tree = change("fedgan.gan.lr_g", yaml.safe_load("1e-3"))
    assert "fedgan.gan.lr_g = '1e-3'" in message(tree)
    assert "write 1.0e-3" in message(tree)


def test_a_missing_key_is_named_unless_it_is_misspelt():
    tree = change("seeds.tuning", [1])
    del tree["seeds"]["tuning"]
    assert message(tree) == "params.yaml: seeds.tuning is missing"
    tree["seeds"]["tunning"] = [101]
    assert "did you mean tuning?" in message(tree)


def test_parameters_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        params.load().threats.gallery = 9


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "mine.yaml is missing"),
        ("seeds: [1\nthreats: 3\n", "mine.yaml is not valid YAML at line 2"),
        ("- seeds\n", "mine.yaml must be a mapping of sections, found list"),
        ("", "mine.yaml must be a mapping of sections, found NoneType"),
        ("seeds: {}\n", "mine.yaml: "),
    ],
)
def test_a_file_that_is_no_parameter_file(tmp_path, content, expected):
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        params.load(file=file)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    """Function that writes a profile of the test's own."""
    monkeypatch.setattr(paths, "PROFILES", tmp_path)
    return lambda name, content: (tmp_path / f"{name}.yaml").write_text(content, encoding="utf-8")


def test_a_profile_changes_only_what_it_names(profiles):
    profiles("big", "fedgan: {rounds: 77}\nseeds:\n  evaluation: [7]\n")
    quick, big = params.load(), params.load("big")
    assert (big.fedgan.rounds, big.seeds.evaluation) == (77, [7])
    assert big.fedgan.gan == quick.fedgan.gan
    assert big.seeds.tuning == quick.seeds.tuning


def test_a_mistake_in_a_profile_names_the_profile(profiles):
    profiles("big", "fedgan: {runds: 77}\n")
    with pytest.raises(InputError, match=re.escape("big.yaml: unknown key fedgan.runds")):
        params.load("big")


def test_an_unknown_profile_lists_the_known(profiles):
    profiles("big", "{}")
    with pytest.raises(InputError, match="unknown profile 'bigger': choose one of quick, big"):
        params.load("bigger")


def test_the_command_prints_valid_parameters_or_fails_with_one_line(capsys):
    assert main(["params"]) == 0
    assert params.validate(yaml.safe_load(capsys.readouterr().out)) == params.load()
    assert main(["params", "--profile", "huge"]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("error: unknown profile 'huge'")
