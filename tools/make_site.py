"""Build the site: every notebook with its pictures, and the reference of the library, for a browser without a kernel and without the internet.

    python tools/make_site.py            # writes _site_src/ and _site/; open _site/index.html

Notebooks become Markdown as they are committed: nothing is run. Formulas become MathML, which browsers draw themselves. Hidden cells stay out;
cells that are exported say into which module."""
import base64, html, importlib, inspect, json, re, shutil, subprocess, sys
from dataclasses import is_dataclass
from pathlib import Path

from fastcore.docments import docments
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
SOURCE = ROOT/"_site_src"
PAGES = {"docs/launch/README.md": "launch.md", "benchmarks/README.md": "speed.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
         "CODE_OF_CONDUCT.md": "conduct.md"}

def math(text):
    "Formulas between dollars as MathML; code keeps its dollars"
    parts = re.split(r"(```.*?```|`[^`]*`)", text, flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1].strip(), display="block"), parts[i], flags=re.S)
        parts[i] = re.sub(r"(?<!\\)\$(?!\s)([^$\n]+?)(?<!\s)\$", lambda m: convert(m[1]), parts[i])
    return "".join(parts)

def links(text, here=""):
    "Links between notebooks and files as links between pages"
    for file, page in PAGES.items(): text = text.replace(f"](../{file})", f"]({page})").replace(f"]({file})", f"]({page})")
    text = re.sub(r"\]\((?:nbs/)?(\w+)\.ipynb(#[^)]*)?\)", r"](\1.md\2)", text)
    return text.replace("<details>", "<details markdown>")

def fence(text, kind, title=""):
    "A block of code, fenced so that no line of it can close the fence"
    return f"````{kind}" + (f' title="{title}"' if title else "") + f"\n{text.rstrip()}\n````\n"

def output(out, name, images):
    "One output as Markdown; a picture becomes a file"
    data = out.get("data", {})
    if out["output_type"] == "stream": return fence("".join(out["text"]), "text") if out["name"] == "stdout" else ""
    if "image/png" in data:
        path = SOURCE/"pictures"/f"{name}_{len(images)}.png"; images.append(path); path.parent.mkdir(exist_ok=True); path.write_bytes(base64.b64decode(data["image/png"]))
        alt = out["metadata"].get("image/png", {}).get("alt", "") or "".join(data.get("text/plain", ""))
        return f"![{html.escape(alt).replace(']', '')}](pictures/{path.name})\n"
    if "text/markdown" in data: return math("".join(data["text/markdown"]))+"\n"
    if "text/html" in data: return "".join(data["text/html"])+"\n"
    return fence("".join(data["text/plain"]), "text") if "text/plain" in data else ""

def notebook(path):
    "A notebook as Markdown"
    cells, module, text, images = json.loads(path.read_text())["cells"], "", [], []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": text.append(links(math(source))); continue
        if found := re.search(r"^#\| default_exp (\w+)", source, re.M): module = found[1]
        if re.match(r"#\| (hide|default_exp)\b", source) or source.startswith("%"): continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
        if code: text.append(fence(code, "python", f"exported to egcnn_nb/{module}.py" if source.startswith("#| export") else ""))
        text += [output(o, path.stem, images) for o in cell["outputs"]]
    return "\n\n".join(text)

def arguments(function):
    "The arguments of a function and what it returns, as a table"
    rows, signature = docments(function, full=True), inspect.signature(function)
    word = lambda a: "" if a in (inspect.Parameter.empty, None) else a if isinstance(a, str) else getattr(a, "__name__", str(a)).replace("|", "or")
    line = lambda name, kind, default, meaning: f"| {name} | {f'`{kind}`' if kind else ''} | {default} | {html.escape(' '.join((meaning or '').split())).replace('|', '&#124;')} |"
    lines = [line(f"`{n}`", word(p.annotation), "" if p.default is p.empty else f"`{p.default!r}`".replace("|", "or")[:60], rows[n].docment) for n, p in signature.parameters.items() if n not in ("self", "cls")]
    if signature.return_annotation not in (inspect.Signature.empty, None) or rows["return"].docment: lines.append(line("*returns*", word(signature.return_annotation), "", rows["return"].docment))
    return "\n".join(["| argument | type | default | meaning |", "|---|---|---|---|", *lines]) if lines else ""

def reference(module, page):
    "What a module offers, as Markdown"
    m, text = importlib.import_module(f"egcnn_nb.{module}"), []
    text.append(f"# {module}\n\n{inspect.getdoc(m)}\n\nDefined and explained in [{page}](../{page}.md).")
    for name in m.__all__:
        thing = getattr(m, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): text.append(f"## `{name}`\n\nA constant: see [{page}](../{page}.md)."); continue
        text.append(f"## `{name}`\n\n{html.escape(inspect.getdoc(thing) or '')}")
        if inspect.isfunction(thing): text.append(arguments(thing)); continue
        if is_dataclass(thing) or "__init__" in vars(thing): text.append(arguments(thing if is_dataclass(thing) else thing.__init__))
        for method, f in vars(thing).items():
            if inspect.isfunction(f) and not method.startswith("_") and f.__doc__: text.append(f"### `{name}.{method}`\n\n{html.escape(f.__doc__)}\n\n{arguments(f)}")
    return "\n\n".join(text)

def write():
    "All pages into _site_src/"
    shutil.rmtree(SOURCE, ignore_errors=True); (SOURCE/"api").mkdir(parents=True)
    shutil.copytree(ROOT/"nbs/images", SOURCE/"images"); shutil.copytree(ROOT/"tools/site", SOURCE, dirs_exist_ok=True)
    books, nav = sorted((ROOT/"nbs").glob("[0-9]*.ipynb")), []
    for path in [ROOT/"nbs/index.ipynb", *books]: (SOURCE/f"{path.stem}.md").write_text(notebook(path))
    for path in books:
        if found := re.search(r"#\| default_exp (\w+)", path.read_text()): (SOURCE/f"api/{found[1]}.md").write_text(reference(found[1], path.stem)); nav.append(found[1])
    for file, page in PAGES.items():
        text = links((ROOT/file).read_text())
        for picture in re.findall(r"!\[[^]]*\]\(([\w.]+)\)", text): shutil.copy((ROOT/file).parent/picture, SOURCE/picture)
        (SOURCE/page).write_text(text)
    entries = [{"Home": "index.md"}, {"Notebooks": [{b.stem: f"{b.stem}.md"} for b in books]}, {"Reference": [{m: f"api/{m}.md"} for m in nav]},
               {"More": [{p.removesuffix(".md").capitalize(): p} for p in PAGES.values()]}]
    (ROOT/"_mkdocs.yml").write_text((ROOT/"mkdocs.yml").read_text() + f"nav: {json.dumps(entries)}\n")

def main():
    write()
    return subprocess.call([sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", "_mkdocs.yml"], cwd=ROOT)

if __name__ == "__main__": sys.exit(main())
