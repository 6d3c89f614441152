"""medsec.show.png: figures in few bytes, and the same to the eye."""

import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from nbformat import v4
from PIL import Image

from medsec.evidence import execute
from medsec.show import plots, png


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@pytest.fixture
def drawn():
    """What matplotlib writes of coloured lines: smooth edges, an alpha channel."""
    plots.use_style()
    fig, ax = plt.subplots(figsize=(4, 3))
    for colour, line, _ in plots.LOOK.values():
        ax.plot(np.random.default_rng(0).random(9), color=colour, linestyle=line)
    file = io.BytesIO()
    fig.savefig(file, format="png", metadata={"Software": None})
    plt.close(fig)
    return file.getvalue()


def test_a_drawn_figure_halves_and_looks_the_same(drawn):
    small = png.compact(drawn)
    assert len(small) < 0.6 * len(drawn)
    assert Image.open(io.BytesIO(small)).mode == "P"
    change = np.abs(pixels(small) - pixels(drawn))
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


def test_twice_is_once(drawn):
    photograph = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8))
    for data in (drawn, photograph):
        once = png.compact(data)
        assert png.compact(once) == once


def test_figures_inside_notebooks_are_made_small(drawn):
    shown = v4.new_output("display_data", {"image/png": base64.b64encode(drawn).decode()})
    notebook = v4.new_notebook(cells=[v4.new_code_cell("fig", outputs=[shown])])
    execute.normalise(notebook)
    assert base64.b64decode(notebook.cells[0].outputs[0]["data"]["image/png"]) == png.compact(drawn)
