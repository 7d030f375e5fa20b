"""Which exported lines do the notebooks' own tests run?

    pip install coverage && OMP_NUM_THREADS=1 python tools/covered.py [04_edge_gate ...] [--missing]     # default: every notebook

Each notebook runs from top to bottom in a process of its own. Its exported cells run under the name and the line numbers of the module that they
become, so that coverage.py counts them there, together with what other notebooks run of that module. --missing lists the lines that none has run.
What runs only in other processes (commands, workers, several ranks) is not counted, though the tests in tests/ run it."""

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path

import coverage
from books import ROOT, module_of, notebook, notebooks, source_of
from quietly import as_notebook, run_cells


def line_of(module, cell):
    "Line of a module before an exported cell's first"
    text = source_of(module).read_text().splitlines()
    return 1 + next(
        (
            i
            for i, line in enumerate(text)
            if line.startswith("# %% ") and line.endswith(f"#{cell['id']}")
        ),
        0,
    )


def as_module(module, cell):
    "An exported cell that is compiled under its module's name; any other as it is"
    source = "".join(cell["source"])
    if not re.match(r"#\| export\b", source) or cell["cell_type"] != "code":
        return dict(cell, source=source)
    body = source.split("\n", 1)[1]
    return dict(
        cell,
        source=f"exec(compile({chr(10) * line_of(module, cell) + body!r}, {str(source_of(module))!r}, 'exec'), globals())",
    )


def run(path, data):
    "A notebook's cells under coverage, in this process; exit code 1 if one fails"
    cells = [
        c
        for c in json.loads(path.read_text())["cells"]
        if not re.search(r"#\| eval: false|nbdev_export\(\)", "".join(c["source"]))
    ]
    module = module_of(path)
    if module:
        cells = [as_module(module, c) for c in cells]
    measure = coverage.Coverage(
        data_file=data, data_suffix=path.stem, include=[f"{ROOT}/egcnn_nb/*"], omit=["*/_modidx.py"]
    )
    measure.start()
    code = run_cells(as_notebook(cells), path.parent)
    measure.stop()
    measure.save()
    os._exit(code)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("notebooks", nargs="*")
    p.add_argument("--missing", action="store_true")
    args = p.parse_args()
    paths = [notebook(n) for n in args.notebooks] or notebooks()
    data = str(Path(tempfile.mkdtemp()) / "data")
    for path in paths:
        process = multiprocessing.get_context("spawn").Process(target=run, args=(path, data))
        process.start()
        process.join()
        print(path.stem, "" if process.exitcode == 0 else "FAILED", file=sys.stderr, flush=True)
    total = coverage.Coverage(data_file=data)
    total.combine()
    total.report(show_missing=args.missing, skip_covered=args.missing, precision=1)


if __name__ == "__main__":
    main()
