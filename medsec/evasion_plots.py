"""Figures of notebook 04, in the style of `medsec.plots`."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from torch import Tensor

from medsec import plots
from medsec.plots import WIDTH

LOOKS = {  # of the three rates: colour, marker, offset, what the legend says
    "dr_whitebox": ("#D55E00", "^", -0.16, "the attack knows the model (white-box)"),
    "dr_transfer": ("#0072B2", "o", 0.0, "examples made for the undefended model (transfer)"),
    "dr_recovered": ("#009E73", "s", 0.16, "of those that turned the undefended model (recovered)"),
}


def rates(table: pd.DataFrame, published: Mapping[str, float], title: str):
    """Three numbers that have been called defence rate, arm by arm.

    Args:
        table: columns ``variant, metric, value, low, high``; metrics as in `LOOKS`.
        published: label -> the paper's value, drawn as a line.
        title: of the figure.
    """
    variants = list(dict.fromkeys(table["variant"]))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.4 * len(variants) + 1.5), layout="constrained")
    for metric, (colour, marker, shift, label) in LOOKS.items():
        rows = table[table["metric"] == metric]
        heights = [variants.index(v) + shift for v in rows["variant"]]
        ax.hlines(heights, rows["low"], rows["high"], color=colour, linewidth=1.3)
        ax.plot(rows["value"], heights, marker, color=colour, markersize=5, linestyle="none", label=label)
    for (label, value), style in zip(published.items(), (":", "--"), strict=False):
        ax.axvline(value, color="0.4", linewidth=0.9, linestyle=style, label=f"published: {label}")
    ax.set(
        yticks=range(len(variants)), yticklabels=variants, xlabel="defence rate (share of the examples)", xlim=(0, 1.02)
    )
    ax.invert_yaxis()
    fig.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    fig.legend(loc="outside lower center", ncols=2)
    return fig, ax


def examples(
    x: Tensor, found: Mapping[str, Tensor], title: str, *, times: float, answers: Mapping[str, Tensor], y: Tensor
):
    """Images, what attacks make of them, and the change, magnified; framed where the answer is wrong.

    Args:
        x: (n, C, S, S) in [0, 1].
        found: model -> (n, C, S, S), the examples made for it.
        title: of the figure.
        times: by which the change is magnified.
        answers: model -> (n,) its answers to its examples.
        y: (n,) the truth.
    """
    none = np.zeros(len(x), bool)
    rows, frames = {"image": x.numpy()}, {"image": none}
    for name, images in found.items():
        rows[f"for {name}"], frames[f"for {name}"] = images.numpy(), (answers[name] != y).numpy()
        change = f"{name}: change ×{times:g}"
        rows[change], frames[change] = (0.5 + times * (images - x)).clamp(0, 1).numpy(), none
    return plots.gallery(rows, title, frames=frames)


def looks(x: Tensor, maps: Mapping[str, Tensor], lesions: np.ndarray | None, title: str):
    """Images, and beside them where networks look, each map from its own lowest (black) to its highest value (white).

    Args:
        x: (n, C, S, S).
        maps: label -> (n, S, S).
        lesions: (n, S, S) bool, outlined, or None.
        title: of the figure.
    """
    rows = {"image": x.numpy()}
    for label, values in maps.items():
        low = values.amin((1, 2), keepdim=True)
        span = (values.amax((1, 2), keepdim=True) - low).clamp_min(1e-9)
        rows[label] = ((values - low) / span)[:, None].numpy()
    outlined = None if lesions is None else dict.fromkeys(rows, lesions)
    return plots.gallery(rows, title, overlays=outlined)
