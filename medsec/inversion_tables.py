"""Views of notebook 03's summary table: what its figures and tables show. All read a table, none computes a reconstruction."""

import pandas as pd

from medsec import tables
from medsec.inversion_clients import VARIANTS
from medsec.params import Params

MEASURED = (  # scenario, metric, digits
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


def cell(summary: pd.DataFrame, digits: int = 2, **where: str) -> str:
    """The row that matches as text, value and interval; empty where there is none."""
    found = tables.select(summary, where)
    return tables.interval(found.iloc[0], digits) if len(found) else ""


def headline(summary: pd.DataFrame) -> pd.DataFrame:
    """One line a defence: what attackers get, and what it costs; ``n`` are the seeds under attack and those of training."""
    lines = []
    for variant in VARIANTS:
        line = {"defence": variant}
        for scenario, metric, digits in MEASURED:
            name = f"{metric.replace('_', ' ')}, {scenario}"
            line[name] = cell(summary, digits, variant=variant, scenario=scenario, metric=metric)
        runs = [
            tables.select(summary, {"variant": variant, "scenario": scenario, "metric": metric})["n"].sum()
            for scenario, metric in (("adaptive", "psnr"), ("utility", "auc"))
        ]
        line["n"] = f"{runs[0]}; {runs[1]}"
        lines.append(line)
    return pd.DataFrame([line for line in lines if line["n"] != "0; 0"])


def plane(summary: pd.DataFrame) -> pd.DataFrame:
    """By defence: ``x, x_low, x_high`` (AUC), ``y, y_low, y_high`` (adaptive PSNR), the fewest seeds ``n``."""
    axes = {}
    for axis, scenario, metric in (("x", "utility", "auc"), ("y", "adaptive", "psnr")):
        rows = tables.headline(summary, metric)
        rows = rows[rows["scenario"] == scenario].set_index("variant")[["value", "low", "high", "n"]]
        axes[axis] = rows.rename(columns={"value": axis, "low": f"{axis}_low", "high": f"{axis}_high"})
    both = axes["x"].join(axes["y"], how="inner", lsuffix="_x", rsuffix="_y")
    return both.assign(n=both[["n_x", "n_y"]].min(axis=1)).drop(columns=["n_x", "n_y"])


def by_attack(summary: pd.DataFrame) -> pd.DataFrame:
    """One line a defence, one column an adaptive attack: its PSNR less that of ``ig`` on the same victims, in dB."""
    rows = summary[(summary["metric"] == "psnr_minus_naive") & (summary["scenario"] == "adaptive")]
    attacks = list(dict.fromkeys(rows["attack"]))
    lines = [
        {
            "defence": variant,
            **{
                a: cell(summary, 1, variant=variant, scenario="adaptive", metric="psnr_minus_naive", attack=a)
                for a in attacks
            },
        }
        for variant in VARIANTS
        if variant in set(rows["variant"])
    ]
    return pd.DataFrame(lines)


def sweeps(summary: pd.DataFrame, params: Params) -> dict[str, pd.DataFrame]:
    """PSNR of the adaptive attacker over the batch size and over the rounds (`plots.curves`); empty without such rows."""
    rows = summary[(summary["scenario"] == "adaptive") & (summary["metric"] == "psnr")]
    rows = rows[rows["variant"].isin(params.record.inversion.variants)]
    found = {}
    for key in ("batch", "round"):
        others = [name for name in tables.keys(rows)[3:] if name != key]
        mine = rows[(rows[others] == "").all(axis=1) & (rows[key] != "")]
        if mine.empty:
            return {}
        found[key] = mine.assign(name=mine["variant"], x=mine[key].astype(float))
    return found


def paper(summary: pd.DataFrame) -> pd.DataFrame:
    """The abstract's numbers beside ours: by BatchNorm's statistics and gradients, by gradients, and adaptively."""
    lines = [
        {
            "what": "PSNR, difference to no defence (dB)",
            "paper": "-3.73",
            **_differences(summary, "psnr", 1),
        },
        {"what": "SSIM, difference to no defence", "paper": "-0.2", **_differences(summary, "ssim", 2)},
        {"what": "macro-F1, difference to no defence", "paper": "not stated", **_costs(summary, "macro_f1_minus_none")},
        {
            "what": "macro-F1, difference to the mean of the baselines",
            "paper": "> -0.01",
            **_costs(summary, "macro_f1_minus_baselines"),
        },
    ]
    return pd.DataFrame(lines).fillna("")


def _differences(summary: pd.DataFrame, metric: str, digits: int) -> dict[str, str]:
    found = {}
    for name in ("released", "described"):
        for label, scenario in (("gradients", "naive"), ("knowing it", "adaptive")):
            text = cell(summary, digits, variant=f"shadow_{name}", scenario=scenario, metric=f"{metric}_minus_none")
            found[f"{name}: {label}"] = text
        text = cell(
            summary, digits, variant=f"shadow_{name}", scenario="naive", metric=f"{metric}_minus_none", attack="bn"
        )
        found[f"{name}: with statistics"] = text
    return found


def _costs(summary: pd.DataFrame, metric: str) -> dict[str, str]:
    return {
        f"{name}: gradients": cell(summary, 3, variant=f"shadow_{name}", scenario="utility", metric=metric)
        for name in ("released", "described")
    }
