"""Who may import whom (docs/architecture.md): the contracts in pyproject.toml hold, and nobody goes around them."""

import ast
import re

from importlinter.cli import lint_imports

from medsec.core import paths


def test_the_contracts_of_the_layers_hold(monkeypatch, capsys):
    monkeypatch.chdir(paths.ROOT)
    assert lint_imports(no_cache=True) == 0, f"{capsys.readouterr().out}\nrun: lint-imports"


def test_no_module_is_imported_by_a_string():
    """Such an import is an arrow that no tool sees."""
    for package in ("medsec", "medphantom"):
        for file in (paths.ROOT / package).rglob("*.py"):
            assert not re.search(r"\b(import_module|__import__)\(", file.read_text(encoding="utf-8")), file.name


def test_few_names_are_public():
    """``__all__`` says what readers may build on. The names that `medsec.data` passes on count once."""
    total = 0
    for file in sorted((paths.ROOT / "medsec").rglob("*.py")):
        if file.name in ("__init__.py", "__main__.py"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        (names,) = [ast.literal_eval(node.value) for node in tree.body if _is_all(node)]
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        defined |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        defined |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        assert set(names) <= defined, file.name
        total += len(names)
    assert total <= 200


def _is_all(node):
    target = (
        node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
    )
    return isinstance(target, ast.Name) and target.id == "__all__"
