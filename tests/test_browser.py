"""Every interactive view in a real JupyterLab, and one notebook in Notebook 7.

The browser is headless Chromium without internet. A picture of each view before and after it was moved
goes to the folder that EGCNN_SCREENSHOTS names (default: a temporary one)."""

import io
import os
import re
import socket
import subprocess
import sys
import time
from functools import partial
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


# every cell is in the page, and no question lies over it
FRONT_END = {
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false"}',
}


def free_port():
    "The number of a port that nobody uses"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        _, port = s.getsockname()
        return port


def front_end_settings(folder):
    "Write the settings of the front end into a folder; the folder"
    own = folder / "@jupyterlab"
    for name, value in FRONT_END.items():
        file = own / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(value)
    return folder


def wait_for_port(process, port, log):
    "Wait until a server answers"
    patience = 240  # seconds; a busy machine needs more than a minute
    deadline = time.time() + patience
    while not answers(port):
        written = Path(log).read_text()
        assert process.poll() is None, written
        assert time.time() < deadline, written
        time.sleep(0.3)


def answers(port):
    "Whether a server listens on a port"
    try:
        connection = socket.create_connection(("127.0.0.1", port), 1)
    except OSError:
        return False
    connection.close()
    return True


def environment(folder):
    "The environment of a front end whose settings are in a folder"
    return {
        **os.environ,
        "JUPYTERLAB_SETTINGS_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }


# name of a front end -> its module, and the class of its settings
FRONT_ENDS = {
    "lab": ("jupyterlab", "LabApp"),
    "notebook": ("notebook", "JupyterNotebookApp"),
}


def serve(app, folder, log, python=sys.executable, extra=()):
    'Start a Jupyter front end ("lab" or "notebook") on a free port: process and address'
    port = free_port()
    settings = front_end_settings(folder.parent / "settings")
    module, trait = FRONT_ENDS[app]
    words = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder}",
        f"--{trait}.expose_app_in_browser=True",
    ]
    process = subprocess.Popen(
        [python, "-m", module, *words, *extra],
        stdout=open(log, "w"),
        stderr=subprocess.STDOUT,
        env=environment(settings),
    )
    wait_for_port(process, port, log)
    return process, f"http://127.0.0.1:{port}"


def end(process):
    "End a front end"
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="session")
def lab(work):
    "The address of a JupyterLab"
    folder = work / "nbs"
    log = work / "lab.log"
    process, address = serve("lab", folder, log)
    yield address
    end(process)


@pytest.fixture
def page(chromium):
    "A page that remembers errors and requests to other machines"
    page = chromium.new_page(viewport={"width": 1400, "height": 1600}, reduced_motion="reduce")
    page.outside = set()
    page.errors = []
    page.on("request", partial(note_request, page))
    page.on("pageerror", partial(note_error, page))
    page.on("console", partial(note_message, page))
    yield page
    page.close()


def note_request(page, request):
    "Remember a request to another machine"
    url = request.url
    if not HERE.match(url):
        page.outside.add(url)


def note_error(page, error):
    "Remember an error of a page"
    text = str(error)
    first = text[:300]
    page.errors.append(first)


def note_message(page, message):
    "Remember an error that a page logs"
    if message.type == "error":
        note_error(page, message.text)


KERNEL_IS_IDLE = f"""() =>
    window.jupyterapp && {CURRENT}?.sessionContext?.session?.kernel?.status == 'idle'"""
RUN_ALL_CELLS = """() => {
    window.ran = 0;
    window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.ran = 1);
}"""
OUTPUTS = f"""() => {{
    const found = [];
    for (const cell of {CURRENT}.content.model.cells)
        for (let i = 0; i < (cell.outputs?.length ?? 0); i++)
            found.push(cell.outputs.get(i).toJSON());
    return found;
}}"""


def wait_for_kernel(page):
    "Wait until the kernel of the notebook can run cells"
    page.wait_for_function(KERNEL_IS_IDLE, timeout=120_000)


def run_all(page, url):
    "Open a notebook and run all of its cells; the outputs of the cells"
    page.goto(url, timeout=90_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
    wait_for_kernel(page)
    page.errors.clear()  # what the front end logs while it starts
    page.evaluate(RUN_ALL_CELLS)
    page.wait_for_function("() => window.ran == 1", timeout=400_000)
    page.wait_for_timeout(2500)
    return page.evaluate(OUTPUTS)


def pixels(element, **kw):
    "What an element looks like: int16 (H,W,3)"
    content = element.screenshot(**kw)
    shot = Image.open(io.BytesIO(content))
    colours = shot.convert("RGB")
    return np.asarray(colours, np.int16)


def picture_of(view):
    "The element of a view in which something is drawn"
    for element in view.query_selector_all("canvas, img.egcnn-view"):
        box = element.bounding_box()
        if box and box["width"] > 60:
            return element
    raise AssertionError("The view has no picture.")


def visible(view, selector):
    "The elements of a view that can be seen"
    found = view.query_selector_all(selector)
    return [element for element in found if element.is_visible()]


def tick(page, view):
    "Tick the second check box of a view by the keyboard; its state before and after"
    _, box, *_ = visible(view, "input[type=checkbox]")
    before = box.is_checked()
    box.focus()
    page.keyboard.press("Space")
    after = box.is_checked()
    return before, after


READOUT_OF = "h => h.closest('.jupyter-widgets').querySelector('.widget-readout')"


def move(page, view):
    "Move the first slider (or check box) of a view by the keyboard; its number before and after"
    sliders = visible(view, ".noUi-handle")
    if not sliders:
        return tick(page, view)
    slider = sliders[0]
    number = slider.evaluate_handle(READOUT_OF).as_element()
    before = number.inner_text()
    slider.focus()
    press(page, "ArrowRight", 4)
    if number.inner_text() == before:  # it stood at its end
        press(page, "ArrowLeft", 4)
    return before, number.inner_text()


def press(page, key, times):
    "Press a key a few times"
    keyboard = page.keyboard
    for _ in range(times):
        keyboard.press(key)


def has_changed(before, after):
    "Whether a picture shows something, and something else than before"
    if after.std() <= 3:
        return False
    if after.shape != before.shape:
        return True
    gap = np.abs(after - before)
    return gap.max() > 20


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
        now = pixels(picture_of(view))
        if has_changed(before, now):
            break
    else:
        pytest.fail(f"{name}: the pixels stay the same when {old} becomes {new}")
    view.screenshot(path=shots / f"{name}_b.png")


# logged for a view that a test cell closed at once; a view that is shown must draw anyway
CLOSED_VIEW = "Failed to initialize model"


def healthy(page, outputs, log, since=0):
    """No error in a cell, the page or the kernel, and no request to another machine

    The log of the kernel is read from its character `since`.
    """
    failed = [output for output in outputs if output["output_type"] == "error"]
    assert not failed, failed
    assert not page.outside, page.outside
    errors = [error for error in page.errors if CLOSED_VIEW not in error]
    assert not errors, errors
    written = log.read_text()
    assert "Traceback" not in written[since:]


def path_in_lab(name):
    "Path of a notebook below nbs/"
    path = books.notebook(name)
    below = path.relative_to(ROOT / "nbs")
    return below.as_posix()


def views_of(page):
    "The interactive views of a notebook"
    outputs = ".jp-OutputArea-output"
    return visible(page, f"{outputs} > .jupyter-widgets.widget-vbox, {outputs} .egcnn-root")


@pytest.mark.parametrize("notebook", VIEWS)
def test_each_view_draws_and_moves(notebook, lab, page, work, shots):
    log = work / "lab.log"
    # a kernel that was shut down while it drew may have logged an error after its own test
    since = len(log.read_text())
    path = path_in_lab(notebook)
    outputs = run_all(page, f"{lab}/lab/tree/{path}?reset")
    views = views_of(page)
    count = len(views)
    assert count == VIEWS[notebook], f"{count} views"
    for i, view in enumerate(views):
        try_view(page, view, f"{notebook}_{i}", shots)
    healthy(page, outputs, log, since)
    page.evaluate(f"() => {CURRENT}.sessionContext.shutdown()")


def test_a_notebook_in_notebook_7(page, work, shots):
    log = work / "notebook.log"
    path = path_in_lab("04_edge_gate")
    process, address = serve("notebook", work / "nbs", log)
    try:
        outputs = run_all(page, f"{address}/notebooks/{path}")
        views = views_of(page)
        assert views
        for i, view in enumerate(views):
            try_view(page, view, f"notebook7_{i}", shots)
        healthy(page, outputs, log)
    finally:
        end(process)


def write_notebook(path, *cells):
    "Write a notebook of code cells"
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    for text in cells:
        cell = nbformat.v4.new_code_cell(text)
        notebook.cells.append(cell)
    nbformat.write(notebook, path)


BOARD = """
from egcnn_nb.show.dashboard import Dashboard
from egcnn_nb.run.settings import Settings
small = dict(width=4, levels=3, patch_size=(24, 32, 32))
board = Dashboard(Settings("../data_samples/kits2019", "runs/board", epochs=400, **small))
board
"""
# this cell keeps the kernel busy: buttons must work all the same
BUSY = """
import time
board.start()
time.sleep(20)
"""


class Board:
    "The dashboard in a page"

    def __init__(self, page):
        self.page = page

    def text(self):
        "The line below the picture"
        line = self.page.query_selector(".widget-html-content")
        return line.inner_text()

    def step(self):
        "The number of the step"
        text = self.text()
        found = re.search(r"step (\d+)", text)
        assert found, text
        return int(found[1])

    def press(self, name):
        "Press a button"
        selector = f"button.jupyter-button:text-is('{name}')"
        self.page.click(selector)

    def wait_until(self, condition, seconds=60):
        "Wait until a condition holds"
        deadline = time.time() + seconds
        while not condition():
            assert time.time() < deadline, self.text()
            self.page.wait_for_timeout(200)

    def wait_for_text(self, start):
        "Wait until the line begins with a word"

        def is_there():
            text = self.text()
            return text.startswith(start)

        self.wait_until(is_there)

    def wait_for_step(self, step):
        "Wait until the run is behind a step"

        def is_behind():
            return self.step() > step

        self.wait_until(is_behind)

    def has_begun(self):
        "Whether the run is in its first or second epoch"
        text = self.text()
        return re.search(r"[12] of 400", text)

    def stands_still(self, milliseconds):
        "Wait; the step at which the run stood all the time"
        step = self.step()
        self.page.wait_for_timeout(milliseconds)
        assert self.step() == step
        return step


def test_the_dashboard_pauses_goes_on_and_stops_while_it_trains(lab, page, work, shots):
    folder = work / "nbs"
    write_notebook(folder / "board.ipynb", BOARD.strip(), BUSY.strip())
    page.goto(f"{lab}/lab/tree/board.ipynb?reset")
    wait_for_kernel(page)
    page.evaluate(RUN_ALL_CELLS)
    page.wait_for_selector(".widget-html-content b", timeout=60_000)
    board = Board(page)
    board.wait_until(board.has_begun)
    board.press("pause")
    board.wait_for_text("paused")
    held = board.stands_still(1500)
    view = page.query_selector(".jp-OutputArea-output .jupyter-widgets")
    view.screenshot(path=shots / "dashboard_paused.png")
    board.press("start")
    board.wait_for_step(held + 3)
    board.press("stop")
    board.wait_for_text("stopped")
    stopped = board.stands_still(1000)
    run = folder / "runs/board"
    assert list(run.glob("checkpoint-*.pt"))
    board.press("start")
    board.wait_for_step(stopped + 3)
    board.press("stop")
    board.wait_for_text("stopped")
    assert not page.outside, page.outside
    assert not page.errors, page.errors
