"""Views of notebook 03's summary table: what its figures and tables show. All read a table, none computes a reconstruction."""

import pandas as pd

from experiments.gia_defense.clients import VARIANTS
from experiments.params import Params
from medsec.evidence import claims, tables

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
    """Retrieval by the attack that identifies most, and its name: a reconstruction best by PSNR need not be the most telling."""
    rows = summary[(summary["variant"] == variant) & (summary["metric"] == "retrieval")]
    rows = rows[rows["scenario"].isin(["naive", "adaptive"])]
    others = [key for key in tables.keys(rows)[3:] if key != "attack"]
    rows = rows[(rows[others] == "").all(axis=1)]
    if rows.empty:
        return ""
    best = rows.loc[rows["value"].idxmax()]
    return f"{tables.interval(best)} ({best['attack'] or 'best by PSNR'})"


def diverged(summary: pd.DataFrame, variant: str, strength: str = "") -> int:
    """Seeds on which training with a defence found no classifier; those are in no mean."""
    return _seeds(summary, variant, "utility", "failed", strength=strength)


def _lost(seeds: int) -> str:
    return f" ({seeds} more diverged)" if seeds else ""


def plane(summary: pd.DataFrame, params: Params) -> pd.DataFrame:
    """One line a defence and strength, with the fewest seeds ``n`` and ``usual``, whether it is the headline's strength.

    ``diverged`` counts the seeds on which training found no classifier; a defence that never found one is left out.

    Columns ``variant, strength``; ``x, x_low, x_high``: AUC, difference to no defence on the same seeds; ``y, …``: adaptive
    PSNR; ``z, …``: adaptive retrieval in a projected gallery.
    """
    axes = {}
    for axis, scenario, metric in (
        ("x", "utility", "auc_minus_none"),
        ("y", "adaptive", "psnr"),
        ("z", "adaptive", "retrieval_projected"),
    ):
        rows = summary[(summary["scenario"] == scenario) & (summary["metric"] == metric)]
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

    There are three measures: the PSNR (below the floor, which needs no gradient, it counts as the floor), retrieval, AUC. One
    is ``ahead`` that is clearly better in one of them (the intervals do not meet) and clearly worse in none; ``behind`` the
    other way round; ``trade`` if it is better in one and worse in another; else they are ``alike``. Fewer than
    `medsec.evidence.claims.LEAST_RUNS` runs have intervals of next to no width, which would decide anything: ``too few runs``.
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
                ("retrieval projected, adaptive", "z", 2),
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
    """What the adaptive attacker gets over the batch size and over the rounds (`plots.curves`); empty without such rows."""
    rows = summary[(summary["scenario"] == "adaptive") & (summary["metric"] == metric)]
    rows = rows[rows["variant"].isin(params.record.inversion.variants)]
    found = {}
    for key in ("batch", "round"):
        others = [name for name in tables.keys(rows)[3:] if name != key]
        mine = rows[(rows[others] == "").all(axis=1) & (rows[key] != "")]
        if mine.empty:
            return {}
        found[key] = mine.assign(name=mine["variant"], x=mine[key].astype(float))
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
