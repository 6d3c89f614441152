"""Figures: one style, functions that take tables or arrays and return ``(fig, axes)``.

Colours are those of Okabe & Ito, told apart by the colour-blind; in grey the line styles and markers tell them apart.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medsec import png

WIDTH = 7.0  # inches; the text width of a page
LOOK = {  # colour, line style, marker of everything that is compared
    "clean": ("#009E73", "-", "o"),
    "poison": ("#E69F00", "--", "s"),
    "boost": ("#D55E00", "-.", "^"),
    "attacker": ("#D55E00", "-.", "^"),
    "others": ("#0072B2", "-", "o"),
    "server": ("#000000", "--", "s"),
    "real": ("#666666", ":", "D"),
}
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "medsec",
    "image.cmap": "gray",
}


def use_style() -> None:
    """Apply the companion's style to all figures that follow."""
    sns.set_theme(context="paper", style="white", rc=STYLE)
    plt.rcParams.update(STYLE)


def save(fig: Figure, file: Path) -> None:
    """Write a PNG, made small (`medsec.png`), whose bytes depend on nothing but what it shows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", bbox_inches="tight", metadata={"Software": None})
    file.write_bytes(png.compact(drawn.getvalue()))


def gallery(
    rows: Mapping[str, np.ndarray],
    title: str,
    *,
    overlays: Mapping[str, np.ndarray] | None = None,
    frames: Mapping[str, np.ndarray] | None = None,
):
    """Rows of images, labelled at the left.

    Args:
        rows: label -> (n, C, H, W) in [0, 1] or uint8, C = 1 or 3; shorter rows end in white.
        title: of the figure.
        overlays: label -> (n, H, W) bool, outlined in its row.
        frames: label -> (n,) bool, images to be framed.
    """
    columns = max(len(images) for images in rows.values())
    left = 0.012 * max(len(label) for label in rows) + 0.02  # of the labels, share of the figure's width
    cell = min(WIDTH / (columns + 1.2), WIDTH * (1 - left) / columns)
    fig, axes = plt.subplots(len(rows), columns, figsize=(WIDTH, cell * len(rows) + 0.45), squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for i, ax in enumerate(line):
            ax.axis("off")
            if i < len(images):
                show(ax, images[i])
                if frames is not None and frames[label][i]:
                    edge = images.shape[-1]
                    ax.add_patch(plt.Rectangle((-0.5, -0.5), edge, edge, fill=False, color="#D55E00", linewidth=2.5))
                if overlays is not None and label in overlays and overlays[label][i].any():
                    ax.contour(overlays[label][i], levels=[0.5], colors="#E69F00", linewidths=1.0)
        line[0].text(-0.12, 0.5, label, transform=line[0].transAxes, ha="right", va="center")
    fig.subplots_adjust(left=left, right=1, bottom=0, top=1 - 0.4 / fig.get_figheight(), wspace=0.06, hspace=0.06)
    fig.suptitle(title, x=0.0, y=1.0, ha="left", va="top", weight="bold", fontsize=10)
    return fig, axes


def show(ax: Axes, image: np.ndarray) -> None:
    """One (C, H, W) image, in [0, 1] or uint8, on its full grey scale."""
    image = image / 255 if image.dtype == np.uint8 else image
    ax.imshow(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1), vmin=0, vmax=1, interpolation="nearest")
    ax.axis("off")


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


def dots(table: pd.DataFrame, title: str, label: str, *, log: bool = False, runs: pd.DataFrame | None = None):
    """Value and interval of each row of a table, one line a row; single runs as small dots.

    Args:
        table: columns ``name, value, low, high``, drawn from top to bottom.
        title, label: of the figure and of the horizontal axis.
        log: logarithmic axis.
        runs: columns ``name, value``.
    """
    fig, ax = plt.subplots(figsize=(WIDTH, 0.34 * len(table) + 0.9))
    for i, row in enumerate(table.itertuples()):
        colour, _, marker = LOOK.get(row.name, LOOK["real"])
        if runs is not None:
            single = runs.loc[runs["name"] == row.name, "value"]
            ax.plot(single, np.full(len(single), i), ".", color=colour, alpha=0.5, markersize=5)
        ax.hlines(i, row.low, row.high, color=colour, linewidth=2)
        ax.plot(row.value, i, marker, color=colour, markersize=6)
    ax.set(yticks=range(len(table)), yticklabels=table["name"], xlabel=label, title=title)
    ax.invert_yaxis()
    ax.set_ylim(len(table) - 0.5, -0.5)
    if log:
        ax.set_xscale("log")
    return fig, ax


def sweeps(table: pd.DataFrame, title: str):
    """Trigger rate under every change of one factor, poison and boost side by side, clean as a control where it exists.

    Args:
        table: columns ``name, variant, value, low, high, n``; names are drawn from top to bottom in order of appearance.
        title: of the figure.
    """
    names = list(dict.fromkeys(table["name"]))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.3 * len(names) + 1.0))
    for shift, variant in zip((-0.2, 0.0, 0.2), ("clean", "poison", "boost"), strict=True):
        colour, _, marker = LOOK[variant]
        part = table[table["variant"] == variant]
        at = np.array([names.index(name) for name in part["name"]]) + shift
        ax.hlines(at, part["low"], part["high"], color=colour, linewidth=2)
        ax.plot(part["value"], at, marker, color=colour, markersize=5, label=variant)
        single = (part["n"] == 1).to_numpy()  # no interval: hollow
        ax.plot(part["value"][single], at[single], marker, color=colour, markerfacecolor="white", markersize=5)
    ax.set(
        yticks=range(len(names)),
        yticklabels=names,
        xlabel="trigger rate of the averaged G",
        xlim=(-0.03, 1.03),
        title=title,
    )
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig, ax


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


def curves(
    panels: Mapping[str, pd.DataFrame],
    title: str,
    xlabel: str,
    *,
    ylim: tuple[float, float] | None = None,
    mark: float | None = None,
):
    """Several lines with intervals over a numeric horizontal axis, one panel a quantity.

    Args:
        panels: label of the vertical axis -> columns ``name, x, value, low, high``.
        title, xlabel: of the figure and of the horizontal axes.
        ylim: of every panel.
        mark: where a dotted vertical line stands.
    """
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.9), squeeze=False)
    styles = [("#000000", ":", "D"), ("#0072B2", "-", "o"), ("#D55E00", "-.", "^"), ("#009E73", "--", "s")]
    names = list(dict.fromkeys(name for table in panels.values() for name in table["name"]))  # alike in all panels
    for ax, (label, table) in zip(axes[0], panels.items(), strict=True):
        for name, rows in table.groupby("name", sort=False):
            colour, line, marker = styles[names.index(name) % len(styles)]
            rows = rows.sort_values("x")
            ax.plot(rows["x"], rows["value"], color=colour, linestyle=line, marker=marker, markersize=4, label=name)
            ax.vlines(rows["x"], rows["low"], rows["high"], color=colour, linewidth=1)
        ax.set(xlabel=xlabel, ylabel=label)
        if ylim:
            ax.set_ylim(*ylim)
        if mark is not None:
            ax.axvline(mark, color="0.4", linewidth=0.8, linestyle=":")
    handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.suptitle(title, x=0.01, y=1.0, ha="left", weight="bold", fontsize=10)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    fig.legend(handles.values(), handles, loc="lower center", ncols=len(handles))
    return fig, axes


def stacked_bars(ax: Axes, counts: pd.DataFrame, label: str) -> None:
    """Stacked bars of image counts: one bar a row of ``counts``, one segment a column (class)."""
    greys = plt.get_cmap("cividis")(np.linspace(0.15, 0.9, counts.shape[1]))
    bottom = np.zeros(len(counts))
    for colour, (name, values) in zip(greys, counts.items(), strict=True):
        ax.bar(counts.index.astype(str), values, bottom=bottom, color=colour, label=name, edgecolor="white")
        bottom += values.to_numpy()
    ax.set(ylabel="images", title=label)


def heatmap(ax: Axes, table: pd.DataFrame, title: str, *, low: float, high: float) -> None:
    """Annotated matrix of shares."""
    sns.heatmap(table, ax=ax, vmin=low, vmax=high, cmap="cividis", annot=True, fmt=".2f", cbar=False, square=True)
    ax.set_title(title)


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
