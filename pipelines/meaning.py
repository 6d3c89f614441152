"""What the code means, one hash a folder: ``python pipelines/meaning.py`` writes ``pipelines/meaning.json``.

The pipelines' stages depend on these hashes and not on the files. A comment, a docstring or another line break changes none of
them, so that nothing is run again for it. Whatever else changes runs the notebooks that use the folder, from finished cells.
"""

import ast
import hashlib
import json
from pathlib import Path

from medsec.core import files

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "pipelines" / "meaning.json"


def meaning(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return ast.dump(tree)


def hashed(folder: Path) -> str:
    """Hash of the names and the `meaning` of all modules below a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        found.update(f"{file.relative_to(ROOT).as_posix()}\n{meaning(file.read_text(encoding='utf-8'))}\n".encode())
    return found.hexdigest()


def folders() -> dict[str, Path]:
    """By its name in the file every folder of code: packages of `medsec`, and experiments."""
    found = {"medphantom": ROOT / "medphantom"}
    for package in ("medsec", "experiments"):
        found |= {f"{package}/{f.name}": f for f in sorted((ROOT / package).iterdir()) if (f / "__init__.py").is_file()}
    return found


def main() -> None:
    text = json.dumps({name: hashed(folder) for name, folder in folders().items()}, indent=1) + "\n"
    files.write(TARGET, text)


if __name__ == "__main__":
    main()
