"""Draw the two diagrams of the README from the code itself.

One shows what EG-CNN consists of, the other which room of the package builds on which.

    python tools/diagrams.py            # writes nbs/images/architecture.svg and nbs/images/rooms.svg
    python tools/diagrams.py --check    # exit 1 if the code has changed since

What a picture shows is kept in its own description, which --check compares with the code."""

import ast
import html
import json
import sys
from functools import partial
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
    package = ROOT / "egcnn_nb"
    place = path.relative_to(package).with_suffix("")
    return ".".join(place.parts)


def room_of(module):
    "The room of a module; `train.py` only calls the command"
    if module == "train":
        return "commands"
    room, dot, _ = module.partition(".")
    return room if dot else "core"


def imported(source, module):
    "Names of the package's modules, such as method.sobel, that the source of a module imports"
    *room, _ = module.split(".")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        name = node.module or ""
        if node.level == 0 and name.startswith("egcnn_nb."):
            yield name.removeprefix("egcnn_nb.")
        elif node.level:
            up = node.level - 1
            above = room[: len(room) - up]
            yield ".".join([*above, name])


def rooms_below(source, module):
    "The other rooms that the source of a module imports"
    own = room_of(module)
    found = set()
    for other in imported(source, module):
        room = room_of(other)
        if room != own:
            found.add(room)
    return found


def rooms():
    "room -> its modules and the rooms that they import, from the ground floor up"
    found = {}
    for floor in FLOORS:
        for room in floor:
            found[room] = {"modules": [], "imports": set()}
    for path in modules():
        module = name_of(path)
        own = found[room_of(module)]
        *_, name = module.split(".")
        own["modules"].append(name)
        source = path.read_text()
        own["imports"] |= rooms_below(source, module)
    lived_in = {}
    for room, own in found.items():
        if own["modules"]:
            own["imports"] = sorted(own["imports"])
            lived_in[room] = own
    return lived_in


def floors_of(graph):
    "The floors, without rooms that are not there"
    found = []
    for floor in FLOORS:
        rooms = [room for room in floor if room in graph]
        found.append(rooms)
    return found


def brought_along(graph, room):
    "All rooms that come with a room"
    found = set()
    for other in graph[room]["imports"]:
        found.add(other)
        found |= brought_along(graph, other)
    return found


def direct(graph, room):
    "The rooms that a room imports and that none of the others brings along"
    needs = graph[room]["imports"]
    found = []
    for need in needs:
        others = [brought_along(graph, other) for other in needs]
        if need not in set().union(*others):
            found.append(need)
    return found


def places(floors):
    "room -> where it is drawn"
    found = {}
    for y, floor in enumerate(floors):
        width = 10 / len(floor)
        for i, room in enumerate(floor):
            x = width * (i + 0.5)
            found[room] = (x, y)
    _, y = found["method"]
    found["method"] = (3.2, y)  # so that no arrow crosses it
    return found


BOX = {"boxstyle": "round,pad=.45", "fc": "white", "ec": COLOURS["edge"], "lw": 1.2}


def draw_room(ax, place, room, modules, letters):
    "A room, with its modules in lines of so many letters; its frame"
    x, y = place
    names = ", ".join(dict.fromkeys(modules))
    text = fill(names, letters)
    label = ax.text(
        x,
        y,
        f"{room}\n{text}",
        ha="center",
        va="center",
        fontsize=9,
        bbox=BOX,
        linespacing=1.35,
    )
    return label.get_bbox_patch()


def draw_rooms(graph):
    "The rooms, each floor above all that it imports"
    fig = Figure(figsize=(8.5, 7.2), layout="constrained")
    ax = fig.subplots()
    ax.axis("off")
    floors = floors_of(graph)
    ax.set(xlim=(0, 10), ylim=(-0.6, len(floors) - 0.4))
    place = places(floors)
    drawn = {}
    for floor in floors:
        letters = 64 if len(floor) == 1 else 34
        for room in floor:
            modules = graph[room]["modules"]
            drawn[room] = draw_room(ax, place[room], room, modules, letters)
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
    net = SegNet(4, 3, width=8, levels=4)
    model = EGCNN(net, activation="sigmoid")
    volume = torch.zeros(1, 4, 64, 64, 64)
    graph = rooms()
    return {
        "architecture": (model.summary(), partial(drawing, model, volume)),
        "rooms": (json.dumps(graph), partial(draw_rooms, graph)),
    }


def is_shown(path, shows):
    "Whether a picture shows this"
    if not path.exists():
        return False
    return html.escape(shows, quote=False) in path.read_text()


def main():
    matplotlib.rcParams["svg.hashsalt"] = "egcnn_nb"
    check = "--check" in sys.argv
    for name, (shows, draw) in diagrams().items():
        path = IMAGES / f"{name}.svg"
        if not check:
            fig = draw()
            fig.savefig(path, metadata={"Date": None, "Description": shows})
        elif not is_shown(path, shows):
            sys.exit(
                f"{path.name} does not show what the code is; run tools/diagrams.py and look at it"
            )


if __name__ == "__main__":
    main()
