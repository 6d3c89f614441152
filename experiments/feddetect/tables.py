"""The summary of notebook 02, and the rows of its tables that follow from others."""

import numpy as np
import pandas as pd

from experiments.feddetect import gans
from experiments.feddetect.cells import KEYS, READS_LOSSES
from experiments.feddetect.hospitals import ONCE, ONLY, RULES, SERVED
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
    attack, on the same seed and the same size and partition of the federation; those of `gans` with their own.
    """
    if has_twin(params):
        like = runs[(runs["variant"] == TWIN[1]) & (runs["scenario"] != "colluders") & (runs["m"] == "")]
        runs = _with(runs, like.assign(variant=TWIN[0]))
    for liar, truthful in SAME_BUT_FOR_LOSSES.items():
        like = runs[(runs["scenario"] == truthful) & ~runs["variant"].isin(READS_LOSSES)]
        runs = _with(runs, like.assign(scenario=liar))
    parts = [runs, _minus_clean(runs, params), gans.minus_clean(runs)]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


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


COMPARED = ("none", "feddetect_hardened", *RULES, *SERVED)  # where hospitals differ
ASIDE = ("excluded", "distance", "attacked distance")  # groups of `where_hospitals_differ` that are told, not drawn


def where_hospitals_differ(summary: pd.DataFrame) -> pd.DataFrame:
    """Each rule where hospitals differ: in style if the record has that, else in their patients.

    Returns:
        Rows of the summary with ``name`` (rule, or `ONCE` or `ONLY`) and ``group``: the trigger rate of ``boost_liar``
        and of its ``own attacker``; without an attack honest ``weight lost``, the share ``excluded``, and the ``distance``
        of the images, also under its own attacker. Empty where the record has no such rows.
    """
    rows = summary[(summary[[key for key in KEYS if key != "partition"]] == "").all(axis=1)]
    schemes = set(rows.loc[rows["scenario"] == "aware_rule", "partition"])
    rows = rows[rows["partition"] == ("style" if "style" in schemes else min(schemes, default="-"))]
    own = rows["variant"].map({"feddetect_hardened": "aware"}).fillna("aware_rule")
    groups = {
        "boost_liar": (rows["metric"] == "trigger_rate") & (rows["scenario"] == "boost_liar"),
        "own attacker": (rows["metric"] == "trigger_rate") & (rows["scenario"] == own),
        "weight lost": (rows["metric"] == "weight_lost") & (rows["scenario"] == "no_attack"),
        "excluded": (rows["metric"] == "false_exclusion") & (rows["scenario"] == "no_attack"),
        "distance": (rows["metric"] == "frechet") & (rows["scenario"] == "no_attack"),
        "attacked distance": (rows["metric"] == "frechet") & (rows["scenario"] == own),
    }
    rows = rows.assign(name=rows["variant"])
    found = pd.concat([rows[at].assign(group=group) for group, at in groups.items()])
    order = [*COMPARED, ONCE, ONLY]
    return found[found["name"].isin(order)].sort_values("name", key=lambda c: c.map(order.index), kind="stable")


def holds(table: pd.DataFrame, stopped: float, excluded: float) -> list[str]:
    """The rules of `where_hospitals_differ` that neither attacker gets past and that exclude nobody, the best images first.

    Past: the interval reaches beyond a trigger rate of ``stopped``. Nobody: at most a share ``excluded`` of honest
    client-rounds without an attack; a rule without weights excludes nobody.
    """
    cells = table.set_index(["name", "group"])
    kept = [
        name
        for name in COMPARED
        if all((name, group) in cells.index for group in ("boost_liar", "own attacker"))
        and max(cells.loc[(name, group), "high"] for group in ("boost_liar", "own attacker")) <= stopped
        and ((name, "excluded") not in cells.index or cells.loc[(name, "excluded"), "high"] <= excluded)
    ]
    far = {name: cells["value"].get((name, "distance"), float("inf")) for name in kept}
    return sorted(kept, key=far.__getitem__)


def advice(table: pd.DataFrame, works: float, stopped: float, excluded: float) -> str:
    """Which rule a hospital should take where hospitals differ, in a sentence or two; see `holds`.

    ``works``: the trigger rate that an attacker must reach without a defence.
    """
    cells = table.set_index(["name", "group"])
    told = {at: f"{row['value']:.3g} [{row['low']:.3g}, {row['high']:.3g}]" for at, row in cells.iterrows()}
    if not cells["low"].get(("none", "own attacker"), 0.0) >= works:
        return "Here the attacker is too weak without a defence: no rule is tested."
    if not (kept := holds(table, stopped, excluded)):
        tried = table[(table["group"] == "own attacker") & (table["name"] != "none")]
        best = tried.loc[tried["value"].idxmin(), "name"]
        return (
            f"**No rule holds** where hospitals differ. The least that an attacker who knows the rule plants is "
            f"{told[best, 'own attacker']}, with `{best}`."
        )
    best = kept[0]
    far = {
        at: told.get(at, "(not measured)")
        for at in ((best, "distance"), (best, "attacked distance"), ("none", "distance"), (ONLY, "distance"))
    }
    gains = cells["high"].get((best, "distance"), np.inf) < cells["low"].get((ONLY, "distance"), -np.inf)
    lead, worth = f"take `{best}`", ""
    if not gains:
        lead = f"`{best}` holds, but it is not shown to draw better than a server without hospitals"
        worth = " So what stops the attacker may be no more than the server's own data."
    return (
        f"**Where hospitals differ, {lead}**: who knows it plants its trigger in {told[best, 'own attacker']} of the "
        f"images, without it in {told['none', 'own attacker']}. Its Fréchet distance is {far[best, 'distance']} without an "
        f"attack and {far[best, 'attacked distance']} under that one; the undefended federation's is "
        f"{far['none', 'distance']} without an attack, and that of a server that never hears a hospital "
        f"{far[ONLY, 'distance']}.{worth}"
    )


OF_GAN = {  # what is told of each GAN of `gans`: column -> digits and metric
    "drawing": {
        "called the stamped class, with the trigger": (2, "attack_success"),
        "without it": (2, "attack_success_unstamped"),
        "AUC": (2, "downstream_auc"),
        "Fréchet distance": (1, "frechet"),
        "honest excluded": (2, "false_exclusion"),
    },
    "regularised": {
        "trigger rate": (3, "trigger_rate"),
        "attacker blocked": (2, "blocked_tpr"),
        "honest excluded": (2, "false_exclusion"),
        "label agreement": (2, "label_accuracy"),
        "Fréchet distance": (1, "frechet"),
    },
}


def of_gan(summary: pd.DataFrame, gan: str) -> pd.DataFrame | None:
    """One line an attacker and rule of a GAN of `gans`; None where the record has none of it."""
    parts, wanted = [], OF_GAN[gan]
    for scenario, arm in gans.ARMS.items():
        if arm.gan == gan and scenario in set(summary["scenario"]):
            columns = {name: (n, {"scenario": scenario, "metric": metric}) for name, (n, metric) in wanted.items()}
            part = tables.wide(summary, "rule", "variant", arm.variants, columns)
            parts.append(part.assign(attacker=arm.behaves))
    return pd.concat(parts)[["attacker", "rule", *wanted]] if parts else None


def _minus_clean(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    compared = runs["metric"].isin(["frechet", "downstream_auc"]) & ~runs["scenario"].isin(gans.ARMS)
    rows = runs[compared & (runs["round"] == "") & (runs["client"] == "")]
    many = str(params.feddetect.scenario.colluders[1])
    rows = rows.assign(size=rows["m"].where((rows["scenario"] != "colluders") | (rows["m"] != ""), many))
    clean = (rows["variant"] == "none") & (rows["scenario"] == "no_attack") & (rows["trigger"] == "")
    return tables.minus(rows[~clean], rows[clean], ["size", "partition"], "clean")[runs.columns]
