"A room imports the rooms below it; every export comes with its notebook."

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from books import modules, notebooks
from diagrams import ALLOWED, imported, name_of, room_of

NOT_LOADED = ("matplotlib", "ipywidgets", "anywidget")


def sources():
    "module -> its source"
    return {name_of(path): path.read_text() for path in modules()}


def forbidden(module, source):
    "The modules that a module imports and may not"
    below = ALLOWED[room_of(module)]
    return [
        m
        for m in imported(source, module)
        if room_of(m) != room_of(module) and room_of(m) not in below
    ]


def circle(graph):
    "The modules on a circle of imports, or None"
    done = set()

    def visit(module, path):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        for other in graph.get(module, ()):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return None

    found = (visit(module, []) for module in graph)
    return next((c for c in found if c), None)


def test_modules_import_the_rooms_below_only():
    for module, source in sources().items():
        assert forbidden(module, source) == [], module


def test_there_is_no_circle_of_imports():
    graph = {module: set(imported(source, module)) for module, source in sources().items()}
    assert circle(graph) is None
    assert circle({"a": ["b"], "b": ["c"], "c": ["a"]}) == ["a", "b", "c"]


def test_an_import_from_above_is_seen():
    assert forbidden("data.nifti", "from ..run.steps import train_step") == ["run.steps"]
    assert forbidden("data.nifti", "from egcnn_nb.method.losses import EGLoss") == ["method.losses"]
    assert forbidden("data.nifti", "from ..core import expect") == []
    assert forbidden("method.egcnn", "def f():\n    from ..show.viewers import view") == [
        "show.viewers"
    ]


@pytest.mark.parametrize(
    "module",
    ["run.training", "run.predict", "study.experiments", "commands.train", "commands.experiment"],
)
def test_what_computes_loads_nothing_that_draws(module):
    code = f"import sys, egcnn_nb.{module}; print([n for n in {NOT_LOADED} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_floor_needs_no_torch():
    code = "import sys, egcnn_nb, egcnn_nb.core, egcnn_nb.commands.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_public_function_is_named_like_its_module():
    for module, source in sources().items():
        own = [
            n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
        ]
        assert module == "run.predict" or module.split(".")[-1] not in own, module


def test_the_library_needs_no_nbdev():
    for path in modules():
        tree = ast.walk(ast.parse(path.read_text()))
        names = []
        for node in tree:
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
        assert not [n for n in names if n.split(".")[0] in ("nbdev", "fastcore", "execnb")], (
            path.name
        )


def test_notebooks_are_committed_with_outputs_and_without_state():
    for path in notebooks():
        content = json.loads(path.read_text())
        outputs = [out for cell in content["cells"] for out in cell.get("outputs", [])]
        assert "widgets" not in content["metadata"], path.name
        assert outputs or path.parent.name == "4_inside", path.name
        assert path.stat().st_size < 500 * 1024, path.name
        assert not [out for out in outputs if out["output_type"] == "error"], path.name


def test_every_picture_has_a_text_for_those_who_cannot_see_it():
    for path in notebooks():
        for cell in json.loads(path.read_text())["cells"]:
            for out in cell.get("outputs", []):
                if "image/png" not in out.get("data", {}):
                    continue
                alt = out["metadata"].get("image/png", {}).get("alt", "")
                assert len(alt) > 20 and not alt.startswith("<"), (path.name, cell["id"], alt)


def lessons():
    "Notebooks that teach; those in 4_inside have a purpose, the code and the tests"
    found = [path for path in notebooks() if not path.parent.name.startswith("4_inside")]
    assert len(found) >= 22
    return found


def test_every_lesson_has_the_same_order():
    """What you will build, time to read; three exercises with solutions that a cell tests,
    three lines of summary, common mistakes; then the export."""
    for path in lessons():
        cells = json.loads(path.read_text())["cells"]
        text = ["".join(c["source"]) for c in cells]
        assert "You will build" in text[0], path.name
        assert re.search(r"Time to read: \d+ minutes", text[0]), path.name
        at = next((i for i, t in enumerate(text) if re.search(r"^## \*Try it\*", t, re.M)), None)
        assert at is not None, path.name
        questions, solutions = text[at].split("<details>")
        assert all(f"\n{k}. " in questions and f"\n{k}. " in solutions for k in (1, 2, 3)), (
            path.name
        )
        tests = text[at + 1] if "which the next cell tests" in text[at] else text[at - 1]
        assert re.search(r"assert |test_eq|test_close|ExceptionExpected", tests), path.name
        end = next((t for t in text[at + 1 :] if "## Summary" in t), "")
        assert len(re.findall(r"^- ", end, re.M)) == 3 and "**Common mistakes**" in end, path.name


def test_the_diagrams_show_what_the_code_is():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/diagrams.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
