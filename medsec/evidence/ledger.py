"""The ledger: every claim over all cohorts, what each of them says, and the row that decides.

``python -m experiments ledger`` writes it into the README and to ``results/findings.csv``; a test fails where these
are out of date.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medsec.core import files, paths
from medsec.core.errors import InputError
from medsec.evidence import claims, record, tables
from medsec.evidence.claims import FAILS, HOLDS, NOT_HERE, NOT_YET, OPEN, UNTESTED

__all__ = ["cohorts", "contrary", "counts", "entries", "message", "rows", "summary", "table"]

# What a verdict is called, by whose claim it is. A paper's claim is reproduced or not; ours is a bar, reached or missed.
WORDS = {"paper": {HOLDS: "reproduced", FAILS: "not found here"}, "medsec": {HOLDS: "holds", FAILS: "missed"}}
PARTLY = "partly"
DAGGER = "†"
DEFAULT = "phantom"


@dataclass(frozen=True)
class Finding:
    """What one cohort says of one claim: the verdict of `medsec.evidence.claims.verdict`, and where its row stands.

    ``file`` is relative to the repository, ``line`` counts from 1 and the header; both are None where there is no row. ``p`` is
    that of `medsec.evidence.claims.p_value`.
    """

    cohort: str
    verdict: str
    measured: str
    n: int
    kind: str
    file: Path | None
    line: int | None
    p: float = 1.0


def cohorts() -> list[str]:
    """All cohorts that have results or a record, the default first."""
    folders = {f.name for place in ("results", "records") for f in (paths.ROOT / place).glob("*") if f.is_dir()}
    return sorted((name for name in folders if not name.endswith("-gpu")), key=lambda name: (name != DEFAULT, name))


def sources(table: str, cohort: str) -> dict[str, Path]:
    """The tables of a notebook that a cohort has, ``record`` before ``quick``."""
    places = {"record": paths.records(cohort), "quick": paths.results(cohort, paths.ROOT)}
    return {kind: place / f"{table}.csv" for kind, place in places.items() if (place / f"{table}.csv").is_file()}


def finding(
    claim: dict, files: dict[str, Path], read: dict[str, pd.DataFrame], cohort: str, *, unfinished: bool = False
) -> Finding:
    """One claim on one cohort, judged by the table with the most runs (the record, at equality); fewer than five settle nothing.

    Args:
        files: `sources` of the claim's table, at least one.
        read: what they hold.
        unfinished: the record has not all of its cells.
    """
    rows = {kind: tables.select(found, claim["where"]) for kind, found in read.items()}
    kind = max(rows, key=lambda name: rows[name]["n"].sum())
    if rows[kind].empty and "quick" not in files and not unfinished:
        # Images of which only headlines are recorded, and no notebook was run.
        return Finding(cohort, NOT_HERE, "not among the headlines of these images", 0, kind, None, None)
    unfinished = unfinished and kind == "record"
    judged = claims.verdict(claim, read[kind], cohort, unfinished=unfinished, least=claims.SETTLED_RUNS)
    there = judged["n"] > 0
    return Finding(
        cohort,
        judged["verdict"],
        judged["measured"],
        judged["n"],
        kind,
        files[kind].relative_to(paths.ROOT) if there else None,
        int(rows[kind].index[0]) + 2 if there else None,
        judged["p"],
    )


def overall(by: str, verdicts: Sequence[str]) -> str:
    """One word for what several cohorts say: that of `WORDS` if they agree, *partly* if some but not all hold.

    Where none holds, one that does not is enough for *not found here* or *missed*; *not testable here* if none has a row,
    *untested* where no row says anything.
    """
    judged = [verdict for verdict in verdicts if verdict in (HOLDS, FAILS, OPEN)]
    if not judged:
        return next((word for word in (UNTESTED, NOT_YET) if word in verdicts), NOT_HERE)
    words = WORDS["medsec" if by == "medsec" else "paper"]
    if len(set(judged)) == 1:
        return words.get(judged[0], OPEN)
    return PARTLY if HOLDS in judged else words[FAILS]


def contrary(those: Sequence[Finding]) -> str:
    """Whether a claim holds on one cohort and does not on another: ``yes``, or nothing."""
    return "yes" if {HOLDS, FAILS} <= {each.verdict for each in those} else ""


def entries(name: str) -> list[tuple[dict, list[Finding]]]:
    """Every claim of ``claims/<name>.yaml`` with the findings of the cohorts that have its table."""
    places = {cohort: sources(claims.load(name)["table"], cohort) for cohort in cohorts()}
    files = [paths.CLAIMS / f"{name}.yaml", *(file for found in places.values() for file in found.values())]
    return _entries(name, tuple((file, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=16)  # a notebook shows the same claims in several ways
def _entries(name: str, files: tuple) -> list[tuple[dict, list[Finding]]]:
    ledger, judged_by = claims.load(name), []
    for cohort in cohorts():
        if found := sources(ledger["table"], cohort):
            unfinished = "record" in found and not record.is_finished(ledger["table"], cohort)
            judged_by.append((found, {kind: tables.read(file) for kind, file in found.items()}, cohort, unfinished))
    return [
        (claim, [finding(claim, *each, unfinished=unfinished) for *each, unfinished in judged_by])
        for claim in ledger["claims"]
    ]


def headlines(name: str) -> list[tuple[dict, list[Finding]]]:
    """The `entries` that a reader needs, in the order of the ledger's list of them."""
    by_id = {claim["id"]: (claim, those) for claim, those in entries(name)}
    return [by_id[id_] for id_ in claims.load(name)["headlines"]]


def together() -> dict[tuple[str, str, str], bool]:
    """By ledger, claim and cohort of every headline that was tested: does it stand if all are to be right together?

    Whoever looks at sixty intervals of 95 % finds some that are wrong. Holm's correction asks more of each (`claims.holm`).
    """
    tested = {
        (name, claim["id"], each.cohort): each.p
        for name in claims.names()
        for claim, those in headlines(name)
        for each in those
        if each.verdict in (HOLDS, FAILS, OPEN)
    }
    return dict(zip(tested, claims.holm(list(tested.values())), strict=True))


def correction() -> str:
    """How many decided headlines stand `together`, as a sentence."""
    stands = together()
    decided = [
        stands[name, claim["id"], each.cohort]
        for name in claims.names()
        for claim, those in headlines(name)
        for each in those
        if each.verdict in (HOLDS, FAILS)
    ]
    return (
        f"These are {len(stands)} tests. Of the {len(decided)} that are decided by themselves, {sum(decided)} stand if all are "
        f"to be right together with 95 % (Holm's correction); the others bear a {DAGGER}."
    )


def table(name: str, *, only_headlines: bool = False, root: str = "") -> pd.DataFrame:
    """One line a claim: whose it is, the verdict over all cohorts, and one column a cohort, linked to the table that decides.

    Args:
        only_headlines: without the details.
        root: where the repository lies, as seen from the page that shows the links.
    """
    lines, stands = [], together()
    for claim, those in headlines(name) if only_headlines else entries(name):
        word = overall(claim["by"], [each.verdict for each in those])
        line = {"id": f"`{claim['id']}`", "claim": claim["text"], "by": claim["by"], "verdict": f"**{word}**"}
        for each in those:
            alone = each.verdict in (HOLDS, FAILS) and not stands.get((name, claim["id"], each.cohort), True)
            line[each.cohort] = shown(each, root, DAGGER * alone)
        lines.append(line)
    return pd.DataFrame(lines)


def shown(found: Finding, root: str = "", mark: str = "") -> str:
    """A finding as Markdown, with a link to its table (not to a line, which another row above it would move)."""
    if found.file is None:
        return found.verdict
    link = f"[{found.verdict}{mark}]({root}{found.file.as_posix()})"
    return f"{link}: {found.measured} (n = {found.n}{', quick' * (found.kind == 'quick')})"


CODES = {HOLDS: 1, OPEN: 0, FAILS: -1, UNTESTED: 2}
KEYS = ("claim",)


def rows() -> pd.DataFrame:
    """All findings as a tidy table: one row a claim and cohort that has its row; ``value`` is that of `CODES`.

    ``variant`` names the ledger, ``scenario`` the cohort, ``claim`` the claim; ``n`` are the runs behind the verdict.
    """
    found = []
    for name in claims.names():
        for claim, those in entries(name):
            for each in those:
                if each.verdict in CODES:
                    code = float(CODES[each.verdict])
                    found.append(
                        {"variant": name, "scenario": each.cohort, "metric": "verdict", "value": code, "low": code}
                        | {
                            "high": code,
                            "sd": 0.0,
                            "n": each.n,
                            "n_items": each.n,
                            "unit": "verdict",
                            "claim": claim["id"],
                        }
                    )
    return pd.DataFrame(found)


def message() -> str:
    """What became of the headlines, for the title of a figure: ``5 of 9 statements of the papers are reproduced, …``."""
    words = {"paper": [], "medsec": []}
    for name in claims.names():
        for claim, those in headlines(name):
            whose = "medsec" if claim["by"] == "medsec" else "paper"
            words[whose].append(overall(claim["by"], [each.verdict for each in those]))
    won = {whose: found.count(WORDS[whose][HOLDS]) for whose, found in words.items()}
    return (
        f"On all images that test them, {won['paper']} of the papers' {len(words['paper'])} headline statements are reproduced,\n"
        f"and {won['medsec']} of our own {len(words['medsec'])} hold"
    )


def findings() -> pd.DataFrame:
    """Every claim and cohort with the verdict, its numbers and its row, as text: what notebook 99 is made of.

    It is kept in ``results/findings.csv``, on which that notebook's stage depends: it could not depend on the tables
    themselves, because some are outputs of another pipeline, whose images not everybody has.
    """
    lines = [
        {"ledger": name, "claim": claim["id"], "by": claim["by"], "cohort": each.cohort, "verdict": each.verdict}
        | {"measured": each.measured, "n": each.n, "kind": each.kind}
        | {"file": each.file.as_posix() if each.file else "", "line": each.line or ""}
        for name in claims.names()
        for claim, those in entries(name)
        for each in those
    ]
    return pd.DataFrame(lines)


def counts() -> pd.DataFrame:
    """One line a ledger and whose claim it is: how many of its headlines have which word."""
    lines = []
    for name in claims.names():
        whose: dict[str, list[str]] = {}
        for claim, those in headlines(name):
            by = "ours" if claim["by"] == "medsec" else "the paper's"
            whose.setdefault(by, []).append(overall(claim["by"], [each.verdict for each in those]))
        for by, words in sorted(whose.items(), reverse=True):
            told = {word: str(words.count(word)) for word in dict.fromkeys(words)}
            lines.append({"ledger": name, "claims": by, "number": len(words)} | told)
    found = pd.DataFrame(lines).fillna("")
    order = ["reproduced", "holds", PARTLY, OPEN, "not found here", "missed", UNTESTED, NOT_HERE, NOT_YET]
    return found[["ledger", "claims", "number", *(word for word in order if word in found.columns)]]


def summary() -> str:
    """`counts` over all ledgers, in a sentence for whose claims they are."""
    found, told = counts(), []
    for by, start in (("the paper's", "The papers' {} headline statements"), ("ours", "Our own {}")):
        mine = found[found["claims"] == by].drop(columns=["ledger", "claims"])
        words = {word: pd.to_numeric(mine[word]).sum() for word in mine.columns[1:]}
        plural = {"holds": "hold"}
        parts = [f"{n:.0f} {plural.get(word, word)}" for word, n in words.items() if n]
        told.append(f"{start.format(mine['number'].sum())}: {', '.join(parts)}.")
    return " ".join(told)


# The README's table --------------------------------------------------------------------------------------------------

FINDINGS = "results/findings.csv"
BEGIN = "<!-- results: made by `python -m experiments ledger`, do not edit -->"
END = "<!-- end of results -->"


def readme_block() -> str:
    """How many claims have which verdict, as Markdown between `BEGIN` and `END`."""
    where = f"[notebook 99](executed/phantom/99_claims.ipynb); as data: [{FINDINGS}]({FINDINGS})."
    return "\n\n".join([BEGIN, tables.markdown(counts()), f"Every verdict and the row that decides it: {where}", END])


def replace_block(text: str, begin: str, end: str, block: str) -> str:
    """A text whose part from the mark ``begin`` to the mark ``end`` is replaced by ``block`` (which brings the marks).

    Raises:
        InputError: the text lacks one of the two marks.
    """
    if begin not in text or end not in text:
        raise InputError(f"the page lacks the marks {begin} and {end}, between which results stand; restore them")
    return text[: text.index(begin)] + block + text[text.index(end) + len(end) :]


def update_readme(text: str) -> str:
    """The README's text with its block of verdicts made anew."""
    return replace_block(text, BEGIN, END, readme_block())


def write() -> None:
    """Write the verdicts of all cohorts into ``README.md`` and ``results/findings.csv``, from the tables there are."""
    readme = paths.ROOT / "README.md"
    files.write(readme, update_readme(files.read_text(readme)))
    tables.write(findings(), paths.ROOT / FINDINGS)
