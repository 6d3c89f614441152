"""Figures of notebook 01."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medsec.show.plots import LOOK, WIDTH, forest


def over_rounds(ax: Axes, table: pd.DataFrame, look: str, label: str | None = None) -> None:
    """Mean over runs per round as a line, its interval as a band. ``table``: summary rows with a ``round`` each."""
    colour, line, _ = LOOK[look]
    table = table.assign(round=table["round"].astype(int)).sort_values("round")
    ax.plot(table["round"], table["value"], color=colour, linestyle=line, linewidth=1.8, label=label or look)
    ax.fill_between(table["round"], table["low"], table["high"], color=colour, alpha=0.18, linewidth=0)
    ax.set_xlabel("round")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def trigger_over_rounds(summary: pd.DataFrame, title: str, boost_from: int):
    """Trigger rate of the averaged generator over rounds, one line a variant."""
    fig, ax = plt.subplots(figsize=(WIDTH, 2.9))
    chosen = summary[(summary["metric"] == "trigger_rate") & (summary["client"] == "server") & (summary["round"] != "")]
    for variant in ("clean", "poison", "boost"):
        rows = chosen[chosen["variant"] == variant]
        if variant == "boost":  # it continues the poison run
            rows = rows[rows["round"].astype(int) >= boost_from]
        over_rounds(ax, rows, variant)
    ax.axvline(boost_from, color="0.4", linewidth=0.8, linestyle=":")
    ax.text(boost_from, 1.03, "boost starts", ha="center", va="bottom", fontsize=8, color="0.3")
    ax.set(ylim=(-0.03, 1.03), ylabel="trigger rate of the averaged G")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.set_title(title, pad=16)
    return fig, ax


def mechanism(per_seat: pd.DataFrame, panels: Mapping[str, str], title: str):
    """One panel a metric: attacker's seat and the others over rounds under attack; the clean run of the same seats dotted.

    Args:
        per_seat: columns ``variant, metric, client, round, value, low, high`` with client ``attacker``, ``others`` or
            ``server``.
        panels: metric -> label of the vertical axis.
        title: of the figure.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.7))
    for ax, (metric, label) in zip(axes, panels.items(), strict=True):
        part = per_seat[per_seat["metric"] == metric]
        for seat in ("attacker", "others", "server"):
            rows = part[(part["client"] == seat) & (part["variant"] == "poison")]
            if len(rows):
                over_rounds(ax, rows, seat, {"server": "averaged G"}.get(seat, seat))
        clean = part[(part["client"] == "attacker") & (part["variant"] == "clean")].sort_values("round")
        ax.plot(
            clean["round"], clean["value"], color="0.35", linestyle=":", linewidth=1.4, label="same seat, no attack"
        )
        ax.set_title(label, fontsize=9, weight="normal")
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.suptitle(title, x=0.01, y=1.0, ha="left", weight="bold", fontsize=10)
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    fig.legend(handles.values(), handles, loc="lower center", ncols=len(handles))
    return fig, axes


def sweeps(table: pd.DataFrame, title: str):
    """Trigger rate under every change of one factor; clean is a control where it exists.

    Args:
        table: columns ``name, variant, value, low, high, n``.
        title: of the figure.
    """
    looks = {v: (*LOOK[v][::2], at, v) for at, v in zip((-0.2, 0.0, 0.2), ("clean", "poison", "boost"), strict=True)}
    table = table.rename(columns={"variant": "group"})
    return forest(table, title, "trigger rate of the averaged G", looks, xlim=(-0.03, 1.03))


def attribution_maps(maps: Mapping[str, np.ndarray], title: str) -> tuple[Figure, Sequence[Axes]]:
    """Signed attribution maps (H, W) on one common scale; the sign is drawn as brightness, so grey print keeps it."""
    fig, axes = plt.subplots(1, len(maps), figsize=(WIDTH, WIDTH / len(maps) + 0.35), layout="constrained")
    top = max(float(np.abs(values).max()) for values in maps.values())
    for ax, (label, values) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(100 * values, vmin=-100 * top, vmax=100 * top, cmap="cividis", interpolation="nearest")
        ax.set_title(label, fontsize=9, weight="normal")
        ax.axis("off")
    bar = fig.colorbar(image, ax=axes, shrink=0.75, pad=0.02)
    bar.set_label("% of attribution\n(dark: synthetic, bright: real)")
    fig.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    return fig, axes
