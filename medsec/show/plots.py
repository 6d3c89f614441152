"""Figures: one style, functions that take tables or arrays and return ``(fig, axes)``.

Colours are those of Okabe & Ito, told apart by the colour-blind; in grey the line styles and markers tell them apart.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medsec.show import png

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
    """Write a PNG, made small (`medsec.show.png`), whose bytes depend on nothing but what it shows."""
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
