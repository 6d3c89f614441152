"""The figure of notebook 05. It takes the cells of `experiments.threat_matrix.tables.grid` and returns ``(fig, axes)``."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from experiments.threat_matrix.arms import families, row
from experiments.threat_matrix.cells import COLUMNS
from experiments.threat_matrix.tables import BETTER, WORSE
from medsec.show.plots import WIDTH

SIGNS = {BETTER: "▲", WORSE: "▼"}
DARK = 0.5  # above this badness the text is white
NOTE = (
    "Dark is bad for whoever defends.  ▲ better, ▼ worse than no defence: the whole interval of the paired difference\n"
    "lies beyond what matters (matrix.matters).  n/a, or *: not in every run; the table below says why.\n"
    "Hatched, untested: the attack does too little where nobody defends, so no row can show that it helps."
)
GAP = 0.35  # of a cell, between groups


def heat_map(cells: pd.DataFrame, title: str, items: str = ""):
    """Every defence, the columns that decide: value, interval, and a sign where it differs from no defence.

    Args:
        cells: see `experiments.threat_matrix.tables.grid`.
        title: of the figure.
        items: on how many images the columns rest, for the note below.
    """
    shown = [place for place, column in enumerate(COLUMNS) if column.decides]
    across = dict(zip(shown, _places([COLUMNS[place].threat for place in shown]), strict=True))
    grouped = [(variant, family) for family, rows in families(cells["variant"]).items() for variant in rows]
    down = dict(zip([v for v, _ in grouped], _places([family for _, family in grouped]), strict=True))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.24 * (max(down.values()) + 1) + 1.5))
    for cell in cells[cells["column"].isin(shown)].to_dict("records"):
        _cell(ax, across[cell["column"]], down[cell["variant"]], cell)
    for place, x in across.items():
        column, middle = COLUMNS[place], {"ha": "center", "va": "bottom"}
        ax.text(x, -1.15, column.threat.split(":")[0], **middle, weight="bold", fontsize=8)
        ax.text(x, -0.6, f"success: {column.name}" if "success" in column.threat else column.name, **middle, fontsize=7)
    ax.set_yticks(list(down.values()), [row(variant).title for variant in down], fontsize=7.5)
    ax.set_xticks([])
    ax.set(xlim=(-0.5, max(across.values()) + 0.5), ylim=(max(down.values()) + 0.5, -0.5))
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_title(title, loc="left", x=-0.42, pad=34)
    ax.text(-0.42, -0.012, f"{NOTE}\n{items}".strip(), transform=ax.transAxes, ha="left", va="top", fontsize=7)
    return fig, ax


def _places(groups: list[str]) -> list[float]:
    """Where rows or columns stand: one apart, with a gap between groups."""
    names = list(dict.fromkeys(groups))
    return [i + GAP * names.index(group) for i, group in enumerate(groups)]


def _cell(ax: Axes, x: float, y: float, cell: dict) -> None:
    empty, middle = pd.isna(cell["value"]) or not cell["tested"], {"ha": "center", "va": "center"}
    style = {"facecolor": "white", "edgecolor": "0.75", "hatch": "////", "linewidth": 0}
    if not empty:
        colour = plt.get_cmap("cividis_r")(cell["badness"])
        style = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.8}
    ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, **style))
    if empty:
        value = "" if pd.isna(cell["value"]) else f" ({cell['value']:.2f})"
        word = "n/a" if cell["tested"] else f"untested{value}"
        ax.text(x, y, word, **middle, fontsize=6.5, color="0.3", backgroundcolor="white")
        return
    ink = "white" if cell["badness"] > DARK else "black"
    value, low, high = (f"{cell[name]:.2f}" for name in ("value", "low", "high"))
    ax.text(x - 0.4, y, SIGNS.get(cell["judged"], ""), **middle, fontsize=8, color=ink)
    ax.text(x - 0.17, y, f"{value}{'*' if cell['why'] else ''}", **middle, fontsize=8, color=ink, weight="bold")
    ax.text(x + 0.23, y, f"[{low}, {high}]", **middle, fontsize=6.5, color=ink)
