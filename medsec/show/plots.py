"""Figures: one style, functions that take tables or arrays and return ``(fig, axes)``.

Colours are those of Okabe & Ito, told apart by the colour-blind; in grey the line styles and markers tell them apart.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from cycler import cycler
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medsec.show import png

__all__ = ["WIDTH", "curves", "forest", "gallery", "save", "show", "use_style"]

WIDTH = 7.0  # inches; the text width of a page
FILES = ("agg", "cairo", "pdf", "pgf", "ps", "svg", "template")  # Matplotlib's backends that show nothing
INK, LINE = ".15", 0.8
COLOURS = "4C72B0 DD8452 55A868 C44E52 8172B3 937860 DA8BC3 8C8C8C CCB974 64B5CD"
TICKS = {
    "color": INK,
    "labelsize": 11 * LINE,
    "major.size": 6 * LINE,
    "major.width": 1.25 * LINE,
    "minor.size": 4 * LINE,
    "minor.width": LINE,
}
# As of seaborn's theme "white" in its context "paper", without seaborn: it takes long to import, and brings scipy.stats.
THEME = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 12 * LINE,
    "axes.linewidth": 1.25 * LINE,
    "axes.prop_cycle": cycler(color=[f"#{colour}" for colour in COLOURS.split()]),
    "font.sans-serif": ["Arial", "DejaVu Sans", "Liberation Sans", "Bitstream Vera Sans", "sans-serif"],
    "grid.color": ".8",
    "legend.fontsize": 11 * LINE,
    "legend.title_fontsize": 12 * LINE,
    "lines.linewidth": 1.5 * LINE,
    "lines.markersize": 6 * LINE,
    "lines.solid_capstyle": "round",
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
    "patch.linewidth": LINE,
    "text.color": INK,
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in TICKS.items()},
    "xtick.bottom": False,
    "ytick.left": False,
}
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


SAYS = "Figure: "  # before what a figure says, in the text of its output


def use_style() -> None:
    """Apply the companion's style to all figures that follow, and show them if this is a notebook."""
    shell = get_ipython()
    if shell and plt.get_backend().lower() in FILES:  # as MPLBACKEND says, where pyplot was imported before medsec
        shell.enable_matplotlib("inline")
    if shell:
        # A figure's text is its message: what a screen reader says. A method, since IPython drops formatters of this class.
        Figure._repr_pretty_ = lambda fig, out, _: out.text(f"{SAYS}{message(fig)}")
    plt.rcParams.update(THEME | STYLE)


def message(fig: Figure) -> str:
    """What a figure says in its title, or in those of its panels, on one line."""
    titles = [ax.get_title(loc) for ax in fig.axes for loc in ("left", "center", "right")]
    whole = fig.get_suptitle() or "; ".join(title for title in titles if title)
    return " ".join(whole.split()) or repr(fig)


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


def forest(
    table: pd.DataFrame,
    title: str,
    label: str,
    looks: Mapping[str, tuple[str, str, float, str]] | None = None,
    *,
    lines: Mapping[str, float] | None = None,
    runs: pd.DataFrame | None = None,
    xlim: tuple[float, float] | None = None,
    log: bool = False,
):
    """Points with their intervals, a line a name from top to bottom; hollow where one run has no interval.

    Args:
        table: columns ``name, value, low, high``, with ``looks`` also ``group``; perhaps ``n``, the number of runs.
        title, label: of the figure and of the horizontal axis.
        looks: group -> colour, marker, offset from the name's line, what the legend says ("": nothing). Without it each
            name has the look that `LOOK` gives it.
        lines: what the legend says -> where a vertical line stands; two at most.
        runs: columns ``name, value``, drawn as small dots.
        xlim, log: limits of the axis, and whether it is logarithmic.
    """
    names = list(dict.fromkeys(table["name"]))
    if looks is None:
        table = table.assign(group=table["name"])
        looks = {name: (*LOOK.get(name, LOOK["real"])[::2], 0.0, "") for name in names}
    shown = sum(bool(look[3]) for look in looks.values()) + len(lines or {})
    height = (0.28 + 0.03 * len({look[2] for look in looks.values()})) * len(names) + 0.85 + 0.22 * ((shown + 1) // 2)
    fig, ax = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    for group, (colour, marker, offset, text) in looks.items():
        rows = table[table["group"] == group]
        at = np.array([names.index(name) for name in rows["name"]]) + offset
        if runs is not None:
            single = runs.loc[runs["name"] == group, "value"]
            ax.plot(single, np.full(len(single), names.index(group)), ".", color=colour, alpha=0.5, markersize=5)
        ax.hlines(at, rows["low"], rows["high"], color=colour, linewidth=1.5)
        style = {"color": colour, "linestyle": "none", "markersize": 11 if marker == "|" else 5}
        ax.plot(rows["value"], at, marker, label=text or None, **style)
        if "n" in rows:
            alone = (rows["n"] == 1).to_numpy()
            ax.plot(rows["value"][alone], at[alone], marker, markerfacecolor="white", **style)
    for (text, value), style in zip((lines or {}).items(), (":", "--"), strict=False):
        ax.axvline(value, color="0.4", linewidth=0.9, linestyle=style, label=text)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), xlabel=label)
    ax.set_xscale("log" if log else "linear")
    if xlim:
        ax.set_xlim(*xlim)
    fig.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    if shown:
        fig.legend(loc="outside lower center", ncols=2)
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
    styles.append(("#CC79A7", (0, (6, 2, 1, 2, 1, 2)), "v"))
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
