"""Figures of notebook 04, in the style of `medsec.show.plots`."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from torch import Tensor

from medsec.show import plots
from medsec.show.plots import WIDTH

RATES = {  # by reading: colour, marker, offset, what the legend says
    "white-box": ("#D55E00", "^", -0.16, "made for the network itself (white-box)"),
    "transfer, related f₀": ("#009E73", "s", 0.0, "made for a plain network with its initial weights"),
    "transfer, independent f₀": ("#0072B2", "o", 0.16, "made for an independent plain network"),
}
MAPS = {
    "integrated_gradients": ("#D55E00", "^", -0.24, "Integrated Gradients"),
    "grad_cam": ("#0072B2", "o", -0.08, "Grad-CAM"),
}


def rates(table: pd.DataFrame, published: Mapping[str, float], title: str):
    """What has been called defence rate, arm by arm, by the network that the examples were made for.

    Args:
        table: columns ``variant, group, value, low, high``; groups as in `RATES`, others are left out.
        published: label -> the paper's value, drawn as a line.
        title: of the figure.
    """
    lines = {f"published: {label}": value for label, value in published.items()}
    table = table[table["group"].isin(RATES)].rename(columns={"variant": "name"})
    label = "defence rate (share of the network's right answers that it keeps)"
    return plots.forest(table, title, label, RATES, lines=lines, xlim=(0, 1.02))


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
    """One row an image, one column a map of where a network looks, from its own lowest (black) to its highest value (white).

    Args:
        x: (n, C, S, S).
        maps: heading -> (n, S, S).
        lesions: (n, S, S) bool, outlined, or None.
        title: of the figure.
    """
    columns = {"image": x.numpy()}
    for heading, values in maps.items():
        low = values.amin((1, 2), keepdim=True)
        span = (values.amax((1, 2), keepdim=True) - low).clamp_min(1e-9)
        columns[heading] = ((values - low) / span)[:, None].numpy()
    side = WIDTH / len(columns)
    headings = 0.16 * (1 + max(heading.count("\n") for heading in columns))
    height = side * len(x) + headings + 0.35
    fig, axes = plt.subplots(len(x), len(columns), figsize=(WIDTH, height), squeeze=False)
    for line, images in zip(axes.T, columns.values(), strict=True):
        for i, ax in enumerate(line):
            plots.show(ax, images[i])
            if lesions is not None and lesions[i].any():
                ax.contour(lesions[i], levels=[0.5], colors="#E69F00", linewidths=0.9)
    for ax, heading in zip(axes[0], columns, strict=True):
        ax.set_title(heading, fontsize=7, weight="normal", loc="center", pad=3)
    fig.subplots_adjust(left=0, right=1, bottom=0, top=1 - (headings + 0.35) / height, wspace=0.05, hspace=0.05)
    fig.suptitle(title, x=0.0, y=1.0, ha="left", va="top", weight="bold", fontsize=10)
    return fig, axes


def pointing(table: pd.DataFrame, controls: Mapping[str, float], title: str):
    """How often the highest point of a map lies in the lesion, arm by arm; the controls, which look at nothing, are lines.

    Args:
        table: columns ``variant, map, value, low, high``; maps ``integrated_gradients``, ``grad_cam``, ``cbam1`` and on.
        controls: label -> share.
        title: of the figure.
    """
    gates = [name for name in dict.fromkeys(table["map"]) if name not in MAPS]
    label = "attention gates, from the image inwards"
    looks = MAPS | {name: ("#009E73", "s", 0.08 + 0.1 * i, "" if i else label) for i, name in enumerate(gates)}
    table = table.rename(columns={"variant": "name", "map": "group"})
    label = "share of the images with a lesion in which the map's highest point lies in it"
    return plots.forest(table, title, label, looks, lines=controls, xlim=(0, 1.02))
