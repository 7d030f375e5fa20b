"""How readable the project is, in numbers, as Markdown tables.

    python tools/style.py [--check] [--write] [--worst 5]

Three groups of code are measured: the package, the notebooks' own cells, and tests, tools and
benchmarks. A line of code is one that holds more than a comment. Docstrings do not count.
Expressions a line: every name, call, number, operator and so on of a function's body, over the
lines of that body. A function inside another is measured alone. A notebook's cell is measured whole.
Complexity: one, and one more for each branch, loop, comprehension, `with`, `assert` and `and`.

--check: exit code 1 where a goal is missed, or where CONTRIBUTING.md shows other figures. --write:
write its table. --worst: so many of the densest places are named."""

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from statistics import median

from books import NBS, ROOT, notebooks

LONGEST_LINE = 120
MOST_COMPLEX = 10
GROUPS = ("package", "cells", "around")
TITLES = {
    "package": "package",
    "cells": "notebooks' own cells",
    "around": "tests, tools, benchmarks",
}
HELD = ("package", "around")  # groups whose figures have goals

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (
    ast.If,
    ast.IfExp,
    ast.For,
    ast.While,
    ast.ExceptHandler,
    ast.With,
    ast.comprehension,
    ast.Assert,
)
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
EXPORT = re.compile(r"#\|\s*export\b")
MAGIC = re.compile(r"^[%!]", re.M)
GENERATED = re.compile(r"__all__ = | {11}'")


@dataclass
class Source:
    "A module, or a cell"

    place: str  # where it is
    text: str


@dataclass
class Density:
    "Expressions a line at one place"

    place: str
    value: float


@dataclass
class Group:
    "What was counted in one group of sources"

    lines: int = 0
    semicolons: int = 0
    functions: int = 0
    long_lines: list = field(default_factory=list)  # places
    complex: list = field(default_factory=list)  # places of functions over MOST_COMPLEX
    densities: list = field(default_factory=list)  # of Density

    def note(self, place: str, value: float) -> None:
        "Note the expressions a line at a place"
        density = Density(place, value)
        self.densities.append(density)


# ---- sources


def sources(group: str) -> list[Source]:
    "The sources of a group"
    if group == "package":
        return modules_in("egcnn_nb")
    if group == "around":
        return modules_in("tests", "tools", "benchmarks")
    return own_cells()


def modules_in(*folders) -> list[Source]:
    "The modules in some folders as sources, without the index that nbdev writes"
    found = []
    for folder in folders:
        paths = (ROOT / folder).rglob("*.py")
        for path in sorted(paths):
            if path.name != "_modidx.py":
                source = source_of(path)
                found.append(source)
    return found


def source_of(path: Path) -> Source:
    "A module as a source"
    place = place_of(path)
    text = path.read_text()
    return Source(place, text)


def place_of(path: Path) -> str:
    "Where a file is in the repository"
    place = path.relative_to(ROOT)
    return str(place)


def cells(path: Path, kind: str) -> list[Source]:
    "The cells of a notebook that are code, or markdown"
    content = path.read_text()
    notebook = json.loads(content)
    name = place_of(path)
    found = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == kind:
            place = f"{name}[{number}]"
            text = "".join(cell["source"])
            source = Source(place, text)
            found.append(source)
    return found


def is_own(cell: Source) -> bool:
    "Whether a cell is not exported, and has no magic"
    if EXPORT.match(cell.text):
        return False
    return MAGIC.search(cell.text) is None


def own_cells() -> list[Source]:
    "Cells of code that are not exported, and have no magic"
    found = []
    for path in [NBS / "index.ipynb", *notebooks()]:
        for cell in cells(path, "code"):
            if is_own(cell):
                found.append(cell)
    return found


# ---- one source


def tokens_of(text: str) -> list[tokenize.TokenInfo]:
    "The tokens of a source, without comments and line ends"
    lines = io.StringIO(text)
    found = []
    for token in tokenize.generate_tokens(lines.readline):
        if token.type not in NO_CODE:
            found.append(token)
    return found


def lines_of(tokens: list[tokenize.TokenInfo]) -> set[int]:
    "Numbers of the lines that hold code"
    lines = set()
    for token in tokens:
        first, _ = token.start
        last, _ = token.end
        lines.update(range(first, last + 1))
    return lines


def body_of(function: Function) -> list[ast.stmt]:
    "The statements of a function, without its docstring"
    if ast.get_docstring(function) is None:
        return function.body
    return function.body[1:]


def nodes_of(function: Function) -> list[ast.AST]:
    "The nodes in the body of a function, without those of functions and classes inside it"
    found = []
    waiting: list[ast.AST] = list(body_of(function))
    while waiting:
        node = waiting.pop()
        found.append(node)
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def complexity(function: Function) -> int:
    "One, and one more for each way through a function that a reader must keep in mind"
    count = 1
    for node in nodes_of(function):
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
    return count


def density(nodes, lines: int) -> float:
    "Expressions a line"
    count = 0
    for node in nodes:
        if isinstance(node, ast.expr):
            count += 1
    return count / max(lines, 1)


def density_of(function: Function, lines: set[int]) -> float:
    "Expressions a line of a function's body"
    body = body_of(function)
    first = body[0].lineno
    last = function.end_lineno or first
    numbers = range(first, last + 1)
    inside = lines.intersection(numbers)
    nodes = nodes_of(function)
    count = len(inside)
    return density(nodes, count)


def is_too_long(line: str) -> bool:
    "Whether a line is too long; nbdev writes the list of exported names"
    if GENERATED.match(line):
        return False
    return len(line) > LONGEST_LINE


def measure_source(source: Source, group: Group, whole: bool) -> None:
    "Add a source to a group; `whole`: its density is that of the whole source"
    tokens = tokens_of(source.text)
    lines = lines_of(tokens)
    group.lines += len(lines)
    words = [token.string for token in tokens]
    group.semicolons += words.count(";")
    note_long_lines(source, group)
    tree = ast.parse(source.text)
    nodes = list(ast.walk(tree))
    if whole and lines:
        value = density(nodes, len(lines))
        group.note(source.place, value)
    for node in nodes:
        if isinstance(node, FUNCTIONS) and body_of(node):
            place = f"{source.place}:{node.lineno} {node.name}"
            count_function(node, place, group)
            if not whole:
                value = density_of(node, lines)
                group.note(place, value)


def note_long_lines(source: Source, group: Group) -> None:
    "Note the lines of a source that are too long"
    lines = source.text.splitlines()
    for number, line in enumerate(lines, 1):
        if is_too_long(line):
            place = f"{source.place}:{number}"
            group.long_lines.append(place)


def count_function(function: Function, place: str, group: Group) -> None:
    "Count a function, and note it where it is too complex"
    group.functions += 1
    if complexity(function) > MOST_COMPLEX:
        group.complex.append(place)


def measure(name: str) -> Group:
    "The figures of a group"
    group = Group()
    for source in sources(name):
        measure_source(source, group, whole=name == "cells")
    return group


# ---- the figures and their goals


def middle_density(group: Group) -> float:
    "Median of the expressions a line"
    values = values_of(group)
    return median(values)


def values_of(group: Group) -> list[float]:
    "Expressions a line of all places"
    values = []
    for density in group.densities:
        values.append(density.value)
    return values


def high_density(group: Group) -> float:
    "90th percentile of the expressions a line"
    values = sorted(values_of(group))
    count = len(values)
    place = int(0.9 * count)
    return values[place]


def complex_share(group: Group) -> float:
    "Share of the functions that are too complex, in percent"
    count = len(group.complex)
    functions = max(group.functions, 1)
    share = count / functions
    return 100 * share


def long_count(group: Group) -> int:
    "Number of lines that are too long"
    return len(group.long_lines)


def semicolon_count(group: Group) -> int:
    "Number of semicolons"
    return group.semicolons


@dataclass
class Figure:
    "One row of the table"

    name: str
    of: Callable[[Group], float]
    form: str  # how its value is printed
    goal: str
    is_met: Callable[[float], bool]


FIGURES = (
    Figure("expressions a line, median", middle_density, "{:.1f}", "≤ 5", lambda v: v <= 5),
    Figure("expressions a line, 90th percentile", high_density, "{:.1f}", "≤ 9", lambda v: v <= 9),
    Figure(f"lines over {LONGEST_LINE}", long_count, "{}", "0", lambda v: v == 0),
    Figure("semicolons", semicolon_count, "{}", "0", lambda v: v == 0),
    Figure(
        f"functions of complexity over {MOST_COMPLEX}",
        complex_share,
        "{:.1f} %",
        "< 3 %",
        lambda v: v < 3,
    ),
)


def missed_goals(groups: dict[str, Group]) -> list[str]:
    "The figures that miss their goal"
    missed = []
    for name in HELD:
        title = TITLES[name]
        group = groups[name]
        for figure in FIGURES:
            value = figure.of(group)
            if not figure.is_met(value):
                found = figure.form.format(value)
                missed.append(f"{title}: {figure.name} {found}, goal {figure.goal}")
    return missed


def row(name: str, values: list, goal: str) -> str:
    "One row of the table"
    words = [name]
    words += values
    words.append(goal)
    cells = " | ".join(words)
    return f"| {cells} |"


def table(groups: dict[str, Group]) -> list[str]:
    "The lines of the table, with the figures of all groups"
    titles = [TITLES[name] for name in groups]
    rules = ["---"] * len(titles)
    head = row("", titles, "goal")
    rule = row("---", rules, "---")
    lines = [head, rule]
    for figure in FIGURES:
        values = []
        for group in groups.values():
            value = figure.of(group)
            values.append(figure.form.format(value))
        line = row(figure.name, values, figure.goal)
        lines.append(line)
    return lines


def print_size(groups: dict[str, Group]) -> None:
    "Print how many lines of code each group has"
    print("\nLines of code:")
    for name, group in groups.items():
        title = TITLES[name]
        print(f"{title} {group.lines}")
    print("\nThe goals hold for the package, and for tests, tools and benchmarks.")


def densest_of(group: Group, count: int) -> list[str]:
    "So many of the densest places of a group"
    densest = sorted(group.densities, key=attrgetter("value"), reverse=True)
    found = []
    for density in densest[:count]:
        line = f"{density.value:.0f} {density.place}"
        found.append(line)
    return found


def print_places(groups: dict[str, Group], count: int) -> None:
    "Name the densest places of each group, and every line and function that is over its bound"
    for name, group in groups.items():
        title = TITLES[name]
        densest = densest_of(group, count)
        print_list(f"\n{title}, densest:", densest)
        print_counted("too long", group.long_lines, count)
        print_counted("too complex", group.complex, count)


def print_counted(title: str, places: list[str], count: int) -> None:
    "Print how many places there are, and so many of them"
    number = len(places)
    print_list(f"{title}: {number}", places[:count])


# ---- the table in CONTRIBUTING.md

PAGE = ROOT / "CONTRIBUTING.md"
BEGIN = "<!-- written by: python tools/style.py --write -->"
END = "<!-- to here -->"


def page_with(lines: list[str]) -> str:
    "CONTRIBUTING.md with this table"
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, behind = rest.partition(END)
    written = [before + BEGIN, *lines, END + behind]
    return "\n".join(written)


def print_list(title: str, places: list[str]) -> None:
    "Print a title and the places below it; nothing where there are none"
    if places:
        print(title, *places, sep="\n    ")


# ---- documentation


def public_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    "Public functions of a module and public methods of its public classes"
    described = parts_described(tree)
    owners = [tree, *public_parts(tree, ast.ClassDef)]
    found = []
    for owner in owners:
        for function in public_parts(owner, ast.FunctionDef):
            if function.name not in described:
                found.append(function)
    return found


def public_parts(
    owner: ast.Module | ast.ClassDef, kind: type[ast.ClassDef] | type[ast.FunctionDef]
) -> list:
    "The public classes or functions that a module or a class defines"
    found = []
    for node in owner.body:
        if isinstance(node, kind) and not node.name.startswith("_"):
            found.append(node)
    return found


def parts_described(tree: ast.Module) -> set[str]:
    "torch's own methods, and fields that hold a function: they are described once, in their class"
    names = {"forward", "backward"}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            kind = ast.unparse(node.annotation)
            if "Callable" in kind:
                name = ast.unparse(node.target)
                names.add(name)
    return names


def arguments_of(function: Function) -> list[ast.arg]:
    "The arguments of a function, without the object or the class of a method"
    given = function.args
    found = []
    for argument in [*given.posonlyargs, *given.args, *given.kwonlyargs]:
        if argument.arg not in ("self", "cls"):
            found.append(argument)
    return found


def is_documented(function: Function, lines: list[str]) -> bool:
    "Whether a function has a docstring, and a comment for each argument"
    if ast.get_docstring(function) is None:
        return False
    first = function.lineno - 1
    last = function.body[0].lineno - 1
    signature = "\n".join(lines[first:last])
    for argument in arguments_of(function):
        name = argument.arg
        commented = re.search(rf"\b{name}\b[^\n#]*#", signature)
        if not commented:
            return False
    return True


def is_typed(function: Function) -> bool:
    "Whether a function says the types of its parameters and of its result"
    for argument in arguments_of(function):
        if argument.annotation is None:
            return False
    return function.returns is not None


def print_documentation() -> None:
    "Print which share of the public functions is documented, and the others' names"
    count = 0
    bare = []
    untyped = []
    for source in sources("package"):
        lines = source.text.splitlines()
        tree = ast.parse(source.text)
        for function in public_functions(tree):
            count += 1
            place = f"{source.place} {function.name}"
            if not is_documented(function, lines):
                bare.append(place)
            if not is_typed(function):
                untyped.append(place)
    missing = len(bare)
    share = 1 - missing / max(count, 1)
    print(f"\nPublic functions with docstring and docments: {share:.0%} of {count}.")
    print_list("without:", bare)
    print_list("without types:", untyped)


# ---- prose

PROSE = {
    "semicolons": r";",
    "colons that join two clauses": r"[a-z)]: [a-z]",
    "you, we, your, our": r"\b(?:[Yy]ou|[Yy]our|[Ww]e|[Oo]ur)\b",
}
NO_PROSE = (
    r"```.*?```",  # code
    r"`[^`]*`",
    r"\$\$.*?\$\$",  # formulas
    r"\$[^$]*\$",
    r"<[^>]*>",  # HTML
    r"^\|.*$",  # tables
    r"\]\([^)]*\)",  # addresses
)


def prose() -> str:
    "The sentences of the notebooks and of the Markdown files"
    texts = []
    for path in [NBS / "index.ipynb", *notebooks()]:
        for cell in cells(path, "markdown"):
            texts.append(cell.text)
    docs = ROOT / "docs"
    pages = sorted(ROOT.glob("*.md"))
    pages += sorted(docs.rglob("*.md"))
    for path in pages:
        text = path.read_text()
        texts.append(text)
    left_out = "|".join(NO_PROSE)
    pattern = re.compile(left_out, re.S | re.M)
    kept = []
    for text in texts:
        sentences = pattern.sub(" ", text)
        kept.append(sentences)
    return "\n".join(kept)


def print_prose() -> None:
    "Print how often some habits occur in 10,000 words"
    text = prose()
    words = text.split()
    number = len(words)
    ten_thousands = max(number, 1) / 10_000
    print(f"\n| in 10,000 words of prose ({number} words) | |\n|---|---|")
    for name, pattern in PROSE.items():
        found = re.findall(pattern, text)
        count = len(found)
        share = count / ten_thousands
        print(f"| {name} | {share:.0f} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 where a goal is missed")
    parser.add_argument("--write", action="store_true", help="write the table of CONTRIBUTING.md")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="name N places a group")
    args = parser.parse_args()
    groups = {name: measure(name) for name in GROUPS}
    lines = table(groups)
    print(*lines, sep="\n")
    print_size(groups)
    print_documentation()
    print_prose()
    missed = missed_goals(groups)
    page = page_with(lines)
    if args.write:
        PAGE.write_text(page)
    elif PAGE.read_text() != page:
        missed.append("CONTRIBUTING.md shows other figures: run tools/style.py --write")
    print_list("\nmissed:", missed)
    if args.worst:
        print_places(groups, args.worst)
    return int(args.check and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
