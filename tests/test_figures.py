"""Figures: static where nobody can move a slider, with sliders where somebody can, and in few bytes."""

import base64
import io
import re
from types import SimpleNamespace

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import seaborn
import yaml
from IPython.core.formatters import PlainTextFormatter
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from nbformat import v4
from PIL import Image

from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.gia_defense import clients as inversion_clients
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.evasion import training as robust
from medsec.evidence import execute
from medsec.show import panels, plots, png
from medsec.show.panels import Choice, Slider

# Panels: the same drawing with sliders or without ---------------------------------------------------------------------

CONTROLS = {"size": Slider(2, 8, 1, 4), "eps": Slider(0, 1, 0.1, 0.5), "kind": Choice(("grid", "moving"))}


@pytest.fixture
def drawn():
    """Function that draws nothing and remembers what it was called with."""

    def draw(**values):
        draw.calls.append(values)
        return plt.figure()

    draw.calls = []
    yield draw
    plt.close("all")


def test_a_static_figure_of_the_first_values(drawn, monkeypatch):
    monkeypatch.delenv(panels.LIVE, raising=False)
    assert isinstance(panels.panel(drawn, **CONTROLS), Figure)
    assert drawn.calls == [{"size": 4, "eps": 0.5, "kind": "grid"}]


def test_live_it_has_a_slider_or_menu_for_each_control(drawn, monkeypatch):
    monkeypatch.setenv(panels.LIVE, "1")
    made = {}
    monkeypatch.setattr(ipywidgets, "interact", lambda show, **widgets: made.update(widgets, show=show))
    assert panels.panel(drawn, **CONTROLS) is None
    size, eps, kind = made["size"], made["eps"], made["kind"]
    assert isinstance(size, ipywidgets.IntSlider)
    assert (size.min, size.max, size.step, size.value) == (2, 8, 1, 4)
    assert isinstance(eps, ipywidgets.FloatSlider)
    assert isinstance(kind, ipywidgets.Dropdown)
    assert kind.options == ("grid", "moving")
    made["show"](size=3, eps=0.1, kind="moving")
    assert drawn.calls == [{"size": 3, "eps": 0.1, "kind": "moving"}]


def test_only_one_says_live(monkeypatch):
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(panels.LIVE, value)
        assert panels.is_live() is expected


@pytest.mark.parametrize("values", [(2, 8, 1, 9), (2, 8, 0, 4), (5, 2, 1, 3)])
def test_a_slider_that_cannot_be(values):
    with pytest.raises(InputError, match="a slider from"):
        Slider(*values)


# Panels in the notebooks ----------------------------------------------------------------------------------------------

NOTEBOOKS = {
    "01_backdoor_fedgan": {"kind", "size", "margin", "opacity"},
    "03_gia_defense": {"where", "times"},
    "04_adversarial_pruning_defense": {"network", "eps"},
}
SMALL = {
    "fedgan": {"measure": {"threshold_fpr": 0.05, "extractor_epochs": 1}},
    "inversion": {
        "federation": {"width": 4, "n_clients": 2, "images_per_client": 12},
        "victims": 2,
        "attack": {"iterations": 2},
        "autoencoder": {"latent": 4, "latent_prior": 6, "epochs": 1},
    },
    "evasion": {"attacks": {"steps": 2}},
}


def cells(notebook):
    return nbformat.read(paths.NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells


def source(notebook, what):
    """The one code cell of a notebook that has this in it."""
    (found,) = [cell.source for cell in cells(notebook) if cell.cell_type == "code" and what in cell.source]
    return found


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_panel_is_announced_and_shown_once(notebook):
    listed = cells(notebook)
    (at,) = [i for i, cell in enumerate(listed) if "panels.panel(" in cell.source]
    assert listed[at - 1].cell_type == "markdown"
    assert "`make lab`" in listed[at - 1].source
    assert not listed[at].metadata.get("tags"), "compared like any other output"
    assert re.search(r"^fig = panels\.panel\(", listed[at].source, re.MULTILINE), "a bare figure would be shown twice"
    assert "paths." not in listed[at].source, "what a reader tries is no result"


def begun(notebook, cohort, profile):
    """Names of a notebook at its panel, as far as the panel needs them, with networks that know nothing."""
    names = {"cohort": cohort, "profile": str(profile)}
    exec(source(notebook, "plots.use_style()"), names)  # the notebook's own imports and parameters
    if notebook.startswith("01"):
        exec(source(notebook, "setup = fedgan_eval.prepare"), names)
    if notebook.startswith("04"):
        setup = names["evasion_arms"].prepare(cohort, names["P"])
        x, y = (part[:4] for part in setup.splits["test"])
        colours, classes = setup.cohort.channels, setup.cohort.n_classes
        models = {name: robust.new(colours, classes, seed=0, cbam=None).eval() for name in ("base", "hardened")}
        names |= {"setup": setup, "seed": 0, "x": x, "y": y, "models": models}
    return names


@pytest.fixture
def profile(tmp_path, write_npz):
    file = write_npz(tmp_path, classes=3, channels=3, per_class=100)
    made = tmp_path / "small.yaml"
    made.write_text(yaml.safe_dump({**SMALL, "cohorts": {"npz": {"path": str(file)}}}), encoding="utf-8")
    with matplotlib.rc_context():  # a notebook sets its style
        yield made
    fedgan_eval._prepare.cache_clear()
    inversion_clients._prepare.cache_clear()
    plt.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_panel_draws_wherever_its_controls_are(notebook, profile, monkeypatch):
    names = begun(notebook, "npz", profile)
    monkeypatch.setenv(panels.LIVE, "0")
    exec(source(notebook, "panels.panel("), names)
    assert isinstance(names["fig"], Figure)
    plt.close("all")

    made = {}
    monkeypatch.setenv(panels.LIVE, "1")
    monkeypatch.setattr(ipywidgets, "interact", lambda show, **widgets: made.update(show=show, widgets=widgets))
    exec(source(notebook, "panels.panel("), names)
    assert names["fig"] is None
    assert set(made["widgets"]) == NOTEBOOKS[notebook]
    first = {name: widget.value for name, widget in made["widgets"].items()}
    for name, widget in made["widgets"].items():
        ends = widget.options if isinstance(widget, ipywidgets.Dropdown) else (widget.min, widget.max)
        for value in ends:
            made["show"](**first | {name: value})
            plt.close("all")
    made["show"](**{n: getattr(w, "max", w.value) for n, w in made["widgets"].items()})  # all at their end, together


# In few bytes, and the same to the eye --------------------------------------------------------------------------------


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_the_style_is_that_of_seaborn_with_ours_on_top():
    with matplotlib.rc_context():
        plots.use_style()
        ours = dict(matplotlib.rcParams)
    with matplotlib.rc_context():
        seaborn.set_theme(context="paper", style="white", color_codes=False, rc=plots.STYLE)
        theirs = dict(matplotlib.rcParams)
    cycles = [[to_rgb(colour) for colour in each.pop("axes.prop_cycle").by_key()["color"]] for each in (ours, theirs)]
    assert cycles[0] == cycles[1]
    assert {key: ours[key] for key in ours if ours[key] != theirs[key]} == {}
    assert {key for key in ours if ours[key] != matplotlib.rcParamsDefault.get(key)} > set(plots.STYLE)


def test_the_text_of_a_figure_is_its_message():
    fig, axes = plt.subplots(1, 2)
    assert plots.message(fig) == repr(fig)  # no title
    axes[0].set_title("left one", loc="left")
    axes[1].set_title("right\none")
    assert plots.message(fig) == "left one; right one"
    fig.suptitle("the whole\n figure")
    assert plots.message(fig) == "the whole figure"
    plt.close(fig)


def test_a_notebook_tells_a_figure_in_words(monkeypatch):
    monkeypatch.setattr(Figure, "_repr_pretty_", None, raising=False)  # so that it is taken away afterwards
    monkeypatch.setattr(plots, "get_ipython", lambda: SimpleNamespace(enable_matplotlib=lambda _: None))
    plots.use_style()
    fig = plt.figure()
    fig.suptitle("Noise does not help")
    assert PlainTextFormatter()(fig) == f"{plots.SAYS}Noise does not help"
    sanitize = (paths.ROOT / "tests" / "nbval_sanitize.cfg").read_text(encoding="utf-8")
    assert f"\nregex: {plots.SAYS}[^" in sanitize  # a replay does not compare it
    plt.close(fig)


@pytest.fixture
def figure():
    """What matplotlib writes of coloured lines: smooth edges, an alpha channel."""
    plots.use_style()
    fig, ax = plt.subplots(figsize=(4, 3))
    for colour, line, _ in plots.LOOK.values():
        ax.plot(np.random.default_rng(0).random(9), color=colour, linestyle=line)
    file = io.BytesIO()
    fig.savefig(file, format="png", metadata={"Software": None})
    plt.close(fig)
    return file.getvalue()


def test_a_drawn_figure_halves_and_looks_the_same(figure):
    small = png.compact(figure)
    assert len(small) < 0.6 * len(figure)
    assert Image.open(io.BytesIO(small)).mode == "P"
    change = np.abs(pixels(small) - pixels(figure))
    assert change.mean() < 0.1
    assert np.quantile(change.max(-1), 0.999) <= 16


def test_every_grey_is_kept():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 16, axis=0)
    grey = np.concatenate([np.repeat(ramp, 3, 2), np.full_like(ramp, 255)], 2)
    assert np.array_equal(pixels(png.compact(encoded(grey))), grey[..., :3])


def test_a_photograph_keeps_its_colours():
    photograph = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(pixels(png.compact(encoded(photograph))), photograph)


def test_what_is_transparent_becomes_the_page():
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (pixels(png.compact(encoded(clear))) == 255).all()


def test_twice_is_once(figure):
    photograph = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8))
    for data in (figure, photograph):
        once = png.compact(data)
        assert png.compact(once) == once


def test_figures_inside_notebooks_are_made_small(figure):
    shown = v4.new_output("display_data", {"image/png": base64.b64encode(figure).decode()})
    notebook = v4.new_notebook(cells=[v4.new_code_cell("fig", outputs=[shown])])
    execute.normalise(notebook)
    assert base64.b64decode(notebook.cells[0].outputs[0]["data"]["image/png"]) == png.compact(figure)
