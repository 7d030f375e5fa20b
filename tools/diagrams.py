"""Draw the two diagrams of the README from the code itself: what EG-CNN consists of, and which notebook builds on which.

    python tools/diagrams.py            # writes nbs/images/architecture.svg and nbs/images/notebooks.svg
    python tools/diagrams.py --check    # exit 1 if the code has changed since

What a picture shows is kept in its own description, which --check compares with the code."""
import ast, html, json, re, sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from egcnn_nb.backbones import SegNet
from egcnn_nb.egcnn import EGCNN
from egcnn_nb.anatomy import drawing
from egcnn_nb.explorers import COLOURS

ROOT = Path(__file__).parents[1]
IMAGES = ROOT/"nbs/images"

def notebooks():
    "module -> name of the notebook that exports it, in the order of the notebooks"
    found = {}
    for nb in sorted((ROOT/"nbs").glob("[0-9]*.ipynb")):
        if module := re.search(r"#\| default_exp (\w+)", nb.read_text()): found[module[1]] = nb.stem
    return found

def imports():
    "notebook -> notebooks that it needs and that none of the others it needs brings along"
    names, direct = notebooks(), {}
    for module, nb in names.items():
        tree = ast.parse((ROOT/f"egcnn_nb/{module}.py").read_text())
        inside = (n.module.removeprefix("egcnn_nb.") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.level == 1 or n.module.startswith("egcnn_nb.")))
        direct[nb] = {names[m] for m in inside if m in names}
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
