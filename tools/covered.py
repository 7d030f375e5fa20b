"""Which exported lines do the notebooks' own tests run?

    pip install coverage
    OMP_NUM_THREADS=1 python tools/covered.py [04_edge_gate ...] [--missing]

Default: every notebook. Each runs from top to bottom in a process of its own. Its exported cells
run under the name and the line numbers of the module that they become, so that coverage.py counts
them there, together with what other notebooks run of that module. --missing lists the lines that
none has run. What runs only in other processes (commands, workers, several ranks) is not counted,
though the tests in tests/ run it."""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path

import coverage  # pyright: ignore[reportMissingImports]
from books import ROOT, module_of, notebook, notebooks, source_of
from quietly import as_notebook, run_cells


def line_of(module, cell):
    "Line of a module before an exported cell's first"
    path = source_of(module)
    name = cell["id"]
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("# %% ") and line.endswith(f"#{name}"):
            return number
    return 1


def as_module(module, cell):
    "An exported cell that is compiled under its module's name; any other as it is"
    source = "".join(cell["source"])
    if re.match(r"#\| export\b", source) and cell["cell_type"] == "code":
        source = compiled_there(source, module, cell)
    return dict(cell, source=source)


def compiled_there(source, module, cell):
    "A line that runs an exported cell under its module's name and line numbers"
    _, _, body = source.partition("\n")
    above = line_of(module, cell)
    shifted = "\n" * above + body
    path = str(source_of(module))
    return f"exec(compile({shifted!r}, {path!r}, 'exec'), globals())"


def cells_to_run(path):
    "The cells of a notebook that its tests run, exported ones under the name of their module"
    notebook = json.loads(path.read_text())
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if not re.search(r"#\| eval: false|nbdev_export\(\)", source):
            cells.append(cell)
    module = module_of(path)
    if module is None:
        return cells
    return [as_module(module, cell) for cell in cells]


def run(path, data):
    "A notebook's cells under coverage, in this process; exit code 1 if one fails"
    notebook = as_notebook(cells_to_run(path))
    package = f"{ROOT}/egcnn_nb/*"
    measure = coverage.Coverage(
        data_file=data, data_suffix=path.stem, include=[package], omit=["*/_modidx.py"]
    )
    measure.start()
    code = run_cells(notebook, path.parent)
    measure.stop()
    measure.save()
    os._exit(code)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*")
    parser.add_argument("--missing", action="store_true")
    args = parser.parse_args()
    paths = [notebook(name) for name in args.notebooks] or notebooks()
    folder = Path(tempfile.mkdtemp())
    data = str(folder / "data")
    spawn = multiprocessing.get_context("spawn")
    for path in paths:
        process = spawn.Process(target=run, args=(path, data))
        process.start()
        process.join()
        failed = "" if process.exitcode == 0 else "FAILED"
        print(path.stem, failed, file=sys.stderr, flush=True)
    total = coverage.Coverage(data_file=data)
    total.combine()
    total.report(show_missing=args.missing, skip_covered=args.missing, precision=1)


if __name__ == "__main__":
    main()
