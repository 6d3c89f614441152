"""The book builds without a warning, holds together, calls nobody, and works in a browser."""

import contextlib
import functools
import http.server
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import nbformat
import psutil
import pytest

from medsec.core import paths

ROOT = paths.ROOT
BUILD_LIMIT = 120  # seconds of one core, promised; wall time would depend on what else runs here
PAGE_LIMIT = 20
PHONE = (390, 844)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HINT = "no Chromium with its driver; Debian, Ubuntu: apt-get install chromium chromium-driver"

_spec = importlib.util.spec_from_file_location("book_build", ROOT / "book" / "build.py")
book = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(book)


# ------------------------------------------------------------------------------------------------------- preprocessing


def executed(*cells):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 01 — Title\n\nText."), *cells])
    return nbformat.from_dict(notebook)


def figure():
    return nbformat.v4.new_code_cell("draw()", outputs=[nbformat.v4.new_output("display_data", {"image/png": "aGk="})])


def test_a_figure_names_its_cell_and_its_command():
    before = executed(nbformat.v4.new_markdown_cell("## By `eye`"), figure(), nbformat.v4.new_code_cell("1"))
    untouched = json.dumps(before)
    after = book.annotate(before, "01_x", "pneumoniamnist", ["phantom"])
    assert json.dumps(before) == untouched
    drawn, plain = after.cells[2], after.cells[3]
    caption = drawn.metadata["mystnb"]["figure"]["caption"]
    assert f'href="#{drawn.metadata["anchor"]}"' in caption
    assert "`dvc repro -f pipelines/pneumoniamnist/dvc.yaml:01_x`" in caption
    assert "By eye" in drawn.metadata["mystnb"]["image"]["alt"]
    assert "mystnb" not in plain.metadata
    assert plain.metadata["anchor"] != drawn.metadata["anchor"]
    title, _, rest = after.cells[0].source.partition("\n")
    assert title == "# 01 — Title · pneumoniamnist"
    assert "(../phantom/01_x.ipynb)" in rest
    assert rest.endswith("Text.")


def test_default_parameters_go_where_others_were_injected():
    default = nbformat.v4.new_code_cell("c = 1", metadata={"tags": ["parameters"]})
    injected = nbformat.v4.new_code_cell("c = 2", metadata={"tags": ["injected-parameters"]})
    both = book.annotate(executed(default, injected), "01_x", "phantom", [])
    assert [cell.source for cell in both.cells[1:]] == ["c = 2"]
    alone = book.annotate(executed(default), "01_x", "phantom", [])
    assert [cell.source for cell in alone.cells[1:]] == ["c = 1"]


def test_the_command_names_a_stage():
    stages = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    for file in ROOT.glob("executed/*/*.ipynb"):
        pipeline, _, stage = book.command(file.stem, file.parent.name).split()[-1].rpartition(":")
        text = (ROOT / pipeline).read_text(encoding="utf-8") if pipeline else stages
        assert f"\n  {stage}:\n" in text


@pytest.mark.parametrize(
    ("link", "folder", "expected"),
    [
        ("[a](https://x.org/y)", "docs", "[a](https://x.org/y)"),
        ("[a](#there)", "docs", "[a](#there)"),
        ("[a](glossary.md#eps)", "docs", "[a](glossary.md#eps)"),
        ("[a](../README.md)", "docs", "[a](../index.md)"),
        ("[a](README.md)", "", "[a](index.md)"),
        ("[a](../README.md#time-and-size)", "docs", "[a](../run.md#time-and-size)"),
        ("[a](../claims/)", "docs", "a"),
        ("[a](../LICENSE)", "docs", "[a](path:../LICENSE)"),
        (
            "[a](LICENSE#L7)",
            "",
            "[a](path:LICENSE)",
        ),  # a line of a table: the file is offered, which has no lines to go to
        ("[a](nowhere.md)", "docs", "[a](nowhere.md)"),
    ],
)
def test_links_fit_the_book(link, folder, expected):
    files = set()
    assert book.settle_links(f"See {link}.", folder, {"docs/glossary.md"}, files) == f"See {expected}."
    assert files == ({"LICENSE"} if "LICENSE" in link else set())


def test_an_interval_stays_together():
    assert (
        book.keep_together("**holds**: 0.3 [0.2, -0.4] (n = 5, quick)")
        == "**holds**: 0.3 [0.2,\xa0-0.4] (n\xa0=\xa05, quick)"
    )


def test_a_section_of_the_readme():
    assert book.section("# T\n\n## A\n\none\n\n## B\n\ntwo\n", "A") == "one"
    with pytest.raises(SystemExit, match="no section: C"):
        book.section("## A\n", "C")


def test_every_module_is_documented_once():
    listed = re.findall(r"automodule:: medsec\.(\w+)", "".join(book.api_pages().values()))
    assert sorted(listed) == sorted(file.stem for file in (ROOT / "medsec").glob("[!_]*.py"))


# --------------------------------------------------------------------------------------------------------------- files


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
    expected = {"index.html", "results.html", "run.html", "search.html", "genindex.html", "api/index.html"}
    expected |= {f"docs/{file.stem}.html" for file in (ROOT / "docs").glob("*.md")}
    expected |= {file.relative_to(ROOT).with_suffix(".html").as_posix() for file in ROOT.glob("executed/*/*.ipynb")}
    assert expected <= set(pages)


def test_every_page_is_reached_from_the_first(pages):
    waiting, seen = ["index.html"], set()
    while waiting:
        page = waiting.pop()
        if page in seen or page not in pages:
            continue
        seen.add(page)
        waiting += [urljoin(page, unquote(urldefrag(link).url)) for link in pages[page].links if not external(link)]
    assert set(pages) - seen <= {"py-modindex.html"}


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


def test_no_page_loads_anything_from_elsewhere(html, pages):
    assert not {(name, address) for name, page in pages.items() for address in page.loads if external(address)}
    for sheet in html.rglob("*.css"):
        addresses = re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s;]+)", sheet.read_text(encoding="utf-8"))
        assert not [address for address in addresses if external(address)], sheet.name


def test_no_page_names_a_place_on_this_machine(html, pages):
    for name, page in pages.items():
        assert str(ROOT) not in page.text, name
        assert str(html.parent) not in page.text, name


def test_the_pipeline_is_a_list_in_the_book(pages):
    text = re.sub(r"<[^>]+>", "", pages["run.html"].text)
    assert "data.dvc is needed by 00_data_and_threats, 01_backdoor_fedgan" in text
    assert "flowchart" not in text


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


def test_no_reader_sees_what_is_meant_for_the_program(pages):
    for name, page in pages.items():
        text = re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", page.text, flags=re.DOTALL)
        assert not re.search(
            r"\{(toctree|download|eval-rst)\}|\.\. \w+::|system-message|problematic|path:\.\./", text
        ), name


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
    for flag in (
        "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-quic no-first-run no-default-browser-check "
        "disable-background-networking disable-component-update disable-sync disable-extensions no-proxy-server "
        f"user-data-dir={tmp_path_factory.mktemp('browser')}"
    ).split():
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")  # the driver is spoken to on this machine
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        service = webdriver.ChromeService(executable_path=driver, log_output=os.devnull)
        chrome = webdriver.Chrome(options=options, service=service)
        family = psutil.Process(service.process.pid)
        started = [family, *family.children(recursive=True)]
        chrome.set_page_load_timeout(PAGE_LIMIT)
        chrome.set_script_timeout(PAGE_LIMIT)
        chrome.get("about:blank")
        complaints(chrome, "")  # what the browser's own first page asked for is no concern of ours
        try:
            yield chrome
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                started += family.children(recursive=True)
            chrome.quit()
            _, left = psutil.wait_procs(started, timeout=10)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def complaints(browser, address):
    """Console errors, failed requests and requests to elsewhere since the last call."""
    found = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        event, facts = message["method"], message["params"]
        if event == "Network.loadingFailed" and not facts.get("canceled"):
            found.append(f"failed: {facts['errorText']}")
        if event == "Network.responseReceived" and facts["response"]["status"] >= 400:
            found.append(f"{facts['response']['status']}: {facts['response']['url']}")
        if event == "Network.requestWillBeSent" and not facts["request"]["url"].startswith((address, "data:", "blob:")):
            found.append(f"elsewhere: {facts['request']['url']}")
    return found


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
        if name != "search.html":  # (empty until something is searched for)
            assert browser.execute_script("return document.querySelectorAll('h1').length") == 1, name
        assert browser.execute_script(BROKEN_IMAGES) == [], name
        assert complaints(browser, address) == [], name


@contextlib.contextmanager
def phone(browser):
    size = {"width": PHONE[0], "height": PHONE[1], "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_page_is_wider_than_a_phone(browser, address, pages):
    with phone(browser):
        for name in pages:
            browser.get(address + name)
            wide = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert max(wide) <= PHONE[0], name
        browser.get(address)
        menu = browser.find_element("css selector", ".sidebar-drawer")
        assert menu.rect["x"] < 0
        browser.find_element("css selector", "label.nav-overlay-icon").click()
        deadline = time.monotonic() + 5
        while menu.rect["x"] < 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert menu.rect["x"] == 0, "the menu does not open"


def test_light_and_dark(browser, address):
    browser.get(address)
    colours = set()
    for _ in range(3):  # auto, light, dark
        colours.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        browser.execute_script("document.querySelector('.theme-toggle').click()")
    assert len(colours) == 2
    assert complaints(browser, address) == []


def test_search_finds_a_term(browser, address):
    browser.get(f"{address}search.html?q=trigger")
    deadline = time.monotonic() + PAGE_LIMIT
    while time.monotonic() < deadline:
        if hits := browser.find_elements("css selector", "#search-results li a"):
            break
        time.sleep(0.1)
    assert hits
    assert complaints(browser, address) == []
