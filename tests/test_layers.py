"A notebook imports lower floors only; every export comes with its notebook."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/"tools"))
from diagrams import notebooks


def floors():
    "module -> number of the notebook that exports it"
    return {module: nb.split("_")[0] for module, nb in notebooks().items()}

def imported(tree):
    "Names of the package's modules that a syntax tree imports"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1: yield node.module
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("egcnn_nb."): yield node.module.split(".")[1]

def too_high(floor, source, floors):
    "Modules imported from the same floor or above"
    return [m for m in imported(ast.parse(source)) if floors.get(m, "") >= floor]

def test_modules_import_lower_floors_only():
    known = floors()
    assert len(known) >= 13
    for module, floor in known.items():
        assert too_high(floor, (ROOT/f"egcnn_nb/{module}.py").read_text(), known) == [], module

def test_a_higher_import_is_seen():
    assert too_high("03", "from .losses import EGLoss", {"losses": "05", "core": "00"}) == ["losses"]
    assert too_high("03", "from egcnn_nb.core import expect", {"losses": "05", "core": "00"}) == []

def test_notebooks_import_lower_floors_only():
    known = floors()
    for nb in (ROOT/"nbs").glob("[0-9]*.ipynb"):
        for cell in json.loads(nb.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or source.startswith("%"): continue
            assert too_high(nb.name.split("_")[0], source, known) == [], (nb.name, source)

def test_the_library_needs_no_nbdev():
    for module in (ROOT/"egcnn_nb").glob("*.py"):
        names = [a.name for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in ast.walk(ast.parse(module.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [n for n in names if n.split(".")[0] in ("nbdev", "fastcore", "execnb")], module.name

def test_notebooks_are_committed_with_outputs_and_without_state():
    for nb in (ROOT/"nbs").glob("[0-9]*.ipynb"):
        content = json.loads(nb.read_text())
        assert "widgets" not in content["metadata"], nb.name
        assert any(c.get("outputs") for c in content["cells"]), nb.name
        assert nb.stat().st_size < 500*1024, nb.name
        assert not [o for c in content["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"], nb.name

def test_every_picture_has_a_text_for_those_who_cannot_see_it():
    for nb in (ROOT/"nbs").glob("[0-9]*.ipynb"):
        for cell in json.loads(nb.read_text())["cells"]:
            for out in cell.get("outputs", []):
                if "image/png" not in out.get("data", {}): continue
                alt = out["metadata"].get("image/png", {}).get("alt", "")
                assert len(alt) > 20 and not alt.startswith("<"), (nb.name, cell["id"], alt)

def test_every_notebook_teaches_in_the_same_order():
    "What you will build, time to read; three exercises with solutions that a cell tests, three lines of summary, common mistakes; then the export"
    for nb in sorted((ROOT/"nbs").glob("[0-9]*.ipynb")):
        cells = json.loads(nb.read_text())["cells"]; text = ["".join(c["source"]) for c in cells]
        assert "You will build" in text[0] and re.search(r"Time to read: \d+ minutes", text[0]), nb.name
        at = next((i for i, t in enumerate(text) if t.startswith("## *Try it*") or "\n## *Try it*" in t), None)
        assert at is not None and all(f"\n{k}. " in text[at].split("<details>")[0] and f"\n{k}. " in text[at].split("<details>")[1] for k in (1, 2, 3)), nb.name
        tests = text[at+1] if "which the next cell tests" in text[at] else text[at-1]
        assert re.search(r"assert |test_eq|test_close|ExceptionExpected", tests), nb.name
        end = next((t for t in text[at+1:] if "## Summary" in t), "")
        assert len(re.findall(r"^- ", end, re.M)) == 3 and "**Common mistakes**" in end, nb.name

def test_the_diagrams_show_what_the_code_is():
    done = subprocess.run([sys.executable, str(ROOT/"tools/diagrams.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
