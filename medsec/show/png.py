"""Figures in few bytes: they are in git twice, as files and inside the executed notebooks."""

import io

import numpy as np
from PIL import Image

__all__: list[str] = []  # for the other modules of the package

ERROR = 0.5  # of 255 levels: what a palette may change, on average


def compact(png: bytes) -> bytes:
    """The same figure in about half the bytes: without an alpha channel, and with a palette of 256 colours.

    Exact where the figure has no more colours than that (every grey image); else the nearest of 256 chosen ones. A figure
    that this would change by more than `ERROR` (colour photographs) keeps all its colours. Done twice, it changes nothing.
    """
    drawn = Image.open(io.BytesIO(png))
    if drawn.mode == "P":
        return png
    plain = drawn
    if drawn.mode != "RGB":
        plain = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn.convert("RGBA")).convert("RGB")
    few = _palette(plain)
    if few is None and plain is drawn:
        return png
    smaller = io.BytesIO()
    (few or plain).save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def _palette(plain: Image.Image) -> Image.Image | None:
    """The image with a palette; None if too much would be lost."""
    few = plain.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    change = np.asarray(few.convert("RGB"), np.int16) - np.asarray(plain, np.int16)
    return few if np.abs(change).mean() <= ERROR else None
