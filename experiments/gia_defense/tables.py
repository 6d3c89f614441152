"""Views of notebook 03's summary table: what its figures and tables show. All read a table, none computes a reconstruction."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.gia_defense.clients import VARIANTS
from experiments.params import Params
from medsec.evidence import claims, tables

LONGER = "ig, "  # how the key of a longer search begins, such as "ig, 1000 steps"
RARE = 0.025  # chance of so many hits by luck, below which they are more than luck
MEASURED = {  # column: digits and row
    f"{metric.replace('_', ' ')}, {scenario}": (digits, {"scenario": scenario, "metric": metric})
    for scenario, metric, digits in (
        ("naive", "psnr", 1),
        ("adaptive", "psnr", 1),
        ("adaptive", "ssim", 2),
        ("adaptive", "st_lpips", 2),
        ("adaptive", "retrieval_projected", 2),
        ("ceiling", "retrieval_latent", 2),
        ("utility", "auc", 3),
        ("utility", "auc_minus_none", 3),
        ("utility", "macro_f1_minus_none", 3),
    )
}


def best(summary: pd.DataFrame, recorded: pd.DataFrame | None) -> pd.DataFrame:
    """The record, if it has every headline's PSNR that the quick run has, else the quick run: one figure has one source."""
    if recorded is None:
        return summary
    quick, full = (tables.headline(table, "psnr") for table in (summary, recorded))
    pairs = [set(zip(rows["variant"], rows["scenario"], strict=True)) for rows in (quick, full)]
    own = {pair for pair in pairs[0] if pair[0] not in VARIANTS}  # no record has defences of one's own
    return recorded if pairs[0] - own <= pairs[1] else summary


def size(summary: pd.DataFrame) -> str:
    """``n = 5 seeds of 13 victims``: on how much the headline rests."""
    row = tables.row(summary, variant="none", scenario="adaptive", metric="psnr")
    return f"n = {row['n']} seeds of {round(row['n_items'] / row['n'])} victims"


# Titles: what is seen, from the numbers that are drawn -----------------------------------------------------------------


def seen(rows: dict[str, np.ndarray], defence: str) -> str:
    """Mean PSNR of the pictures shown, without and with a defence: rows ``<variant>, adaptive`` and ``original``."""
    from medsec.inversion.scores import psnr

    plain, defended = (psnr(rows[f"{name}, adaptive"], rows["original"]).mean() for name in ("none", defence))
    return f"One gradient shows the image at {plain:.0f} dB, that of `{defence}` at {defended:.0f} dB"


def above_floor(summary: pd.DataFrame, variants: Sequence[str]) -> str:
    """What the two best defences leave to somebody who knows them, and what the mean image of the class has."""
    rows = tables.headline(summary, "psnr")
    rows = rows[(rows["scenario"] == "adaptive") & rows["variant"].isin(variants) & (rows["variant"] != "none")]
    first, second = rows.sort_values("value").head(2).to_dict("records")
    floor = tables.row(summary, variant="none", scenario="prior_only", metric="psnr")["value"]
    return (
        f"Who knows the defence gets {first['value']:.0f} dB under `{first['variant']}`, {second['value']:.0f} dB or more under "
        f"the other {len(rows) - 1};\nno gradient at all has {floor:.0f} dB"
    )


def reaching(points: pd.DataFrame, floor: float) -> str:
    """How many defences of `plane`, at their usual strength, are at the floor, and how many of them at no shown cost."""
    usual = points[points["usual"] & (points["variant"] != "none")]
    hidden = usual[usual["y_low"] <= floor]
    free = hidden[hidden["x_high"] >= 0]
    return f"{len(hidden)} of {len(usual)} defences leave not clearly more than no gradient has, {len(free)} without a clear loss"


def trend(rows: pd.DataFrame, label: str) -> str:
    """What the undefended curve of `sweeps` does from its first to its last point, and what a longer search finds."""
    none = rows[rows["name"] == "none"].sort_values("x")
    first, last = none.iloc[0], none.iloc[-1]
    apart = first["low"] > last["high"] or first["high"] < last["low"]
    word = ("falls" if last["value"] < first["value"] else "rises") if apart else "does not clearly change"
    ends = f"from {first['value']:.0f} dB at {first['x']:g} to {last['value']:.0f} dB at {last['x']:g} {label}"
    longer = rows[rows["name"].str.startswith(f"none, {LONGER}")].sort_values("x")
    more = ""
    if len(longer):
        points = " and ".join(f"{row['value']:.0f} dB at {row['x']:g}" for _, row in longer.iterrows())
        more = f";\n{longer['attack'].iloc[0].removeprefix(LONGER)} find {points}"
    return f"No defence: the PSNR {word}, {ends}{more}"


def headline(summary: pd.DataFrame) -> pd.DataFrame:
    """One line a defence: what attackers get, what it costs; ``n``: seeds under attack; seeds that were trained to the end."""
    table = tables.wide(summary, "defence", "variant", VARIANTS, MEASURED)
    table["identified, by the best attack"] = [identified(summary, variant) for variant in VARIANTS]
    attacked, trained = (
        [_seeds(summary, variant, scenario, metric) for variant in VARIANTS]
        for scenario, metric in (("adaptive", "psnr"), ("utility", "auc"))
    )
    lost = [_lost(diverged(summary, variant)) for variant in VARIANTS]
    table["n"] = [f"{a}; {t}{more}" for a, t, more in zip(attacked, trained, lost, strict=True)]
    return table[[bool(a or t) for a, t in zip(attacked, trained, strict=True)]].reset_index(drop=True)


def _seeds(summary: pd.DataFrame, variant: str, scenario: str, metric: str, **keys: str) -> int:
    where = {"variant": variant, "scenario": scenario, "metric": metric, **keys}
    return int(tables.select(summary, where)["n"].sum())


def identified(summary: pd.DataFrame, variant: str) -> str:
    """Of one image a batch, by the attack that identifies most, and its name; see `identifications`."""
    rows = identifications(summary)
    rows = rows[(rows["variant"] == variant) & (rows["strength"] == "")]
    if rows.empty:
        return ""
    best = rows.loc[rows["value"].idxmax()]
    return f"{tables.interval(best)} ({best['by']})"


def identifications(summary: pd.DataFrame) -> pd.DataFrame:
    """Rows of all attacks that say whose image it is, one image a batch, in the first round, and ``by``, the attack's name.

    A reconstruction that is best by PSNR need not be the most telling, and the fingerprint needs none.
    """
    built = summary["scenario"].isin(["naive", "adaptive"]) & summary["metric"].isin(
        ["retrieval", "retrieval_projected"]
    )
    compared = (summary["scenario"] == "fingerprint") & (summary["metric"] == "identified_top1")
    rows = summary[built | compared]
    others = [key for key in tables.keys(rows)[3:] if key not in ("attack", "strength")]
    rows = rows[(rows[others] == "").all(axis=1)]
    first = rows["scenario"].map({"fingerprint": "fingerprint"}).fillna("best by PSNR")
    by = rows["attack"].where(rows["attack"] != "", first)
    return rows.assign(by=by + rows["metric"].map({"retrieval_projected": ", projected"}).fillna(""))


def fingerprints(summary: pd.DataFrame) -> pd.DataFrame:
    """One line a defence and strength: what a comparison of gradients tells, chance in brackets; empty without such rows."""
    rows = summary[(summary["scenario"] == "fingerprint") & (summary["round"] == "")]
    lines = []
    for variant in VARIANTS:
        for strength in dict.fromkeys(rows["strength"][rows["variant"] == variant]):
            line = {"defence": variant, "strength": strength}
            for batch in dict.fromkeys(rows["batch"]):
                where = {"variant": variant, "strength": strength, "batch": batch}
                images = f", batch of {batch}" if batch else ""
                line["named" + images] = _share(summary, 1, **where)
                if not batch:
                    line["among ten"] = _share(summary, 10, **where)
                line[f"member, AUC{images}"] = tables.cell(
                    summary, 2, **where, scenario="fingerprint", metric="membership_auc"
                )
            line["member, true positives"] = tables.cell(
                summary, 2, **where | {"batch": ""}, scenario="fingerprint", metric="membership_tpr"
            )
            lines.append(line)
    return pd.DataFrame(lines).fillna("")


def _share(summary: pd.DataFrame, most: int, **where: str) -> str:
    row = tables.select(summary, where | {"scenario": "fingerprint", "metric": f"identified_top{most}"})
    return f"{tables.interval(row.iloc[0])} ({by_chance(summary, most, **where):.2g})" if len(row) else ""


def by_chance(summary: pd.DataFrame, most: int, **where: str) -> float:
    """What `identified_top<most>` gives who guesses: the images that are named over the candidates."""
    size = tables.row(summary, **where, scenario="fingerprint", metric="candidates")["value"]
    return min(1.0, most * int(where.get("batch") or 1) / size)


def exposed(summary: pd.DataFrame, variants: Sequence[str] = VARIANTS) -> dict[str, bool]:
    """By a defence at its usual strength: whether it is shown that the victim is among ten candidates more often than by chance.

    Of one image a batch; shown by the whole interval, of at least `medsec.evidence.claims.LEAST_RUNS` runs, and by a binomial
    test over all victims (the interval of three runs is too narrow).
    """
    from scipy import stats  # slow to import

    found = {}
    for variant in variants:
        where = {"variant": variant, "scenario": "fingerprint", "metric": "identified_top10"}
        row = tables.select(summary, where)
        if len(row):
            row, luck = row.iloc[0], by_chance(summary, 10, variant=variant)
            hits = round(row["value"] * row["n_items"])
            rare = stats.binomtest(hits, int(row["n_items"]), luck, alternative="greater").pvalue < RARE
            found[variant] = bool(row["n"] >= claims.LEAST_RUNS and row["low"] > luck and rare)
    return found


def told(summary: pd.DataFrame) -> str:
    """What `fingerprints` says, in words that follow from its rows; needs those of ``none`` and ``shadow_hardened``."""
    above, batch = exposed(summary), largest(summary)
    hidden = ", ".join(f"`{variant}`" for variant, seen in above.items() if not seen)
    where = {"scenario": "fingerprint", "metric": "membership_auc"}
    areas = {v: tables.select(summary, where | {"variant": v}) for v in above}
    leaks = [f"`{v}`" for v, row in areas.items() if not above[v] and len(row) and row.iloc[0]["low"] > 0.5]
    member = f" (yet membership is above chance under {', '.join(leaks)})" if leaks else ""
    more = f" ({_share(summary, 1, variant='none', batch=batch)} in a batch of {batch})" if batch else ""
    repair = {most: _share(summary, most, variant="shadow_hardened") for most in (1, 10)}
    outside = _share(summary, 10, variant="shadow_hardened", attack="like")
    less = f" ({outside} to one that has all clients' images and not whose they are)" if outside else ""
    left = "a short list of patients remains" if above["shadow_hardened"] else "no more than by chance"
    return (
        f"Without a defence comparing gradients names **{_share(summary, 1, variant='none')}** of the victims{more}; in brackets "
        f"at the end: chance. Not shown to be above chance, among ten: {hidden or 'none'}{member}. Public stand-ins, to a server "
        f"that has all of the client's images: {repair[1]} named, {repair[10]} among ten{less}: {left}."
    )


def named(summary: pd.DataFrame) -> pd.DataFrame:
    """Who is named, ``name, group, value, low, high``: by the best ``reconstruction``, by gradients of ``one`` image and of a
    ``batch``, the largest there is; only defences whose gradients were compared."""
    rows = identifications(summary)
    rows = rows[rows["strength"] == ""].sort_values("value")
    rows = rows.assign(group=rows["scenario"].map({"fingerprint": "one"}).fillna("reconstruction"))
    best = rows.groupby(["variant", "group"]).tail(1)
    most = largest(summary)
    compared = (summary["scenario"] == "fingerprint") & (summary["metric"] == "identified_top1")
    batch = summary[compared & (summary["batch"] == most) & (most != "")]
    batch = batch[(batch[["attack", "labels", "round", "strength"]] == "").all(axis=1)]
    listed = pd.concat([best, batch.assign(group="batch")])
    listed = listed[listed["variant"].isin(rows["variant"][rows["group"] == "one"])]
    order = {variant: place for place, variant in enumerate(VARIANTS)}
    listed = listed.sort_values("variant", key=lambda column: column.map(order), kind="stable")
    return listed.rename(columns={"variant": "name"})[["name", "group", "value", "low", "high"]].reset_index(drop=True)


def largest(summary: pd.DataFrame) -> str:
    """The largest batch whose gradients were compared; "" if only single images were."""
    batches = summary["batch"][summary["scenario"] == "fingerprint"]
    return max(batches, key=lambda batch: int(batch or 0), default="")


def diverged(summary: pd.DataFrame, variant: str, strength: str = "") -> int:
    """Seeds on which training with a defence found no classifier; those are in no mean."""
    return _seeds(summary, variant, "utility", "failed", strength=strength)


def _lost(seeds: int) -> str:
    return f" ({seeds} more diverged)" if seeds else ""


def plane(summary: pd.DataFrame, params: Params) -> pd.DataFrame:
    """One line a defence and strength, with the fewest seeds ``n`` and ``usual``, whether it is the headline's strength.

    ``diverged`` counts the seeds on which training found no classifier; a defence that never found one is left out.

    Columns ``variant, strength``; ``x, x_low, x_high``: AUC, difference to no defence on the same seeds; ``y, …``: adaptive
    PSNR; ``z, …``: identified, by the attack that identifies most (`identifications`).
    """
    axes = {}
    for axis, scenario, metric in (
        ("x", "utility", "auc_minus_none"),
        ("y", "adaptive", "psnr"),
        ("z", "", ""),
    ):
        rows = summary[(summary["scenario"] == scenario) & (summary["metric"] == metric)]
        if axis == "z":
            rows = identifications(summary).sort_values("value").groupby(["variant", "strength"]).tail(1)
            rows = rows.assign(attack="").drop(columns="by")
        if axis == "x":  # the reference itself has no difference
            none = tables.headline(summary, "auc")
            rows = pd.concat([none[none["variant"] == "none"].assign(value=0.0, low=0.0, high=0.0), rows])
        others = [key for key in tables.keys(rows)[3:] if key != "strength"]
        rows = rows[(rows[others] == "").all(axis=1)].set_index(["variant", "strength"])
        names = {"value": axis, "low": f"{axis}_low", "high": f"{axis}_high", "n": f"n_{axis}"}
        axes[axis] = rows[list(names)].rename(columns=names)
    both = axes["x"].join([axes["y"], axes["z"]], how="inner").reset_index()
    both["usual"] = both["strength"] == ""
    both["diverged"] = [
        diverged(summary, variant, strength)
        for variant, strength in zip(both["variant"], both["strength"], strict=True)
    ]
    both["strength"] = [
        strength or f"{usual_strength(variant, params):g}" if usual_strength(variant, params) is not None else ""
        for variant, strength in zip(both["variant"], both["strength"], strict=True)
    ]
    order = {variant: place for place, variant in enumerate(VARIANTS)}
    both = both.sort_values("strength", key=lambda column: pd.to_numeric(column).fillna(0))
    both = both.sort_values("variant", key=lambda column: column.map(order), kind="stable")
    return both.assign(n=both[["n_x", "n_y"]].min(axis=1)).drop(columns=["n_x", "n_y", "n_z"]).reset_index(drop=True)


def usual_strength(variant: str, params: Params) -> float | None:
    """The headline's strength of a defence that the record has at others too."""
    for name in params.record.inversion.strengths.get(variant, {}):
        return float(params.inversion.defences[variant][name])
    return None


TOO_FEW = "too few runs"


def standing(points: pd.DataFrame, variant: str, floor: float) -> pd.DataFrame:
    """Every point of `plane` against a defence at its usual strength.

    There are three measures: the PSNR (below the floor, which needs no gradient, it counts as the floor), the share that is
    identified, AUC. One is ``ahead`` that is clearly better in one of them (the intervals do not meet) and clearly worse in
    none; ``behind`` the other way round; ``trade`` if it is better in one and worse in another; else they are ``alike``. Fewer
    than `medsec.evidence.claims.LEAST_RUNS` runs have intervals of next to no width, which would decide anything: ``too few
    runs``.
    """
    (own,) = points[(points["variant"] == variant) & points["usual"]].to_dict("records")

    def better(a: dict, b: dict) -> list[bool]:
        lower = max(a["y_high"], floor) < max(b["y_low"], floor)
        return [lower, a["z_high"] < b["z_low"], a["x_low"] > b["x_high"]]

    lines = []
    for point in points.to_dict("records"):
        wins, losses = any(better(point, own)), any(better(own, point))
        word = {(True, False): "ahead", (False, True): "behind", (True, True): "trade", (False, False): "alike"}
        shown = {
            name: tables.interval(
                {"value": point[axis], "low": point[f"{axis}_low"], "high": point[f"{axis}_high"], "n": point["n"]},
                digits,
            )
            for name, axis, digits in (
                ("PSNR, adaptive", "y", 1),
                ("identified", "z", 2),
                ("AUC, minus none", "x", 3),
            )
        }
        is_own, enough = point["variant"] == variant and point["usual"], point["n"] >= claims.LEAST_RUNS
        lines.append(
            {
                "defence": point["variant"],
                "strength": point["strength"],
                **shown,
                "n": f"{point['n']}{_lost(point['diverged'])}",
                f"against {variant}": "" if is_own else word[wins, losses] if enough else TOO_FEW,
            }
        )
    return pd.DataFrame(lines)


def by_attack(summary: pd.DataFrame) -> pd.DataFrame:
    """One line a defence, one column an adaptive attack: its PSNR less that of ``ig`` on the same victims, in dB."""
    rows = summary[(summary["metric"] == "psnr_minus_naive") & (summary["scenario"] == "adaptive")]
    attacks = list(dict.fromkeys(rows["attack"]))
    where = {"scenario": "adaptive", "metric": "psnr_minus_naive"}
    names = [variant for variant in VARIANTS if variant in set(rows["variant"])]
    return tables.wide(summary, "defence", "variant", names, {a: (1, {**where, "attack": a}) for a in attacks})


def sweeps(summary: pd.DataFrame, params: Params, metric: str = "psnr") -> dict[str, pd.DataFrame]:
    """What the adaptive attacker gets over the batch size and over the rounds (`plots.curves`); empty without such rows.

    Over the batch size also what a longer search gets without a defence, as a curve of its own, if it was recorded.
    """
    rows = summary[(summary["scenario"] == "adaptive") & (summary["metric"] == metric)]
    rows = rows[rows["variant"].isin(params.record.inversion.variants)]
    found = {}
    for key in ("batch", "round"):
        others = [name for name in tables.keys(rows)[3:] if name != key]
        mine = rows[(rows[others] == "").all(axis=1) & (rows[key] != "")]
        if mine.empty:
            return {}
        found[key] = mine.assign(name=mine["variant"], x=mine[key].astype(float))
    longer = summary[summary["attack"].str.startswith(LONGER) & (summary["metric"] == metric)]
    longer = longer.assign(name="none, " + longer["attack"], x=pd.to_numeric(longer["batch"]))
    found["batch"] = pd.concat([found["batch"], longer], ignore_index=True)
    return found


def conditions(summary: pd.DataFrame) -> pd.DataFrame:
    """One line a defence and condition of the untrained network other than one image, its label and one step."""
    rows = summary[(summary["scenario"] == "adaptive") & (summary["metric"] == "psnr") & (summary["region"] == "")]
    rows = rows[(rows[["round", "attack", "strength"]] == "").all(axis=1)]
    rows = rows[(rows[["batch", "labels", "steps"]] != "").any(axis=1)]
    lines = []
    for row in rows.to_dict("records"):
        where = {key: row[key] for key in ("variant", "scenario", "batch", "labels", "steps")}
        lines.append(
            {
                "defence": row["variant"],
                "images in a batch": row["batch"] or "1",
                "labels": row["labels"] or "known",
                "local steps": row["steps"] or "1",
                "PSNR, adaptive": tables.cell(summary, 1, **where, metric="psnr"),
                "retrieval, adaptive": tables.cell(summary, 2, **where, metric="retrieval"),
                "n": row["n"],
            }
        )
    return pd.DataFrame(lines)


def paper(summary: pd.DataFrame) -> pd.DataFrame:
    """The abstract's numbers beside ours: by BatchNorm's statistics and gradients, by gradients, and adaptively."""
    cost = {"gradients": {"scenario": "utility"}}
    leak = {
        "gradients": {"scenario": "naive"},
        "knowing it": {"scenario": "adaptive"},
        "with statistics": {"scenario": "naive", "attack": "bn"},
    }
    lines = [
        {"what": what, "paper": stated}
        | {
            f"{name}: {label}": tables.cell(summary, digits, variant=f"shadow_{name}", metric=metric, **where)
            for name in ("released", "described")
            for label, where in conditions.items()
        }
        for what, stated, metric, digits, conditions in (
            ("PSNR, difference to no defence (dB)", "-3.73", "psnr_minus_none", 1, leak),
            ("SSIM, difference to no defence", "-0.2", "ssim_minus_none", 2, leak),
            ("macro-F1, difference to no defence", "not stated", "macro_f1_minus_none", 3, cost),
            ("macro-F1, difference to the mean of the baselines", "> -0.01", "macro_f1_minus_baselines", 3, cost),
        )
    ]
    return pd.DataFrame(lines).fillna("")
