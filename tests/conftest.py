"""Shared by all tests: one thread per process, small cohorts, and the real X-rays where this machine has them."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported: results depend on the number of threads
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import medsec  # noqa: F401  (pins the instruction set, also before numpy and torch)

# isort: split

import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from medsec.core import paths, settings
from medsec.evidence import cells

# `make test` generates few examples, always the same; `make fuzz` many, other ones at every run.
hypothesis.settings.register_profile("medsec", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.register_profile("fuzz", deadline=None, database=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("medsec")

REAL = "pneumoniamnist.npz"
NUMBERS = itertools.count()
_ENV_ROOT = os.environ.get("MEDMNIST_ROOT")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cells_of_the_session(tmp_path_factory):
    """Finished cells of the tests, also of fixtures that several share, never lie among those of the reader."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSEC_CELLS", str(tmp_path_factory.mktemp("cells")))
        patch.delenv("MEDSEC_FRESH", raising=False)
        yield


@pytest.fixture(autouse=True)
def _cells_of_its_own(tmp_path_factory, monkeypatch):
    """No test finds the finished cells of another."""
    monkeypatch.setenv("MEDSEC_CELLS", str(tmp_path_factory.getbasetemp() / f"cells-of-test-{next(NUMBERS)}"))


@pytest.fixture(autouse=True)
def _nothing_is_shared():
    """No test is spared the work of another."""
    cells.SHARED.clear()


@pytest.fixture
def cohorts() -> settings.Cohorts:
    """Cohort parameters small enough for tests; they do not follow params.yaml."""
    shares = {"client": 0.5, "public": 0.2, "reference": 0.3}
    images = {"client": 24, "public": 8, "reference": 8, "val": 8, "test": 8}
    sections = {
        "phantom": {"size": 28, "seed": 7, "images": images},
        "fundus": {"size": 28, "seed": 7, "images": images, "grades": 2},
        "medmnist": {"size": 28, "seed": 7, "shares": shares},
        "npz": {"path": None, "seed": 7, "shares": shares},
        "folder": {
            "path": None,
            "size": 28,
            "channels": None,
            "patient_pattern": "^([^_]+)_",
            "table": None,
            "seed": 7,
            "shares": {"client": 0.3, "public": 0.15, "reference": 0.25, "val": 0.15, "test": 0.15},
        },
    }
    return settings.Cohorts.model_validate(sections)


@pytest.fixture(scope="session")
def write_npz():
    """Function that writes a small file in MedMNIST's layout: distinct random images, every class in every split.

    ``write_npz(folder, classes=2, channels=1, size=28, per_class=10, name="tiny.npz", **arrays)``: ``arrays`` replace
    whole keys (``train_images=...``), None leaves a key out. Returns the file's path.
    """

    def write(folder, classes=2, channels=1, size=28, per_class=10, name="tiny.npz", **arrays) -> Path:
        rng = np.random.default_rng(0)
        content = {}
        for split in ("train", "val", "test"):
            shape = (classes * per_class, size, size) + ((channels,) if channels > 1 else ())
            content[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
            content[f"{split}_labels"] = (np.arange(classes * per_class) % classes).astype(np.uint8)[:, None]
        content.update(arrays)
        np.savez_compressed(folder / name, **{key: value for key, value in content.items() if value is not None})
        return folder / name

    return write


@pytest.fixture
def tiny_npz(write_npz, tmp_path):
    """`write_npz` into the test's own folder."""
    return partial(write_npz, tmp_path)


@pytest.fixture
def npz_cohorts(cohorts):
    """Function: cohort parameters whose npz section points at a file."""

    def point(path) -> settings.Cohorts:
        return cohorts.model_copy(update={"npz": cohorts.npz.model_copy(update={"path": str(path)})})

    return point


@pytest.fixture(scope="session")
def real_file() -> Path:
    """pneumoniamnist.npz, from $MEDMNIST_ROOT or ../shared/data; tests that need it are skipped where it is missing."""
    folders = [Path(_ENV_ROOT)] if _ENV_ROOT else []
    folders.append(paths.ROOT.parent / "shared" / "data")
    for folder in folders:
        if (folder / REAL).is_file():
            return folder / REAL
    pytest.skip(f"no {REAL} in MEDMNIST_ROOT or ../shared/data: the tests on real X-rays need it")


@pytest.fixture
def real_root(real_file, monkeypatch) -> Path:
    """The folder of the real X-rays, set as MEDMNIST_ROOT."""
    monkeypatch.setenv("MEDMNIST_ROOT", str(real_file.parent))
    return real_file.parent


@pytest.fixture(scope="session")
def without_simd():
    """Function ``without_simd(module)``: what ``fingerprint()`` of a test module gives where numpy uses no SIMD extension."""

    def run(module: str) -> str:
        if not any(__cpu_features__.get(name) for name in __cpu_dispatch__):
            pytest.skip("this numpy dispatches to no SIMD extension on this processor")
        script = (
            f"import json, conftest as c, {module} as t\n"
            "left = [f for f in c.__cpu_dispatch__ if c.__cpu_features__.get(f)]\n"
            "print(json.dumps([left, t.fingerprint()]))"
        )
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        # All that numpy has; "native" keeps medsec from putting its own list in this one's place.
        pinned = {"MEDSEC_INSTRUCTIONS": "native", "NPY_DISABLE_CPU_FEATURES": " ".join(__cpu_dispatch__)}
        environment = {**os.environ, **pinned, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        still_enabled, found = json.loads(done.stdout)
        assert still_enabled == []  # otherwise the comparison would prove nothing
        return found

    return run
