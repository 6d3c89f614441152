"""Who may import whom (docs/architecture.md): the contracts in pyproject.toml hold, and nobody goes around them."""

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
