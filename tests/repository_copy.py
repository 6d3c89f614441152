"""A copy of this repository to run commands in, and to kill them."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medsec.core import paths

PATIENCE = 240  # seconds to wait: this machine may be busy


def start(command, folder):
    """A command in a folder. No name of a user is set, and another medsec is in the path."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MEDSEC_", "DVC_", "GIT_"))}
    clean |= {"PYTHONPATH": str(paths.ROOT), "DVC_NO_ANALYTICS": "1", "MEDSEC_LIVE": "1"}
    clean["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), clean["PATH"]))  # a stage says "python"
    words = shlex.split(command)
    words = [sys.executable, "-m", *words] if words[0] == "dvc" else words
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=folder, env=clean, start_new_session=True, **pipes)


def run(command, folder):
    """What a command prints; it must succeed."""
    process = start(command, folder)
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, f"{command}: {printed[-1000:]}\n{errors[-2000:]}"
    return printed


def copy_repository(folder):
    """A repository of its own: the files that git knows or would take, as they are here, and what `dvc pull` brings."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=paths.ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (paths.ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(paths.ROOT / name, folder / name)
    run("git init --quiet --initial-branch main", folder)
    for setting in ("user.email habits@example.org", "user.name Habits", "gc.auto 0"):
        run(f"git config {setting}", folder)
    run("git add --all", folder)
    run("git commit --quiet --message start", folder)
    run("dvc pull --quiet", folder)
    return folder
