"""The site in a real browser: every page in the light and on a phone.

No page may log an error, ask another machine, or be hard to use for those who cannot see well.
"""

import functools
import http.server
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


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The built site, served: folder and address"
    clone = tmp_path_factory.mktemp("site") / "clone"
    left_out = shutil.ignore_patterns(".venv", ".git", "_site", "_site_src", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=left_out)
    done = subprocess.run(
        [sys.executable, "tools/make_site.py", "--views", "04_edge_gate"],
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    handler = functools.partial(Quiet, directory=clone / "_site")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield clone / "_site", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@dataclass
class Opened:
    "A page of the site, what it logged, and the addresses it loaded"

    page: Page
    logged: list = field(default_factory=list)
    loaded: list = field(default_factory=list)

    def listen(self):
        "Note errors, warnings and requests from now on"
        self.page.on("console", self.console)
        self.page.on("pageerror", lambda error: self.logged.append(str(error)))
        self.page.on("response", self.response)
        self.page.on("request", lambda request: self.loaded.append(request.url))

    def console(self, message):
        "Note an error or a warning"
        if message.type in ("error", "warning"):
            self.logged.append(message.text)

    def response(self, response):
        "Note what was not found"
        if response.status >= 400:
            self.logged.append(f"{response.status} {response.url}")

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
    found = []
    for violation in Axe().run(page).response["violations"]:
        if violation["impact"] in ("serious", "critical"):
            found.append((violation["id"], violation["nodes"][0]["html"][:200]))
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
    files = [p for p in folder.rglob("*.html") if p.name != "404.html"]
    return sorted(p.relative_to(folder).as_posix() for p in files)


def test_the_site_has_its_pages(site):
    pages = pages_of(site[0])
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
    context = chromium.new_context(viewport=DESKTOP, color_scheme="dark")
    for name in ("index", "03_sobel_edges", "05_losses", "01_one_sitting", "api/method.egcnn"):
        shown = opened(context, f"{site[1]}/{name}.html")
        assert shown.page.evaluate(BACKGROUND) != "rgb(255, 255, 255)", name
        assert shown.logged == [], name
        assert faults(shown.page) == [], name


ADD_FAULTS = """document.querySelector('.md-content p').innerHTML +=
    '<img src="/none.png"><span style="color:#eee">pale</span>'"""


def test_a_fault_would_be_seen(site, chromium):
    page = opened(chromium.new_context(), f"{site[1]}/index.html").page
    page.evaluate(ADD_FAULTS)
    names = {name for name, _ in faults(page)}
    assert {"image-alt", "color-contrast"} <= names


def test_search_finds_a_function(site, chromium):
    page = opened(chromium.new_context(), f"{site[1]}/index.html").page
    page.keyboard.press("s")
    page.keyboard.type("balanced_bce")
    page.wait_for_selector(".md-search-result__link[href*='losses']", timeout=15000)


FIRST_FRAME_IS_SHOWN = """(() => {
    const img = document.querySelector('figure.frames img');
    return img.src.endsWith('_0.webp') && img.naturalWidth > 0;
})()"""


def test_a_view_can_be_moved_without_a_kernel(site, chromium):
    folder, address = site
    shown = opened(chromium.new_context(), f"{address}/04_edge_gate.html")
    figure = shown.page.locator("figure.frames")
    assert figure.count() == 1
    picture = figure.locator("img")
    before = picture.get_attribute("src")
    figure.locator("input").focus()
    shown.page.keyboard.press("Home")
    shown.page.wait_for_function(FIRST_FRAME_IS_SHOWN)
    assert picture.get_attribute("src") != before
    assert float(figure.locator("output").inner_text()) < 0
    assert shown.logged == []
    size = sum(file.stat().st_size for file in (folder / "views").iterdir())
    assert size <= 2e6


def text_of(page):
    "The HTML of a page without code and formulas"
    return re.sub(r"<(pre|code|script|math)\b.*?</\1>", "", page.read_text(), flags=re.S)


def test_a_table_is_shown_without_the_code_that_reads_it(site):
    front = (site[0] / "index.html").read_text()
    assert "bare with consistency loss" in front
    assert "tabulate" not in front


def test_no_formula_is_left_as_latex(site):
    folder = site[0]
    assert (folder / "04_edge_gate.html").read_text().count("<math") > 5
    for page in folder.rglob("*.html"):
        words = re.sub(r"<[^>]+>", "", text_of(page))
        assert not re.search(r"\$[^$\s<][^$<\n]*\$", words), page.name


def test_every_link_leads_somewhere(site):
    for page in site[0].rglob("*.html"):
        for link in re.findall(r'href="([^"#?]+)', text_of(page)):
            elsewhere = ":" in link or link.startswith("/")
            assert elsewhere or (page.parent / link).exists(), f"{page.name}: {link}"
