"""itkwidgets draws in JupyterLab as it does with an internet connection.

Its front end loads parts from the internet; here they come from npm packages. Its JupyterLab extension loads
them on every page, so it is installed into an environment of its own, on top of this one. This needs npm, and
minutes with software rendering:

    pip install -c constraints.txt -e '.[dev,itk]' && EGCNN_ITK=1 pytest tests/test_itk.py
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_browser import (
    HERE,
    RUN_ALL_CELLS,
    end,
    pixels,
    serve,
    visible,
    wait_for_kernel,
    write_notebook,
)

pytestmark = pytest.mark.skipif(
    not os.environ.get("EGCNN_ITK"), reason="set EGCNN_ITK=1; needs npm and the extra itk"
)
NPM = [
    "vue@2.6.10",
    "vue-js-modal@1.3.35",
    "@hscmap/vue-window@2.4.1",
    "imjoy-core@0.14.5",
    "imjoy-rpc@0.5.9",
    "itk-vtk-viewer@14.51.0",
    "itk-viewer-bootstrap-ui@0.30.0",
]


EXTENSIONS = ["imjoy-jupyterlab-extension==0.2.6", "imjoy-elfinder"]
PATIENT = {"timeout": 240_000}  # software rendering is slow

CASE = "../data_samples/brats2019/HGG/BraTS19_PHANTOM_007_1/BraTS19_PHANTOM_007_1"
PATCH = """
from egcnn_nb.show import scenes
scenes.itk_missing = lambda: ""  # the test answers for the two servers
"""
VIEW = f"scenes.view3d('{CASE}_flair.nii.gz', '{CASE}_seg.nii.gz', backend='itk')"


def unpack(folder):
    "The npm packages, each unpacked into folder/NAME"
    for spec in NPM:
        package, _, _version = spec.rpartition("@")
        name = package.replace("/", "-").lstrip("@")
        place = folder / name
        place.mkdir(parents=True)
        pack = ["npm", "pack", "--silent", spec]
        done = subprocess.run(pack, cwd=place, capture_output=True, text=True, check=True)
        *_, archive = done.stdout.split()
        extract = ["tar", "xzf", archive, "--strip-components=1"]
        subprocess.run(extract, cwd=place, check=True)


def file_of(folder, url):
    "The file of a package that stands for an address"
    path, _, _ = url.partition("?")
    *_, name = path.split("/")
    if "vue-js-modal" in path:
        return folder / "vue-js-modal/dist" / name
    if "dweb.link" in path:
        _, _, below = path.partition("dweb.link/")
        viewer = folder / "itk-vtk-viewer/dist"
        return viewer / (below or "index.html")
    if "lib.imjoy.io" in path:
        return folder / "imjoy-core/dist" / name
    npm = re.match(r"https://cdn\.jsdelivr\.net/npm/([^@/]+)@[^/]+/(.*)", path)
    if npm is None:
        return folder / "none"
    return folder / npm[1] / npm[2]


# npm has vue-window as a CommonJS module only
AS_SCRIPT = """(() => {{ const exports = window.VueWindow = {{}}, require = () => window.Vue;
{module}
}})();"""


def answer(folder):
    "A route that serves each address from the package that holds its file"

    def route(r):
        url = r.request.url
        if "vue-window" in url:
            module = (folder / "hscmap-vue-window/lib/index.js").read_text()
            script = AS_SCRIPT.format(module=module)
            return r.fulfill(body=script, content_type="text/javascript")
        file = file_of(folder, url)
        if file.is_file():
            return r.fulfill(path=file, headers={"access-control-allow-origin": "*"})
        return r.abort()

    return route


def environment_with_extensions(folder):
    "An environment on top of this one with the extensions of itkwidgets: its Python"
    make = [sys.executable, "-m", "venv", folder]
    subprocess.run(make, check=True)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    below = str(Path(pytest.__file__).parents[1])
    link = site / "below.pth"
    link.write_text(f"import site; site.addsitedir({below!r})\n")
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *EXTENSIONS], check=True)
    return python


def viewer_canvas(page):
    "The canvas of the viewer in its frame, or None"
    for frame in page.frames:
        if "dweb.link" not in frame.url:
            continue
        for canvas in visible(frame, "canvas"):
            if canvas.bounding_box()["width"] > 200:
                return canvas
    return None


def is_drawn(page):
    "Whether the viewer shows more than one colour"
    canvas = viewer_canvas(page)
    if canvas is None:
        return False
    shown = pixels(canvas, **PATIENT)
    return shown.std() > 10


def is_outside(url):
    "Whether an address is one of another machine"
    return not HERE.match(url)


def wait_until_drawn(page, seconds=180):
    "Wait for the viewer; whether it drew"
    deadline = time.time() + seconds
    while time.time() < deadline:
        page.wait_for_timeout(5000)
        if is_drawn(page):
            return True
    return False


def test_the_scene_is_drawn(chromium, work, tmp_path, shots, monkeypatch):
    npm, folder = tmp_path / "npm", work / "nbs"
    unpack(npm)
    python = environment_with_extensions(tmp_path / "env")
    below = Path(sys.prefix) / "share/jupyter"
    monkeypatch.setenv("JUPYTER_PATH", str(below))
    write_notebook(folder / "itk.ipynb", PATCH.strip(), VIEW)
    lab = [f"--app-dir={below}/lab"]
    process, address = serve("lab", folder, work / "itk.log", python, lab)
    page = chromium.new_page(viewport={"width": 1100, "height": 900})
    try:
        page.route(is_outside, answer(npm))
        page.goto(f"{address}/lab/tree/itk.ipynb?reset", timeout=90_000)
        wait_for_kernel(page)
        page.evaluate(RUN_ALL_CELLS)
        drawn = wait_until_drawn(page)
        page.screenshot(path=shots / "itk.png", **PATIENT)
        assert drawn, "nothing is drawn"
    finally:
        page.close()
        end(process)
