"""The students' notebooks, made from the solutions: ``python exercises/build.py`` writes them.

The notebooks in ``exercises/solutions/`` are the only source. In a cell with the tag ``solution`` everything between the
lines ``# BEGIN SOLUTION`` and ``# END SOLUTION`` becomes a TODO; cells with the tag ``answer`` are left out; links lose the
``../`` that only a notebook in the folder below needs.
"""

import copy
import re
import sys
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parent
BLOCK = re.compile(r"^( *)# BEGIN SOLUTION\n.*?^\1# END SOLUTION$", re.DOTALL | re.MULTILINE)
TODO = r"\1# TODO: your code, in place of the next line.\n\1raise NotImplementedError"


def student(solution: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The student's version of a solution notebook.

    Raises:
        ValueError: a ``solution`` cell without exactly one marked block, or a marked block anywhere else.
    """
    made = copy.deepcopy(solution)
    made.cells = [cell for cell in made.cells if "answer" not in cell.metadata.get("tags", [])]
    for i, cell in enumerate(made.cells):
        expected = int("solution" in cell.metadata.get("tags", []))
        cell.source, found = BLOCK.subn(TODO, cell.source)
        if found != expected or "SOLUTION" in cell.source:
            raise ValueError(f"cell {i}: {found} marked blocks, expected {expected} (and its tag is part of the cell)")
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../../", "](../")
        cell.id = str(i)
    return made


def main() -> None:
    for file in sorted((FOLDER / "solutions").glob("*.ipynb")):
        try:
            made = student(nbformat.read(file, as_version=4))
        except ValueError as error:
            sys.exit(f"error: {file.name}: {error}")
        nbformat.write(made, FOLDER / file.name)
        print(f"exercises/{file.name}")


if __name__ == "__main__":
    main()
