"""Figures of notebook 00."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes


def stacked_bars(ax: Axes, counts: pd.DataFrame, title: str) -> None:
    """Numbers of images: one bar a row of ``counts``, one segment a column (class)."""
    colours = plt.get_cmap("cividis")(np.linspace(0.15, 0.9, counts.shape[1]))
    style = {"color": dict(zip(counts, colours, strict=True)), "edgecolor": "white", "width": 0.8, "rot": 0}
    counts.plot.bar(ax=ax, stacked=True, ylabel="images", title=title, legend=False, **style)


def heatmap(ax: Axes, table: pd.DataFrame, title: str, *, low: float, high: float) -> None:
    """Annotated matrix of shares."""
    import seaborn as sns  # slow to import

    sns.heatmap(table, ax=ax, vmin=low, vmax=high, cmap="cividis", annot=True, fmt=".2f", cbar=False, square=True)
    ax.set_title(title)
