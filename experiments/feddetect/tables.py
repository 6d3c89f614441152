"""The summary of notebook 02, and the rows of its tables that follow from others."""

import pandas as pd

from experiments.feddetect.cells import KEYS, READS_LOSSES
from experiments.params import Params
from medsec.evidence import tables

# To a defence that does not read losses, a liar is the attacker who sends the same and tells the truth.
SAME_BUT_FOR_LOSSES = {"liar": "honest", "framer": "boost", "boost_liar": "boost"}
# Of four values, the mean without the largest and the smallest is the median: one variant is the other's twin there.
TWIN = ("trimmed_mean", "median")


def summarise(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    """The summary of a runs table, after `complete`."""
    return tables.summarise(complete(runs, params), KEYS)


def complete(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    """A runs table with the rows that follow from others.

    (1) With four clients and one attacker the trimmed mean is the median (`TWIN`). (2) Where a defence does not read
    losses, a liar's rows are those of the attacker who sends the same and tells the truth (`SAME_BUT_FOR_LOSSES`).
    (3) For all others ``<metric>_minus_clean``: the difference to the undefended federation without
    attack, on the same seed and the same size and partition of the federation.
    """
    if has_twin(params):
        like = runs[(runs["variant"] == TWIN[1]) & (runs["scenario"] != "colluders") & (runs["m"] == "")]
        runs = _with(runs, like.assign(variant=TWIN[0]))
    for liar, truthful in SAME_BUT_FOR_LOSSES.items():
        like = runs[(runs["scenario"] == truthful) & ~runs["variant"].isin(READS_LOSSES)]
        runs = _with(runs, like.assign(scenario=liar))
    return pd.concat([runs, _minus_clean(runs, params)], ignore_index=True)


def has_twin(params: Params) -> bool:
    """Whether the two variants of `TWIN` are the same rule in the headline's federation."""
    return params.fedgan.n_clients == 4 and len(params.fedgan.malicious) == 1


def _with(runs: pd.DataFrame, copied: pd.DataFrame) -> pd.DataFrame:
    """The runs and those copied rows that are not among them."""
    address = [c for c in runs.columns if c not in ("value", "n_items", "unit")]
    there = pd.MultiIndex.from_frame(runs[address].astype(str))
    copied = copied[copied["metric"] != "server_ms"]  # a time is measured or not there
    fresh = copied[~pd.MultiIndex.from_frame(copied[address].astype(str)).isin(there)]
    return pd.concat([runs, fresh], ignore_index=True)


def evade_curve(summary: pd.DataFrame, params: Params) -> pd.DataFrame:
    """The aware attacker's final trigger rate and how often it is blocked, by the evidence that it allows itself.

    Returns:
        Rows of the summary with ``name`` (defence) and ``x`` (share of the threshold), the headline's included.
    """
    metric = summary["metric"].isin(["trigger_rate", "blocked_tpr"])
    rows = summary[metric & (summary["scenario"] == "aware") & summary["variant"].isin(["none", "feddetect_hardened"])]
    rows = rows[(rows[["m", "partition", "trigger", "round", "client"]] == "").all(axis=1)]
    share = rows["evade"].where(rows["evade"] != "", str(params.feddetect.scenario.aware.evade)).astype(float)
    return rows.assign(name=rows["variant"], x=share).sort_values(["name", "x"], ascending=[False, True])


def _minus_clean(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    compared = runs["metric"].isin(["frechet", "downstream_auc"])
    rows = runs[compared & (runs["round"] == "") & (runs["client"] == "")]
    many = str(params.feddetect.scenario.colluders[1])
    rows = rows.assign(size=rows["m"].where((rows["scenario"] != "colluders") | (rows["m"] != ""), many))
    clean = (rows["variant"] == "none") & (rows["scenario"] == "no_attack") & (rows["trigger"] == "")
    return tables.minus(rows[~clean], rows[clean], ["size", "partition"], "clean")[runs.columns]
