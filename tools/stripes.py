"""Draw what networks say about a case, cut along two axes: stripes along one axis are seen in one
of the cuts only.

    python tools/stripes.py DATA CASE PNG CREDIT RUN TITLE [RUN TITLE ...]

RUN is a folder written by egcnn_train; of the last one the predicted edges are shown too, if it has
an edge stream."""

import sys
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from egcnn_nb.core import COLOURS
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.volumes import read_labels
from egcnn_nb.run.inside import look_inside
from egcnn_nb.run.predict import load_run
from egcnn_nb.study.report import _overlay

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
    by_name = {case.name: case for case in found.cases}
    return by_name[name]


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
    _overlay(ax, cut, colours)


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


def main(data, name, png, credit, *words):
    case = case_of(data, name)
    folders = words[::2]
    titles = words[1::2]
    runs = dict(zip(titles, folders, strict=True))
    shown = shown_of(case, runs)
    fig = picture(shown, credit)
    fig.savefig(png, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
