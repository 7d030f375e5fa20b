"The site in a real browser: every page, in the light and on a phone, without an error, a request to the outside, or a serious fault for those who cannot see."

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe

ROOT = Path(__file__).parents[1]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The built site, served: folder and address"
    clone = tmp_path_factory.mktemp("site") / "clone"
    shutil.copytree(
        ROOT,
        clone,
        ignore=shutil.ignore_patterns(".venv", ".git", "_site", "_site_src", "__pycache__"),
    )
    done = subprocess.run(
        [sys.executable, "tools/make_site.py", "--views", "04_edge_gate"],
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=clone / "_site")
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield clone / "_site", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def opened(context, address):
    "A page, what it said, and whom it asked"
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("response", lambda r: said.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("request", lambda r: asked.append(r.url))
    page.goto(address, wait_until="load")
    page.wait_for_function("document.querySelector('.md-search')?.ariaLabel == 'Search'")
    return page, said, asked


def faults(page):
    "What axe-core calls serious or critical"
    return [
        (v["id"], v["nodes"][0]["html"][:200])
        for v in Axe().run(page).response["violations"]
        if v["impact"] in ("serious", "critical")
    ]


def test_every_page_in_the_light_and_on_a_phone(site, chromium):
    folder, address = site
    pages = [
        p.relative_to(folder).as_posix() for p in folder.rglob("*.html") if p.name != "404.html"
    ]
    assert len(pages) >= 50 and {
        "index.html",
        "13_multi_gpu.html",
        "api/method.sobel.html",
        "speed.html",
    } <= set(pages)
    for size, some in (
        ({"width": 1280, "height": 900}, pages),
        ({"width": 390, "height": 844}, sorted(pages)[::4]),
    ):
        context = chromium.new_context(viewport=size, color_scheme="light")
        for name in some:
            page, said, asked = opened(context, f"{address}/{name}")
            pictures = page.evaluate(
                "[...document.images].filter(i => i.loading != 'lazy' && !i.naturalWidth).map(i => i.src)"
            )
            assert (
                said,
                pictures,
                [a for a in asked if not a.startswith((address, "data:", "blob:"))],
            ) == ([], [], []), name
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
                f"{name} is wider than {size['width']} pixels"
            )
            assert not page.evaluate("[...document.images].filter(i => !i.alt).length"), (
                f"{name}: a picture without words"
            )
            if size["width"] > 1000:
                assert faults(page) == [], name
            page.close()


def test_in_the_dark(site, chromium):
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    for name in ("index", "03_sobel_edges", "05_losses", "01_one_sitting", "api/method.egcnn"):
        page, said, _ = opened(context, f"{site[1]}/{name}.html")
        assert page.evaluate(
            "getComputedStyle(document.body).backgroundColor"
        ) != "rgb(255, 255, 255)" and (said, faults(page)) == ([], []), name


def test_a_fault_would_be_seen(site, chromium):
    page, *_ = opened(chromium.new_context(), f"{site[1]}/index.html")
    page.evaluate(
        "document.querySelector('.md-content p').innerHTML += '<img src=\"/none.png\"><span style=\"color:#eee\">pale</span>'"
    )
    assert {"image-alt", "color-contrast"} <= {name for name, _ in faults(page)}


def test_search_finds_a_function(site, chromium):
    page, said, _ = opened(chromium.new_context(), f"{site[1]}/index.html")
    page.keyboard.press("s")
    page.keyboard.type("balanced_bce")
    page.wait_for_selector(".md-search-result__link[href*='losses']", timeout=15000)


def test_a_view_can_be_moved_without_a_kernel(site, chromium):
    page, said, asked = opened(chromium.new_context(), f"{site[1]}/04_edge_gate.html")
    figure = page.locator("figure.frames")
    assert figure.count() == 1
    before = figure.locator("img").get_attribute("src")
    figure.locator("input").focus()
    page.keyboard.press("Home")
    page.wait_for_function(
        "document.querySelector('figure.frames img').src.endsWith('_0.webp') && document.querySelector('figure.frames img').naturalWidth > 0"
    )
    assert (
        figure.locator("img").get_attribute("src") != before
        and float(figure.locator("output").inner_text()) < 0
        and said == []
    )
    assert sum(f.stat().st_size for f in (site[0] / "views").iterdir()) <= 2e6


def test_formulas_links_and_hidden_code(site):
    folder, front = site[0], (site[0] / "index.html").read_text()
    assert (
        "bare with consistency loss" in front and "tabulate" not in front
    )  # the table, without the code that reads it
    assert (folder / "04_edge_gate.html").read_text().count("<math") > 5
    for page in folder.rglob("*.html"):
        text = re.sub(r"<(pre|code|script|math)\b.*?</\1>", "", page.read_text(), flags=re.S)
        assert not re.search(r"\$[^$\s<][^$<\n]*\$", re.sub(r"<[^>]+>", "", text)), (
            page.name
        )  # no formula left as LaTeX
        for link in re.findall(r'href="([^"#?]+)', text):
            if ":" not in link and not link.startswith("/"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
