"""Claims as data: ``claims/*.yaml`` name the row that decides, this module gives the verdict on one table.

`medsec.ledger` puts the verdicts of all cohorts together.
"""

from pathlib import Path

import pandas as pd
import yaml

from medsec import paths, tables
from medsec.errors import InputError

LEAST_RUNS = 3
HOLDS, FAILS, OPEN, NOT_HERE = "holds", "does not hold", "undecided", "not testable here"
NOT_YET, UNTESTED = "not measured yet", "untested"
MOST_DIGITS = 4


def load(name: str) -> dict:
    """The claims of ``claims/<name>.yaml``: ``paper``, ``table``, and a list ``claims``.

    Where the file's ``given`` names another claim of the list, that claim itself stands there.

    Raises:
        InputError: the file is missing, a claim has no row or not exactly one bound, or is given one that is not there.
    """
    file = paths.CLAIMS / f"{name}.yaml"
    if not file.is_file():
        raise InputError(f"claims/{name}.yaml is missing")
    ledger = yaml.safe_load(file.read_text(encoding="utf-8"))
    for claim in ledger["claims"]:
        if "where" not in claim or sum(key in claim for key in ("above", "below")) != 1:
            raise InputError(f"{file.name}: claim {claim.get('id')!r} needs `where` and one of above, below")
    by_id = {claim["id"]: claim for claim in ledger["claims"]}
    for claim in ledger["claims"]:
        if "given" in claim:
            if claim["given"] not in by_id:
                raise InputError(
                    f"{file.name}: claim {claim['id']!r} is given {claim['given']!r}, which is no claim there"
                )
            claim["given"] = by_id[claim["given"]]
    return ledger


def verdict(claim: dict, table: pd.DataFrame, cohort: str = "", *, unfinished: bool = False) -> dict:
    """One claim against a summary table.

    Args:
        cohort: whose table it is, for a claim about the images of certain ``cohorts`` only.
        unfinished: of a record: a row that it lacks is *not measured yet*.

    Returns:
        ``id, by, claim, verdict, n, measured``; the verdict is *holds* if the whole interval lies beyond the bound,
        *does not hold* if it lies wholly on the other side, else (or with fewer than `LEAST_RUNS` runs) *undecided*;
        *not testable here* for a claim marked ``record_only`` whose row the table lacks, and for one about other images;
        *untested* where it would hold, but the claim that it is ``given`` does not (a stopped attack that does not work
        without a defence either proves nothing).

    Raises:
        InputError: the row that decides is not in the table.
    """
    base = {"id": claim["id"], "by": claim["by"], "claim": claim["text"]}
    if "cohorts" in claim and cohort not in claim["cohorts"]:
        return {**base, "verdict": NOT_HERE, "n": 0, "measured": f"about the images of {', '.join(claim['cohorts'])}"}
    if (unfinished or "record_only" in claim) and tables.select(table, claim["where"]).empty:
        if unfinished:
            return {**base, "verdict": NOT_YET, "n": 0, "measured": "the record is not finished"}
        return {**base, "verdict": NOT_HERE, "n": 0, "measured": claim["record_only"]}
    row = tables.row(table, **claim["where"])
    if "above" in claim:
        holds, fails = row["low"] > claim["above"], row["high"] <= claim["above"]
    else:
        holds, fails = row["high"] < claim["below"], row["low"] >= claim["below"]
    enough = row["n"] >= LEAST_RUNS  # fewer give an interval of next to no width, which would decide anything
    word = HOLDS if holds and enough else FAILS if fails and enough else OPEN
    if word == HOLDS and "given" in claim and verdict(claim["given"], table, cohort)["verdict"] != HOLDS:
        word = UNTESTED
    return {
        **base,
        "verdict": word,
        "n": int(row["n"]),
        "measured": _measured(row, claim.get("above", claim.get("below"))),
    }


def _measured(row: pd.Series, bound: float) -> str:
    """The row as text, with as many digits as tell the ends of its interval from the bound."""
    ends = [row[end] for end in ("low", "high") if row[end] != bound]
    digits = 2
    while digits < MOST_DIGITS and any(round(end, digits) == bound for end in ends):
        digits += 1
    return tables.interval(row, digits)


def verdicts(name: str, table: pd.DataFrame, cohort: str = "", *, unfinished: bool = False) -> pd.DataFrame:
    """The verdict on every claim of ``claims/<name>.yaml``, in the order of the file; see `verdict`."""
    return pd.DataFrame([verdict(claim, table, cohort, unfinished=unfinished) for claim in load(name)["claims"]])


def names() -> list[str]:
    """All ledgers, in order."""
    return sorted(f.stem for f in Path(paths.CLAIMS).glob("[0-9]*.yaml"))
