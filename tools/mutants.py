"""Put one fault at a time into an exported cell and see whether the tests of its notebook find it.

    OMP_NUM_THREADS=1 python tools/mutants.py 04_edge_gate [03_sobel_edges ...] [--every 3] [--json FILE]

Faults are those of cosmic-ray: another operator, another comparison, a number one larger or smaller, True for False, a loop that does not run.
Each notebook runs from top to bottom in a process of its own, with the fault; it is found ("killed") when a cell fails, or when it takes four times as
long as without. `--every 3`: each third fault alone. What survives is printed, to be read: a test is missing, or nobody could tell the difference."""

import argparse
import difflib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

from books import notebook
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
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
OPERATORS = (
    [f"core/ReplaceBinaryOperator_{s}" for s in SWAPS]
    + [f"core/ReplaceComparisonOperator_{c}" for c in COMPARISONS]
    + [
        f"core/{n}"
        for n in (
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
    ]
)


def mutants(source):
    "All sources that differ from this one by one fault"
    for name in OPERATORS:
        operator, k = get_operator(name)(), 0
        while (found := mutate_code(source, operator, k)) is not None and found != source:
            yield found
            k += 1


def run(nb, folder):
    "A notebook in this process, which ends with exit code 0 if every cell runs"
    os._exit(run_cells(nb, folder))


def outcome(cells, limit, folder):
    "0: all ran, 1: a cell failed, None: it took too long; and the seconds"
    nb, start = as_notebook(cells), time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=run, args=(nb, folder))
    process.start()
    process.join(limit)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return None, time.monotonic() - start
    return process.exitcode, time.monotonic() - start


def judge(name, every):
    "killed, survivors (as differences) of a notebook"
    path = notebook(name)
    folder = path.parent
    cells = [
        dict(c, source="".join(c["source"]))
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    cells = [
        c
        for c in cells
        if "nbdev_export()" not in c["source"] and "#| eval: false" not in c["source"]
    ]
    code, seconds = outcome(cells, 900, folder)
    assert code == 0, f"{name} fails as it is"
    faults = [
        (i, m)
        for i, c in enumerate(cells)
        if re.match(r"#\| export\b", c["source"])
        and not c["source"].startswith("#| export\nimport")
        for m in mutants(c["source"])
    ][::every]
    killed, survivors = 0, []
    for k, (i, mutant) in enumerate(faults):
        code, _ = outcome(
            [*cells[:i], dict(cells[i], source=mutant), *cells[i + 1 :]], 4 * seconds + 20, folder
        )
        if code == 0:
            survivors.append(
                "\n".join(
                    d
                    for d in difflib.unified_diff(
                        cells[i]["source"].splitlines(), mutant.splitlines(), lineterm="", n=0
                    )
                    if not d.startswith(("---", "+++", "@@"))
                )
            )
        else:
            killed += 1
        print(
            f"\r{name}: {k + 1}/{len(faults)}, {killed} killed", end="", file=sys.stderr, flush=True
        )
    print(file=sys.stderr)
    return killed, survivors


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("notebooks", nargs="+")
    p.add_argument("--every", type=int, default=1)
    p.add_argument("--json")
    args = p.parse_args()
    found = {n: judge(n, args.every) for n in args.notebooks}
    print("| notebook | faults | found | |\n|---|---|---|---|")
    for n, (killed, alive) in found.items():
        print(f"| {n} | {killed + len(alive)} | {killed} | {killed / (killed + len(alive)):.0%} |")
    for n, (_, alive) in found.items():
        print(f"\n## {n}: not found\n", *alive, sep="\n\n")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
