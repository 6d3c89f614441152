"""Settings of the book. `build.py` gathers the pages and calls Sphinx with them.

No page loads anything from elsewhere: mathematics become MathML, which browsers draw by themselves, and the theme brings its
own script and uses the fonts of the reader's system.
"""

import html
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "medsec"
author = "The medsec developers"
copyright = "the medsec developers, MIT licence"  # (Sphinx's name for it)
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["notebooks/**", "exercises/**", "examples/**"]  # only to be downloaded
suppress_warnings = [
    "ref.python",  # in a docstring, `load` may be that of several modules: it then stays a name without a link
]

# Pages
nb_execution_mode = "off"  # the notebooks are executed already, by the pipeline
nb_render_markdown_format = "myst"  # tables in outputs
nb_ipywidgets_js = {}  # no widget, and no script from elsewhere for one
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
html_math_renderer = "mathml"

# Docstrings
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "exclude-members": "model_config"}
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

# Look
html_theme = "furo"
html_title = "medsec"
html_static_path = ["_static", "../results/phantom/panels.png"]
html_css_files = ["book.css"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_sphinx = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

NARROW = 30  # signs a line that fit beside the margins of any phone


def inline_math(translator, node):
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def display_math(translator, node):
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def name_cells(app, doctree):
    """Give the code of each cell of a notebook the anchor that `build.annotate` chose: a link to folded code unfolds it."""
    for cell in doctree.findall(nodes.container):
        if anchor := cell.get("cell_metadata", {}).get("anchor"):
            cell.children[0]["ids"].append(anchor)


def accessible(page: str) -> str:
    """The HTML of a page without what stands in the way of keyboards and screen readers: what axe calls critical or serious.

    The theme's captions are headings of no level, its two sidebars have no names, and the search page no heading. What may be
    wider than a phone (code, tables, formulas) must be reached by the keyboard, to be scrolled. Sphinx puts the lines of a long
    signature into a list of definitions that define nothing. What unfolds code is called what stands on it.
    """
    page = page.replace('class="caption" role="heading">', 'class="caption" role="heading" aria-level="2">')
    page = page.replace('<aside class="sidebar-drawer', '<aside aria-label="All pages" class="sidebar-drawer')
    page = page.replace('<aside class="toc-drawer', '<aside aria-label="On this page" class="toc-drawer')
    page = page.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    page = re.sub(r'<div class="(math"|table-wrapper )', r'<div tabindex="0" class="\1', page)
    page = page.replace('<div id="search-results">', '<h1>Search</h1>\n<div id="search-results">')
    page = re.sub(r"<pre>(.*?)</pre>", _reached, page, flags=re.DOTALL)
    return re.sub(r"<dl>\s*((?:<dd>.*?</dd>\s*)+)</dl>", _lines, page, flags=re.DOTALL)


def _reached(found: re.Match) -> str:
    longest = max(map(len, html.unescape(re.sub(r"<[^>]+>", "", found[1])).splitlines()), default=0)
    return f'<pre tabindex="0">{found[1]}</pre>' if longest > NARROW else found[0]


def _lines(found: re.Match) -> str:
    return f'<div class="sig-lines">{found[1].replace("<dd>", "<div>").replace("</dd>", "</div>")}</div>'


def mend(app, exception):
    """Make all pages `accessible`, after they are written."""
    if exception is None and app.builder.format == "html":
        for file in Path(app.outdir).rglob("*.html"):
            file.write_text(accessible(file.read_text(encoding="utf-8")), encoding="utf-8")


def plain_signs(app, what, name, obj, options, lines):
    """In docstrings, |x| is an absolute value and (V, *shape) a shape: hide their signs from reStructuredText."""
    for number, line in enumerate(lines):
        parts = re.split(r"(``.+?``)", line)
        parts[::2] = [re.sub(r"\*(?=\w+\))", r"\*", part.replace("|", r"\|")) for part in parts[::2]]
        lines[number] = "".join(parts)


def plain_signature(app, what, name, obj, options, signature, returns):
    """Of a section of the parameters show the keys only: their limits would fill the page.

    Defaults such as ``<function fedavg>`` and ``<factory>`` are no Python, and with them Sphinx could not shorten types.
    """
    if what == "class" and hasattr(obj, "model_fields"):
        return f"({', '.join(obj.model_fields)})", None
    if signature:
        signature = re.sub(r"= <function (\w+)>", r"= \1", signature)
        signature = re.sub(r"= <.+?>+(?=[,)])", "= ...", signature)
    return signature, returns


def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.connect("doctree-read", name_cells)
    app.connect("build-finished", mend)
    app.connect("autodoc-process-docstring", plain_signs)
    app.connect("autodoc-process-signature", plain_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
