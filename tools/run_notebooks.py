"""Run notebooks and keep their outputs, so that they read without a kernel.

    python tools/run_notebooks.py [nbs/1_method/05_losses.ipynb ...]        # default: every notebook in nbs/

Each notebook is run from top to bottom in a fresh kernel. A picture gets its text for those who cannot see it from the cell's line
`#| fig-alt: ...`, or from the view that it stands for. Views of widgets are dropped where the same output has a picture
(a saved view needs its kernel; a picture does not), and no widget state is saved."""

import re
import sys
import time
from pathlib import Path

import nbformat
from books import NBS, notebooks
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

VIEW = "application/vnd.jupyter.widget-view+json"


def strip_views(nb):
    "Leave the static picture of an interactive view, and nothing that needs a kernel; progress bars go"
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if "outputs" in cell:
            cell.outputs = [
                o
                for o in cell.outputs
                if o.get("name") != "stderr"
                and not (VIEW in o.get("data", {}) and "image/png" not in o["data"])
            ]
        for out in cell.get("outputs", []):
            out.get("data", {}).pop(VIEW, None)


def name_pictures(nb):
    "Alternative text of each picture, where HTML made from the notebook looks for it"
    for cell in nb.cells:
        named = re.search(r"^#\| fig-alt: (.+)$", cell.source, re.M)
        for out in cell.get("outputs", []):
            text = named[1] if named else out.get("data", {}).get("text/plain", "")
            if "image/png" in out.get("data", {}):
                out.metadata.setdefault("image/png", {})["alt"] = text


def run(path):
    nb = nbformat.read(path, as_version=4)
    start, skipped = (
        time.time(),
        [
            c
            for c in nb.cells
            if c.cell_type == "code" and re.search(r"^#\| eval: false$", c.source, re.M)
        ],
    )
    for cell in skipped:
        cell.metadata["tags"] = ["skip-execution"]  # the tests leave it out too
    NotebookClient(
        nb,
        timeout=900,
        kernel_name="python3",
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    for cell in skipped:
        del cell.metadata["tags"]
    strip_views(nb)
    name_pictures(nb)
    nbformat.write(nb, path)
    nbdev_clean(str(path))
    print(
        f"{path.name}: {time.time() - start:.0f} s, {path.stat().st_size // 1024} KiB", flush=True
    )


if __name__ == "__main__":
    paths = [Path(p).resolve() for p in sys.argv[1:]] or [NBS / "index.ipynb", *notebooks()]
    for path in paths:
        run(path)
