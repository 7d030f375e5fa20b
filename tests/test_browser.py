"""Every interactive view in a real JupyterLab (and one notebook in Notebook 7), in headless Chromium without internet.

The pictures of each view before and after it was moved go to the folder that EGCNN_SCREENSHOTS names (default: a temporary one)."""

import io
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import books
import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
VIEWS = {
    "explorers": 1,
    "look_at_data": 2,
    "scenes": 1,
    "03_sobel_edges": 3,
    "04_edge_gate": 1,
    "05_losses": 4,
    "06_backbones": 1,
    "anatomy": 3,
    "watch_a_run": 1,
    "predict": 4,
    "your_own_scan": 1,
}  # notebook -> views in it
HERE = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:")
CURRENT = "window.jupyterapp.shell.currentWidget"


def serve(app, folder, log, python=sys.executable, extra=()):
    "Start a Jupyter front end on a free port: process and address"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = folder.parent / "settings/@jupyterlab"
    for name, value in {
        "notebook-extension/tracker": '{"windowingMode": "none"}',
        "apputils-extension/notification": '{"fetchNews": "false"}',
    }.items():
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value)  # every cell is in the page; no question over it
    words = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder}",
        f"--{'LabApp' if app == 'lab' else 'JupyterNotebookApp'}.expose_app_in_browser=True",
    ]
    process = subprocess.Popen(
        [python, "-m", "jupyterlab" if app == "lab" else app, *words, *extra],
        stdout=open(log, "w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(settings.parent), "OMP_NUM_THREADS": "1"},
    )
    deadline = time.time() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert process.poll() is None and time.time() < deadline, Path(log).read_text()[-2000:]
            time.sleep(0.3)
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def lab(work):
    process, address = serve("lab", work / "nbs", work / "lab.log")
    yield address
    process.terminate()
    process.wait(30)


@pytest.fixture
def page(chromium):
    "A page that remembers errors and requests to other machines"
    page = chromium.new_page(viewport={"width": 1400, "height": 1600}, reduced_motion="reduce")
    page.outside, page.errors = set(), []
    page.on("request", lambda r: HERE.match(r.url) or page.outside.add(r.url))
    page.on("pageerror", lambda e: page.errors.append(str(e)[:300]))
    page.on("console", lambda m: page.errors.append(m.text[:300]) if m.type == "error" else None)
    yield page
    page.close()


def run_all(page, url):
    "Open a notebook and run all of its cells; the outputs of the cells"
    page.goto(url, timeout=90_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
    page.wait_for_function(
        f"() => window.jupyterapp && {CURRENT}?.sessionContext?.session?.kernel?.status == 'idle'",
        timeout=120_000,
    )
    page.errors.clear()  # what the front end says of itself while it starts
    page.evaluate(
        "() => { window.ran = 0; window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.ran = 1) }"
    )
    page.wait_for_function("() => window.ran == 1", timeout=400_000)
    page.wait_for_timeout(2500)
    return page.evaluate(
        f"() => [...{CURRENT}.content.model.cells].flatMap(c => c.outputs ? [...Array(c.outputs.length).keys()].map(i => c.outputs.get(i).toJSON()) : [])"
    )


def pixels(element, **kw):
    return np.asarray(Image.open(io.BytesIO(element.screenshot(**kw))).convert("RGB"), np.int16)


def picture_of(view):
    "The element of a view in which something is drawn"
    return next(
        e
        for e in view.query_selector_all("canvas, img.egcnn-view")
        if (e.bounding_box() or {"width": 0})["width"] > 60
    )


def move(page, view):
    "Move the first control of a view by the keyboard; the number it shows before and after"
    slider = next((h for h in view.query_selector_all(".noUi-handle") if h.is_visible()), None)
    if slider is None:  # a view of boxes: tick the second
        box = [b for b in view.query_selector_all("input[type=checkbox]") if b.is_visible()][1]
        before = box.is_checked()
        box.focus()
        page.keyboard.press("Space")
        return before, box.is_checked()
    shown = slider.evaluate_handle(
        "h => h.closest('.jupyter-widgets').querySelector('.widget-readout')"
    ).as_element()
    before = shown.inner_text()
    slider.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    if shown.inner_text() == before:
        [page.keyboard.press("ArrowLeft") for _ in range(4)]  # it stood at its end
    return before, shown.inner_text()


def try_view(page, view, name, shots):
    "A view draws, and a control moved by keyboard changes its pixels and the number shown"
    view.scroll_into_view_if_needed()
    page.wait_for_timeout(400)
    before = pixels(picture_of(view))
    view.screenshot(path=shots / f"{name}_a.png")
    assert before.std() > 3, f"{name}: an empty picture"
    old, new = move(page, view)
    assert old != new, f"{name}: the number stays at {old}"
    deadline = time.time() + 40
    while time.time() < deadline:
        page.wait_for_timeout(300)
        after = pixels(picture_of(view))
        if after.std() > 3 and (after.shape != before.shape or np.abs(after - before).max() > 20):
            break
    else:
        pytest.fail(f"{name}: the pixels stay the same when {old} becomes {new}")
    view.screenshot(path=shots / f"{name}_b.png")


def healthy(page, outputs, log, since=0):
    "No error in a cell, the page, or (in what its log says after so many characters) the kernel, and no request to another machine"
    assert not [o for o in outputs if o["output_type"] == "error"], [
        o["evalue"] for o in outputs if o["output_type"] == "error"
    ]
    assert not page.outside, page.outside
    errors = [
        e for e in page.errors if "Failed to initialize model" not in e
    ]  # said of a view that a test cell closed at once; one that is shown must draw anyway
    assert not errors, errors
    said = log.read_text()[since:]
    assert "Traceback" not in said, said[-3000:]


def path_in_lab(name):
    "Path of a notebook below nbs/"
    return books.notebook(name).relative_to(ROOT / "nbs").as_posix()


def views_of(page):
    return [
        v
        for v in page.query_selector_all(
            ".jp-OutputArea-output > .jupyter-widgets.widget-vbox, .jp-OutputArea-output .egcnn-root"
        )
        if v.is_visible()
    ]


@pytest.mark.parametrize("notebook", VIEWS)
def test_each_view_draws_and_moves(notebook, lab, page, work, shots):
    since = len(
        (work / "lab.log").read_text()
    )  # a kernel that was shut down while it drew may have complained after its own test
    outputs = run_all(page, f"{lab}/lab/tree/{path_in_lab(notebook)}?reset")
    views = views_of(page)
    assert len(views) == VIEWS[notebook], f"{len(views)} views"
    for i, view in enumerate(views):
        try_view(page, view, f"{notebook}_{i}", shots)
    healthy(page, outputs, work / "lab.log", since)
    page.evaluate(f"() => {CURRENT}.sessionContext.shutdown()")


def test_a_notebook_in_notebook_7(page, work, shots):
    process, address = serve("notebook", work / "nbs", work / "notebook.log")
    try:
        outputs = run_all(page, f"{address}/notebooks/{path_in_lab('04_edge_gate')}")
        for i, view in enumerate(views_of(page)):
            try_view(page, view, f"notebook7_{i}", shots)
        assert views_of(page)
        healthy(page, outputs, work / "notebook.log")
    finally:
        process.terminate()
        process.wait(30)


def write_notebook(path, *cells):
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(c) for c in cells],
            metadata={
                "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
            },
        ),
        path,
    )


def test_the_dashboard_pauses_goes_on_and_stops_while_it_trains(lab, page, work, shots):
    write_notebook(
        work / "nbs/board.ipynb",
        "from egcnn_nb.show.dashboard import Dashboard, Settings\n"
        "board = Dashboard(Settings('../data_samples/kits2019', 'runs/board', epochs=400, width=4, levels=3, patch_size=(24, 32, 32)))\nboard",
        "board.start()\nimport time; time.sleep(20)",
    )  # the second cell keeps the kernel busy: buttons must work all the same
    page.goto(f"{lab}/lab/tree/board.ipynb?reset")
    page.wait_for_function(
        f"() => window.jupyterapp && {CURRENT}?.sessionContext?.session?.kernel?.status == 'idle'",
        timeout=120_000,
    )
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_selector(".widget-html-content b", timeout=60_000)
    text = lambda: page.query_selector(".widget-html-content").inner_text()
    step = lambda: int(re.search(r"step (\d+)", text())[1])
    press = lambda name: page.click(f"button.jupyter-button:text-is('{name}')")

    def until(ok, seconds=60):
        deadline = time.time() + seconds
        while not ok():
            assert time.time() < deadline, text()
            page.wait_for_timeout(200)

    until(lambda: "1 of 400" in text() or "2 of 400" in text())
    press("pause")
    until(lambda: text().startswith("paused"))
    held = step()
    page.wait_for_timeout(1500)
    assert step() == held
    page.query_selector(".jp-OutputArea-output .jupyter-widgets").screenshot(
        path=shots / "dashboard_paused.png"
    )
    press("start")
    until(lambda: step() > held + 3)
    press("stop")
    until(lambda: text().startswith("stopped"))
    held = step()
    page.wait_for_timeout(1000)
    assert step() == held
    assert list((work / "nbs/runs/board").glob("checkpoint-*.pt"))
    press("start")
    until(lambda: step() > held + 3)
    press("stop")
    until(lambda: text().startswith("stopped"))
    assert not page.outside and not page.errors, (page.outside, page.errors)
