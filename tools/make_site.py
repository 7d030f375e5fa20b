"""Build the site: every notebook with its pictures, and the reference of the library, for a browser without a kernel and without the internet.

    python tools/make_site.py [--views 03_sobel_edges ...]        # writes _site_src/ and _site/; then python -m http.server -d _site

Notebooks become Markdown as they are committed. Formulas become MathML, which browsers draw themselves. Hidden cells stay out; cells that are
exported say into which module. Interactive views stay as they were committed, or, for the notebooks named after --views (alone: all), the notebook
is run, the first slider of each view is moved from end to end, and the page gets a slider over the pictures that came of it."""

import argparse
import base64
import html
import importlib
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import is_dataclass
from pathlib import Path

import nbformat
from books import module_of, notebooks
from fastcore.docments import docments
from latex2mathml.converter import convert
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "_site_src"
PAGES = {
    "docs/glossary.md": "glossary.md",
    "docs/launch/README.md": "launch.md",
    "benchmarks/README.md": "speed.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "results/hippocampus/README.md": "hippocampus.md",
}

VIEWS = (
    "explorers",
    "look_at_data",
    "scenes",
    "03_sobel_edges",
    "04_edge_gate",
    "05_losses",
    "06_backbones",
    "anatomy",
    "predict",
    "your_own_scan",
)  # notebooks with views


def math(text):
    "Formulas between dollars as MathML; code keeps its dollars"
    parts = re.split(r"(```.*?```|`[^`]*`)", text, flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(
            r"\$\$(.+?)\$\$", lambda m: convert(m[1].strip(), display="block"), parts[i], flags=re.S
        )
        parts[i] = re.sub(r"(?<!\\)\$(?!\s)([^$\n]+?)(?<!\s)\$", lambda m: convert(m[1]), parts[i])
    return "".join(parts)


def links(text):
    "Links between notebooks and files as links between pages"
    for file, page in PAGES.items():
        text = re.sub(rf"\]\((?:\.\./)*{re.escape(file)}\)", f"]({page})", text)
    text = re.sub(
        r"\]\((?:\.\./)*(?:nbs/)?(?:\d_\w+/)?(\w+)\.ipynb(#[^)]*)?\)", r"](\1.md\2)", text
    )
    return text.replace("<details>", "<details markdown>")


def fence(text, kind, title=""):
    "A block of code, fenced so that no line of it can close the fence"
    return f"````{kind}" + (f' title="{title}"' if title else "") + f"\n{text.rstrip()}\n````\n"


SWEEP = """
import gc, json, pathlib, ipywidgets
from egcnn_nb.show.explorers import Explorer, to_png
found = []
for view in [o for o in gc.get_objects() if isinstance(o, Explorer) and o.draw and o.alt]:
    sliders = [(n, c) for n, c in view.controls.items() if isinstance(c, (ipywidgets.IntSlider, ipywidgets.FloatSlider))]
    if not sliders: continue
    name, slider = sliders[0]; start = slider.value; lowest = slider.min; step = slider.step or 1; steps = round((slider.max-lowest)/step)
    at = sorted({min(max(round(steps*k/10), 0), steps) for k in range(11)} | {round((start-lowest)/step)})
    frames = []
    for k in at: slider.value = lowest+k*step; view.redraw(); frames.append((slider.value, to_png(view.static())))
    slider.value = start; view.redraw()
    if len({f for _, f in frames}) < 2: continue
    for k, (_, frame) in enumerate(frames): (pathlib.Path(FOLDER)/f"{len(found)}_{k}.png").write_bytes(frame)
    found.append({"alt": view.alt, "name": slider.description or name, "values": [round(float(v), 4) for v, _ in frames], "start": at.index(round((start-lowest)/step))})
(pathlib.Path(FOLDER)/"views.json").write_text(json.dumps(found))
"""


def sweep(path):
    "Run a notebook, and move the first slider of each view: alternative text -> a slider over pictures, as HTML; at most 2 MB a page"
    nb = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as tmp:
        nb.cells.append(nbformat.v4.new_code_cell(f"FOLDER = {tmp!r}\n{SWEEP}"))
        NotebookClient(
            nb,
            timeout=900,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
        views = json.loads((Path(tmp) / "views.json").read_text())
        pictures = {
            (i, k): Image.open(Path(tmp) / f"{i}_{k}.png").convert("RGB")
            for i, v in enumerate(views)
            for k in range(len(v["values"]))
        }
    for quality in (80, 60, 40, 20):
        files = {key: io.BytesIO() for key in pictures}
        for key, picture in pictures.items():
            picture.save(files[key], "webp", quality=quality)
        if sum(f.tell() for f in files.values()) <= 2e6:
            break
    folder = SOURCE / "views"
    folder.mkdir(exist_ok=True)
    for (i, k), f in files.items():
        (folder / f"{path.stem}_{i}_{k}.webp").write_bytes(f.getvalue())
    return {
        v["alt"]: slider(f"views/{path.stem}_{i}_", v, pictures[i, v["start"]].size)
        for i, v in enumerate(views)
    }


def slider(prefix, view, size):
    "A slider over pictures, as HTML"
    return (
        f'<figure class="frames" data-prefix="{prefix}" data-values="{html.escape(json.dumps(view["values"]))}">'
        f'<img src="{prefix}{view["start"]}.webp" width="{size[0]}" height="{size[1]}" alt="{html.escape(view["alt"])}">'
        f'<label>{html.escape(view["name"])} <input type="range" min="0" max="{len(view["values"]) - 1}" value="{view["start"]}"> <output>{view["values"][view["start"]]:g}</output></label></figure>\n'
    )


def output(out, name, images, views):
    "One output as Markdown; a picture becomes a file"
    data = out.get("data", {})
    if out["output_type"] == "stream":
        return fence("".join(out["text"]), "text") if out["name"] == "stdout" else ""
    if "image/png" in data:
        path = SOURCE / "pictures" / f"{name}_{len(images)}.png"
        images.append(path)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(base64.b64decode(data["image/png"]))
        alt = out["metadata"].get("image/png", {}).get("alt", "") or "".join(
            data.get("text/plain", "")
        )
        if alt in views:
            return views[alt]
        return f"![{html.escape(alt).replace(']', '')}](pictures/{path.name})\n"
    if "text/markdown" in data:
        return math("".join(data["text/markdown"])) + "\n"
    if "text/html" in data:
        return "".join(data["text/html"]) + "\n"
    return fence("".join(data["text/plain"]), "text") if "text/plain" in data else ""


def notebook(path, views={}):
    "A notebook as Markdown; `views`: alternative text of a picture -> HTML in its place"
    cells = json.loads(path.read_text())["cells"]
    module = ""
    text = []
    images = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text.append(links(math(source)))
            continue
        if found := re.search(r"^#\| default_exp ([\w.]+)", source, re.M):
            module = found[1]
        if re.match(r"#\| (hide|default_exp)\b", source) or source.startswith("%"):
            continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if code and not source.startswith("#| echo: false"):
            text.append(
                fence(
                    code,
                    "python",
                    f"exported to egcnn_nb/{module.replace('.', '/')}.py"
                    if source.startswith("#| export")
                    else "",
                )
            )
        text += [output(o, path.stem, images, views) for o in cell["outputs"]]
    return "\n\n".join(text)


def arguments(function):
    "The arguments of a function and what it returns, as a table"
    rows = docments(function, full=True)
    signature = inspect.signature(function)
    word = lambda a: (
        ""
        if a in (inspect.Parameter.empty, None)
        else a
        if isinstance(a, str)
        else getattr(a, "__name__", str(a)).replace("|", "or")
    )
    line = lambda name, kind, default, meaning: (
        f"| {name} | {f'`{kind}`' if kind else ''} | {default} | {html.escape(' '.join((meaning or '').split())).replace('|', '&#124;')} |"
    )
    lines = [
        line(
            f"`{n}`",
            word(p.annotation),
            "" if p.default is p.empty else f"`{p.default!r}`".replace("|", "or")[:60],
            rows[n].docment,
        )
        for n, p in signature.parameters.items()
        if n not in ("self", "cls")
    ]
    if signature.return_annotation not in (inspect.Signature.empty, None) or rows["return"].docment:
        lines.append(
            line("*returns*", word(signature.return_annotation), "", rows["return"].docment)
        )
    return (
        "\n".join(["| argument | type | default | meaning |", "|---|---|---|---|", *lines])
        if lines
        else ""
    )


def reference(module, page):
    "What a module offers, as Markdown"
    m = importlib.import_module(f"egcnn_nb.{module}")
    text = []
    text.append(
        f"# {module}\n\n{inspect.getdoc(m)}\n\nDefined and explained in [{page}](../{page}.md)."
    )
    for name in m.__all__:
        thing = getattr(m, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            text.append(f"## `{name}`\n\nA constant: see [{page}](../{page}.md).")
            continue
        text.append(f"## `{name}`\n\n{html.escape(inspect.getdoc(thing) or '')}")
        if inspect.isfunction(thing):
            text.append(arguments(thing))
            continue
        if is_dataclass(thing) or "__init__" in vars(thing):
            text.append(arguments(thing if is_dataclass(thing) else thing.__init__))
        for method, f in vars(thing).items():
            if inspect.isfunction(f) and not method.startswith("_") and f.__doc__:
                text.append(f"### `{name}.{method}`\n\n{html.escape(f.__doc__)}\n\n{arguments(f)}")
    return "\n\n".join(text)


def write(alive):
    "All pages into _site_src/; the views of the notebooks named in `alive` can be moved"
    shutil.rmtree(SOURCE, ignore_errors=True)
    (SOURCE / "api").mkdir(parents=True)
    shutil.copytree(ROOT / "nbs/images", SOURCE / "images")
    shutil.copytree(ROOT / "tools/site", SOURCE, dirs_exist_ok=True)
    books = notebooks()
    nav = []
    for path in [ROOT / "nbs/index.ipynb", *books]:
        (SOURCE / f"{path.stem}.md").write_text(
            notebook(path, sweep(path) if path.stem in alive else {})
        )
    for path in books:
        if module := module_of(path):
            (SOURCE / f"api/{module}.md").write_text(reference(module, path.stem))
            nav.append(module)
    for file, page in PAGES.items():
        text = links((ROOT / file).read_text())
        for name in re.findall(r"\]\(([\w.]+)\)", text):
            if (beside := (ROOT / file).parent / name).is_file():
                shutil.copy(beside, SOURCE / name)  # its pictures, and the files that it explains
        (SOURCE / page).write_text(math(text))
    entries = [
        {"Home": "index.md"},
        {"Notebooks": [{b.stem: f"{b.stem}.md"} for b in books]},
        {"Reference": [{m: f"api/{m}.md"} for m in nav]},
        {"More": [{p.removesuffix(".md").capitalize(): p} for p in PAGES.values()]},
    ]
    (ROOT / "_mkdocs.yml").write_text(
        (ROOT / "mkdocs.yml").read_text() + f"nav: {json.dumps(entries)}\n"
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--views",
        nargs="*",
        metavar="NOTEBOOK",
        help="notebooks whose views can be moved; none named: all",
    )
    views = p.parse_args().views
    write(VIEWS if views == [] else views or [])
    return subprocess.call(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", "_mkdocs.yml"],
        cwd=ROOT,
    )


if __name__ == "__main__":
    sys.exit(main())
