"""Claims as data: ``claims/*.yaml`` name the row that decides, this module gives the verdict.

``python -m medsec.claims`` writes the table of verdicts into the README; a test fails where it is out of date.
"""

import sys
from pathlib import Path

import pandas as pd
import yaml

from medsec import paths, tables
from medsec.errors import InputError

LEAST_RUNS = 3
HOLDS, FAILS, OPEN, NOT_HERE = "holds", "does not hold", "undecided", "not testable here"
NOT_YET = "not measured yet"


def load(name: str) -> dict:
    """The claims of ``claims/<name>.yaml``: ``paper``, ``table``, and a list ``claims``.

    Raises:
        InputError: the file is missing, or a claim has no row or not exactly one bound.
    """
    file = paths.CLAIMS / f"{name}.yaml"
    if not file.is_file():
        raise InputError(f"claims/{name}.yaml is missing")
    ledger = yaml.safe_load(file.read_text(encoding="utf-8"))
    for claim in ledger["claims"]:
        if "where" not in claim or sum(key in claim for key in ("above", "below")) != 1:
            raise InputError(f"{file.name}: claim {claim.get('id')!r} needs `where` and one of above, below")
    return ledger


def verdict(claim: dict, table: pd.DataFrame, *, unfinished: bool = False) -> dict:
    """One claim against a summary table.

    Args:
        unfinished: of a record: a row that it lacks is *not measured yet*.

    Returns:
        ``id, by, claim, verdict, n, measured``; the verdict is *holds* if the whole interval lies beyond the bound,
        *does not hold* if it lies wholly on the other side, else (or with fewer than `LEAST_RUNS` runs) *undecided*;
        *not testable here* for a claim marked ``record_only`` whose row the table lacks.

    Raises:
        InputError: the row that decides is not in the table.
    """
    base = {"id": claim["id"], "by": claim["by"], "claim": claim["text"]}
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
    return {
        **base,
        "verdict": HOLDS if holds and enough else FAILS if fails and enough else OPEN,
        "n": int(row["n"]),
        "measured": tables.interval(row),
    }


def verdicts(name: str, table: pd.DataFrame, *, unfinished: bool = False) -> pd.DataFrame:
    """The verdict on every claim of ``claims/<name>.yaml``, in the order of the file; see `verdict`."""
    return pd.DataFrame([verdict(claim, table, unfinished=unfinished) for claim in load(name)["claims"]])


def names() -> list[str]:
    """All ledgers, in order."""
    return sorted(f.stem for f in Path(paths.CLAIMS).glob("[0-9]*.yaml"))


# The README's table --------------------------------------------------------------------------------------------------

BEGIN = "<!-- results: made by `python -m medsec.claims`, do not edit -->"
END = "<!-- end of results -->"


def readme_block() -> str:
    """Verdicts of every ledger as Markdown between `BEGIN` and `END`, one column a cohort.

    A claim is judged by its row in the record, unless the record is unfinished and rests on fewer runs than the results of
    the quick profile. Claims marked ``detail`` are left to the notebook.
    """
    cohorts = sorted(folder.name for folder in (paths.ROOT / "results").iterdir() if folder.is_dir())
    cohorts.sort(key=lambda name: name != "phantom")
    parts = [BEGIN]
    for name in names():
        ledger = load(name)
        shown = None
        for cohort in cohorts:
            places = {"record": paths.records(cohort), "quick": paths.results(cohort, paths.ROOT)}
            files = {kind: place / f"{ledger['table']}.csv" for kind, place in places.items()}
            found = {kind: tables.read(file) for kind, file in files.items() if file.is_file()}
            if not found:
                continue
            told = [claim for claim in ledger["claims"] if not claim.get("detail", False)]
            if shown is None:
                shown = pd.DataFrame({"claim": [c["text"] for c in told], "by": [c["by"] for c in told]})
            links = [f"[{kind}]({files[kind].relative_to(paths.ROOT).as_posix()})" for kind in found]
            shown = shown.assign(**{f"{cohort} ({', '.join(links)})": [_cell(claim, found) for claim in told]})
        if shown is not None:
            parts += [f"\n**{ledger['paper']}** ([claims](claims/{name}.yaml))\n", tables.markdown(shown)]
    return "\n".join([*parts, "", END])


def _cell(claim: dict, found: dict[str, pd.DataFrame]) -> str:
    """What the README says of a claim: the verdict of the table with the most runs, at equality of the first."""
    runs = {kind: tables.select(table, claim["where"])["n"].sum() for kind, table in found.items()}
    kind = max(runs, key=runs.get)
    judged = verdict(claim, found[kind])
    if judged["n"] == 0:
        return judged["verdict"]
    return f"**{judged['verdict']}**: {judged['measured']} (n = {judged['n']}{', quick' * (kind == 'quick')})"


def replace_block(text: str, begin: str, end: str, block: str) -> str:
    """A text whose part from the mark ``begin`` to the mark ``end`` is replaced by ``block`` (which brings the marks).

    Raises:
        InputError: the text lacks one of the two marks.
    """
    if begin not in text or end not in text:
        raise InputError(f"README.md lacks the marks {begin} and {end}, between which results stand; restore them")
    return text[: text.index(begin)] + block + text[text.index(end) + len(end) :]


def update_readme(text: str) -> str:
    """The README's text with its block of verdicts made anew."""
    return replace_block(text, BEGIN, END, readme_block())


def main() -> int:
    readme = paths.ROOT / "README.md"
    try:
        readme.write_text(update_readme(readme.read_text(encoding="utf-8")), encoding="utf-8")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
