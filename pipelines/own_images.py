"""Images of one's own, and what was made from them, stay out of git: ``python pipelines/own_images.py FILE…``.

A hook before every commit (.pre-commit-config.yaml) gives it the files that are about to be committed, seen from the
repository's root. It prints a line for each that must stay away, and exits with status 1.
"""

import sys
from pathlib import Path, PurePosixPath

from medsec.core.paths import OWN

MADE = ("executed", "results", "records", "networks", "pipelines", ".cells")  # by cohort
OURS = ("results", "records", "tests", "docs", "book")  # where this repository keeps pictures of its own
STARTS = {b"\x89PNG": "a PNG", b"\xff\xd8\xff": "a JPEG", b"PK\x03\x04": "an npz or another zip archive"}


def why_not(name: str) -> str | None:
    """Why a file must not be committed; None if it may."""
    parts = PurePosixPath(name).parts
    if len(parts) > 2 and parts[0] in MADE and parts[1] in OWN:
        return "made from your own images"
    try:
        with Path(name).open("rb") as stream:
            head = stream.read(132)
    except OSError:
        return None  # deleted, or a link that leads nowhere: nothing of it is committed
    if head[128:] == b"DICM":
        return "a DICOM file"
    kinds = [kind for start, kind in STARTS.items() if head.startswith(start)]
    return f"{kinds[0]} outside {', '.join(OURS)}" if kinds and parts[0] not in OURS else None


def main(names: list[str]) -> int:
    found = {name: why for name in names if (why := why_not(name))}
    for name, why in found.items():
        print(f"{name!a} is {why}: not to be committed; take it out: git restore --staged", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
