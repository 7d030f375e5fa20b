"""The site in a real browser: every page in the light and on a phone.

No page may log an error, ask another machine, or be hard to use for those who cannot see well.
"""

import functools
import http.server
import inspect
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import books  # noqa: E402
import make_site  # noqa: E402


class Quiet(http.server.SimpleHTTPRequestHandler):
    "A handler of requests that logs nothing"

    def log_message(self, format, *args):
        pass


def built(clone):
    "The folder of the site that a clone builds, with one view"
    done = subprocess.run(
        [sys.executable, "tools/make_site.py", "--views", "04_edge_gate"],
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return clone / "_site"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The built site, served: folder and address"
    tmp = tmp_path_factory.mktemp("site")
    clone = tmp / "clone"
    left_out = shutil.ignore_patterns(".venv", ".git", "_site", "_site_src", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=left_out)
    folder = built(clone)
    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@dataclass
class Opened:
    "A page of the site, what it logged, and the addresses it loaded"

    page: Page
    logged: list = field(default_factory=list)
    loaded: list = field(default_factory=list)

    def listen(self):
        "Note errors, warnings and requests from now on"
        page = self.page
        page.on("console", self.console)
        page.on("pageerror", self.error)
        page.on("response", self.response)
        page.on("request", self.request)

    def error(self, error):
        "Note an error"
        text = str(error)
        self.logged.append(text)

    def request(self, request):
        "Note an address"
        url = request.url
        self.loaded.append(url)

    def console(self, message):
        "Note an error or a warning"
        kind, text = message.type, message.text
        if kind in ("error", "warning"):
            self.logged.append(text)

    def response(self, response):
        "Note what was not found"
        status, url = response.status, response.url
        if status >= 400:
            self.logged.append(f"{status} {url}")

    def outside(self, address):
        "What the page loaded from other machines"
        own = (address, "data:", "blob:")
        return [url for url in self.loaded if not url.startswith(own)]


SEARCH_IS_READY = "document.querySelector('.md-search')?.ariaLabel == 'Search'"
BROKEN_PICTURES = """[...document.images]
    .filter(i => i.loading != 'lazy' && !i.naturalWidth)
    .map(i => i.src)"""
PICTURES_WITHOUT_TEXT = "[...document.images].filter(i => !i.alt).length"
FITS = "document.documentElement.scrollWidth <= innerWidth"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


def opened(context, address):
    "A page that is loaded"
    shown = Opened(context.new_page())
    shown.listen()
    shown.page.goto(address, wait_until="load")
    shown.page.wait_for_function(SEARCH_IS_READY)
    return shown


def faults(page):
    "What axe-core calls serious or critical"
    results = Axe().run(page)
    found = []
    for violation in results.response["violations"]:
        if violation["impact"] in ("serious", "critical"):
            name = violation["id"]
            first = violation["nodes"][0]
            html = first["html"]
            found.append((name, html[:200]))
    return found


def check(shown, address):
    "A page has all its pictures, with texts, fits the screen, and loads nothing from outside"
    page = shown.page
    assert shown.logged == []
    assert page.evaluate(BROKEN_PICTURES) == []
    assert shown.outside(address) == []
    assert page.evaluate(FITS), "wider than the screen"
    assert page.evaluate(PICTURES_WITHOUT_TEXT) == 0


def pages_of(folder):
    "The names of all pages"
    names = []
    for path in folder.rglob("*.html"):
        name = path.relative_to(folder)
        names.append(name.as_posix())
    names.remove("404.html")
    return sorted(names)


def test_the_site_has_its_pages(site):
    folder, _ = site
    pages = pages_of(folder)
    assert len(pages) >= 50
    expected = {"index.html", "13_multi_gpu.html", "api/method.sobel.html", "speed.html"}
    assert expected <= set(pages)


def test_every_page_in_the_light(site, chromium):
    folder, address = site
    context = chromium.new_context(viewport=DESKTOP, color_scheme="light")
    for name in pages_of(folder):
        shown = opened(context, f"{address}/{name}")
        check(shown, address)
        assert faults(shown.page) == [], name
        shown.page.close()


def test_every_fourth_page_on_a_phone(site, chromium):
    folder, address = site
    context = chromium.new_context(viewport=PHONE, color_scheme="light")
    for name in pages_of(folder)[::4]:
        shown = opened(context, f"{address}/{name}")
        check(shown, address)
        shown.page.close()


def test_in_the_dark(site, chromium):
    _, address = site
    context = chromium.new_context(viewport=DESKTOP, color_scheme="dark")
    for name in SOME_PAGES:
        shown = opened(context, f"{address}/{name}.html")
        page = shown.page
        colour = page.evaluate(BACKGROUND)
        assert colour != "rgb(255, 255, 255)", name
        assert shown.logged == [], name
        found = faults(page)
        assert found == [], name


SOME_PAGES = ("index", "03_sobel_edges", "05_losses", "01_one_sitting", "api/method.egcnn")


@pytest.fixture
def front_page(site, chromium):
    "The first page"
    _, address = site
    context = chromium.new_context()
    shown = opened(context, f"{address}/index.html")
    return shown.page


ADD_FAULTS = """document.querySelector('.md-content p').innerHTML +=
    '<img src="/none.png"><span style="color:#eee">pale</span>'"""


def test_a_fault_would_be_seen(front_page):
    front_page.evaluate(ADD_FAULTS)
    found = dict(faults(front_page))
    assert "image-alt" in found
    assert "color-contrast" in found


def test_search_finds_a_function(front_page):
    keyboard = front_page.keyboard
    keyboard.press("s")
    keyboard.type("balanced_bce")
    front_page.wait_for_selector(".md-search-result__link[href*='losses']", timeout=15000)


FIRST_FRAME_IS_SHOWN = """(() => {
    const img = document.querySelector('figure.frames img');
    return img.src.endsWith('_0.webp') && img.naturalWidth > 0;
})()"""


def test_a_view_can_be_moved_without_a_kernel(site, chromium):
    folder, address = site
    context = chromium.new_context()
    shown = opened(context, f"{address}/04_edge_gate.html")
    page = shown.page
    figure = page.locator("figure.frames")
    assert figure.count() == 1
    picture = figure.locator("img")
    before = picture.get_attribute("src")
    slider = figure.locator("input")
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_function(FIRST_FRAME_IS_SHOWN)
    assert picture.get_attribute("src") != before
    number = figure.locator("output")
    assert float(number.inner_text()) < 0
    assert shown.logged == []
    views = folder / "views"
    sizes = [file.stat().st_size for file in views.iterdir()]
    assert sum(sizes) <= 2e6


CODE = re.compile(r"<(pre|code|script|math)\b.*?</\1>", re.S)


def text_of(page):
    "The HTML of a page without code and formulas"
    html = page.read_text()
    return CODE.sub("", html)


def test_a_table_is_shown_without_the_code_that_reads_it(site):
    folder, _ = site
    front = (folder / "index.html").read_text()
    assert "bare with consistency loss" in front
    assert "tabulate" not in front


def test_no_formula_is_left_as_latex(site):
    folder, _ = site
    lesson = (folder / "04_edge_gate.html").read_text()
    assert lesson.count("<math") > 5
    for page in folder.rglob("*.html"):
        words = re.sub(r"<[^>]+>", "", text_of(page))
        formula = re.search(r"\$[^$\s<][^$<\n]*\$", words)
        assert not formula, page.name


def leads_elsewhere(link):
    "Whether a link leads to another site, or begins at the root of this one"
    return ":" in link or link.startswith("/")


def test_every_link_leads_somewhere(site):
    folder, _ = site
    for page in folder.rglob("*.html"):
        html = text_of(page)
        for link in re.findall(r'href="([^"#?]+)', html):
            target = page.parent / link
            there = leads_elsewhere(link) or target.exists()
            assert there, f"{page.name}: {link}"


def test_no_page_takes_the_place_of_another():
    lessons = [f"{path.stem}.md" for path in books.notebooks()]
    pages = ["index.md", *lessons, *make_site.PAGES.values()]
    twice = {page for page in pages if pages.count(page) > 1}
    assert not twice


def test_a_function_as_a_default_has_its_name_in_place_of_an_address():
    for module in ("run.training", "run.models", "study.evaluation"):
        text = make_site.reference(module, "page")
        assert " at 0x" not in text, module
    of_training = make_site.reference("run.training", "page")
    assert "| `stop` | `Callable` | `_never` |" in of_training


def test_a_long_default_ends_with_its_mark():
    def function(names=tuple(range(100))):
        pass

    parameter = inspect.signature(function).parameters["names"]
    text = make_site.default_of(parameter)
    assert text.startswith("`(0, 1, 2") and text.endswith("`")
    assert len(text) == 60
