"""Settings of the book. `build.py` gathers the pages and calls Sphinx with them.

No page loads anything from elsewhere: mathematics become MathML, which browsers draw by themselves, and the theme brings its
own script and uses the fonts of the reader's system.
"""

import re

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
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_sphinx = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


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
    app.connect("autodoc-process-docstring", plain_signs)
    app.connect("autodoc-process-signature", plain_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
