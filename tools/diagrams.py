"""Draw the two diagrams of the README from the code itself.

One shows what EG-CNN consists of, the other which room of the package builds on which.

    python tools/diagrams.py            # writes nbs/images/architecture.svg and nbs/images/rooms.svg
    python tools/diagrams.py --check    # exit 1 if the code has changed since

What a picture shows is kept in its own description, which --check compares with the code."""

import ast
import html
import json
import sys
from pathlib import Path
from textwrap import fill

import matplotlib
import torch
from matplotlib.figure import Figure

from egcnn_nb.core import COLOURS
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.show.anatomy import drawing

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from books import modules

IMAGES = ROOT / "nbs/images"

# Which rooms a room may import. `core` stands for the two modules on the ground floor, core and tensors.
ALLOWED = {
    "core": set(),
    "fast": {"core"},
    "data": {"core"},
    "method": {"core", "fast"},
    "run": {"core", "data", "method"},
    "show": {"core", "data", "method", "run"},
    "study": {"core", "data", "method", "run"},
    "adapters": {"core", "fast", "data", "method", "run"},
    "commands": {"core", "fast", "data", "method", "run", "study", "adapters"},
}
FLOORS = [
    ["core"],
    ["fast", "data"],
    ["method"],
    ["run"],
    ["show", "study", "adapters"],
    ["commands"],
]


def name_of(path):
    "A module's name, such as method.sobel, from its path"
    return ".".join(path.relative_to(ROOT / "egcnn_nb").with_suffix("").parts)


def room_of(module):
    "The room of a module; `train.py` only calls the command"
    if module == "train":
        return "commands"
    return module.split(".")[0] if "." in module else "core"


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
            above = room[: len(room) - node.level + 1]
            yield ".".join([*above, name])


def rooms():
    "room -> its modules and the rooms that they import, from the ground floor up"
    found = {}
    for path in modules():
        module = name_of(path)
        own = found.setdefault(room_of(module), {"modules": [], "imports": set()})
        own["modules"].append(module.split(".")[-1])
        own["imports"] |= {room_of(m) for m in imported(path.read_text(), module)} - {
            room_of(module)
        }
    order = [room for floor in FLOORS for room in floor if room in found]
    return {
        room: {"modules": found[room]["modules"], "imports": sorted(found[room]["imports"])}
        for room in order
    }


def direct(graph, room):
    "The rooms that a room imports and that none of the others brings along"
    needs = graph[room]["imports"]

    def below(other):
        own = graph[other]["imports"]
        return set(own).union(*(below(n) for n in own))

    return [n for n in needs if not any(n in below(other) for other in needs if other != n)]


def draw_rooms(graph):
    "The rooms, each floor above all that it imports"
    floors = [[room for room in floor if room in graph] for floor in FLOORS]
    fig = Figure(figsize=(8.5, 7.2), layout="constrained")
    ax = fig.subplots()
    ax.axis("off")
    ax.set(xlim=(0, 10), ylim=(-0.6, len(floors) - 0.4))
    place = {}
    for y, floor in enumerate(floors):
        for i, room in enumerate(floor):
            place[room] = (10 * (i + 0.5) / len(floor), y)
    place["method"] = (3.2, place["method"][1])  # so that no arrow crosses it
    drawn = {}
    for room, (x, y) in place.items():
        width = 34 if len(floors[y]) > 1 else 64
        text = fill(", ".join(dict.fromkeys(graph[room]["modules"])), width)
        box = {"boxstyle": "round,pad=.45", "fc": "white", "ec": COLOURS["edge"], "lw": 1.2}
        label = ax.text(
            x,
            y,
            f"{room}\n{text}",
            ha="center",
            va="center",
            fontsize=9,
            bbox=box,
            linespacing=1.35,
        )
        drawn[room] = label.get_bbox_patch()
    for room in graph:
        for other in direct(graph, room):
            arrow = {
                "arrowstyle": "-|>",
                "color": "#5b6472",
                "lw": 1,
                "patchA": drawn[room],
                "patchB": drawn[other],
            }
            ax.annotate("", place[other], place[room], arrowprops=arrow)
    return fig


def diagrams():
    "name -> (what it shows, function that draws it)"
    torch.manual_seed(0)
    model = EGCNN(SegNet(4, 3, width=8, levels=4), activation="sigmoid")
    graph = rooms()
    return {
        "architecture": (model.summary(), lambda: drawing(model, torch.zeros(1, 4, 64, 64, 64))),
        "rooms": (json.dumps(graph), lambda: draw_rooms(graph)),
    }


def main():
    matplotlib.rcParams["svg.hashsalt"] = "egcnn_nb"
    check = "--check" in sys.argv
    for name, (shows, draw) in diagrams().items():
        path = IMAGES / f"{name}.svg"
        if not check:
            draw().savefig(path, metadata={"Date": None, "Description": shows})
        elif not path.exists() or html.escape(shows, quote=False) not in path.read_text():
            sys.exit(
                f"{path.name} does not show what the code is; run tools/diagrams.py and look at it"
            )


if __name__ == "__main__":
    main()
