"""Figures of notebook 02."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from medsec.show.plots import LOOK, WIDTH


def released_weights(weights: pd.DataFrame, null: pd.DataFrame, title: str):
    """Left: the released rule's weights of every client over rounds, one panel a seed. Right: its null simulation.

    Args:
        weights: columns ``seed, round, client, value``.
        null: columns ``metric, m, value, low, high`` with the metrics ``any_flag`` and ``acts``.
        title: of the figure.
    """
    seeds = sorted(weights["seed"].unique())
    fig, axes = plt.subplots(
        1, len(seeds) + 1, figsize=(WIDTH, 2.8), gridspec_kw={"width_ratios": [1] * len(seeds) + [1.35]}
    )
    lines = ["-", "--", "-.", ":"]
    for ax, seed in zip(axes, seeds, strict=False):
        part = weights[weights["seed"] == seed].assign(round=lambda t: t["round"].astype(int)).sort_values("round")
        for k, (client, rows) in enumerate(part.groupby("client")):
            colour = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"][k % 4]
            ax.plot(rows["round"], rows["value"], color=colour, linestyle=lines[k % 4], label=f"client {client}")
        ax.axhline(1 / part["client"].nunique(), color="0.5", linewidth=0.8)
        ax.set(ylim=(-0.03, 1.03), xlabel="round")
        ax.set_title(f"seed {seed}", fontsize=9, weight="normal")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0].set_ylabel("weight in the average")
    axes[0].legend(fontsize=7, loc="upper left", handlelength=1.8)
    for metric, label, marker, colour in (
        ("any_flag", "somebody flagged", "o", "#D55E00"),
        ("acts", "rule acts", "s", "#000000"),
    ):
        part = null[null["metric"] == metric]
        at = np.arange(len(part))
        axes[-1].vlines(at, part["low"], part["high"], color=colour)
        axes[-1].plot(at, part["value"], marker, color=colour, label=label)
        axes[-1].set_xticks(at, part["m"])
    axes[-1].set(ylim=(-0.03, 1.03), xlabel="honest clients", ylabel="share of rounds")
    axes[-1].set_title("i.i.d. losses, simulated", fontsize=9, weight="normal")
    axes[-1].legend(fontsize=7, loc="lower right")
    fig.suptitle(title, x=0.01, y=1.0, ha="left", weight="bold", fontsize=10)
    fig.tight_layout()
    return fig, axes


def evidence_over_rounds(panels: Mapping[str, pd.DataFrame], threshold: float, title: str):
    """Each client's evidence over rounds, every seed a line; attackers thick and marked.

    Args:
        panels: label -> columns ``seed, round, client, value, attacker`` (bool).
        threshold: above which a client is flagged.
        title: of the figure.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.8), sharey=True)
    for ax, (label, table) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for (_, _, attacker), rows in table.groupby(["seed", "client", "attacker"]):
            rows = rows.assign(round=rows["round"].astype(int)).sort_values("round")
            colour, _, marker = LOOK["attacker" if attacker else "others"]
            ax.plot(
                rows["round"],
                rows["value"],
                color=colour,
                marker=marker if attacker else None,
                markersize=3.5,
                linewidth=1.6 if attacker else 0.7,
                alpha=1 if attacker else 0.6,
                label="attacker" if attacker else "honest client",
            )
        ax.axhline(threshold, color="0.2", linestyle="--", linewidth=1, label="flag")
        ax.set_title(label, fontsize=9, weight="normal")
        ax.set_xlabel("round")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    np.atleast_1d(axes)[0].set_ylabel("evidence (z)")
    handles = {label: h for ax in np.atleast_1d(axes) for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.suptitle(title, x=0.01, y=1.0, ha="left", weight="bold", fontsize=10)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    fig.legend(handles.values(), handles, loc="lower center", ncols=len(handles))
    return fig, axes


def matrix(table: pd.DataFrame, title: str, label: str):
    """Annotated matrix of shares, rows and columns named; missing cells stay white."""
    import seaborn as sns  # slow to import

    fig, ax = plt.subplots(figsize=(WIDTH, 0.34 * len(table) + 1.7))
    sns.heatmap(
        table,
        ax=ax,
        vmin=0,
        vmax=1,
        cmap="cividis",
        annot=True,
        fmt=".2f",
        annot_kws={"fontsize": 7.5},
        cbar_kws={"label": label, "shrink": 0.8},
    )
    ax.tick_params(axis="x", rotation=40)
    for text in ax.get_xticklabels():
        text.set_ha("right")
    ax.set(xlabel="", ylabel="")
    ax.set_title(title)
    return fig, ax
