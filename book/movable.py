"""The page "Move it yourself": three panels of the notebooks, which a reader moves without a kernel.

Numbers and images come from ``results/phantom/panels.json`` and ``panels.png`` (`experiments.panels`), the words from here. The
page is whole without JavaScript: it shows where the controls begin. ``_static/panels.js`` only fills in the same texts anew.
"""

import json
from html import escape

TITLE = "Move it yourself"
ABOUT = """Three panels of the notebooks, computed beforehand on the drawn cohort *phantom*: nothing is installed, and nothing is
sent. Move a slider with the mouse, a finger or the arrow keys.

<noscript><p><strong>Moving them needs JavaScript.</strong> Without it you see where each panel begins.</p></noscript>
"""

# Of each panel: heading, notebook and text; its controls, with their labels, the names of their values (or how a value is
# written) and a remark; its strips of images; what is said of them; and what stands under an image that is marked, or not.
# {names} in braces are those of the JSON; {shown} is how many images are marked.
PANELS = {
    "trigger": {
        "title": "How small and faint may a trigger be?",
        "notebook": "01_backdoor_fedgan",
        "about": "A dishonest hospital stamps a small checkerboard on its images. The server looks for it at its place, by "
        "correlation, which does not see contrast: a faint trigger is found where the image below it is even.",
        "controls": {
            "place": ("Place", {"corner": "in the corner, as in the notebook", "inside": "further inside"}),
            "size": ("Size", "{size} px a side"),
            "opacity": ("Opacity", "{opacity}"),
        },
        "strips": {"Images with the trigger": ("clean", "stamped")},
        "fades": "stamped",
        "says": "Found in {shown} of the 4 images shown, and in {found} of all {held_out} held-out images. A false alarm in "
        "{alarms} of these without a trigger.",
        "marks": ("missed", "found"),
    },
    "eps": {
        "title": "How large a change turns an answer?",
        "notebook": "04_adversarial_pruning_defense",
        "about": "An attacker who knows the network changes every pixel by at most eps (20 steps of PGD). The second row shows "
        "the change alone, sixteen times as strong: black is none.",
        "controls": {
            "network": (
                "Network",
                {"base": "plain", "prune_cbam": "with pruning and attention", "at_ramp": "trained against the attack"},
            ),
            "eps": ("eps", "{eps}/255"),
        },
        "strips": {
            "Images after the attack": ("attacked",),
            "The change, sixteen times as strong": ("clean", "attacked"),
        },
        "says": "{shown} of the 4 answers shown are wrong. Of the answers to all {attacked} attacked images, {wrong} are wrong.",
        "marks": ("right", "wrong"),
    },
    "noise": {
        "title": "How much noise hides an image?",
        "notebook": "03_gia_defense",
        "about": "A client computes a gradient on one image and sends it; the server turns it back into an image. Noise goes on "
        "the image before, or on the gradient after.",
        "controls": {
            "where": (
                "Noise on",
                {
                    "image": "the image (strength: its rms)",
                    "gradient": "the gradient (strength: its length over the gradient's)",
                },
            ),
            "times": ("Strength", "{strength}"),
        },
        "strips": {
            "Images of the client": ("image",),
            "What the gradient is computed on": ("used",),
            "What the server reconstructs": ("reconstructed",),
        },
        "says": "The reconstructions have {psnr} dB. {shown} of the 4 are more like their own image than like any other of the "
        "client's {held} images.",
        "marks": ("lost", "found"),
    },
}


def page(found: dict) -> str:
    """The Markdown of the page, from the numbers in ``panels.json``."""
    parts = [f"# {TITLE}\n\n{ABOUT}"]
    for name, words in PANELS.items():
        link = f"From [notebook {words['notebook'][:2]}](executed/{found['cohort']}/{words['notebook']}.ipynb)."
        shown = form(name, words, found["panels"][name])
        parts.append(f"({name})=\n\n## {words['title']}\n\n{words['about']} {link}\n\n{_raw(shown)}")
    kept = json.dumps({name: {**found["panels"][name], "words": PANELS[name]["marks"]} for name in PANELS})
    script = f'<script type="application/json" id="panels">{kept}</script>'
    return "\n\n".join([*parts, _raw(f'{script}\n<script src="_static/panels.js" defer></script>')]) + "\n"


def _raw(html: str) -> str:
    return f"```{{raw}} html\n{html}\n```"


def at(table, place: list[int]):
    """What a table says of a position; one that is no list says the same of all."""
    for index in place:
        table = table[index] if isinstance(table, list) else table
    return table


def values(panel: dict, place: list[int]) -> dict:
    """All that texts may name, at a position: the controls' values, the numbers, and how many images are marked."""
    chosen = {name: known[i] for (name, known), i in zip(panel["controls"].items(), place, strict=True)}
    numbers = {name: at(table, place) for name, table in panel["numbers"].items()}
    return chosen | numbers | {"shown": at(panel["marks"], place).count("1")}


def filled(text: str, known: dict) -> str:
    """A text with its names filled in, numbers as JavaScript writes them."""
    return text.format(**{key: f"{value:g}" if isinstance(value, float) else value for key, value in known.items()})


def form(name: str, words: dict, panel: dict) -> str:
    """One panel as HTML, where its controls begin."""
    place = list(panel["start"].values())
    known, marks = values(panel, place), at(panel["marks"], place)
    controls = [_control(name, key, words["controls"][key], panel, known) for key in panel["controls"]]
    strips = [_strip(label, layers, words, panel, place, known) for label, layers in words["strips"].items()]
    under = "".join(f'<li class="mark-{mark}">{words["marks"][int(mark)]}</li>' for mark in marks)
    said = escape(words["says"])
    return "\n".join(
        [
            f'<form class="panel" data-panel="{name}" autocomplete="off" aria-label="{words["title"]}">',
            *controls,
            *strips,
            f'<ul class="marks" aria-hidden="true">{under}</ul>',
            f'<p><output data-says="{said}">{escape(filled(words["says"], known))}</output></p>',
            "</form>",
        ]
    )


def _control(panel_name: str, key: str, how: tuple, panel: dict, known: dict) -> str:
    """A menu where values have names, else a slider over their places; not to be moved until the script allows it."""
    (label, names), start, place = how, panel["start"][key], f"{panel_name}-{key}"
    if isinstance(names, dict):
        listed = "".join(
            f'<option value="{i}"{" selected" * (i == start)}>{names[value]}</option>'
            for i, value in enumerate(panel["controls"][key])
        )
        field = f'<select id="{place}" name="{key}" disabled>{listed}</select>'
        return f'<p class="control"><label for="{place}">{label}</label> {field}</p>'
    last, shown = len(panel["controls"][key]) - 1, filled(names, known)
    field = (
        f'<input type="range" id="{place}" name="{key}" min="0" max="{last}" step="1" value="{start}" '
        f'aria-valuetext="{shown}" data-value="{names}" disabled>'
    )
    chosen = f'<span data-says="{names}" aria-hidden="true">{shown}</span>'
    return f'<p class="control"><label for="{place}">{label}</label> {field} {chosen}</p>'


def _strip(label: str, layers: tuple, words: dict, panel: dict, place: list[int], known: dict) -> str:
    """A row of images, as one image with a text: what it shows, and what is said of it."""
    text = f"{label}. {words['says']}"
    rows = []
    for layer in layers:
        style = f"--row: {at(panel['rows'][layer], place)}"
        fades = words.get("fades") == layer
        style += f"; opacity: {known['opacity']}" if fades else ""
        rows.append(f'<span data-row="{layer}"{" data-fades" * fades} style="{style}"></span>')
    kind = "strip change" if layers == ("clean", "attacked") else "strip"
    image = f'<div class="{kind}" role="img" aria-label="{escape(filled(text, known))}" data-alt="{escape(text)}">'
    return f'<p class="shown" aria-hidden="true">{label}</p>\n{image}{"".join(rows)}</div>'
