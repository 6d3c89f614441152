"""Tables survive the disk, claims get the verdict their rows give, and a wrong table never passes the check."""

import errno
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from experiments.__main__ import main
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.claims import figures as claim_figures
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.evidence import check, claims, ledger, tables

KEYS = ["client", "round"]
ROWS = [
    ("poison", "attack", "trigger_rate", 0.83, 0.8, 0.9, 0.05, 3, 3000, "share", "", ""),
    ("poison", "attack", "trigger_rate", 0.5, 0.4, 0.6, 0.1, 3, 600, "share", "0", "12"),
    ("poison", "minus_clean", "frechet", 21.5, 20.0, 24.25, 2.0, 3, 3000, "distance", "", ""),
    ("clean", "no_attack", "trigger_rate", 0.01, 0.0, 0.02, 0.01, 3, 3000, "share", "", ""),
]


@pytest.fixture
def table():
    return pd.DataFrame(ROWS, columns=[*tables.SUMMARY, *KEYS])


# -------------------------------------------------------------------------------------------------------------- tables


def test_a_summary_survives_the_disk(table, tmp_path):
    file = tmp_path / "new" / "folder" / "t.csv"
    tables.write(table, file)
    back = tables.read(file)
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert back["value"].dtype == float
    assert back["n"].dtype == int
    assert back["client"].tolist() == ["", "0", "", ""]
    assert [f.name for f in file.parent.iterdir()] == ["t.csv"]
    first = file.read_bytes()
    tables.write(back, file)
    assert file.read_bytes() == first
    assert b"\r" not in first


def test_a_runs_table_survives_the_disk(tmp_path):
    runs = pd.DataFrame({"seed": [3, 4], "variant": "None", "scenario": "", "metric": "NA", "value": [1e-7, 1 / 3]})
    tables.write(runs, tmp_path / "t.csv")
    back = tables.read(tmp_path / "t.csv")
    assert back["seed"].tolist() == [3, 4]
    np.testing.assert_allclose(back["value"], [1e-7, 1 / 3], rtol=1e-5)
    assert back["metric"].tolist() == ["NA", "NA"], "a name that pandas takes for a missing value"
    assert back["variant"].tolist() == ["None", "None"]


def test_a_failed_write_keeps_the_old_table(table, tmp_path, monkeypatch):
    file = tmp_path / "t.csv"
    tables.write(table, file)
    before = file.read_bytes()

    def half(self, content):
        self.open("wb").write(content[:11])
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match=r"disk full.*t\.csv"):
        tables.write(table.head(1), file)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["t.csv"], "no half of a table is left either"


def test_a_missing_table(tmp_path):
    with pytest.raises(InputError, match=r"01\.csv is missing from .*; make it with: make repro"):
        tables.read(tmp_path / "01.csv")


@pytest.mark.parametrize(
    "content", ["", "variant,value\na,much\n", "variant,n\na,1.5\n", "variant,value\na,\n", "a,b\n1,2,3\n4,5,6,7,8\n"]
)
def test_no_table(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match=r"t\.csv is no table"):
        tables.read(tmp_path / "t.csv")


def test_keys_are_what_is_not_measured(table):
    assert tables.keys(table) == ["variant", "scenario", "metric", "client", "round"]
    assert "seed" not in tables.keys(table.assign(seed=0))


def test_keys_that_are_not_named_must_be_empty(table):
    address = {"variant": "poison", "scenario": "attack", "metric": "trigger_rate"}
    assert tables.row(table, **address)["value"] == 0.83
    assert tables.row(table, **address, client="0", round="12")["value"] == 0.5
    assert tables.row(table, **address, client=0, round=12)["value"] == 0.5
    assert len(tables.select(table, {**address, "client": "0"})) == 0
    assert len(tables.select(table, {})) == 0


def test_rows_that_are_not_there_or_not_one(table):
    with pytest.raises(InputError, match="0 rows match"):
        tables.row(table, variant="poison", scenario="attack", metric="auc")
    twice = pd.concat([table, table])
    with pytest.raises(InputError, match="2 rows match"):
        tables.row(twice, variant="clean", scenario="no_attack", metric="trigger_rate")
    with pytest.raises(InputError, match="no column 'seat' in the table; it has variant, scenario, metric, client"):
        tables.row(table, variant="poison", seat="0")


@pytest.mark.parametrize("where", [{"unit": "parsec"}, {"n": 99}, {"seed": 1}])
def test_a_measure_in_an_address_is_not_ignored(table, where):
    """It may be refused or it may choose, but rows that contradict it do not match."""
    runs = table.assign(seed=0)
    try:
        found = tables.select(runs, {**WHERE, **where})
    except InputError:
        return
    assert len(found) == 0


def test_markdown(table):
    lines = tables.markdown(table[["variant", "value", "client"]].head(2)).split("\n")
    assert lines == [
        "| variant | value | client |",
        "| --- | --- | --- |",
        "| poison | 0.83 |  |",
        "| poison | 0.5 | 0 |",
    ]


def test_interval(table):
    assert tables.interval(table.iloc[2]) == "21.50 [20.00, 24.25]"
    assert tables.interval(table.iloc[2], 0) == "22 [20, 24]"


def test_metrics_hold_the_headlines(table, tmp_path):
    tables.write_metrics(table, tmp_path / "new" / "m.json")
    assert json.loads((tmp_path / "new" / "m.json").read_text()) == {
        "poison": {"attack": {"trigger_rate": 0.83}, "minus_clean": {"frechet": 21.5}},
        "clean": {"no_attack": {"trigger_rate": 0.01}},
    }


# -------------------------------------------------------------------------------------------------------------- claims


def claim(**fields):
    return {"id": "c", "by": "us", "text": "something", **fields}


def summary_of(low, high, n=3):
    row = ("poison", "attack", "trigger_rate", (low + high) / 2, low, high, 0.1, n, 30, "share", "", "")
    return pd.DataFrame([row], columns=[*tables.SUMMARY, *KEYS])


WHERE = {"variant": "poison", "scenario": "attack", "metric": "trigger_rate"}


@pytest.mark.parametrize(
    ("bound", "low", "high", "verdict"),
    [
        ({"above": 0.5}, 0.51, 0.9, "holds"),
        ({"above": 0.5}, 0.5, 0.9, "undecided"),
        ({"above": 0.5}, 0.4, 0.6, "undecided"),
        ({"above": 0.5}, 0.4, 0.5, "does not hold"),
        ({"above": 0.5}, 0.1, 0.2, "does not hold"),
        ({"below": 0.5}, 0.1, 0.49, "holds"),
        ({"below": 0.5}, 0.1, 0.5, "undecided"),
        ({"below": 0.5}, 0.4, 0.6, "undecided"),
        ({"below": 0.5}, 0.5, 0.6, "does not hold"),
        ({"below": 0.5}, 0.8, 0.9, "does not hold"),
        ({"above": 0.5}, float("nan"), float("nan"), "undecided"),
        ({"above": 0}, 0.1, 0.2, "holds"),
        ({"below": 0}, 0.1, 0.2, "does not hold"),
    ],
)
def test_verdicts(bound, low, high, verdict):
    found = claims.verdict(claim(where=WHERE, **bound), summary_of(low, high, n=5))
    assert found["verdict"] == verdict
    assert (found["id"], found["by"], found["claim"], found["n"]) == ("c", "us", "something", 5)
    assert found["measured"] == f"{(low + high) / 2:.2f} [{low:.2f}, {high:.2f}]"


NOT_HERE = {"where": {**WHERE, "client": "7"}, "above": 0.5, "record_only": "too small"}


def test_a_claim_for_records_only_needs_no_row_elsewhere():
    found = claims.verdict(claim(**NOT_HERE), summary_of(0, 1))
    assert (found["verdict"], found["n"], found["measured"]) == ("not testable here", 0, "too small")
    there = summary_of(0.6, 0.7).assign(client="7")
    assert claims.verdict(claim(**NOT_HERE), there)["verdict"] == "holds"
    assert claims.verdict(claim(**{**NOT_HERE, "above": 0.8}), there)["verdict"] == "does not hold"


def test_a_claim_about_other_images():
    about = claim(where=WHERE, above=0.5, cohorts=["fundus"])
    assert claims.verdict(about, summary_of(0.6, 0.7), "fundus")["verdict"] == "holds"
    found = claims.verdict(about, summary_of(0.6, 0.7), "phantom")
    assert (found["verdict"], found["measured"]) == ("not testable here", "about the images of fundus")


@pytest.mark.parametrize(
    ("bound", "low", "high", "measured"),
    [
        ({"above": -0.01}, -0.0118, -0.005, "-0.008 [-0.012, -0.005]"),
        ({"below": 0.05}, 0.0207, 0.05004, "0.0354 [0.0207, 0.0500]"),  # four digits are the most
        ({"below": 0.05}, 0.02, 0.05, "0.04 [0.02, 0.05]"),  # the bound itself, not beside it
        ({"below": 0.0001}, 0.0, 0.0, "0.00 in every run (30 items)"),
    ],
)
def test_an_interval_is_written_so_that_its_ends_can_be_told_from_the_bound(bound, low, high, measured):
    assert claims.verdict(claim(where=WHERE, **bound), summary_of(low, high))["measured"] == measured


@pytest.mark.parametrize(
    ("works", "left", "verdict"),
    [
        (0.9, 0.01, "holds"),
        (0.2, 0.01, "untested"),  # an attack that does not work without a defence cannot show that one stops it
        (0.2, 0.10, "does not hold"),
        (0.9, 0.10, "does not hold"),
    ],
)
def test_a_stopped_attack_must_work_without_a_defence(ledgers, works, left, verdict):
    undefended = summary_of(works, works + 0.05).assign(variant="none")
    table = pd.concat([undefended, summary_of(left, left + 0.01)], ignore_index=True)
    works_alone = claim(id="works", where={**WHERE, "variant": "none"}, above=0.5)
    ledgers(claim(id="stops", where=WHERE, below=0.05, given="works"), works_alone)
    assert claims.verdicts("1-test", table)["verdict"].tolist()[0] == verdict


def test_a_claim_that_is_given_what_nobody_claims(ledgers):
    ledgers(claim(id="stops", where=WHERE, below=0.05, given="works"))
    with pytest.raises(InputError, match="'stops' is given 'works', which is no claim there"):
        claims.load("1-test")


@pytest.mark.parametrize(("left", "verdict"), [(0.2, "does not hold"), (0.0, "untested")])
def test_where_nothing_is_left_nothing_can_be_raised(ledgers, left, verdict):
    """A difference between two networks that both keep nothing is 0: it says nothing of the defence."""
    base = summary_of(left, left).assign(variant="base")
    table = pd.concat([base, summary_of(0.0, 0.0)], ignore_index=True)
    some_left = claim(id="left", where={**WHERE, "variant": "base"}, above=0.1)
    ledgers(claim(id="raises", where=WHERE, above=0.0, needs="left"), some_left)
    assert claims.verdicts("1-test", table)["verdict"].tolist()[0] == verdict


def test_an_unfinished_record_may_lack_what_a_claim_is_given(ledgers):
    ledgers(
        claim(id="stops", where=WHERE, below=0.5, given="works"), claim(id="works", where=NOT_HERE["where"], above=0)
    )
    found = claims.verdicts("1-test", summary_of(0.1, 0.2), unfinished=True)
    assert found["verdict"].tolist() == ["untested", "not measured yet"]


def test_a_claim_at_an_eps_that_was_not_attacked():
    """Somebody has another headline in `params.yaml`: that is no error."""
    at = {**WHERE, "eps": "0.0156863"}
    elsewhere = summary_of(0.6, 0.7).assign(eps="0.0313725")
    found = claims.verdict(claim(where=at, above=0.5), elsewhere)
    assert (found["verdict"], found["n"], found["measured"]) == ("not testable here", 0, "only at 8/255")
    assert claims.verdict(claim(where=at, above=0.5), elsewhere.assign(eps="0.0156863"))["verdict"] == "holds"
    with pytest.raises(InputError, match="0 rows match"):
        claims.verdict(claim(where={**at, "variant": "shield"}, above=0.5), elsewhere)


def test_what_decides_is_told():
    found = claims.verdict(claim(where=WHERE, below=0.05), summary_of(0.01, 0.02))
    assert found["decides"] == "`trigger_rate` < 0.05"
    assert claims.decides(claim(where=WHERE, above=-3)) == "`trigger_rate` > -3"


def test_a_record_beside_a_quick_table(ledgers):
    ledgers(claim(where=WHERE, above=0.5))
    quick, long = summary_of(0.4, 0.6), summary_of(0.6, 0.7, n=5)
    assert claims.beside("1-test", quick, None, "phantom")["record"].tolist() == ["no record"]
    (line,) = claims.beside("1-test", quick, long, "phantom").to_dict("records")
    assert (line["verdict"], line["record"]) == ("undecided", "holds: 0.65 [0.60, 0.70] (n = 5)")


def test_a_claim_without_its_row():
    with pytest.raises(InputError, match="0 rows match"):
        claims.verdict(claim(where={**WHERE, "client": "7"}, above=0), summary_of(0, 1))


@pytest.fixture
def ledgers(tmp_path, monkeypatch):
    """Function that writes claims/1-test.yaml and the metrics to a temporary place and points `paths` at it."""
    folder = tmp_path / "claims"
    folder.mkdir()
    monkeypatch.setattr(paths, "CLAIMS", folder)
    known = {
        "trigger_rate": {"unit": "share", "tolerance": 0.05},
        "frechet": {"unit": "distance", "tolerance": 1.0},
    }
    (folder / "metrics.yaml").write_text(yaml.safe_dump(known), encoding="utf-8")

    def write(*entries, table="01_test"):
        headlines = list(dict.fromkeys(entry["id"] for entry in entries if "id" in entry))
        content = {"paper": "P", "table": table, "headlines": headlines, "claims": list(entries)}
        (folder / "1-test.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    return write


def test_verdicts_keep_the_order_of_the_ledger(ledgers):
    ledgers(claim(id="z", where=WHERE, above=0.5), claim(id="a", where=WHERE, below=0.5), claim(id="m", **NOT_HERE))
    found = claims.verdicts("1-test", summary_of(0.6, 0.7))
    assert found["id"].tolist() == ["z", "a", "m"]
    assert found["verdict"].tolist() == ["holds", "does not hold", "not testable here"]
    assert claims.names() == ["1-test"]


@pytest.mark.parametrize(
    "fields",
    [
        {"where": WHERE},
        {"where": WHERE, "above": 1, "below": 2},
        {"above": 1},
        {"where": WHERE, "record_only": "no"},
        {"record_only": "no", "above": 1},
        {},
    ],
)
def test_a_claim_with_no_bound_or_two(ledgers, fields):
    ledgers(claim(id="fine", where=WHERE, above=0), claim(id="odd", **fields))
    with pytest.raises(InputError, match=r"1-test\.yaml: claim 'odd' needs"):
        claims.load("1-test")


def test_a_missing_ledger(ledgers):
    with pytest.raises(InputError, match=r"9-none\.yaml is missing"):
        claims.load("9-none")


def test_the_ledger_goes_to_the_readme_and_to_a_table(ledgers, tmp_path, monkeypatch):
    ledgers(claim(id="a", where=WHERE, above=0.5), claim(id="b", **NOT_HERE))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    tables.write(summary_of(0.6, 0.7, n=5), paths.results("phantom", tmp_path) / "01_test.csv")
    tables.write(summary_of(0.1, 0.2, n=5), paths.results("alpha", tmp_path) / "01_test.csv")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{ledger.BEGIN}\nstale rows\n{ledger.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert main(["ledger"]) == 0
        text = readme.read_text(encoding="utf-8")
        assert text.startswith(f"before\n{ledger.BEGIN}\n")
        assert text.endswith(f"\n{ledger.END}\nafter\n")
        assert "stale rows" not in text
        assert "| 1-test | the paper's | 2 |" in text
    quick = "[holds](results/phantom/01_test.csv): 0.65 [0.60, 0.70] (n = 5, quick)"
    assert list(ledger.table("1-test")["phantom"]) == [quick, "not testable here"]
    assert list(ledger.table("1-test")["verdict"]) == ["**partly**", "**not testable here**"]
    kept = pd.read_csv(tmp_path / ledger.FINDINGS, dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(kept, ledger.findings().astype(str))
    # A record's row takes the place of the quick one, unless it rests on fewer runs.
    for n, said in (
        (5, "[holds](records/alpha/01_test.csv): 0.85 [0.80, 0.90] (n = 5)"),
        (4, "[does not hold](results/alpha/01_test.csv): 0.15 [0.10, 0.20] (n = 5, quick)"),
    ):
        tables.write(summary_of(0.8, 0.9).assign(n=n), paths.records("alpha", tmp_path) / "01_test.csv")
        assert ledger.table("1-test")["alpha"][0] == said
    readme.write_text("no marks", encoding="utf-8")
    assert main(["ledger"]) == 2
    assert readme.read_text(encoding="utf-8") == "no marks"


@pytest.mark.parametrize(
    ("unfinished", "word"), [(False, "not testable here"), (True, "not measured yet")], ids=["complete", "in part"]
)
def test_what_a_record_in_part_lacks_is_not_measured_yet(unfinished, word):
    """Images with a record only: the row is no headline of theirs, or its cell is still to come."""
    read, files = {"record": summary_of(0.6, 0.7)}, {"record": paths.ROOT / "x.csv"}
    found = ledger.finding(claim(**NOT_HERE), files, read, "fundus", unfinished=unfinished)
    assert (found.verdict, found.file) == (word, None)


def test_the_ledger_in_a_sentence(ledgers, tmp_path, monkeypatch):
    ours = claim(id="b", where=WHERE, below=0.5)
    ledgers(
        claim(id="a", where=WHERE, above=0.5), ours | {"by": "medsec"}, claim(id="c", **NOT_HERE) | {"by": "medsec"}
    )
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    tables.write(summary_of(0.6, 0.7, n=5), paths.results("phantom", tmp_path) / "01_test.csv")
    assert (
        ledger.summary() == "The papers' 1 headline statements: 1 reproduced. Our own 2: 1 missed, 1 not testable here."
    )
    assert list(ledger.table("1-test").columns) == ["id", "claim", "by", "verdict", "phantom"]


@pytest.mark.parametrize(
    ("by", "verdicts", "word"),
    [
        ("paper", ["holds", "holds"], "reproduced"),
        ("paper, our test", ["holds", "not testable here"], "reproduced"),
        ("paper, our test", ["does not hold"], "not found here"),
        ("paper", ["holds", "undecided"], "partly"),
        ("paper", ["holds", "does not hold"], "partly"),
        ("paper", ["undecided", "does not hold"], "not found here"),
        ("paper", ["undecided", "undecided"], "undecided"),
        ("medsec", ["holds", "holds"], "holds"),
        ("medsec", ["does not hold", "does not hold"], "missed"),
        ("medsec", ["does not hold", "holds"], "partly"),
        ("paper", ["not testable here"], "not testable here"),
        ("paper", ["not testable here", "not measured yet"], "not measured yet"),
        ("paper", [], "not testable here"),
        ("medsec", ["untested", "holds"], "holds"),
        ("medsec", ["untested", "not testable here"], "untested"),
    ],
)
def test_one_word_for_several_cohorts(by, verdicts, word):
    assert ledger.overall(by, verdicts) == word


def test_every_link_of_the_ledger_leads_to_the_row_that_decides():
    linked = 0
    for name in claims.names():
        for entry, those in ledger.entries(name):
            for found in those:
                if found.file is not None:
                    line = (paths.ROOT / found.file).read_text(encoding="utf-8").splitlines()[found.line - 1]
                    header = (paths.ROOT / found.file).read_text(encoding="utf-8").splitlines()[0]
                    row = dict(zip(header.split(","), line.split(","), strict=True))
                    assert all(row[key] == value for key, value in entry["where"].items()), (entry["id"], line)
                    linked += 1
    assert linked > 100


FIELDS = {"id", "by", "text", "where", "above", "below", "record_only", "cohorts", "given", "needs"}


@pytest.mark.parametrize("name", claims.names())
def test_the_ledgers_of_the_repository_are_well_formed(name):
    content, allowed = claims.load(name), tables.metrics()
    assert content["paper"]
    assert content["claims"]
    ids = [entry["id"] for entry in content["claims"]]
    assert len(set(ids)) == len(ids)
    for entry in content["claims"]:
        assert set(entry) <= FIELDS, entry["id"]
        assert entry["by"]
        assert entry["text"]
        assert isinstance(entry.get("record_only", ""), str), entry["id"]
        assert {"variant", "scenario", "metric"} <= set(entry["where"]), entry["id"]
        assert all(isinstance(value, str) and value for value in entry["where"].values()), entry["id"]
        assert entry["where"]["metric"] in allowed, entry["id"]
        bound = entry.get("above", entry.get("below"))
        assert isinstance(bound, int | float), entry["id"]


def test_the_repository_has_ledgers_whose_addresses_fit_their_table():
    assert "1-fedgan" in claims.names()
    content = claims.load("1-fedgan")
    assert content["table"] == "01_backdoor_fedgan"
    for entry in content["claims"]:
        assert set(entry["where"]) <= {"variant", "scenario", "metric", *fedgan_eval.KEYS}, entry["id"]
        assert entry["where"]["metric"] in tables.metrics(), entry["id"]


def test_a_reader_is_given_at_most_25_headlines():
    ids = [(name, id_) for name in claims.names() for id_ in claims.load(name)["headlines"]]
    assert len(set(ids)) == len(ids) <= 25
    assert len({name for name, _ in ids}) == len(claims.names())


CELLS = [cell for named in claim_figures.HERO.values() for asked in named.values() for cell in asked if cell]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell[1])
def test_the_figure_of_all_threats_shows_claims(cell):
    assert cell[1] in {entry["id"] for entry in claims.load(cell[0])["claims"]}


def test_what_is_bad_news_where_it_holds_is_turned():
    rows = pd.DataFrame(
        {"variant": "a", "claim": "c", "scenario": list(claim_figures.COHORTS), "value": [1.0, 0.0, 2.0]}
    )
    values = rows.set_index(["variant", "claim", "scenario"])["value"]
    assert list(claim_figures._codes(values, ("a", "c", True)).values()) == [1, 0, 2]
    assert list(claim_figures._codes(values, ("a", "c", False)).values()) == [-1, 0, 2]
    assert claim_figures._codes(values, ("a", "other", True)) == claim_figures._codes(values, None) == {}


def test_a_long_table_is_folded(table):
    assert tables.markdown(table.head(tables.UNFOLDED)).startswith("| ")
    many = pd.concat([table] * 20).head(tables.UNFOLDED + 1)
    lines = tables.markdown(many).split("\n")
    assert lines[0] == "<details><summary>13 rows</summary>"
    assert lines[1] == lines[-2] == ""  # Markdown inside HTML begins and ends with an empty line
    assert lines[-1] == "</details>"
    assert len(lines) == 13 + 6


def test_every_metric_has_a_tolerance():
    for name, entry in tables.metrics().items():
        assert set(entry) - {"items"} == {"unit", "tolerance"}, name
        assert entry["tolerance"] >= 0, name


# --------------------------------------------------------------------------------------------------------------- check


def test_identical_tables_agree(table):
    assert check.compare(table, table) == []
    assert check.compare(table.sample(frac=1, random_state=0), table) == []


def planted(table, row, **cells):
    changed = table.copy()
    for column, value in cells.items():
        changed.loc[row, column] = value
    return changed


ADDRESS = "variant=poison, scenario=attack, metric=trigger_rate, client=0, round=12"


@pytest.mark.parametrize(
    ("cells", "part"),
    [
        ({"value": 0.95}, "0.95, committed 0.5 ± "),
        ({"value": 0.05}, "0.05, committed 0.5 ± "),
        ({"value": float("nan")}, "nan, committed 0.5"),
        ({"value": float("inf")}, "inf, committed 0.5"),
        ({"n": 2}, "n is 2, was 3"),
        ({"unit": "percent"}, "unit is percent, was share"),
    ],
)
def test_a_planted_difference_is_named(table, cells, part):
    (line,) = check.compare(planted(table, 1, **cells), table)
    assert line.startswith(ADDRESS + ": ")
    assert part in line


def test_a_lost_and_a_new_row_are_named(table):
    assert check.compare(table.drop(index=1), table) == [f"missing row: {ADDRESS}"]
    assert check.compare(table, table.drop(index=1)) == [f"new row: {ADDRESS}"]
    renamed = check.compare(planted(table, 1, client="9"), table)
    assert sorted(renamed) == [f"missing row: {ADDRESS}", f"new row: {ADDRESS.replace('client=0', 'client=9')}"]
    assert len(check.compare(table.head(0), table)) == len(table)


def test_every_difference_of_a_row_is_named(table):
    lines = check.compare(planted(table, 1, value=5.0, n=1, unit="%"), table)
    assert len(lines) == 3
    assert all(line.startswith(ADDRESS) for line in lines)


def test_the_tolerance_is_the_metrics_plus_twice_the_committed_deviation_between_seeds(table, ledgers):
    ledgers()
    slack = 0.05 + 0.2 + 1e-5 * 0.5
    for sign in (1, -1):
        assert check.compare(planted(table, 1, value=0.5 + sign * (slack - 1e-4)), table) == []
        assert len(check.compare(planted(table, 1, value=0.5 + sign * (slack + 1e-4)), table)) == 1
    # A fresh interval however wide excuses nothing.
    assert len(check.compare(planted(table, 1, value=0.9, low=-9.0, high=9.0), table)) == 1


def test_a_distance_in_the_space_of_a_trained_network_may_change_its_scale(table, ledgers):
    ledgers()
    table.loc[1, ["metric", "value", "low", "high", "sd"]] = ["frechet", 300.0, 290.0, 310.0, 10.0]
    slack = 1.0 + 20.0 + check.SCALED["frechet"] * 300
    for sign in (1, -1):
        assert check.compare(planted(table, 1, value=300 + sign * (slack - 0.01)), table) == []
        assert len(check.compare(planted(table, 1, value=300 + sign * (slack + 0.01)), table)) == 1


def test_the_ends_of_an_interval_may_lie_twice_as_far_off(table, ledgers):
    ledgers()
    slack = 0.05 + 0.2 + 1e-5 * 0.5
    assert check.compare(planted(table, 1, low=0.4 - 2 * slack + 1e-4), table) == []
    (line,) = check.compare(planted(table, 1, low=0.4 - 2 * slack - 1e-4), table)
    assert "low" in line


def test_the_number_of_items_may_be_measured_itself(table, ledgers):
    """A defence rate counts the images that a network gets right, and another processor trains another network."""
    ledgers()
    items = int(table.loc[1, "n_items"])
    assert check.compare(planted(table, 1, n_items=round(0.9 * items)), table) == []
    (line,) = check.compare(planted(table, 1, n_items=round(0.7 * items)), table)
    assert f"n_items is {round(0.7 * items)}, was {items}" in line


def test_a_curve_over_rounds_is_judged_by_its_mean(table, ledgers):
    """On another processor a single round is another draw."""
    ledgers()
    later = planted(table.iloc[[1]], 1, round="13")
    whole = pd.concat([table, later], ignore_index=True)
    last = len(whole) - 1
    assert check.compare(planted(planted(whole, 1, value=0.1), last, value=0.9), whole) == []
    (line,) = check.compare(planted(planted(whole, 1, value=0.9), last, value=0.9), whole)
    assert line.startswith(ADDRESS.replace("round=12", "round=12 to 13") + ": value 0.9, committed 0.5 ± ")
    (line,) = check.compare(planted(whole, last, value=float("nan")), whole)
    assert line.startswith(ADDRESS.replace("12", "13") + ": value nan")
    assert len(check.compare(whole.drop(index=last), whole)) == 1


def test_a_single_round_that_decides_a_claim_is_judged_by_itself(table, ledgers):
    where = {key: table.loc[1, key] for key in tables.keys(table)}
    ledgers(claim(where={key: value for key, value in where.items() if value}, above=0.1))
    later = planted(table.iloc[[1]], 1, round="13")
    whole = pd.concat([table, later], ignore_index=True)
    moved = planted(planted(whole, 1, value=0.1), len(whole) - 1, value=0.9)
    assert check.compare(moved, whole) == []
    assert [line.partition(":")[0] for line in check.differences("01_test", "phantom", moved, whole)] == [ADDRESS]


def test_a_claim_that_turns_into_its_opposite_is_named(ledgers):
    ledgers(claim(id="a", where=WHERE, above=0.5))
    yes, no, open_ = summary_of(0.6, 0.7), summary_of(0.3, 0.4), summary_of(0.4, 0.6)
    assert check.contradictions("01_test", "phantom", yes, yes) == []
    assert check.contradictions("01_test", "phantom", open_, yes) == []
    assert check.contradictions("01_test", "phantom", no, open_) == []
    assert check.contradictions("01_test", "phantom", no, yes) == ["claim a: does not hold, committed: holds"]
    assert check.contradictions("01_test", "phantom", yes, no) == ["claim a: holds, committed: does not hold"]
    assert check.contradictions("02_test", "phantom", no, yes) == []


def test_a_tolerance_of_zero_means_equal(tmp_path, monkeypatch):
    row = ("cohort", "size", "images", 512.0, 512.0, 512.0, 0.0, 1, 512, "images", "", "")
    table = pd.DataFrame([row], columns=[*tables.SUMMARY, *KEYS])
    assert check.compare(table, table) == []
    assert len(check.compare(planted(table, 0, value=513.0), table)) == 1
    assert len(check.compare(planted(table, 0, n_items=511), table)) == 1


def test_a_metric_without_tolerance_is_an_error(table):
    odd = planted(table, 0, metric="sharpness")
    with pytest.raises(InputError, match=r"metrics\.yaml has no entry for 'sharpness'"):
        check.compare(odd, odd)
    assert len(check.compare(odd, table)) == 2, "in the fresh table alone it is a new row"


def test_other_columns(table):
    (line,) = check.compare(table.drop(columns="round"), table)
    assert line.startswith("columns differ")
    assert len(check.compare(table[table.columns[::-1]], table)) == 1


def test_a_row_twice(table):
    twice = pd.concat([table, table.iloc[[1]]])
    assert check.compare(twice, table) == [f"the fresh table holds a row twice: {ADDRESS}"]
    assert check.compare(table, twice) == [f"the committed table holds a row twice: {ADDRESS}"]


def test_report():
    assert check.report([]) == "ok"
    assert check.report(["a", "b"]) == "a\nb"
    lines = [f"row {i}" for i in range(check.SHOWN)]
    assert check.report(lines) == "\n".join(lines)
    assert check.report([*lines, "x", "y"]).split("\n") == [*lines, "... and 2 more"]


def test_against_the_reference(table, tmp_path, monkeypatch, ledgers):
    ledgers()
    monkeypatch.setenv("MEDSEC_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("MEDSEC_REFERENCE", str(tmp_path / "reference"))
    committed, fresh = (tmp_path / name / "results" / "phantom" / "01_test.csv" for name in ("reference", "out"))
    tables.write(table, committed)
    with pytest.raises(InputError, match=r"01_test\.csv is missing"):
        check.against_reference("01_test", "phantom")
    tables.write(table, fresh)
    assert check.against_reference("01_test", "phantom") == "ok"
    tables.write(planted(table, 1, value=0.95), fresh)
    assert check.against_reference("01_test", "phantom").startswith(ADDRESS)
    tables.write(table, fresh)
    tables.write(planted(table, 1, value=0.95), committed)
    assert check.against_reference("01_test", "phantom").startswith(ADDRESS)


@pytest.fixture
def checkout(tmp_path, table, ledgers, monkeypatch):
    """A git checkout with one committed summary, a runs table and a ledger; returns the summary's file."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setattr(paths, "ROOT", root)
    ledgers(claim(id="a", where=WHERE, above=0.5), claim(id="b", **NOT_HERE))
    file = paths.results("phantom", root) / "01_test.csv"
    tables.write(table, file)
    (file.parent / "01_test_runs.csv.gz").write_bytes(b"no summary: never read")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "tables"]):
        subprocess.run(["git", *command], cwd=root, check=True, capture_output=True)
    return file


def test_the_committed_tables_agree_with_themselves(checkout, capsys):
    assert check.against_commit("phantom") == {"01_test": ([], [])}
    assert main(["check"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "01_test (phantom): ok",
        "claims 1-test (phantom): 1 holds, 1 not testable here",
    ]


def test_a_planted_wrong_table_fails(checkout, table, capsys):
    tables.write(planted(table, 1, value=0.95), checkout)
    assert main(["check"]) == 1
    assert f"01_test (phantom): {ADDRESS}: value 0.95, committed 0.5" in capsys.readouterr().out
    tables.write(table.drop(index=1), checkout)
    assert main(["check"]) == 1
    assert f"missing row: {ADDRESS}" in capsys.readouterr().out
    tables.write(table, checkout)
    assert main(["check"]) == 0


def test_a_lost_table_is_an_error(checkout, capsys):
    checkout.unlink()
    assert main(["check"]) == 2
    assert "error: 01_test.csv is missing" in capsys.readouterr().err


def test_a_cohort_without_committed_tables(checkout, capsys):
    assert main(["check", "--cohort", "octmnist"]) == 2
    assert "no table is committed in results/octmnist" in capsys.readouterr().err


def test_no_checkout(checkout, capsys):
    shutil.rmtree(paths.ROOT / ".git")
    with pytest.raises(InputError, match="not a git repository"):
        check.against_commit("phantom")
    assert main(["check"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: cannot compare with the last commit: git ls-tree says")
    assert captured.out == ""


def test_rows_of_one_summary_are_addressable(table):
    """What `summarise` makes can be written, read, addressed row by row, and compared."""
    runs = [
        {"seed": s, "variant": v, "scenario": a, "metric": "trigger_rate", "value": s / 10 + b, "n_items": 5}
        | {"unit": "share", "client": c, "round": ""}
        for s, (v, a, b), c in itertools.product(
            range(3), [("clean", "no_attack", 0), ("poison", "attack", 0.5)], ["", "0"]
        )
    ]
    summary = tables.summarise(pd.DataFrame(runs), KEYS, paired_with="clean")
    assert len(summary) == 6
    for _, row in summary.iterrows():
        found = tables.row(summary, **{key: row[key] for key in tables.keys(summary)})
        assert found["value"] == row["value"]
    assert check.compare(summary, summary) == []


def test_two_runs_decide_nothing():
    """The interval of one or two runs is so narrow that it would always decide."""
    row = {"variant": "boost", "scenario": "attack", "metric": "trigger_rate", "value": 0.99, "low": 0.98, "high": 1.0}
    claim = {
        "id": "x",
        "by": "us",
        "text": "t",
        "where": {k: row[k] for k in ("variant", "scenario", "metric")},
        "above": 0.9,
    }
    for n, expected in ((1, claims.OPEN), (2, claims.OPEN), (3, claims.HOLDS)):
        assert (
            claims.verdict(claim, pd.DataFrame([{**row, "n": n, "n_items": 10, "unit": "share"}]))["verdict"]
            == expected
        )


@pytest.mark.parametrize(
    ("n", "said"),
    [([5, 5], "n = 5 seeds"), ([1, 3], "n = 1 to 3 seeds"), ([1], "n = 1 seed"), ([2, 1], "n = 1 to 2 seeds")],
)
def test_a_title_says_how_many_runs_there_were(n, said):
    assert tables.counted(pd.Series(n), "seeds") == said
