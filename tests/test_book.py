"""The book builds without a warning, holds together, calls nobody, and works in a browser."""

import functools
import html as html_
import http.server
import importlib.util
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat import v4
from PIL import Image

from experiments import panels as computed
from experiments import params
from experiments.adversarial_pruning_defense import arms
from medsec.core import paths
from medsec.core.errors import InputError

ROOT = paths.ROOT
BUILD_LIMIT = 120  # seconds of one core, promised; wall time would depend on what else runs here
PAGE_LIMIT = 20
PHONE = (390, 844)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HINT = "no Chromium with its driver; Debian, Ubuntu: apt-get install chromium chromium-driver"


def script(name):
    """A script of the book, as a module."""
    spec = importlib.util.spec_from_file_location(f"book_{name}", ROOT / "book" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT / "book"))  # where build.py finds the module beside it
book, slides, settings = script("build"), script("slides"), script("conf")


def test_every_module_is_documented_once():
    listed = re.findall(r"automodule:: ([\w.]+)", "".join(book.api_pages().values()))
    files = [file for package in ("medsec", "experiments", "medphantom") for file in (ROOT / package).rglob("[!_]*.py")]
    assert sorted(listed) == sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)


def test_the_slides_have_their_figures_and_fit_into_two_hours():
    deck = slides.slides(slides.PAGE.read_text(encoding="utf-8"), slides.PAGE.parent)
    assert 10 < len(deck) <= 20
    assert all(title and points for title, _, points in deck)
    assert sum(figure is not None for _, figure, _ in deck) > 10
    page = slides.draw(*deck[1], "2")
    assert [ax.images[0].get_array().shape[:2] for ax in page.axes] == [plt.imread(deck[1][1]).shape[:2]]
    plt.close(page)
    with pytest.raises(InputError, match=r"slide 'One': gone\.png is missing; make it with: dvc repro"):
        slides.slides("# Deck\n\n## One\n\n![x](gone.png)\n", paths.ROOT)


def test_the_command_under_a_figure_names_a_stage():
    for file in ROOT.glob("executed/*/*.ipynb"):
        pipeline, _, stage = book.command(file.stem, file.parent.name).split()[-1].rpartition(":")
        assert f"\n  {stage}:\n" in (ROOT / (pipeline or "dvc.yaml")).read_text(encoding="utf-8")


def test_only_the_method_of_a_notebook_stays_open():
    shown = {}
    for file in ROOT.glob("executed/phantom/*.ipynb"):
        page = book.annotate(nbformat.read(file, as_version=4), file.stem, "phantom", [])
        code = [cell for cell in page.cells if cell.cell_type == "code"]
        assert "profile = " not in code[0].source, "the first line of the page says it"
        assert all("hide-input" in cell.metadata.tags for cell in code[:1])
        opened = [cell.source for cell in code if "hide-input" not in cell.metadata.get("tags", [])]
        shown[file.stem[:2]] = re.findall(r"^def (\w+)", "\n".join(opened), re.MULTILINE)
    assert {name: found for name, found in shown.items() if found} == {
        "01": ["step"],
        "03": ["invert", "undo"],
        "04": ["pgd"],
    }


def test_a_screen_reader_says_what_a_figure_shows():
    """The finding in its title, not where it stands."""
    figure = v4.new_output("display_data", {"image/png": "", "text/plain": "Figure: Noise does not help"})
    nameless = v4.new_output("display_data", {"image/png": "", "text/plain": "<Figure size 1x1>"})
    cells = [
        v4.new_markdown_cell("# Title\n\n## Part"),
        *(v4.new_code_cell("x", outputs=[o]) for o in (figure, nameless)),
    ]
    page = book.annotate(v4.new_notebook(cells=cells), "03_gia_defense", "phantom", [])
    alts = [c.metadata["mystnb"]["image"]["alt"] for c in page.cells if "mystnb" in c.metadata]
    assert alts == ["Noise does not help", "Figure of the section “Part”"]


def test_what_is_a_method():
    assert book.is_method("def f(x):\n    return torch.sign(x)\n", {"pd"})
    assert not book.is_method("def f(x):\n    return pd.DataFrame(x)\n", {"pd"})
    assert not book.is_method("y = f(x)", {"pd"})


def test_what_stands_in_the_way_of_a_keyboard_is_mended():
    long = "<pre><span></span>" + 40 * "x" + "</pre>"
    assert settings.accessible("<pre>short &amp; sweet</pre>") == "<pre>short &amp; sweet</pre>"
    assert settings.accessible(long) == long.replace("<pre>", '<pre tabindex="0">')
    assert settings.accessible("<dl>\n<dd>x,</dd>\n</dl>") == '<div class="sig-lines"><div>x,</div>\n</div>'
    terms = "<dl>\n<dt>a term</dt><dd>what it is</dd>\n</dl>"
    assert settings.accessible(terms) == terms


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://github.com/some-one/medsec.git", "gh/some-one/medsec"),
        ("https://name:secret@github.com/someone/medsec", "gh/someone/medsec"),
        ("git@github.com:someone/medsec.git", "gh/someone/medsec"),
        ("ssh://git@gitlab.com/group/part/medsec.git", "gl/group%2Fpart%2Fmedsec"),
        ("https://git.hospital.example/medsec.git", None),
        ("../medsec", None),
        ("", None),
    ],
)
def test_a_notebook_runs_on_binder_where_binder_can_clone_it(remote, address):
    found = book.run_link(remote, "01_name")
    wanted = f"https://mybinder.org/v2/{address}/HEAD?labpath=notebooks%2F01_name.ipynb"
    assert found == (f"[Run it on Binder]({wanted})" if address else "[Run this notebook](../../docs/binder.md)")


PANELS = json.loads((ROOT / "results" / "phantom" / "panels.json").read_text(encoding="utf-8"))
STRIPS = Image.open(ROOT / "results" / "phantom" / "panels.png")


def fits(table, sizes):
    """Whether nested lists have as many values as the controls, as deep as they go."""
    if not isinstance(table, list):
        return True
    return bool(sizes) and len(table) == sizes[0] and all(fits(part, sizes[1:]) for part in table)


@pytest.mark.parametrize("name", PANELS["panels"])
def test_every_position_of_a_panel_has_images_and_numbers(name):
    panel, words = PANELS["panels"][name], book.movable.PANELS[name]
    assert list(panel["start"]) == list(panel["controls"]) == list(words["controls"])
    assert {layer for layers in words["strips"].values() for layer in layers} == set(panel["rows"]) - words[
        "strips"
    ].keys()
    sizes = [len(choices) for choices in panel["controls"].values()]
    assert all(fits(table, sizes) for table in (*panel["rows"].values(), panel["marks"], *panel["numbers"].values()))
    for place in itertools.product(*map(range, sizes)):
        rows = [book.movable.at(table, place) for table in panel["rows"].values()]
        assert all(0 <= row < PANELS["rows"] for row in rows)
        assert re.fullmatch(r"[01]{4}", book.movable.at(panel["marks"], place))
        assert "{" not in book.movable.filled(words["says"], book.movable.values(panel, place))


def test_the_picture_of_the_panels_has_all_rows_and_stays_small():
    assert STRIPS.size == (PANELS["shown"] * PANELS["side"], PANELS["rows"] * PANELS["side"])
    assert sum(file.stat().st_size for file in (ROOT / "results" / "phantom").glob("panels.*")) <= 150_000


def strip(row):
    """A row of the picture, as whole numbers."""
    side = PANELS["side"]
    return np.asarray(STRIPS, np.int16)[row * side : (row + 1) * side]


def drawn(images):
    rows = computed.Strips()
    rows.add(images)
    return rows.rows[0].astype(np.int16)


def test_panels_show_what_their_functions_compute():
    """A part of them, within what another kind of processor rounds otherwise."""
    p, (trigger, eps) = params.load(), (PANELS["panels"][name] for name in ("trigger", "eps"))
    splits = computed.inversion_setup("phantom", p).splits
    size = trigger["controls"]["size"][2]
    stamped, hits, alarms = computed.trigger_at(p, splits, "inside", size)
    assert (drawn(stamped) == strip(trigger["rows"]["stamped"][1][2])).all()
    found = trigger["numbers"]["found"][1][2]
    assert np.abs(np.array([int(each.sum()) for each in hits]) - found).max() <= 2
    assert abs(alarms - trigger["numbers"]["alarms"][1][2]) <= 1
    setup, times = arms.prepare("phantom", p), computed.EPS.index(1)
    images, wrong = computed.attacked(p, setup, "base", 1)
    assert np.abs(drawn(images) - strip(eps["rows"]["attacked"][0][times])).mean() < 0.5
    assert abs(int(wrong.sum()) - eps["numbers"]["wrong"][0][times]) <= 2


def processor_seconds():
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="session")
def html(tmp_path_factory):
    """The folder of the finished book."""
    out = tmp_path_factory.mktemp("book")
    command = [sys.executable, ROOT / "book" / "build.py", "--out", out]
    before = processor_seconds()
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=5 * BUILD_LIMIT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert processor_seconds() - before <= BUILD_LIMIT
    return out / "html"


LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, file):
        super().__init__()
        self.links, self.loads, self.anchors = set(), set(), set()
        self.text = file.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if anchor := found.get("id"):
            self.anchors.add(anchor)
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        if tag == "form" and "action" in found:
            self.links.add(found["action"])
        if found.get(LOADS.get(tag)):
            self.loads.add(found[LOADS[tag]])


@pytest.fixture(scope="session")
def pages(html):
    return {file.relative_to(html).as_posix(): Page(file) for file in sorted(html.rglob("*.html"))}


def external(address):
    return bool(urlparse(address).scheme or urlparse(address).netloc) and not address.startswith("data:")


def test_the_book_has_its_pages(pages):
    expected = {"index.html", "results.html", "move.html", "run.html", "search.html", "genindex.html", "api/index.html"}
    expected |= {f"docs/{file.stem}.html" for file in (ROOT / "docs").glob("*.md")}
    expected |= {file.relative_to(ROOT).with_suffix(".html").as_posix() for file in ROOT.glob("executed/*/*.ipynb")}
    assert expected <= set(pages)


def test_links_and_images_lead_somewhere(html, pages):
    broken = []
    for name, page in pages.items():
        for address in page.links | page.loads:
            path, anchor = urldefrag(address)
            if external(address) or address.startswith("data:"):
                continue
            target = urljoin(name, unquote(path)).partition("?")[0]
            if not (html / target).is_file():
                broken.append(f"{name}: {address}")
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                broken.append(f"{name}: {address} (no such anchor)")
    assert not broken


def test_no_page_loads_from_elsewhere_or_names_this_machine(html, pages):
    for name, page in pages.items():
        assert str(ROOT) not in page.text, name
        assert str(html.parent) not in page.text, name
    assert not {(name, address) for name, page in pages.items() for address in page.loads if external(address)}
    for sheet in html.rglob("*.css"):
        addresses = re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s;]+)", sheet.read_text(encoding="utf-8"))
        assert not [address for address in addresses if external(address)], sheet.name


def test_every_figure_stands_above_its_command(html, pages):
    for file in ROOT.glob("executed/*/*.ipynb"):
        outputs = [out for cell in nbformat.read(file, as_version=4).cells for out in cell.get("outputs", [])]
        figures = sum("image/png" in output.get("data", {}) for output in outputs)
        page = pages[file.relative_to(ROOT).with_suffix(".html").as_posix()].text
        shown = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
        assert len(shown) == figures
        for figure in shown:
            assert re.search(r"<img [^>]*src=", figure)
            assert re.search(r'href="#cell-\d+"', figure)
            assert "dvc repro" in re.sub(r"<[^>]+>", "", figure)


# ------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def address(html):
    """Address of a server of the book, on this machine only."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that finds nobody but this machine, and is gone afterwards."""
    program, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip(HINT)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    folder = tmp_path_factory.mktemp("browser")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={folder}"):
        options.add_argument(f"--{flag}")
    options.add_argument("--no-proxy-server")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NO_PROXY", "no_proxy"):  # the driver is spoken to on this machine
            patch.setenv(name, "127.0.0.1,localhost")
        service = webdriver.ChromeService(executable_path=driver, log_output=os.devnull)
        chrome = webdriver.Chrome(options=options, service=service)
        chrome.set_page_load_timeout(PAGE_LIMIT)
        chrome.set_script_timeout(3 * PAGE_LIMIT)  # axe looks at thousands of elements
        yield chrome
        chrome.quit()


def complaints(browser):
    """Console errors since the last call; a request that fails is one, and one to elsewhere fails."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


AXE = """
const [only, theme, skipped] = arguments;
document.body.dataset.theme = theme;
const rules = Object.fromEntries(skipped.map(name => [name, {enabled: false}]));
const options = {resultTypes: ["violations"], preload: false, ...(only.length ? {runOnly: only} : {rules})};
return axe.run(document, options).then(found => found.violations
  .filter(each => ["critical", "serious"].includes(each.impact))
  .map(each => `${each.impact} ${each.id}: ${each.nodes.slice(0, 3).map(node => node.html.slice(0, 160)).join(" | ")}`));
"""
CONTRAST = "color-contrast"  # the one rule that takes seconds a page: asked where every kind of element is
COLOURS = ("index", "move", "results", "api/judge", "docs/flower", "executed/phantom/00_data_and_threats")


def barriers(browser, *rules, theme="light", skipped=()):
    """What axe calls critical or serious on the page: for readers with a keyboard, a screen reader, or weak eyes."""
    folder = Path(importlib.util.find_spec("selenium_axe_python").origin).parent
    browser.execute_script((folder / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
    return browser.execute_script(AXE, rules, theme, skipped)


BROKEN_IMAGES = """
const images = [...document.images];
images.forEach(image => { image.loading = "eager"; });
return Promise.all(images.map(image => image.decode().catch(() => null)))
  .then(() => images.filter(image => !image.naturalWidth).map(image => image.src));
"""


def test_every_page_opens_without_an_error(browser, address, pages):
    for name in pages:
        browser.get(address + name)
        assert browser.title, name
        assert browser.execute_script("return document.querySelectorAll('h1').length") == 1, name
        assert browser.execute_script(BROKEN_IMAGES) == [], name
        assert barriers(browser, skipped=[CONTRAST]) == [], name
        assert complaints(browser) == [], name


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_kinds_of_text_stand_out(browser, address, theme):
    for name in COLOURS:
        browser.get(f"{address}{name}.html")
        browser.execute_script("document.querySelectorAll('details').forEach(part => { part.open = true; });")
        assert barriers(browser, CONTRAST, theme=theme) == [], name


def test_axe_would_find_what_is_in_the_way(browser, address):
    """So that its silence above means something."""
    browser.get(address + "index.html")
    browser.execute_script("document.querySelector('article').insertAdjacentHTML('beforeend', '<input type=range>')")
    browser.execute_script("document.querySelector('article p').style.color = '#ddd'")
    found = barriers(browser)
    assert [each.split(":")[0] for each in found] == ["serious color-contrast", "critical label"]


SHOWN_BY = """
const form = document.querySelector(`[data-panel="${arguments[0]}"]`);
const all = (what, tell) => [...form.querySelectorAll(what)].map(tell);
return {
  rows: all("[data-row]", layer => [layer.dataset.row, Number(getComputedStyle(layer).getPropertyValue("--row"))]),
  loaded: all("[data-row]", layer => getComputedStyle(layer).backgroundImage.includes("panels.png")).every(Boolean),
  faded: all("[data-fades]", layer => Number(getComputedStyle(layer).opacity)),
  marks: all(".marks li", item => item.textContent),
  alt: all("[data-alt]", image => image.getAttribute("aria-label")),
  said: form.querySelector("output").textContent,
};
"""


def expected_of(name, place):
    """What a reader of a panel sees and hears at a position."""
    panel, words = PANELS["panels"][name], book.movable.PANELS[name]
    known = book.movable.values(panel, place)
    said = book.movable.filled(words["says"], known)
    layers = [layer for layers in words["strips"].values() for layer in layers]
    return {
        "rows": [[layer, book.movable.at(panel["rows"][layer], place)] for layer in layers],
        "marks": [words["marks"][int(mark)] for mark in book.movable.at(panel["marks"], place)],
        "said": said,
        "alt": [f"{label}. {said}" for label in words["strips"]],
        "loaded": True,
        "faded": [known["opacity"]] if "fades" in words else [],
    }


@pytest.mark.parametrize("name", PANELS["panels"])
def test_a_panel_is_moved_by_the_keyboard(browser, address, name):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get(address + "move.html")
    panel = PANELS["panels"][name]
    place = list(panel["start"].values())
    assert browser.execute_script(SHOWN_BY, name) == expected_of(name, place)
    for k, (control, choices) in enumerate(panel["controls"].items()):
        field = browser.find_element(By.ID, f"{name}-{control}")
        field.send_keys(Keys.END)
        place[k] = len(choices) - 1
        assert browser.execute_script(SHOWN_BY, name) == expected_of(name, place), control
        field.send_keys(Keys.ARROW_UP if field.tag_name == "select" else Keys.ARROW_LEFT)
        place[k] -= 1
        assert browser.execute_script(SHOWN_BY, name) == expected_of(name, place), control
    assert complaints(browser) == []


def test_the_panels_can_be_read_without_a_script(pages):
    text = pages["move.html"].text
    for name in PANELS["panels"]:
        assert html_.escape(expected_of(name, list(PANELS["panels"][name]["start"].values()))["said"]) in text
    assert "Moving them needs JavaScript" in text


def test_a_link_to_folded_code_unfolds_it(browser, address):
    page = "executed/phantom/01_backdoor_fedgan.html"
    browser.get(address + page)
    anchor = browser.execute_script("return document.querySelector('figcaption a').hash")
    shown = f"return document.querySelector('{anchor}').closest('details').open"
    assert not browser.execute_script(shown)
    browser.get(address + page + anchor)
    assert browser.execute_script(shown)


def test_no_page_is_wider_than_a_phone(browser, address, pages):
    """Last: the browser stays that small."""
    size = {"width": PHONE[0], "height": PHONE[1], "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for name in pages:
        browser.get(address + name)
        wide = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert max(wide) <= PHONE[0], name
        assert barriers(browser, "scrollable-region-focusable") == [], name
