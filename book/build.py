"""Build the book: ``python book/build.py [--out FOLDER]``.

Everything is gathered in FOLDER/pages, where it lies as it does in the repository, so that a link leads to the same thing in
both. Sphinx makes FOLDER/html of it. No notebook is executed, and nothing is written outside FOLDER.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from posixpath import normpath, relpath
from urllib.parse import quote

import movable
import nbformat
from sphinx.cmd.build import build_main

from medsec.core import files as disk
from medsec.evidence import claims, ledger, tables
from medsec.show import plots

BOOK = Path(__file__).resolve().parent
ROOT = BOOK.parent
PANELS = ROOT / "results" / "phantom" / "panels.json"
LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^()\s]+)\)")
PICTURE = re.compile(r"!\[[^\[\]]*\]\(([^()\s:]+)\)")

# Sections of README.md and the page of the book that shows each.
PARTS = {
    "What was measured": "results.md",
    "Two commands": "run.md",
    "Change one number": "run.md",
    "Bring your own images": "run.md",
}

# Pages of the interface: file, title, what it is about, and its packages. The module of a package named nowhere is on the last.
API = {
    "data": (
        "Images and cohorts",
        "Where images come from, and who may see which.",
        ("medsec.data", "medphantom", "experiments.data_and_threats"),
    ),
    "federated": (
        "Networks and federated learning",
        "The networks that are trained, what a client sends, and what a server makes of it.",
        ("medsec.nets", "medsec.federated"),
    ),
    "backdoor": (
        "Paper 1: backdoor and FedDetect",
        "The attack on a federated GAN, and the defences against it (notebooks 01 and 02).",
        ("medsec.backdoor", "experiments.backdoor_fedgan", "experiments.feddetect"),
    ),
    "inversion": (
        "Paper 2: gradient inversion",
        "Attacks that reconstruct images from gradients, and defences of gradients and of images (notebook 03).",
        ("medsec.inversion", "experiments.gia_defense"),
    ),
    "evasion": (
        "Paper 3: adversarial examples",
        "Attacks on a classifier's answer, and training, pruning and attention against them (notebook 04).",
        ("medsec.evasion", "experiments.adversarial_pruning_defense"),
    ),
    "matrix": (
        "Threat matrix",
        "The defences of all three papers against all attacks, in one federation (notebook 05).",
        ("experiments.threat_matrix",),
    ),
    "judge": (
        "Test something of your own",
        "A report on a classifier, a server's rule or a gradient defence of yours.",
        ("medsec.judge",),
    ),
    "tools": (
        "Parameters, tables, claims and records",
        "What makes a run reproducible, and a statement checkable.",
        ("medsec.core", "medsec.evidence", "medsec.show", "experiments"),
    ),
}


# Text ------------------------------------------------------------------------------------------------------------------


def section(text: str, title: str) -> str:
    """The part of a Markdown text below the heading ``## title``, up to the next one."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise SystemExit(f"error: README.md has no section: {title}")
    return found[1].strip()


def short_titles(readme: str) -> dict[str, str]:
    """The short title of each notebook, from the table of README.md."""
    found = re.findall(r"\[(\d\d [^\]]+)\]\(executed/phantom/(\w+)\.ipynb\)", readme)
    return {name: title for title, name in found}


def settle_links(text: str, folder: str, pages: set[str], files: set[str]) -> str:
    """Make the links of a page fit the book.

    Args:
        text: Markdown.
        folder: where the page lies in the repository, "" for its root.
        pages: paths of the pages of the book; links to them stay.
        files: paths of other files that are linked, to be offered for download, are added to it.

    Returns:
        The text, in which README.md has become the book's first page and folders, which a site cannot show, are plain text.
    """

    def settle(match):
        label, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        place = normpath(f"{folder}/{path}" if folder else path)
        if place == "README.md":
            return f"[{label}]({relpath(_readme_part(anchor), folder or '.')})"
        if (ROOT / place).is_dir():
            return label
        if place in pages or not (ROOT / place).is_file():
            return match[0]  # one that leads nowhere is Sphinx's to report
        files.add(place)
        return f"[{label}](path:{path})"  # (MyST: a file to download, even where it looks like a page; it has no lines)

    places = (normpath(f"{folder}/{path}" if folder else path) for path in PICTURE.findall(text))
    files |= {place for place in places if (ROOT / place).is_file()}  # pictures lie where they lay
    return LINK.sub(settle, text)


def _readme_part(anchor: str) -> str:
    """The page that shows a section of README.md."""
    pages = {title.lower().replace(" ", "-"): page for title, page in PARTS.items()}
    return f"{pages[anchor]}#{anchor}" if anchor in pages else "index.md"


def keep_together(text: str) -> str:
    """Numbers in a table break between value and interval, not within: [0.1, 0.2] and (n = 3)."""
    return re.sub(r"\[[-\d.]+, [-\d.]+\]|\(n = \d+", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


def list_pipeline(text: str) -> str:
    """A Mermaid picture of a pipeline becomes a list: its script would have to be loaded from elsewhere."""

    def listed(match):
        names = dict(re.findall(r'(\w+)\["([^"]+)"\]', match[1]))
        needed: dict[str, list[str]] = {}
        for before, after in re.findall(r"(\w+)-->(\w+)", match[1]):
            needed.setdefault(before, []).append(f"`{names[after]}`")
        return "".join(f"- `{names[before]}` is needed by {', '.join(after)}\n" for before, after in needed.items())

    return re.sub(r"^```mermaid\n(.*?)^```\n", listed, text, flags=re.MULTILINE | re.DOTALL)


# Notebooks -------------------------------------------------------------------------------------------------------------


def command(name: str, cohort: str) -> str:
    """The command that runs a notebook again and makes its figures."""
    stage = name if cohort == "phantom" else f"pipelines/{cohort}/dvc.yaml:{name}"
    return f"dvc repro -f {stage}"


SET_UP = {
    "parameters",
    "injected-parameters",
}  # tags of cells that say which cohort and profile: so does the first line


def binder(remote: str, path: str) -> str | None:
    """The address at which the public Binder opens a file of the repository; None unless the remote is on GitHub or GitLab.

    >>> binder("git@github.com:someone/medsec.git", "notebooks/01.ipynb")
    'https://mybinder.org/v2/gh/someone/medsec/HEAD?labpath=notebooks%2F01.ipynb'
    """
    found = re.fullmatch(r"(?:https://(?:[^/@]*@)?|ssh://git@|git@)(github|gitlab)\.com[:/](.+?)(?:\.git)?/?", remote)
    if not found:
        return None
    host = {"github": "gh", "gitlab": "gl"}[found[1]]
    name = found[2] if host == "gh" else quote(found[2], safe="")  # a project of GitLab may lie in groups of groups
    return f"https://mybinder.org/v2/{host}/{name}/HEAD?labpath={quote(path, safe='')}"


def run_link(remote: str, name: str) -> str:
    """Where a reader of a notebook's page can run it: on Binder, or the page that says how."""
    address = binder(remote, f"notebooks/{name}.ipynb")
    return f"[Run it on Binder]({address})" if address else "[Run this notebook](../../docs/binder.md)"


def origin() -> str:
    """The address that this repository was cloned from; empty if it has none, or lies in no repository."""
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # there is no git
        return ""


def annotate(
    notebook: nbformat.NotebookNode, name: str, cohort: str, others: list[str], remote: str = ""
) -> nbformat.NotebookNode:
    """A copy of an executed notebook, for the book.

    Every code cell gets an anchor, and every figure a line with a link to its cell and the command that remakes it. The first
    cell says which cohort this is and where the others are. The code of all cells but those of the method is folded.
    """
    notebook = nbformat.from_dict(notebook)
    titled = [heading for cell in notebook.cells if (heading := _last_heading(cell))]
    head = titled[0] if titled else name
    foreign = _foreign(notebook)
    for number, cell in enumerate(notebook.cells):
        head = _last_heading(cell) or head
        if cell.cell_type != "code":
            continue
        anchor = f"cell-{number}"
        cell.metadata["anchor"] = anchor
        if not is_method(cell.source, foreign):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
        for output in cell.outputs:
            if shown := output.get("data", {}).get("text/markdown"):
                output.data["text/markdown"] = keep_together(shown)
        drawn = [output.data for output in cell.outputs if "image/png" in output.get("data", {})]
        if drawn:
            told = dict.fromkeys(data.get("text/plain", "") for data in drawn)
            said = "; ".join(text.removeprefix(plots.SAYS) for text in told if text.startswith(plots.SAYS))
            cell.metadata["mystnb"] = {
                "image": {"alt": said or f"Figure of the section “{head}”"},
                "figure": {"caption": _caption(name, cohort, anchor), "classes": "made-by"},
            }
    notebook.cells = gathered(cell for cell in notebook.cells if not SET_UP & set(cell.metadata.get("tags", [])))
    title, _, rest = notebook.cells[0].source.partition("\n")
    links = " · ".join(f"[{other}](../{other}/{name}.ipynb)" for other in others)
    also = f" The same on {links}." if links else ""
    moved = [anchor for anchor, words in movable.PANELS.items() if words["notebook"] == name and cohort == "phantom"]
    also += "".join(f" [Move its panel yourself](../../move.md#{anchor})." for anchor in moved)
    run = f"[Source notebook](../../notebooks/{name}.ipynb). {run_link(remote, name)}."
    where = f"*Executed on the cohort **{cohort}**, quick profile. {run}{also}*"
    notebook.cells[0].source = f"{title} · {cohort}\n\n{where}\n{rest}"
    return notebook


def is_method(source: str, foreign: set[str]) -> bool:
    """Whether a cell shows a method: it defines functions or classes, with nothing but Python and PyTorch.

    A function that speaks of tables, figures or our own modules phrases or draws.
    """
    defined = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    used = {name.id for node in defined for name in ast.walk(node) if isinstance(name, ast.Name)}
    return bool(defined) and not used & foreign


def _foreign(notebook: nbformat.NotebookNode) -> set[str]:
    """Names that a notebook imports from elsewhere than PyTorch."""
    found = set()
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", "") or node.names[0].name
                if module.split(".")[0] != "torch":
                    found |= {each.asname or each.name.split(".")[0] for each in node.names}
    return found


def gathered(cells: Iterable[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The same cells, where a folded one without an output joins the folded one that follows: one line to unfold, not five."""
    kept: list[nbformat.NotebookNode] = []
    for cell in cells:
        before = kept[-1] if kept else None
        if before is not None and _is_folded(before) and not before.outputs and _is_folded(cell):
            cell.source = f"{before.source}\n\n\n{cell.source}"
            kept.pop()
        kept.append(cell)
    return kept


def _is_folded(cell: nbformat.NotebookNode) -> bool:
    return cell.cell_type == "code" and "hide-input" in cell.metadata.get("tags", [])


def _last_heading(cell) -> str | None:
    found = re.findall(r"^#+ (.*)", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []
    return found[-1].replace("`", "") if found else None


def _caption(name: str, cohort: str, anchor: str) -> str:
    return f'<a href="#{anchor}">The cell that draws this</a> · made again by `{command(name, cohort)}`'


# Gathering -------------------------------------------------------------------------------------------------------------


def gather(pages: Path) -> None:
    """Write all sources of the book below ``pages``, an empty folder."""
    readme, remote = (ROOT / "README.md").read_text(encoding="utf-8"), origin()
    notebooks = sorted(ROOT.glob("executed/*/*.ipynb"))
    texts = _texts(readme, notebooks)
    known = set(texts) | {str(file.relative_to(ROOT).as_posix()) for file in notebooks}
    files: set[str] = set()
    for path, text in texts.items():
        folder = str(Path(path).parent.as_posix()).removeprefix(".")
        _write(pages / path, settle_links(text, folder, known, files))
    for file in notebooks:
        cohort = file.parent.name
        others = [other.parent.name for other in notebooks if other.name == file.name and other != file]
        notebook = annotate(nbformat.read(file, as_version=4), file.stem, cohort, others, remote)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = settle_links(cell.source, f"executed/{cohort}", known, files)
        _write(pages / file.relative_to(ROOT), nbformat.writes(notebook))
    for path, text in api_pages().items():
        _write(pages / path, text)
    for path in files:
        (pages / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, pages / path)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _texts(readme: str, notebooks: list[Path]) -> dict[str, str]:
    """The Markdown pages of the book by their path: the repository's own, and those made of parts of README.md."""
    docs = sorted(ROOT.glob("docs/*.md"))
    run = "\n\n".join(f"## {title}\n\n{section(readme, title)}" for title, page in PARTS.items() if page == "run.md")
    results = keep_together(f"{section(readme, 'What was measured')}\n\n{verdicts()}")
    introduction = readme.split("\n## ")[0]
    welcome = (BOOK / "index.md").read_text(encoding="utf-8")
    return {
        "index.md": f"{introduction}\n{welcome}\n{navigation(readme, notebooks, docs)}",
        "move.md": movable.page(disk.read_json(PANELS)),
        "results.md": f"# What was measured\n\n{results}\n",
        "run.md": f"# Run it yourself\n\n{run}\n",
        **{name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "SECURITY.md")},
    } | {f"docs/{file.name}": list_pipeline(file.read_text(encoding="utf-8")) for file in docs}


def verdicts() -> str:
    """Every ledger as two tables, its headlines and all of it: a line a claim, a column a cohort, linked to what decides."""
    parts = []
    for name in claims.names():
        short, whole = (tables.markdown(ledger.table(name, only_headlines=only)) for only in (True, False))
        parts.append(f"## {name}: {claims.load(name)['paper']}\n\n{short}\n\nAll claims:\n\n{whole}")
    return "\n\n".join(parts)


def navigation(readme: str, notebooks: list[Path], docs: list[Path]) -> str:
    """The tables of contents: results, the notebooks of each cohort, guides, interface."""
    titles = short_titles(readme)
    parts = {"Results": ["results", "move"]}
    for cohort in sorted({file.parent.name for file in notebooks}):
        names = [file.stem for file in notebooks if file.parent.name == cohort]
        parts[f"Notebooks: {cohort}"] = [
            f"{titles.get(name, name.replace('_', ' '))} <executed/{cohort}/{name}>" for name in names
        ]
    parts["Guides"] = ["run", *(f"docs/{file.stem}" for file in docs), "CONTRIBUTING", "SECURITY"]
    parts["Interface"] = ["api/index"]
    return "\n".join(
        f"```{{toctree}}\n:hidden:\n:caption: '{title}'\n\n" + "\n".join(lines) + "\n```\n"
        for title, lines in parts.items()
    )


def api_pages() -> dict[str, str]:
    """One reStructuredText page for each group of modules, and an index of them."""
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for package in ("medsec", "medphantom", "experiments")
        for file in sorted((ROOT / package).rglob("[!_]*.py"))
    ]
    pages = {}
    for file, (title, about, packages) in API.items():
        blocks = [_heading(title, "="), about]
        for module in (module for package in packages for module in modules if _package(module) == package):
            blocks += [_heading(module, "-"), f".. automodule:: {module}"]
        pages[f"api/{file}.rst"] = "\n\n".join(blocks) + "\n"
    listed = "\n".join(f"   {file}" for file in API)
    about = "The package behind the notebooks, from its docstrings. See also :ref:`all names <genindex>`."
    pages["api/index.rst"] = f"{_heading('Interface', '=')}\n\n{about}\n\n.. toctree::\n   :maxdepth: 2\n\n{listed}\n"
    return pages


def _package(module: str) -> str:
    """The package of `API` that a module belongs to, the last of them if it is named nowhere."""
    *_, last = (package for _, _, packages in API.values() for package in packages)
    named = {package for _, _, packages in API.values() for package in packages}
    return package if (package := module.rpartition(".")[0]) in named else last


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}"


def build(out: Path) -> int:
    """Gather and build; warnings are errors, and all of them are shown. Returns Sphinx's exit status."""
    for name in ("pages", "html", "doctrees"):
        shutil.rmtree(out / name, ignore_errors=True)
    gather(out / "pages")
    options = ["-b", "html", "-c", str(BOOK), "-d", str(out / "doctrees"), "-q", "-W", "--keep-going"]
    return build_main([*options, str(out / "pages"), str(out / "html")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "book", help="default: _build/book")
    out = parser.parse_args().out
    if status := build(out):
        return status
    print(f"open {out / 'html' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
