"""What is made from a reader's own images is ignored by git, refused by the hook, and nobody advises to commit it."""

import io
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from test_repository import script

from medsec.core import paths
from medsec.core.errors import InputError
from medsec.evidence import check

HOOK = "pipelines/own_images.py"


def png():
    stream = io.BytesIO()
    Image.new("L", (2, 2)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("cohort", paths.OWN)
@pytest.mark.parametrize("place", [paths.executed, paths.results, paths.records, paths.networks, paths.cells])
def test_git_ignores_it(cohort, place, monkeypatch):
    monkeypatch.delenv("MEDSEC_CELLS")
    file = place(cohort) / "01_backdoor_fedgan.x"
    done = subprocess.run(["git", "check-ignore", "-q", file], cwd=paths.ROOT, check=False)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.returncode == 0
    assert script(HOOK).why_not(file.relative_to(paths.ROOT).as_posix()) == "made from your own images"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("mine/a.PNG", png(), "a PNG outside"),
        ("a.ipynb", b"\xff\xd8\xff\xe0", "a JPEG outside"),
        ("dvcstore/files/md5/ab/cd", b"PK\x03\x04", "an npz or another zip"),
        ("tests/IM0001", bytes(128) + b"DICM", "a DICOM file"),
        ("results/phantom/a.png", png(), None),
        ("results/npz.csv", b"x", None),
        ("medsec/data/folder.py", b"x", None),
        ("deleted.png", None, None),
    ],
)
def test_the_hook_knows_images_by_their_content(tmp_path, monkeypatch, name, content, why):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = script(HOOK).why_not(name)
    assert found == why if why is None else found.startswith(why)


def test_the_hook_is_installed_and_lets_this_repository_pass(tmp_path):
    hooks = yaml.safe_load((paths.ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    (hook,) = (hook for hook in hooks if HOOK in hook["entry"])
    assert not {"files", "types", "types_or", "exclude"} & set(hook)  # it sees every file
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=paths.ROOT, capture_output=True, text=True, check=False)
    assert script(HOOK).main([name for name in listed.stdout.split("\0") if name]) == 0
    (tmp_path / "x\n.dcm").write_bytes(bytes(128) + b"DICM")
    done = subprocess.run(
        [sys.executable, paths.ROOT / HOOK, "x\n.dcm"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(r"'x\n.dcm' is a DICOM file: not to be committed")


@pytest.mark.parametrize("cohort", paths.OWN)
def test_check_does_not_advise_to_commit_it(cohort):
    with pytest.raises(InputError, match=f"cohort {cohort} is committed: what is made from your own images stays out"):
        check.against_commit(cohort)
