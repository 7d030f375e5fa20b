"""Build the site: every notebook with its pictures, and the reference of the library, for a browser
without a kernel and without the internet.

    python tools/make_site.py [--views 03_sobel_edges ...]
    python -m http.server -d _site

This writes _site_src/ and _site/. Notebooks become Markdown as they are committed. Formulas become
MathML, which browsers draw themselves. Hidden cells stay out, and cells that are exported say into
which module. Interactive views stay as they were committed. The notebooks named after --views
(alone: all with views) are run: the first slider of each view is moved from end to end, and the page
gets a slider over the pictures that came of it."""

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
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import nbformat
from books import module_of, notebooks
from fastcore.docments import docments
from latex2mathml.converter import convert
from nbclient import NotebookClient
from PIL import Image

from egcnn_nb.core import InputError

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "_site_src"
MOST_BYTES = 2e6  # of the pictures below the sliders of one page
PAGES = {
    "docs/glossary.md": "glossary.md",
    "docs/launch/README.md": "launch.md",
    "docs/slicer.md": "slicer.md",
    "benchmarks/README.md": "speed.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "results/hippocampus/README.md": "hippocampus_experiments.md",
    "results/ablation/README.md": "ablation.md",
    "results/networks/README.md": "networks_of_others.md",
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


# ---- Markdown


def as_block(match):
    "A formula between two dollars, as MathML on a line of its own"
    formula = match[1]
    formula = formula.strip()
    return convert(formula, display="block")


def as_inline(match):
    "A formula between dollars, as MathML in its line"
    formula = match[1]
    return convert(formula)


def math(text):
    "Formulas between dollars as MathML; code keeps its dollars"
    found = CODE.split(text)
    parts = []
    for i, part in enumerate(found):
        is_code = i % 2 == 1
        if not is_code:
            part = BLOCK_FORMULA.sub(as_block, part)
            part = INLINE_FORMULA.sub(as_inline, part)
        parts.append(part)
    return "".join(parts)


CODE = re.compile(r"(```.*?```|`[^`]*`)", re.S)
BLOCK_FORMULA = re.compile(r"\$\$(.+?)\$\$", re.S)
INLINE_FORMULA = re.compile(r"(?<!\\)\$(?!\s)([^$\n]+?)(?<!\s)\$")
TO_NOTEBOOK = re.compile(r"\]\((?:\.\./)*(?:nbs/)?(?:\d_\w+/)?(\w+)\.ipynb(#[^)]*)?\)")


def links(text):
    "Links between notebooks and files as links between pages"
    for file, page in PAGES.items():
        name = re.escape(file)
        to_file = rf"\]\((?:\.\./)*{name}\)"
        text = re.sub(to_file, f"]({page})", text)
    text = TO_NOTEBOOK.sub(r"](\1.md\2)", text)
    return text.replace("<details>", "<details markdown>")


def fence(text, kind, title=""):
    "A block of code, fenced so that no line of it can close the fence"
    named = ""
    if title:
        named = f' title="{title}"'
    body = text.rstrip()
    return f"````{kind}{named}\n{body}\n````\n"


# ---- views that can be moved

# the last cell of a notebook whose views are moved
SWEEP = """
import gc
import json
import pathlib

import ipywidgets

from egcnn_nb.show.explorers import Explorer, to_png

SLIDERS = (ipywidgets.IntSlider, ipywidgets.FloatSlider)


def first_slider(view):
    "Name and first slider of a view, or None"
    for name, control in view.controls.items():
        if isinstance(control, SLIDERS):
            return name, control
    return None


def sweep(view, name, slider):
    "Move a slider from end to end: what the page needs to know, and the pictures"
    step = slider.step or 1
    start = slider.value
    lowest = slider.min
    steps = round((slider.max - lowest) / step)
    start_step = round((start - lowest) / step)
    tenths = {min(max(round(steps * k / 10), 0), steps) for k in range(11)}
    stops = sorted(tenths | {start_step})
    values = []
    frames = []
    for stop in stops:
        slider.value = lowest + stop * step
        view.redraw()
        values.append(round(float(slider.value), 4))
        frames.append(to_png(view.static()))
    slider.value = start
    view.redraw()
    told = {"alt": view.alt, "name": slider.description or name, "values": values}
    return {**told, "start": stops.index(start_step)}, frames


folder = pathlib.Path(FOLDER)
views = []
for view in gc.get_objects():
    if not isinstance(view, Explorer) or not view.draw or not view.alt:
        continue
    found = first_slider(view)
    if found is None:
        continue
    told, frames = sweep(view, *found)
    if len(set(frames)) < 2:
        continue
    for k, frame in enumerate(frames):
        (folder / f"{len(views)}_{k}.png").write_bytes(frame)
    views.append(told)
(folder / "views.json").write_text(json.dumps(views))
"""


def sweep(path):
    "Run a notebook and move the first slider of each view: alternative text -> HTML of a slider"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_sweep(path, name)
        text = (folder / "views.json").read_text()
        views = json.loads(text)
        pictures = read_pictures(folder, views)
    name = path.stem
    write_pictures(name, pictures)
    sliders = {}
    for i, view in enumerate(views):
        start, alt = view["start"], view["alt"]
        first = pictures[i, start]
        prefix = f"views/{name}_{i}_"
        sliders[alt] = slider(prefix, view, first.size)
    return sliders


def read_pictures(folder, views):
    "(view, step) -> picture that was written into a folder"
    pictures = {}
    for i, view in enumerate(views):
        for k, _ in enumerate(view["values"]):
            path = folder / f"{i}_{k}.png"
            picture = Image.open(path)
            pictures[i, k] = picture.convert("RGB")
    return pictures


def run_sweep(path, folder):
    "Run a notebook with the cell that moves its views, which writes into a folder"
    nb = nbformat.read(path, as_version=4)
    source = f"FOLDER = {folder!r}\n{SWEEP}"
    cell = nbformat.v4.new_code_cell(source)
    nb.cells.append(cell)
    client = NotebookClient(
        nb,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()


def write_pictures(name, pictures):
    "Write the pictures of a page's views, at the highest quality that is small enough"
    for quality in (80, 60, 40, 20):
        files = {}
        size = 0
        for key, picture in pictures.items():
            content = as_webp(picture, quality)
            files[key] = content
            size += len(content)
        if size <= MOST_BYTES:
            break
    folder = SOURCE / "views"
    folder.mkdir(exist_ok=True)
    for (i, k), content in files.items():
        path = folder / f"{name}_{i}_{k}.webp"
        path.write_bytes(content)


def as_webp(picture, quality):
    "A picture as a WebP file"
    file = io.BytesIO()
    picture.save(file, "webp", quality=quality)
    return file.getvalue()


def slider(prefix, view, size):
    "A slider over pictures, as HTML"
    width, height = size
    start = view["start"]
    numbers = view["values"]
    values = html.escape(json.dumps(numbers))
    last = len(numbers) - 1
    alt = html.escape(view["alt"])
    name = html.escape(view["name"])
    shown = numbers[start]
    return (
        f'<figure class="frames" data-prefix="{prefix}" data-values="{values}">'
        f'<img src="{prefix}{start}.webp" width="{width}" height="{height}" alt="{alt}">'
        f'<label>{name} <input type="range" min="0" max="{last}" value="{start}"> '
        f"<output>{shown:g}</output></label></figure>\n"
    )


# ---- notebooks


def output(out, name, images, views):
    "One output as Markdown; a picture becomes a file"
    if out["output_type"] == "stream":
        return stream(out)
    data = out.get("data", {})
    if "image/png" in data:
        return picture(out, name, images, views)
    if "text/markdown" in data:
        text = "".join(data["text/markdown"])
        return f"{math(text)}\n"
    if "text/html" in data:
        text = "".join(data["text/html"])
        return f"{text}\n"
    if "text/plain" in data:
        text = "".join(data["text/plain"])
        return fence(text, "text")
    return ""


def stream(out):
    "What a cell printed, as Markdown; warnings and progress bars stay out"
    if out["name"] != "stdout":
        return ""
    text = "".join(out["text"])
    return fence(text, "text")


def alternative_text(out):
    "What an output says of its picture"
    named = out["metadata"].get("image/png", {})
    if named.get("alt"):
        return named["alt"]
    plain = out["data"].get("text/plain", "")
    return "".join(plain)


def picture(out, name, images, views):
    "A picture as a file and a link to it, or the view that stands in its place"
    number = len(images)
    folder = SOURCE / "pictures"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}_{number}.png"
    images.append(path)
    encoded = out["data"]["image/png"]
    content = base64.b64decode(encoded)
    path.write_bytes(content)
    alt = alternative_text(out)
    if alt in views:
        return views[alt]
    text = html.escape(alt).replace("]", "")
    return f"![{text}](pictures/{path.name})\n"


def file_of(module):
    "The file of a module by its name, such as method.sobel"
    rooms = module.split(".")
    path = "/".join(rooms)
    return f"egcnn_nb/{path}.py"


def code(source, module):
    "A cell of code as Markdown, or nothing where it is not shown"
    text = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
    text = text.strip()
    if not text or source.startswith("#| echo: false"):
        return []
    title = ""
    if source.startswith("#| export"):
        file = file_of(module)
        title = f"exported to {file}"
    block = fence(text, "python", title)
    return [block]


def is_hidden(source):
    "Whether a cell of code stays out of the page with its outputs"
    if source.startswith("%"):
        return True
    return re.match(r"#\| (hide|default_exp)\b", source) is not None


def notebook(path, views=None):
    "A notebook as Markdown; `views`: alternative text of a picture -> HTML in its place"
    module = module_of(path) or ""
    text = []
    images = []
    whole = json.loads(path.read_text())
    for cell in whole["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            part = math(source)
            part = links(part)
            text.append(part)
        elif not is_hidden(source):
            text += code(source, module)
            for out in cell["outputs"]:
                shown = output(out, path.stem, images, views or {})
                text.append(shown)
    return "\n\n".join(text)


# ---- the reference


@dataclass
class Row:
    "One row in the table of a function's arguments"

    name: str
    kind: object  # annotation
    default: str
    meaning: str | None

    def markdown(self) -> str:
        "The row of the table"
        kind = type_name(self.kind)
        if kind:
            kind = f"`{kind}`"
        meaning = self.meaning or ""
        words = meaning.split()
        meaning = html.escape(" ".join(words))
        meaning = meaning.replace("|", "&#124;")
        cells = [self.name, kind, self.default, meaning]
        row = " | ".join(cells)
        return f"| {row} |"


def type_name(annotation):
    "A type as it is written in a table, where | separates columns"
    if annotation in (inspect.Parameter.empty, None):
        return ""
    if isinstance(annotation, str):
        return annotation
    name = getattr(annotation, "__name__", str(annotation))
    return name.replace("|", "or")


def default_of(parameter):
    "The default of an argument as it is written in a table"
    default = parameter.default
    if default is parameter.empty:
        return ""
    text = repr(default)
    if inspect.isroutine(default):  # the repr of a function is an address
        text = default.__name__.replace("<lambda>", "a function")
    text = text.replace("|", "or")
    return f"`{text[:58]}`"


HEAD = ("| argument | type | default | meaning |", "|---|---|---|---|")


def arguments(function):
    "The arguments of a function and what it returns, as a table"
    meanings = docments(function, full=True)
    signature = inspect.signature(function)
    rows = []
    for name, parameter in signature.parameters.items():
        if name not in ("self", "cls"):
            default = default_of(parameter)
            meaning = meanings[name].docment
            row = Row(f"`{name}`", parameter.annotation, default, meaning)
            rows.append(row)
    kind = signature.return_annotation
    returned = meanings["return"].docment
    if kind not in (inspect.Signature.empty, None) or returned:
        row = Row("*returns*", kind, "", returned)
        rows.append(row)
    if not rows:
        return ""
    lines = [row.markdown() for row in rows]
    return "\n".join([*HEAD, *lines])


def reference(module, page):
    "What a module offers, as Markdown"
    defined = f"Defined and explained in [{page}](../{page}.md)."
    try:
        m = importlib.import_module(f"egcnn_nb.{module}")
    except InputError as error:  # an adapter whose framework is not installed here
        missing = html.escape(str(error))
        return f"# {module}\n\n{defined}\n\nThis module could not be described here. {missing}"
    text = [f"# {module}\n\n{inspect.getdoc(m)}\n\n{defined}"]
    for name in m.__all__:
        thing = getattr(m, name)
        text.append(f"## `{name}`")
        if inspect.isfunction(thing):
            text.append(escaped_doc(thing))
            text.append(arguments(thing))
        elif inspect.isclass(thing):
            text.append(escaped_doc(thing))
            text += class_reference(name, thing)
        else:
            text.append(f"A constant: see [{page}](../{page}.md).")
    return "\n\n".join(text)


def escaped_doc(thing):
    "A docstring for a page"
    doc = inspect.getdoc(thing)
    if doc is None:
        return ""
    return html.escape(doc)


def class_reference(name, cls):
    "The arguments and the public methods of a class, as Markdown"
    text = []
    if is_dataclass(cls):
        text.append(arguments(cls))
    elif "__init__" in vars(cls):
        text.append(arguments(cls.__init__))
    for method, function in vars(cls).items():
        if method.startswith("_") or not inspect.isfunction(function):
            continue
        if function.__doc__:
            doc = html.escape(function.__doc__)
            table = arguments(function)
            text += [f"### `{name}.{method}`", doc, table]
    return text


# ---- the whole site


def write(alive):
    "All pages into _site_src/; the views of the notebooks named in `alive` can be moved"
    shutil.rmtree(SOURCE, ignore_errors=True)
    api = SOURCE / "api"
    api.mkdir(parents=True)
    shutil.copytree(ROOT / "nbs/images", SOURCE / "images")
    shutil.copytree(ROOT / "tools/site", SOURCE, dirs_exist_ok=True)
    books = notebooks()
    for path in [ROOT / "nbs/index.ipynb", *books]:
        views = {}
        if path.stem in alive:
            views = sweep(path)
        text = notebook(path, views)
        page = SOURCE / f"{path.stem}.md"
        page.write_text(text)
    modules = write_reference(books)
    for file, page in PAGES.items():
        write_page(ROOT / file, page)
    write_config(books, modules)


def write_reference(books):
    "A page for each module; returns the modules"
    modules = []
    for path in books:
        module = module_of(path)
        if module:
            page = SOURCE / f"api/{module}.md"
            page.write_text(reference(module, path.stem))
            modules.append(module)
    return modules


def write_page(file, page):
    "A Markdown file as a page, with its pictures and the files that it explains"
    text = file.read_text()
    text = links(text)
    for name in re.findall(r"\]\(([\w.]+)\)", text):
        beside = file.parent / name
        if beside.is_file():
            shutil.copy(beside, SOURCE / name)
    text = math(text)
    target = SOURCE / page
    target.write_text(text)


def write_config(books, modules):
    "The settings of mkdocs, with the list of all pages"
    lessons = [{path.stem: f"{path.stem}.md"} for path in books]
    described = [{module: f"api/{module}.md"} for module in modules]
    more = []
    for page in PAGES.values():
        name = page.removesuffix(".md")
        title = name.capitalize()
        entry = {title: page}
        more.append(entry)
    entries = [
        {"Home": "index.md"},
        {"Notebooks": lessons},
        {"Reference": described},
        {"More": more},
    ]
    given = ROOT / "mkdocs.yml"
    config = given.read_text()
    nav = json.dumps(entries)
    written = ROOT / "_mkdocs.yml"
    written.write_text(f"{config}nav: {nav}\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--views",
        nargs="*",
        metavar="NOTEBOOK",
        help="notebooks whose views can be moved; none named: all",
    )
    views = parser.parse_args().views
    write(VIEWS if views == [] else views or [])
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", "_mkdocs.yml"]
    return subprocess.call(mkdocs, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
