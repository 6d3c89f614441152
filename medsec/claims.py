"""Claims as data: ``claims/*.yaml`` name the row that decides, this module gives the verdict."""

from pathlib import Path

import pandas as pd
import yaml

from medsec import paths, tables
from medsec.errors import InputError

HOLDS, FAILS, OPEN, NOT_HERE = "holds", "does not hold", "undecided", "not testable here"


def load(name: str) -> dict:
    """The claims of ``claims/<name>.yaml``: ``paper``, ``table``, and a list ``claims``.

    Raises:
        InputError: the file is missing, or a claim has neither exactly one bound nor a reason not to be tested.
    """
    file = paths.CLAIMS / f"{name}.yaml"
    if not file.is_file():
        raise InputError(f"claims/{name}.yaml is missing")
    ledger = yaml.safe_load(file.read_text(encoding="utf-8"))
    for claim in ledger["claims"]:
        decided = sum(key in claim for key in ("above", "below", "not_testable"))
        if decided != 1 or ("where" not in claim) != ("not_testable" in claim):
            raise InputError(
                f"{file.name}: claim {claim.get('id')!r} needs `where` and one of above, below; or not_testable"
            )
    return ledger


def verdict(claim: dict, table: pd.DataFrame) -> dict:
    """One claim against a summary table.

    Returns:
        ``id, by, claim, verdict, n, measured``; the verdict is *holds* if the whole interval lies beyond the bound,
        *does not hold* if it lies wholly on the other side, else *undecided*.

    Raises:
        InputError: the row that decides is not in the table.
    """
    base = {"id": claim["id"], "by": claim["by"], "claim": claim["text"]}
    if "not_testable" in claim:
        return {**base, "verdict": NOT_HERE, "n": 0, "measured": claim["not_testable"]}
    row = tables.row(table, **claim["where"])
    if "above" in claim:
        holds, fails = row["low"] > claim["above"], row["high"] <= claim["above"]
    else:
        holds, fails = row["high"] < claim["below"], row["low"] >= claim["below"]
    return {
        **base,
        "verdict": HOLDS if holds else FAILS if fails else OPEN,
        "n": int(row["n"]),
        "measured": tables.interval(row),
    }


def verdicts(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """The verdict on every claim of ``claims/<name>.yaml``, in the order of the file."""
    return pd.DataFrame([verdict(claim, table) for claim in load(name)["claims"]])


def names() -> list[str]:
    """All ledgers, in order."""
    return sorted(f.stem for f in Path(paths.CLAIMS).glob("[0-9]*.yaml"))
