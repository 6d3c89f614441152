"""Claims as data: ``claims/*.yaml`` name the row that decides, this module gives the verdict on one table.

`medsec.evidence.ledger` puts the verdicts of all cohorts together.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import model_validator
from scipy import special

from medsec.core import files, paths
from medsec.core.errors import InputError
from medsec.core.params import Section, validated
from medsec.evidence import tables
from medsec.evidence.intervals import LEVEL

__all__ = ["beside", "load", "names", "verdict", "verdicts"]

LEAST_RUNS = 3  # that one run of a notebook must have to say anything
SETTLED_RUNS = 5  # that a record must have to settle a claim: the interval over 3 is their range, and covers 75 %
HOLDS, FAILS, OPEN, NOT_HERE = "holds", "does not hold", "undecided", "not testable here"
NOT_YET, UNTESTED = "not measured yet", "untested"
MOST_DIGITS = 4


class Claim(Section):
    """One claim; ``where`` addresses the row that decides, ``above`` or ``below`` is the bound."""

    id: str
    by: str
    text: str
    where: dict[str, str]
    above: float | None = None
    below: float | None = None
    cohorts: list[str] | None = None
    given: str = ""
    needs: str = ""
    record_only: str = ""


class Claims(Section):
    paper: str
    table: str
    published: dict | None = None
    headlines: list[str]
    claims: list[Claim]

    @model_validator(mode="after")
    def _each_id_once(self):
        ids = [claim.id for claim in self.claims]
        if twice := next((id_ for i, id_ in enumerate(ids) if id_ in ids[:i]), None):
            raise ValueError(f"two claims have the id {twice!r}")
        if strange := next((id_ for id_ in self.headlines if id_ not in ids), None):
            raise ValueError(f"headlines: {strange!r} is no claim there")
        return self


def load(name: str) -> dict:
    """The claims of ``claims/<name>.yaml``: ``paper``, ``table``, a list ``claims``, and the ids of its ``headlines``.

    Where a claim's ``given`` or ``needs`` names another of the list, that claim itself stands there.

    Raises:
        InputError: the file cannot be used (`files.read_yaml`), a key is misspelt or of the wrong type, a claim has no row or
            not exactly one bound, is given one that is not there, or a headline is none of them.
    """
    file = paths.CLAIMS / f"{name}.yaml"
    ledger = files.read_yaml(file)
    listed = ledger.get("claims") if isinstance(ledger, dict) else None
    for claim in listed if isinstance(listed, list) else ():
        if isinstance(claim, dict) and ("where" not in claim or ("above" in claim) == ("below" in claim)):
            raise InputError(f"{file.name}: claim {claim.get('id')!r} needs `where` and one of above, below")
    validated(Claims, ledger, file.name)
    by_id = {claim["id"]: claim for claim in ledger["claims"]}
    for claim in ledger["claims"]:
        for key, verb in (("given", "is given"), ("needs", "needs")):
            if key in claim and claim[key] not in by_id:
                raise InputError(f"{file.name}: claim {claim['id']!r} {verb} {claim[key]!r}, which is no claim there")
            if key in claim:
                claim[key] = by_id[claim[key]]
    return ledger


def verdict(
    claim: dict, table: pd.DataFrame, cohort: str = "", *, unfinished: bool = False, least: int = LEAST_RUNS
) -> dict:
    """One claim against a summary table.

    Args:
        cohort: whose table it is, for a claim about the images of certain ``cohorts`` only.
        unfinished: of a record: a row that it lacks is *not measured yet*.
        least: runs that a verdict needs.

    Returns:
        ``id, by, claim, decides, verdict, n, measured, p``; ``decides`` is the quantity and its bound (`decides`), ``measured``
        what the row has, ``p`` see `p_value`; the verdict is *holds* if the whole interval lies beyond the bound,
        *does not hold* if it lies wholly on the other side, else (or with fewer than ``least`` runs) *undecided*;
        *not testable here* for a claim marked ``record_only`` whose row the table lacks, for one about other images, and for
        one at an eps at which nothing was attacked;
        *untested* where it would hold, but the claim that it is ``given`` does not (a stopped attack that does not work
        without a defence either proves nothing), and, whatever its row says, where the claim that it ``needs`` does not.

    Raises:
        InputError: the row that decides is not in the table.
    """
    base = {"id": claim["id"], "by": claim["by"], "claim": claim["text"], "decides": decides(claim)}
    if absent := _absent(claim, table, cohort, unfinished):
        word, why = absent
        return {**base, "verdict": word, "n": 0, "measured": why, "p": 1.0}
    row, bound = tables.row(table, **claim["where"]), claim.get("above", claim.get("below"))
    if "above" in claim:
        holds, fails = row["low"] > claim["above"], row["high"] <= claim["above"]
    else:
        holds, fails = row["high"] < claim["below"], row["low"] >= claim["below"]
    enough = row["n"] >= least  # fewer give an interval of next to no width, which would decide anything
    word = HOLDS if holds and enough else FAILS if fails and enough else OPEN
    others = [claim[key] for key in ("needs", *["given"] * (word == HOLDS)) if key in claim]
    if any(verdict(other, table, cohort, unfinished=unfinished, least=least)["verdict"] != HOLDS for other in others):
        word = UNTESTED
    found = {"verdict": word, "n": int(row["n"]), "measured": _measured(row, bound), "p": p_value(row, bound)}
    return {**base, **found}


def p_value(row: pd.Series, bound: float) -> float:
    """How probable a mean at least as far from the bound were, if the bound were the truth (two-sided).

    It reads the end of the row's interval that faces the bound as Student's t would have put it there, whatever it is made of.
    """
    distance = row["value"] - bound
    if row["n"] < 2 or not np.isfinite([distance, row["low"], row["high"]]).all():
        return 1.0
    half = row["value"] - row["low"] if distance > 0 else row["high"] - row["value"]
    if half <= 0 or distance == 0:
        return float(distance == 0)
    t = abs(distance) / half * special.stdtrit(row["n"] - 1, (1 + LEVEL) / 2)
    return float(2 * special.stdtr(row["n"] - 1, -t))


def holm(p: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which of several tests stand if all are to be right together, with probability ``level`` (Holm 1979).

    >>> holm([0.04, 0.001, 0.02])
    [True, True, True]
    >>> holm([0.04, 0.001, 0.04])
    [False, True, False]
    """
    order, stands = np.argsort(p, kind="stable"), [False] * len(p)
    for left, at in zip(range(len(p), 0, -1), order, strict=True):
        if p[at] > (1 - level) / left:
            break
        stands[at] = True
    return stands


def _absent(claim: dict, table: pd.DataFrame, cohort: str, unfinished: bool) -> tuple[str, str] | None:
    """The verdict on a claim whose row a table need not have, and why; None for all others."""
    where = claim["where"]
    if "cohorts" in claim and cohort not in claim["cohorts"]:
        return NOT_HERE, f"about the images of {', '.join(claim['cohorts'])}"
    if not tables.select(table, where).empty:
        return None
    if unfinished:
        return NOT_YET, "the record is not finished"
    if "record_only" in claim:
        return NOT_HERE, claim["record_only"]
    if "eps" in where:  # params.yaml may name another headline
        there = [eps for eps in table["eps"].unique() if eps and len(tables.select(table, {**where, "eps": eps}))]
        if there:
            return NOT_HERE, "only at " + ", ".join(f"{255 * float(eps):.3g}/255" for eps in there)
    return None


def decides(claim: dict) -> str:
    """The quantity that decides a claim, and its bound: a sentence says "costs at most 0.01", the row is a difference."""
    side, bound = ("<", claim["below"]) if "below" in claim else (">", claim["above"])
    return f"`{claim['where']['metric']}` {side} {bound:g}"


def _measured(row: pd.Series, bound: float) -> str:
    """The row as text, with as many digits as tell the ends of its interval from the bound.

    An interval over runs that all gave the same share has no width, whatever few items they rest on: then it is said how many.
    """
    if row["unit"] == "share" and row["low"] == row["high"]:
        return f"{row['value']:.2f} in every run ({row['n_items']} items)"
    ends = [row[end] for end in ("low", "high") if row[end] != bound]
    digits = 2
    while digits < MOST_DIGITS and any(round(end, digits) == bound for end in ends):
        digits += 1
    return tables.interval(row, digits)


def verdicts(
    name: str, table: pd.DataFrame, cohort: str = "", *, unfinished: bool = False, least: int = LEAST_RUNS
) -> pd.DataFrame:
    """The verdict on every claim of ``claims/<name>.yaml``, in the order of the file; see `verdict`."""
    judged = [verdict(claim, table, cohort, unfinished=unfinished, least=least) for claim in load(name)["claims"]]
    return pd.DataFrame(judged).drop(columns="p", errors="ignore")  # of no claims there is no column


def beside(
    name: str, summary: pd.DataFrame, recorded: pd.DataFrame | None, cohort: str, *, unfinished: bool = False
) -> pd.DataFrame:
    """`verdicts` of a notebook's own table, with what the record says in a column beside them.

    Args:
        recorded: the record's table, or None where there is no record.
        unfinished: the record has not all of its cells.
    """
    found = verdicts(name, summary, cohort)
    found["record"] = "no record"
    if recorded is not None:
        long = verdicts(name, recorded, cohort, unfinished=unfinished, least=SETTLED_RUNS)
        found["record"] = long["verdict"] + ": " + long["measured"] + " (n = " + long["n"].astype(str) + ")"
    return found


def names() -> list[str]:
    """All ledgers, in order."""
    return sorted(f.stem for f in Path(paths.CLAIMS).glob("[0-9]*.yaml"))
