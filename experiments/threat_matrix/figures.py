"""The figure of notebook 05. It takes the cells of `experiments.threat_matrix.tables.grid` and returns ``(fig, axes)``."""

import textwrap

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from experiments.threat_matrix.arms import FAMILIES, ROWS
from experiments.threat_matrix.cells import COLUMNS
from experiments.threat_matrix.tables import BETTER, WORSE
from medsec.show.plots import WIDTH

SIGNS = {BETTER: "▲", WORSE: "▼"}
DARK = 0.5  # above this badness the text is white
NOTE = (
    "Dark is bad for whoever defends.  ▲ better, ▼ worse than no defence: the whole interval of the paired difference\n"
    "lies beyond what matters (matrix.matters).  n/a, or *: not in every run; the table below says why."
)
GAP = 0.35  # of a cell, between groups


def heat_map(cells: pd.DataFrame, title: str, items: str = ""):
    """Every defence against every attack: value, interval, and a sign where it differs from no defence.

    Args:
        cells: see `experiments.threat_matrix.tables.grid`.
        title: of the figure.
        items: on how many images the columns rest, for the note below.
    """
    across = _places([column.threat for column in COLUMNS])
    down = dict(zip(ROWS, _places([family for family, rows in FAMILIES.items() for _ in rows]), strict=True))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.33 * (max(down.values()) + 1) + 1.75))
    for cell in cells.to_dict("records"):
        _cell(ax, across[cell["column"]], down[cell["variant"]], cell)
    for threat, middle in pd.Series(across).groupby([column.threat for column in COLUMNS]).mean().items():
        name = threat.replace("client: ", "client:\n").replace("gradient ", "gradient\n").replace("nobody ", "nobody\n")
        ax.text(middle, -2.1, name, ha="center", va="bottom", weight="bold", fontsize=7.5)
    for x, column in zip(across, COLUMNS, strict=True):
        ax.text(x, -0.65, "\n".join(textwrap.wrap(column.name, 10)), ha="center", va="bottom", fontsize=7)
    ax.set_yticks(list(down.values()), [ROWS[variant].title for variant in down], fontsize=7.5)
    ax.set_xticks([])
    ax.set(xlim=(-0.5, max(across) + 0.5), ylim=(max(down.values()) + 0.5, -0.5))
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_title(title, loc="left", x=-0.42, pad=64)
    ax.text(-0.42, -0.012, f"{NOTE}\n{items}".strip(), transform=ax.transAxes, ha="left", va="top", fontsize=7)
    return fig, ax


def _places(groups: list[str]) -> list[float]:
    """Where rows or columns stand: one apart, with a gap between groups."""
    names = list(dict.fromkeys(groups))
    return [i + GAP * names.index(group) for i, group in enumerate(groups)]


def _cell(ax: Axes, x: float, y: float, cell: dict) -> None:
    empty, middle = pd.isna(cell["value"]), {"ha": "center", "va": "center"}
    style = {"facecolor": "white", "edgecolor": "0.75", "hatch": "////", "linewidth": 0}
    if not empty:
        colour = plt.get_cmap("cividis_r")(cell["badness"])
        style = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.8}
    ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, **style))
    if empty:
        ax.text(x, y, "n/a", **middle, fontsize=6.5, color="0.3", backgroundcolor="white")
        return
    ink = "white" if cell["badness"] > DARK else "black"
    digits = 1 if COLUMNS[cell["column"]].metric == "psnr" else 2
    value, low, high = (f"{cell[name]:.{digits}f}" for name in ("value", "low", "high"))
    shown = f"{value}{'*' if cell['why'] else ''} {SIGNS.get(cell['judged'], '')}".strip()
    ax.text(x, y - 0.17, shown, **middle, fontsize=7.5, color=ink, weight="bold")
    ax.text(x, y + 0.24, f"[{low}, {high}]", **middle, fontsize=6.2, color=ink)
