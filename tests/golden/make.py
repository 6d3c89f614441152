"""Make the golden tables anew and say what changed: ``python tests/golden/make.py [CELL ...]``, all cells by default."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported, as in the tests
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import medsec  # noqa: F401  (pins the instruction set)

# isort: split

import json
import sys

import cells
import pandas as pd

from medsec.evidence import tables


def changed(fresh: pd.DataFrame, committed: pd.DataFrame | None, note: dict[str, str] | None) -> str:
    """In a few words, how a table differs from the committed one."""
    if committed is None or note is None:
        return f"new, {len(fresh)} rows"
    lines = cells.differences(fresh, committed, note | {"processor": cells.processor()})
    return f"{len(lines)} of {len(committed)} rows differ: {lines[0]}" if lines else "unchanged"


def main(wanted: list[str]) -> None:
    found, notes = cells.stored(), cells.notes()
    for name in wanted or cells.CELLS:
        fresh = cells.made(name)
        print(f"{name}: {changed(fresh, found.get(name), notes.get(name))}", flush=True)
        found[name] = cells.rounded(fresh)  # also for the summaries, which come last
        notes[name] = {"sha256": cells.digest(fresh), "processor": cells.processor()}
    kept = {name: found[name].copy() for name in cells.CELLS if name in found}
    for name, table in kept.items():
        table.insert(0, "cell", name)
    for kind, file in cells.TABLES.items():
        parts = [table for table in kept.values() if cells.kind(table) == kind]
        joined = pd.concat(parts, ignore_index=True)
        texts = [column for column in joined if column not in tables.MEASURES]
        tables.write(joined.fillna(dict.fromkeys(texts, "")), file)
    notes = {name: notes[name] for name in kept}
    cells.HASHES.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
