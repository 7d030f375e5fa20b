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
    found = {}
    for path in modules():
        name = name_of(path)
        found[name] = path.read_text()
    return found


def graph_of(sources):
    "module -> the modules that it imports"
    graph = {}
    for module, source in sources.items():
        graph[module] = set(imported(source, module))
    return graph


def forbidden(module, source):
    "The modules that a module imports and may not"
    own = room_of(module)
    allowed = {own, *ALLOWED[own]}
    return [other for other in imported(source, module) if room_of(other) not in allowed]


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

    for module in graph:
        if found := visit(module, []):
            return found
    return None


def test_modules_import_the_rooms_below_only():
    for module, source in sources().items():
        found = forbidden(module, source)
        assert found == [], module


def test_there_is_no_circle_of_imports():
    graph = graph_of(sources())
    assert circle(graph) is None


def test_a_circle_is_seen():
    graph = {
        "a": ["b"],
        "b": ["c"],
        "c": ["a"],
    }
    found = circle(graph)
    assert found == ["a", "b", "c"]


@pytest.mark.parametrize(
    "module, source, found",
    [
        ("data.nifti", "from ..run.steps import train_step", ["run.steps"]),
        ("data.nifti", "from egcnn_nb.method.losses import EGLoss", ["method.losses"]),
        ("data.nifti", "from ..core import expect", []),
        ("method.egcnn", "def f():\n    from ..show.viewers import view", ["show.viewers"]),
    ],
)
def test_an_import_from_above_is_seen(module, source, found):
    assert forbidden(module, source) == found


def printed_by(code):
    "What lines of Python print in a process of their own"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    ["run.training", "run.predict", "study.experiments", "commands.train", "commands.experiment"],
)
def test_what_computes_loads_nothing_that_draws(module):
    code = f"import sys, egcnn_nb.{module}; print([n for n in {NOT_LOADED} if n in sys.modules])"
    assert printed_by(code) == "[]"


def test_the_floor_needs_no_torch():
    code = "import sys, egcnn_nb, egcnn_nb.core, egcnn_nb.commands.train; print('torch' in sys.modules)"
    assert printed_by(code) == "False"


def defined_in(source):
    "Names of the functions and classes of a module"
    tree = ast.parse(source)
    definitions = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, definitions)]


def test_no_public_function_is_named_like_its_module():
    found = sources()
    found.pop("run.predict")  # egcnn_nb.predict is always the function
    for module, source in found.items():
        *_, name = module.split(".")
        own = defined_in(source)
        assert name not in own, module


def packages_imported(source):
    "Names of the packages that a module imports"
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_the_library_needs_no_nbdev():
    for module, source in sources().items():
        packages = packages_imported(source)
        assert packages.isdisjoint({"nbdev", "fastcore", "execnb"}), module


def contents_of(path):
    "A notebook, as JSON has it"
    text = path.read_text()
    return json.loads(text)


def outputs_of(path):
    "The outputs of a notebook"
    found = []
    for cell in contents_of(path)["cells"]:
        found += cell.get("outputs", [])
    return found


def test_notebooks_are_committed_with_outputs_and_without_state():
    for path in notebooks():
        name = path.name
        about = contents_of(path)["metadata"]
        assert "widgets" not in about, name
        outputs = outputs_of(path)
        kinds = {output["output_type"] for output in outputs}
        room = path.parent.name
        assert kinds or room == "4_inside", name
        assert "error" not in kinds, name
        size = path.stat().st_size
        assert size < 500 * 1024, name


def texts_of_pictures(path):
    "The alternative text of each picture of a notebook"
    found = []
    for output in outputs_of(path):
        if "image/png" in output.get("data", {}):
            about = output["metadata"].get("image/png", {})
            found.append(about.get("alt", ""))
    return found


def test_every_picture_has_a_text_for_those_who_cannot_see_it():
    for path in notebooks():
        for text in texts_of_pictures(path):
            assert len(text) > 20, (path.name, text)
            assert not text.startswith("<"), (path.name, text)


def lessons():
    "Notebooks that teach; those in 4_inside have a purpose, the code and the tests"
    found = [path for path in notebooks() if path.parent.name != "4_inside"]
    assert len(found) >= 22
    return found


def cell_with(texts, pattern):
    "Number of the first cell that a pattern fits"
    for number, text in enumerate(texts):
        if re.search(pattern, text, re.M):
            return number
    raise AssertionError(f"no cell with {pattern}")


def expect_exercises(text):
    "Three questions, each with its solution"
    questions, solutions = text.split("<details>")
    for number in ("\n1. ", "\n2. ", "\n3. "):
        assert number in questions
        assert number in solutions


@pytest.mark.parametrize("path", lessons(), ids=lambda path: path.stem)
def test_every_lesson_has_the_same_order(path):
    """What you will build, time to read; three exercises with solutions that a cell tests,
    three lines of summary, common mistakes; then the export."""
    cells = contents_of(path)["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    assert "You will build" in texts[0]
    assert re.search(r"Time to read: \d+ minutes", texts[0])
    at = cell_with(texts, r"^## \*Try it\*")
    exercises = texts[at]
    expect_exercises(exercises)
    behind = "which the next cell tests" in exercises
    tests = texts[at + 1] if behind else texts[at - 1]
    assert re.search(r"assert |test_eq|test_close|ExceptionExpected", tests)
    rest = texts[at + 1 :]
    end = rest[cell_with(rest, "## Summary")]
    points = re.findall(r"^- ", end, re.M)
    assert len(points) == 3
    assert "**Common mistakes**" in end


def test_the_diagrams_show_what_the_code_is():
    script = ROOT / "tools/diagrams.py"
    line = [sys.executable, str(script), "--check"]
    done = subprocess.run(line, stderr=subprocess.PIPE)
    error = done.stderr
    assert done.returncode == 0, error
