"""The style of the project in numbers, as a Markdown table, beside the goals.

    python tools/style.py [--check]          # --check: exit code 1 where a goal is missed, each place named

Functions are counted without signature, docstring and blank lines. A notebook's asserts are `assert`, `test_eq` and its kin, and `with ExceptionExpected`,
in cells that are not exported. Docments: every public function, and method of a public class but torch's forward and backward, has a docstring and a
comment for each argument; parts that a class asks of its heirs (`rise:Callable # ...`) are described there, once."""

import argparse
import ast
import json
import re
import sys
from statistics import median, quantiles

from books import NBS, ROOT, notebooks
from books import modules as all_modules


def cells(kind=None):
    "(notebook, cell type, source) of all notebooks"
    for nb in [NBS / "index.ipynb", *notebooks()]:
        for c in json.loads(nb.read_text())["cells"]:
            if kind in (None, c["cell_type"]):
                yield nb.name, c["cell_type"], "".join(c["source"])


def exported():
    "Sources of the exported cells"
    return [(nb, s) for nb, _, s in cells("code") if re.match(r"#\| export\b", s)]


def functions():
    "(notebook, node, source lines, whether it is public) of each exported function and method"
    hooks = {
        t.target.id
        for _, source in exported()
        for c in ast.walk(ast.parse(source))
        if isinstance(c, ast.ClassDef)
        for t in c.body
        if isinstance(t, ast.AnnAssign) and "Callable" in ast.unparse(t.annotation)
    }
    for nb, source in exported():
        tree, lines, known = ast.parse(source), source.splitlines(), set()
        for owner in [
            tree,
            *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")),
        ]:
            known |= {
                n
                for n in owner.body
                if isinstance(n, ast.FunctionDef)
                and not n.name.startswith("_")
                and n.name not in ("forward", "backward", *hooks)
            }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield nb, node, lines, node in known


def body_length(node, lines):
    "Lines of code of a function's body"
    first = node.body[1:] if ast.get_docstring(node) else node.body
    return (
        len([l for l in lines[first[0].lineno - 1 : node.end_lineno] if l.strip()]) if first else 0
    )


def documented(node, lines):
    "Whether a function has a docstring, and a comment for each argument"
    if not ast.get_docstring(node):
        return False
    names = [
        a.arg
        for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        if a.arg not in ("self", "cls")
    ]
    signature = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
    return all(re.search(rf"\b{n}\b[^\n#]*#", signature) for n in names)


def asserts():
    "Number of assertions in the cells that test"
    tests = "\n".join(s for _, _, s in cells("code") if not re.match(r"#\| export\b", s))
    return len(
        re.findall(
            r"^\s*assert |; assert |\btest_(?:eq|close|ne|is|fail)\(|\bExceptionExpected\(",
            tests,
            re.M,
        )
    )


def measure():
    "Name -> (value, goal as text, whether it is met, places that miss it)"
    found = list(functions())
    lengths = [body_length(n, l) for _, n, l, _ in found]
    code = sum(
        len([l for l in s.splitlines() if l.strip() and not l.startswith("#|")])
        for _, s in exported()
    )
    words = {k: sum(len(s.split()) for _, _, s in cells(k)) for k in ("markdown", "code")}
    bare = [f"{nb}: {n.name}" for nb, n, l, public in found if public and not documented(n, l)]
    long = [f"{nb}: {n.name} ({k})" for (nb, n, *_), k in zip(found, lengths) if k > 40]
    modules = {
        f.relative_to(ROOT / "egcnn_nb").as_posix(): len(f.read_text().splitlines())
        for f in all_modules()
    }
    big, ratio, full = (
        [f"{n} ({k})" for n, k in sorted(modules.items()) if k > 300],
        code / asserts(),
        1 - len(bare) / sum(public for *_, public in found),
    )
    sizes = sorted(nb.stat().st_size for nb in notebooks())
    return {
        "functions": (str(len(found)), "", True, []),
        "lines of a function, median": (f"{median(lengths):.0f}", "≤ 6", median(lengths) <= 6, []),
        "lines of a function, 90th percentile": (
            f"{quantiles(lengths, n=10)[-1]:.0f}",
            "",
            True,
            [],
        ),
        "functions above 40 lines": (str(len(long)), "0", not long, long),
        "exported lines for each assertion": (f"{ratio:.1f}", "≤ 8", ratio <= 8, []),
        "words of prose for each word of code": (
            f"{words['markdown'] / words['code']:.2f}",
            "",
            True,
            [],
        ),
        "public functions with docstring and docments": (f"{full:.0%}", "100%", not bare, bare),
        "modules above 300 lines": (str(len(big)), "0", not big, big),
        "KiB of a notebook, median and largest": (
            f"{median(sizes) / 1024:.0f}, {sizes[-1] / 1024:.0f}",
            "≤ 500",
            sizes[-1] < 500 * 1024,
            [],
        ),
    }


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--check", action="store_true")
    args = p.parse_args()
    found = measure()
    print(
        "| | measured | goal |\n|---|---|---|",
        *(f"| {n} | {v} | {g} |" for n, (v, g, *_) in found.items()),
        sep="\n",
    )
    missed = {n: places for n, (_, _, met, places) in found.items() if not met}
    for n, places in missed.items():
        print(f"\nmissed: {n}", *places, sep="\n    ")
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
