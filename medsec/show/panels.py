"""Panels for live use: sliders where somebody can move them, a figure where nobody can.

In a notebook that is executed (papermill, nbval, the book) a panel is the static figure of its default values. ``make lab``
sets ``MEDSEC_LIVE=1``, and with it the same cell shows sliders; every move draws anew.
"""

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from medsec.core import paths
from medsec.core.errors import InputError

__all__ = ["Choice", "Slider", "panel"]

LIVE = "MEDSEC_LIVE"


@dataclass(frozen=True)
class Slider:
    """A number from ``low`` to ``high`` in steps of ``step``; ``value`` to begin with."""

    low: float
    high: float
    step: float
    value: float

    def __post_init__(self):
        if not (self.low <= self.value <= self.high and self.step > 0):
            raise InputError(f"a slider from {self.low} to {self.high} cannot begin at {self.value}, steps {self.step}")


@dataclass(frozen=True)
class Choice:
    """One of several names; the first to begin with."""

    names: tuple[str, ...]

    @property
    def value(self) -> str:
        return self.names[0]


def is_live() -> bool:
    """Whether somebody sits in front of the notebook and asked for sliders."""
    return paths.flag(LIVE)


def panel(draw: Callable[..., Figure], **controls: Slider | Choice) -> Figure | None:
    """The figure that ``draw`` makes of the values of some controls, with sliders and menus if it `is_live`.

    Args:
        draw: takes one argument a control, by its name, and returns a figure.
        controls: by name.

    Returns:
        The static figure; None where the panel is live.
    """
    if not is_live():
        return draw(**{name: control.value for name, control in controls.items()})
    import ipywidgets

    def show(**values):
        draw(**values)
        plt.show()

    ipywidgets.interact(show, **{name: _widget(name, control) for name, control in controls.items()})
    return None


def _widget(name: str, control: Slider | Choice):
    import ipywidgets

    # Drawn when the slider is let go: some panels compute for seconds.
    common = {"description": name.replace("_", " "), "continuous_update": False}
    if isinstance(control, Choice):
        return ipywidgets.Dropdown(options=control.names, value=control.value, description=common["description"])
    whole = all(float(value).is_integer() for value in (control.low, control.high, control.step, control.value))
    kind, number = (ipywidgets.IntSlider, int) if whole else (ipywidgets.FloatSlider, float)
    low, high, step, value = (number(v) for v in (control.low, control.high, control.step, control.value))
    return kind(min=low, max=high, step=step, value=value, **common)
