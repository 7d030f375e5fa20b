"""Draw the two diagrams of the README from the code itself: what EG-CNN consists of, and which notebook builds on which.

    python tools/diagrams.py            # writes nbs/images/architecture.svg and nbs/images/notebooks.svg
    python tools/diagrams.py --check    # exit 1 if the code has changed since

What a picture shows is kept in its own description, which --check compares with the code."""
import ast
import html
import json
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from egcnn_nb.core import COLOURS
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.show.anatomy import drawing

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/"tools"))
from books import module_of, source_of
from books import notebooks as all_notebooks

IMAGES = ROOT/"nbs/images"

def notebooks():
    "module -> name of the notebook that exports it, in the order of the notebooks"
    named = {module_of(path): path.stem for path in all_notebooks()}
    return {module: stem for module, stem in named.items() if module}

def imported(source, module):
    "Names of the package's modules, such as method.sobel, that the source of a module imports"
    room = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        name = node.module or ""
        if node.level == 0 and name.startswith("egcnn_nb."):
            yield name.removeprefix("egcnn_nb.")
        elif node.level:
            above = room[:len(room)-node.level+1]
            yield ".".join([*above, name])

def imports():
    "notebook -> notebooks that it needs and that none of the others it needs brings along"
    names, direct = notebooks(), {}
    for module, nb in names.items():
        direct[nb] = {names[m] for m in imported(source_of(module).read_text(), module) if m in names}
    def below(nb): return set().union(direct[nb], *(below(n) for n in direct[nb]))
    return {nb: sorted(n for n in needs if not any(n in below(m) for m in needs-{n})) for nb, needs in direct.items()}

def draw_notebooks(graph):
    "The notebooks in rows: each stands above all that it needs"
    row = {}
    for nb in graph: row[nb] = max((row[n]+1 for n in graph[nb]), default=0)
    rows = [[nb for nb in graph if row[nb] == r] for r in range(max(row.values())+1)]
    place = {nb: ((i+.5)/len(names)*10 + (r % 3-1)*(len(names) == 1), r) for r, names in enumerate(rows) for i, nb in enumerate(names)}
    fig = Figure(figsize=(8.5, .62*len(rows)+.3), layout="constrained"); ax = fig.subplots(); ax.axis("off"); ax.set_xlim(0, 10); ax.set_ylim(-.5, len(rows)-.5)
    for nb, needs in graph.items():
        for n in needs: ax.annotate("", place[n], place[nb], arrowprops=dict(arrowstyle="-|>", color="#9aa2ae", lw=.8, shrinkA=9, shrinkB=9))
    for nb, (x, y) in place.items(): ax.text(x, y, nb, ha="center", va="center", fontsize=8, bbox=dict(boxstyle="round,pad=.35", fc="white", ec=COLOURS["edge"], lw=1.2))
    return fig

def diagrams():
    "name -> (what it shows, the picture)"
    torch.manual_seed(0); model, graph = EGCNN(SegNet(4, 3, width=8, levels=4), activation="sigmoid"), imports()
    return {"architecture": (model.summary(), lambda: drawing(model, torch.zeros(1, 4, 64, 64, 64))), "notebooks": (json.dumps(graph), lambda: draw_notebooks(graph))}

def main():
    matplotlib.rcParams["svg.hashsalt"] = "egcnn_nb"
    for name, (shows, draw) in diagrams().items():
        path = IMAGES/f"{name}.svg"
        if "--check" not in sys.argv: draw().savefig(path, metadata={"Date": None, "Description": shows})
        elif not path.exists() or html.escape(shows, quote=False) not in path.read_text(): sys.exit(f"{path.name} does not show what the code is; run tools/diagrams.py and look at it")

if __name__ == "__main__": main()
