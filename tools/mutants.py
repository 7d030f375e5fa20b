"""Put one fault at a time into an exported cell and see whether the tests of its notebook find it.

    OMP_NUM_THREADS=1 python tools/mutants.py 04_edge_gate [...] [--every 3] [--json FILE]

Faults are those of cosmic-ray: another operator, another comparison, a number one larger or
smaller, True for False, a loop that does not run. Each notebook runs from top to bottom in a process
of its own, with the fault. The fault is found ("killed") when a cell fails, or when the notebook
takes four times as long as without. `--every 3`: each third fault alone. What survives is printed,
to be read: a test is missing, or nobody could tell the difference."""

import argparse
import difflib
import json
import multiprocessing
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from books import notebook
from cosmic_ray.mutating import mutate_code  # pyright: ignore[reportMissingImports]
from cosmic_ray.plugins import get_operator  # pyright: ignore[reportMissingImports]
from quietly import as_notebook, run_cells

SWAPS = (
    "Add_Sub",
    "Sub_Add",
    "Mul_Div",
    "Div_Mul",
    "Mul_Add",
    "Pow_Mul",
    "FloorDiv_Mul",
    "Mod_Add",
    "BitOr_BitAnd",
    "BitAnd_BitOr",
)
COMPARISONS = (
    "Lt_LtE",
    "LtE_Lt",
    "Gt_GtE",
    "GtE_Gt",
    "Lt_Gt",
    "Gt_Lt",
    "Eq_NotEq",
    "NotEq_Eq",
    "Is_IsNot",
    "IsNot_Is",
)
OTHERS = (
    "NumberReplacer",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ZeroIterationForLoop",
    "ReplaceUnaryOperator_Delete_USub",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_Invert",
)
OPERATORS = (
    *[f"core/ReplaceBinaryOperator_{swap}" for swap in SWAPS],
    *[f"core/ReplaceComparisonOperator_{comparison}" for comparison in COMPARISONS],
    *[f"core/{other}" for other in OTHERS],
)


@dataclass
class Fault:
    "A cell with one fault"

    cell: int  # its number
    source: str  # with the fault


def mutants(source):
    "All sources that differ from this one by one fault"
    for name in OPERATORS:
        operator = get_operator(name)()
        occurrence = 0
        while True:
            found = mutate_code(source, operator, occurrence)
            if found is None or found == source:
                break
            yield found
            occurrence += 1


def run(nb, folder):
    "A notebook in this process, which ends with exit code 0 if every cell runs"
    code = run_cells(nb, folder)
    os._exit(code)


def exit_code(cells, limit, folder):
    "0: all cells ran, 1: one failed, None: it took longer than `limit` seconds"
    nb = as_notebook(cells)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run, args=(nb, folder))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def cells_to_run(path):
    "The cells of a notebook that its tests run, their sources in one piece"
    notebook = json.loads(path.read_text())
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not is_left_out(source):
            whole = dict(cell, source=source)
            cells.append(whole)
    return cells


def is_left_out(source):
    "Whether the tests leave a cell out"
    return "nbdev_export()" in source or "#| eval: false" in source


def faults_of(cells):
    "Every fault in the exported cells, apart from imports"
    faults = []
    for number, cell in enumerate(cells):
        source = cell["source"]
        exported = re.match(r"#\| export\b", source)
        if exported and not source.startswith("#| export\nimport"):
            for mutant in mutants(source):
                fault = Fault(number, mutant)
                faults.append(fault)
    return faults


def difference(before, after):
    "The lines that differ"
    old = before.splitlines()
    new = after.splitlines()
    lines = difflib.unified_diff(old, new, lineterm="", n=0)
    kept = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    return "\n".join(kept)


def seconds_alone(cells, path):
    "How long a notebook takes without a fault"
    start = time.monotonic()
    code = exit_code(cells, 900, path.parent)
    assert code == 0, f"{path.stem} fails as it is"
    return time.monotonic() - start


def judge(name, every):
    "Number of killed faults, and the survivors as differences, of a notebook"
    path = notebook(name)
    cells = cells_to_run(path)
    limit = 4 * seconds_alone(cells, path) + 20
    faults = faults_of(cells)[::every]
    total = len(faults)
    survivors = []
    for count, fault in enumerate(faults, 1):
        cell = cells[fault.cell]
        with_fault = list(cells)
        with_fault[fault.cell] = dict(cell, source=fault.source)
        if exit_code(with_fault, limit, path.parent) == 0:
            survivor = difference(cell["source"], fault.source)
            survivors.append(survivor)
        killed = count - len(survivors)
        progress = f"\r{name}: {count}/{total}, {killed} killed"
        print(progress, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return total - len(survivors), survivors


def report(found):
    "Print how many faults were found, and those that were not"
    print("| notebook | faults | found | |\n|---|---|---|---|")
    for name, (killed, survivors) in found.items():
        total = killed + len(survivors)
        share = killed / total
        print(f"| {name} | {total} | {killed} | {share:.0%} |")
    for name, (_, survivors) in found.items():
        print(f"\n## {name}: not found\n", *survivors, sep="\n\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="+")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    found = {name: judge(name, args.every) for name in args.notebooks}
    report(found)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
