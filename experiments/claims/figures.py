"""The figure of notebook 99, in the style of `medsec.show.plots`."""

import matplotlib.pyplot as plt
import pandas as pd

from medsec.evidence.ledger import CODES
from medsec.show.plots import WIDTH

LOOKS = {  # of a verdict: colour, marker, how it is filled, what the legend says
    1: ("#0072B2", "o", "full", "holds"),
    0: ("#666666", "_", "full", "undecided"),
    -1: ("#D55E00", "x", "full", "does not hold"),
    2: ("#666666", "o", "none", "untested"),
}


def grid(rows: pd.DataFrame, title: str):
    """Verdicts: claims down, under the names of their ledgers, cohorts across; empty where a cohort cannot test a claim.

    Args:
        rows: of `medsec.evidence.ledger.rows`, in the order of the figure.
        title: of the figure.
    """
    assert set(LOOKS) == set(CODES.values())
    rows = rows.assign(name=rows["variant"] + ": " + rows["claim"])
    names, cohorts = (list(dict.fromkeys(rows[column])) for column in ("name", "scenario"))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.2 * len(names) + 1.3), layout="constrained")
    for code, (colour, marker, fill, label) in LOOKS.items():
        mine = rows[rows["value"] == code]
        x, y = ([order.index(v) for v in mine[column]] for order, column in ((cohorts, "scenario"), (names, "name")))
        size = {"markersize": 6, "markeredgewidth": 1.8, "fillstyle": fill}
        ax.plot(x, y, marker, color=colour, linestyle="none", label=label, **size)
    ledgers = [name.partition(":")[0] for name in names]
    for k in range(1, len(names)):
        if ledgers[k] != ledgers[k - 1]:
            ax.axhline(k - 0.5, color="0.8", linewidth=0.8)
    ax.set(xticks=range(len(cohorts)), xticklabels=cohorts, yticks=range(len(names)), yticklabels=names)
    ax.set(xlim=(-0.5, len(cohorts) - 0.5), ylim=(len(names) - 0.5, -0.5))
    ax.tick_params(axis="y", labelsize=7)
    fig.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    fig.legend(loc="outside lower center", ncols=4)
    return fig, ax
