"""Run notebooks and keep their outputs, so that they read without a kernel.

    python tools/run_notebooks.py [nbs/1_method/05_losses.ipynb ...]     # default: every notebook

Each notebook is run from top to bottom in a fresh kernel. A picture gets its text for those who
cannot see it from the cell's line `#| fig-alt: ...`, or from the view that it stands for. Views of
widgets are dropped where the same output has a picture (a saved view needs its kernel, a picture
does not), and no widget state is saved."""

import re
import sys
import time
from pathlib import Path

import nbformat
from books import NBS, notebooks
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

VIEW = "application/vnd.jupyter.widget-view+json"


def outputs_of(nb):
    "All outputs of a notebook"
    found = []
    for cell in nb.cells:
        found += cell.get("outputs", [])
    return found


def reads_without_kernel(output):
    "Whether an output is no progress bar, and no view without a picture"
    if output.get("name") == "stderr":
        return False
    data = output.get("data", {})
    return VIEW not in data or "image/png" in data


def strip_views(nb):
    "Leave the picture of an interactive view, and nothing that needs a kernel; progress bars go"
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if "outputs" in cell:
            kept = filter(reads_without_kernel, cell.outputs)
            cell.outputs = list(kept)
    for output in outputs_of(nb):
        data = output.get("data", {})
        data.pop(VIEW, None)


def name_pictures(nb):
    "Alternative text of each picture, where HTML made from the notebook looks for it"
    for cell in nb.cells:
        named = re.search(r"^#\| fig-alt: (.+)$", cell.source, re.M)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = output.metadata.setdefault("image/png", {})
                own = data.get("text/plain", "")
                picture["alt"] = named[1] if named else own


def is_skipped(cell):
    "Whether a cell is not run; the tests leave it out too"
    if cell.cell_type != "code":
        return False
    return re.search(r"^#\| eval: false$", cell.source, re.M) is not None


def execute(nb, folder):
    "Run a notebook in a fresh kernel, in a folder"
    skipped = [cell for cell in nb.cells if is_skipped(cell)]
    for cell in skipped:
        cell.metadata.setdefault("tags", []).append("skip-execution")
    client = NotebookClient(
        nb,
        timeout=900,
        kernel_name="python3",
        store_widget_state=False,
        # also in a cell with the tag raises-exception, after which a reader's Run All goes on
        force_raise_errors=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    for cell in skipped:
        cell.metadata.tags.remove("skip-execution")
        if not cell.metadata.tags:
            del cell.metadata["tags"]


def run(path):
    "Run a notebook and write its outputs into it"
    start = time.time()
    nb = nbformat.read(path, as_version=4)
    execute(nb, path.parent)
    strip_views(nb)
    name_pictures(nb)
    nbformat.write(nb, path)
    nbdev_clean(str(path))
    seconds = time.time() - start
    size = path.stat().st_size // 1024
    print(f"{path.name}: {seconds:.0f} s, {size} KiB", flush=True)


def main():
    given = sys.argv[1:]
    paths = [Path(name) for name in given]
    if not paths:
        paths = [NBS / "index.ipynb", *notebooks()]
    for path in paths:
        run(path.resolve())


if __name__ == "__main__":
    main()
