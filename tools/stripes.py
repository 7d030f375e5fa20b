"""Draw what networks say about a case, cut along two axes: stripes along one axis are seen in one
of the cuts only.

    python tools/stripes.py DATA CASE RUN... --titles TITLE... --png FILE [--credit TEXT]

RUN is a folder written by egcnn_train. Of the last one the predicted edges are shown too, if it has
an edge stream."""

import argparse
import sys
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from egcnn_nb.core import COLOURS, InputError, exit_on_error
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.volumes import read_labels
from egcnn_nb.run.inside import look_inside
from egcnn_nb.run.predict import load_run
from egcnn_nb.study.report import draw_labels

EDGES = "its edges"  # title of the edges
AXES = "DHW"
CUTS = {2: "D, H", 0: "H, W"}  # the axis that a cut goes across -> the axes that it shows


@dataclass
class Shown:
    "All that is drawn of a case"

    maps: dict  # title -> labels or edges (D,H,W), the truth first
    image: np.ndarray  # (D,H,W)

    def truth(self):
        "The true labels"
        return self.maps["truth"]


def case_of(data, name):
    "The case of a dataset with this name"
    found = find_dataset(data)
    for case in found.cases:
        if case.name == name:
            return case
    raise InputError(f"{data} has no case {name}. Name one of its cases.")


def largest_plane(labels, axis):
    "The plane across an axis in which the first class is largest"
    first = labels == 1
    others = {0, 1, 2} - {axis}
    sizes = first.sum(tuple(others))
    largest = sizes.argmax()
    return int(largest)


def plane_of(volume, plane, axis):
    "A plane of a volume, as it is drawn"
    cut = np.take(volume, plane, axis)
    return cut.T


def draw(ax, title, cut, image, colours):
    "One plane: edges alone, or labels over the image"
    ax.set(xticks=[], yticks=[])
    if title == EDGES:
        ax.imshow(cut, cmap="inferno", vmin=0, vmax=1, origin="lower")
        return
    ax.imshow(image, cmap="gray", origin="lower")
    draw_labels(ax, cut, colours)


def shown_of(case, runs):
    "The truth, the labels that each run predicts, and the edges that the last run predicts"
    truth = read_labels(case.label)
    maps = {"truth": truth.array.astype(int)}
    seen = {}
    for title, folder in runs.items():
        run = load_run(folder)
        seen = look_inside(*run, case)
        maps[title] = seen["labels"]
    if "edge" in seen:
        maps[EDGES] = seen["edge"]
    return Shown(maps, seen["image"])


def colours_of(labels):
    "The colour of each class"
    last = int(labels.max())
    classes = range(1, last + 1)
    return {value: COLOURS[value] for value in classes}


def draw_row(row, shown, axis):
    "All maps, cut across an axis where the first class is largest"
    truth = shown.truth()
    colours = colours_of(truth)
    plane = largest_plane(truth, axis)
    image = plane_of(shown.image, plane, axis)
    maps = shown.maps.items()
    for ax, (title, values) in zip(row, maps, strict=True):
        cut = plane_of(values, plane, axis)
        draw(ax, title, cut, image, colours)
    left = row[0]
    left.set_ylabel(f"{CUTS[axis]}: plane {plane} of {AXES[axis]}", fontsize=9)


def picture(shown, credit):
    "A row for each cut, and a column for each map"
    columns = len(shown.maps)
    width = 2.3 * columns
    fig = Figure(figsize=(width, 5.2), layout="constrained")
    rows = fig.subplots(2, columns)
    for row, axis in zip(rows, CUTS, strict=True):
        draw_row(row, shown, axis)
    for ax, title in zip(rows[0], shown.maps, strict=True):
        ax.set_title(title, fontsize=9)
    fig.suptitle(credit, fontsize=7, color="gray")
    return fig


def arguments():
    "What to draw, and where to"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", metavar="DATA", help="dataset folder")
    parser.add_argument("case", metavar="CASE", help="name of a case with a label map")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument("--titles", nargs="+", required=True, help="one for each run")
    parser.add_argument("--png", metavar="FILE", required=True, help="where the picture goes")
    parser.add_argument("--credit", default="", help="source and licence of the image")
    args = parser.parse_args()
    if len(args.titles) != len(args.runs):
        parser.error(f"{len(args.runs)} runs and {len(args.titles)} titles; give one for each run")
    return args


def main():
    args = arguments()
    case = case_of(args.data, args.case)
    titles = args.titles
    runs = dict(zip(titles, args.runs, strict=True))
    shown = shown_of(case, runs)
    fig = picture(shown, args.credit)
    fig.savefig(args.png, dpi=100)


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
