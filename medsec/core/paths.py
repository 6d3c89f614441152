"""Every place on disk, in one place.

Inputs (parameters, data, notebooks, committed results) are always those of the repository. Outputs go to the
repository too, unless ``MEDSEC_OUT`` names another folder: validation and temporary runs write there and can never
overwrite a committed result.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from medsec.core.errors import InputError

__all__ = ["cells", "executed", "networks", "out", "records", "reference", "results"]

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
PARAMS = ROOT / "params.yaml"
PROFILES = ROOT / "profiles"
DATA = ROOT / "data"
NOTEBOOKS = ROOT / "notebooks"
CLAIMS = ROOT / "claims"
OWN = ("npz", "folder")  # cohorts of a reader's own images: what is made from them is never committed


def given(text: str, kind: Callable[[Path], bool]) -> tuple[Path, bool, bool]:
    """A path that the reader gave, seen from the repository's root; whether it is there, and whether it is of the ``kind``."""
    place = Path(text)
    with suppress(RuntimeError):  # ~ of nobody
        place = place.expanduser()
    place = ROOT / place
    try:
        return place, place.exists(), kind(place)
    except OSError:  # too long a name, a folder that may not be entered
        return place, False, False


def flag(name: str) -> bool:
    """Whether an environment variable is 1; 0, empty and unset are no.

    Raises:
        InputError: it is something else.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise InputError(f"{name}={value} in the environment: set it to 1 or 0")
    return value == "1"


def out() -> Path:
    """Folder that outputs are written below: ``$MEDSEC_OUT``, or the repository."""
    return Path(os.environ.get("MEDSEC_OUT") or ROOT)


def reference() -> Path:
    """Folder whose tables a fresh table is compared with: ``$MEDSEC_REFERENCE``, or the repository."""
    return Path(os.environ.get("MEDSEC_REFERENCE") or ROOT)


def results(cohort: str, base: Path | None = None) -> Path:
    """Quick-profile tables and figures of a cohort, below ``base`` (default: `out`)."""
    return (base or out()) / "results" / cohort


def executed(cohort: str, base: Path | None = None) -> Path:
    """Executed notebooks of a cohort, below ``base`` (default: `out`)."""
    return (base or out()) / "executed" / cohort


def records(cohort: str, base: Path | None = None) -> Path:
    """Full-profile evidence of a cohort, below ``base`` (default: the repository)."""
    return (base or ROOT) / "records" / cohort


def cells(cohort: str) -> Path:
    """Finished cells of a cohort: ``$MEDSEC_CELLS``, or ``.cells`` in the repository; never in git."""
    return Path(os.environ.get("MEDSEC_CELLS") or ROOT / ".cells") / cohort


def federation() -> Path:
    """What a federation over several hosts keeps on this one: ``$MEDSEC_FEDERATION``, or ``.federation``; never in git."""
    return Path(os.environ.get("MEDSEC_FEDERATION") or ROOT / ".federation")


def networks(cohort: str) -> Path:
    """Trained networks of a cohort that notebooks attack; a DVC output."""
    return ROOT / "networks" / cohort
