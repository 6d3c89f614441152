"""Figures of notebook 03, in the style of `medsec.show.plots`."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from medsec.show import plots
from medsec.show.plots import WIDTH

FAMILIES = {  # look of a defence in the plane: colour, marker, and what the legend says
    "none": ("#000000", "*", "no defence"),
    "gradient": ("#0072B2", "o", "on the gradient"),
    "noise": ("#D55E00", "^", "noise on the image, the shadow defence among it"),
    "substitute": ("#009E73", "s", "another image: suppression, and its controls"),
}


def privacy(table: pd.DataFrame, floor: float, title: str):
    """What attackers get out of each defence: PSNR of the naive and the adaptive attacker, and of exact recovery.

    Args:
        table: columns ``variant, scenario, value, low, high``; scenarios ``naive``, ``adaptive``, ``ceiling``.
        floor: PSNR without any gradient, drawn as a line.
        title: of the figure.
    """
    looks = {
        "naive": ("#0072B2", "o", -0.13, "attacker who does not know the defence"),
        "adaptive": ("#D55E00", "^", 0.13, "attacker who does"),
        "ceiling": ("#000000", "|", 0.0, "exact recovery of the changed image"),
    }
    label = "PSNR of the reconstruction (dB); lower is more private"
    lines = {"no gradient: the mean image of the class": floor}
    return plots.forest(
        table.rename(columns={"variant": "name", "scenario": "group"}), title, label, looks, lines=lines
    )


def named(table: pd.DataFrame, batch: str, chance: float, title: str):
    """Of how many victims a server says whose image it is: by a reconstruction, and by comparing gradients.

    Args:
        table: `tables.named`.
        batch: images in the largest batch, "" if there is none.
        chance: for one image, drawn as a line.
        title: of the figure.
    """
    looks = {
        "reconstruction": ("#0072B2", "o", -0.2, "the best reconstruction, one image a batch"),
        "one": ("#D55E00", "^", 0.0, "gradients compared (fingerprint), one image a batch"),
        "batch": ("#000000", "s", 0.2, f"gradients compared, batch of {batch}" if batch else ""),
    }
    label = "share of the victims that are named; lower is more private"
    return plots.forest(table, title, label, looks, lines={"chance, one image": chance}, xlim=(-0.03, 1.03))


def plane(points: pd.DataFrame, family: dict[str, str], floor: float, title: str):
    """Privacy against utility: every defence as a point with both intervals, its name in a column at the right.

    A defence that was measured at several strengths is a curve; its name stands at the usual strength, the others are hollow.

    Args:
        points: columns ``variant, usual``, ``x, x_low, x_high`` (AUC, difference to no defence), ``y, y_low, y_high`` (dB).
        family: of each variant, a key of `FAMILIES`.
        floor: PSNR without any gradient, drawn as a line.
        title: of the figure.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 4.8), layout="constrained")
    for name, (colour, marker, label) in FAMILIES.items():
        rows = points[points["variant"].map(family) == name]
        ax.hlines(rows["y"], rows["x_low"], rows["x_high"], color=colour, linewidth=0.8)
        ax.vlines(rows["x"], rows["y_low"], rows["y_high"], color=colour, linewidth=0.8)
        for _, curve in rows.groupby("variant", sort=False):
            ax.plot(curve["x"], curve["y"], "--", color=colour, linewidth=0.7)
        look = {"linestyle": "none", "color": colour, "markersize": 10 if marker == "*" else 5}
        usual, others = rows[rows["usual"]], rows[~rows["usual"]]
        ax.plot(usual["x"], usual["y"], marker, label=label, **look)
        ax.plot(others["x"], others["y"], marker, markerfacecolor="white", **look)
    ax.axhline(floor, color="0.4", linewidth=0.9, linestyle=":", label="no gradient: the mean image of the class")
    ax.set(
        xlabel="AUC, difference to training without a defence",
        ylabel="PSNR of the best reconstruction (dB)\nlower is more private",
    )
    _names_at_the_right(ax, points[points["usual"]])
    fig.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    fig.legend(loc="outside lower center", ncols=2)
    return fig, ax


def _names_at_the_right(ax: Axes, points: pd.DataFrame) -> None:
    """Every point's name, evenly spaced so that none covers another, with a thin line to its point."""
    order = points.sort_values("y", ascending=False)
    for height, point in zip(np.linspace(0.98, 0.02, len(order)), order.to_dict("records"), strict=True):
        ax.annotate(
            point["variant"],
            (point["x"], point["y"]),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6, "shrinkB": 3},
        )


def changes(images: np.ndarray, deltas: dict[str, np.ndarray], lesions: np.ndarray | None, title: str):
    """What defences add to images: grey is nothing, white and black the largest change in the row; lesions outlined.

    Args:
        images: (n, C, S, S) in [0, 1].
        deltas: name -> (n, C, S, S).
        lesions: (n, S, S) bool, or None.
        title: of the figure.
    """
    rows = {"image": images}
    for name, delta in deltas.items():
        rows[name] = 0.5 + 0.5 * delta / max(float(np.abs(delta).max()), 1e-9)
    outlined = None if lesions is None else dict.fromkeys(rows, lesions)
    return plots.gallery(rows, title, overlays=outlined)
