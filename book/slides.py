"""`docs/slides.md` as a PDF, a slide for each second heading: `make slides`."""

import re
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from medsec.core import paths
from medsec.core.errors import InputError

PAGE = paths.ROOT / "docs" / "slides.md"
TARGET = paths.ROOT / "_build" / "slides.pdf"
SIZE = (13.33, 7.5)  # inches, 16:9


def slides(text: str, folder: Path) -> list[tuple[str, Path | None, list[str]]]:
    """Title, figure and points of every slide.

    Args:
        text: of the page.
        folder: where it lies; its links start there.

    Raises:
        InputError: a figure that is not there.
    """
    found = []
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        link = re.search(r"!\[[^\]]*\]\(([^)]+)\)", body)
        figure = (folder / link[1]).resolve() if link else None
        if figure is not None and not figure.is_file():
            raise InputError(f"slide {title!r}: {link[1]} is missing; make it with: dvc repro")
        points = re.findall(r"^- (.*)$", body.replace("*", ""), re.MULTILINE)
        found.append((title.strip(), figure, points))
    return found


def draw(title: str, figure: Path | None, points: list[str], number: str) -> Figure:
    """One slide: the figure at the left, the points at its right, or in the middle without a figure."""
    page = plt.figure(figsize=SIZE)
    page.text(0.04, 0.93, title, fontsize=26, weight="bold", va="top")
    left, width = (0.69, 27) if figure else (0.08, 70)
    if figure:
        ax = page.add_axes((0.03, 0.05, 0.63, 0.77))
        ax.imshow(plt.imread(figure), interpolation="lanczos", aspect="equal")
        ax.axis("off")
    lines = [textwrap.fill(point, width, initial_indent="• ", subsequent_indent="  ") for point in points]
    page.text(left, 0.78, "\n\n".join(lines), fontsize=17 if figure else 24, va="top", linespacing=1.3)
    page.text(0.97, 0.03, number, fontsize=10, ha="right", color="0.4")
    return page


def main() -> None:
    deck = slides(PAGE.read_text(encoding="utf-8"), PAGE.parent)
    TARGET.parent.mkdir(exist_ok=True)
    with PdfPages(TARGET, metadata={"Title": "medsec"}) as pdf:
        for k, slide in enumerate(deck, start=1):
            page = draw(*slide, f"{k} / {len(deck)}")
            pdf.savefig(page)
            plt.close(page)
    print(TARGET.relative_to(paths.ROOT))


if __name__ == "__main__":
    main()
