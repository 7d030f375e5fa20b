"""itkwidgets drawing in JupyterLab as it would for a connected user: what its front end asks of the internet is answered from npm packages.

    pip install -c constraints.txt -e '.[dev,itk]' && EGCNN_ITK=1 pytest tests/test_itk.py        # needs npm; minutes, with software rendering

Its JupyterLab extension asks servers in the internet on every page, so it is installed into an environment of its own, on top of this one."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_browser import CURRENT, HERE, pixels, serve, write_notebook

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


def unpack(folder):
    "The npm packages, each unpacked into folder/NAME"
    for spec in NPM:
        name = spec.rpartition("@")[0].replace("/", "-").lstrip("@")
        (folder / name).mkdir(parents=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", spec],
            cwd=folder / name,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        subprocess.run(
            ["tar", "xzf", packed, "--strip-components=1"], cwd=folder / name, check=True
        )


def answer(folder):
    "A route that serves each address from the package that holds its file"

    def file(url):
        path = url.split("?")[0]
        if "vue-js-modal" in path:
            return folder / "vue-js-modal/dist" / path.split("/")[-1]
        if "dweb.link" in path:
            return folder / "itk-vtk-viewer/dist" / (path.split("dweb.link/")[1] or "index.html")
        if "lib.imjoy.io" in path:
            return folder / "imjoy-core/dist" / path.split("/")[-1]
        npm = re.match(r"https://cdn\.jsdelivr\.net/npm/([^@/]+)@[^/]+/(.*)", path)
        return folder / npm[1] / npm[2] if npm else folder / "none"

    def route(r):
        if "vue-window" in r.request.url:  # npm has it as a CommonJS module only
            body = (folder / "hscmap-vue-window/lib/index.js").read_text()
            return r.fulfill(
                body=f"(() => {{ const exports = window.VueWindow = {{}}, require = () => window.Vue;\n{body}\n}})();",
                content_type="text/javascript",
            )
        f = file(r.request.url)
        return (
            r.fulfill(path=f, headers={"access-control-allow-origin": "*"})
            if f.is_file()
            else r.abort()
        )

    return route


def test_the_scene_is_drawn(chromium, work, tmp_path, shots, monkeypatch):
    unpack(tmp_path / "npm")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    (site / "below.pth").write_text(
        f"import site; site.addsitedir({str(Path(pytest.__file__).parents[1])!r})\n"
    )
    subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "imjoy-jupyterlab-extension==0.2.6",
            "imjoy-elfinder",
        ],
        check=True,
    )
    below = Path(sys.prefix) / "share/jupyter"
    monkeypatch.setenv("JUPYTER_PATH", str(below))
    case = "../data_samples/brats2019/HGG/BraTS19_PHANTOM_007_1/BraTS19_PHANTOM_007_1"
    write_notebook(
        work / "nbs/itk.ipynb",
        "from egcnn_nb.show import scenes\nscenes.itk_missing = lambda: ''       # the two servers are answered by the test",
        f"scenes.view3d('{case}_flair.nii.gz', '{case}_seg.nii.gz', backend='itk')",
    )
    process, address = serve(
        "lab", work / "nbs", work / "itk.log", python, [f"--app-dir={below}/lab"]
    )
    page = chromium.new_page(viewport={"width": 1100, "height": 900})
    try:
        page.route(lambda url: not HERE.match(url), answer(tmp_path / "npm"))
        page.goto(f"{address}/lab/tree/itk.ipynb?reset", timeout=90_000)
        page.wait_for_function(
            f"() => window.jupyterapp && {CURRENT}?.sessionContext?.session?.kernel?.status == 'idle'",
            timeout=120_000,
        )
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        deadline = time.time() + 180
        while time.time() < deadline:
            page.wait_for_timeout(5000)
            canvas = next(
                (
                    c
                    for f in page.frames
                    if "dweb.link" in f.url
                    for c in f.query_selector_all("canvas")
                    if c.is_visible() and c.bounding_box()["width"] > 200
                ),
                None,
            )
            if canvas and pixels(canvas, timeout=240_000).std() > 10:
                break
        else:
            page.screenshot(path=shots / "itk.png", timeout=240_000)
            pytest.fail("nothing is drawn")
        page.screenshot(path=shots / "itk.png", timeout=240_000)
    finally:
        page.close()
        process.terminate()
        process.wait(30)
