"""Draw what networks say about a case, cut along two axes: stripes along one axis are seen in one
of the cuts only.

    python tools/stripes.py DATA CASE PNG CREDIT RUN TITLE [RUN TITLE ...]

RUN is a folder written by egcnn_train; of the last one the predicted edges are shown too, if it has
an edge stream."""

import sys

import numpy as np
from matplotlib.figure import Figure

from egcnn_nb.core import COLOURS
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.volumes import read_labels
from egcnn_nb.run.inside import look_inside
from egcnn_nb.run.predict import load_run
from egcnn_nb.study.report import _overlay

EDGES = "its edges"  # title of the edges
AXES = ((2, "D, H"), (0, "H, W"))  # a cut across an axis, and the axes that it shows


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
    return int(sizes.argmax())


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


def maps_of(case, runs, titles):
    "Title -> labels or edges, and the image"
    truth = read_labels(case.label)
    maps = {"truth": truth.array.astype(int)}
    for folder, title in zip(runs, titles, strict=True):
        run = load_run(folder)
        seen = look_inside(*run, case)
        maps[title] = seen["labels"]
    if "edge" in seen:
        maps[EDGES] = seen["edge"]
    return maps, seen["image"]


def colours_of(labels):
    "The colour of each class"
    last = int(labels.max())
    return {value: COLOURS[value] for value in range(1, last + 1)}


def draw_row(row, maps, image, axis):
    "All maps, cut across an axis; the number of the plane"
    truth = maps["truth"]
    colours = colours_of(truth)
    plane = largest_plane(truth, axis)
    below = plane_of(image, plane, axis)
    for ax, (title, values) in zip(row, maps.items(), strict=True):
        cut = plane_of(values, plane, axis)
        draw(ax, title, cut, below, colours)
    return plane


def main(data, name, png, credit, *runs):
    case = case_of(data, name)
    maps, image = maps_of(case, runs[::2], runs[1::2])
    columns = len(maps)
    fig = Figure(figsize=(2.3 * columns, 5.2), layout="constrained")
    rows = fig.subplots(2, columns)
    for row, (axis, shown) in zip(rows, AXES, strict=True):
        plane = draw_row(row, maps, image, axis)
        across = "DHW"[axis]
        row[0].set_ylabel(f"{shown}: plane {plane} of {across}", fontsize=9)
    for ax, title in zip(rows[0], maps, strict=True):
        ax.set_title(title, fontsize=9)
    fig.suptitle(credit, fontsize=7, color="gray")
    fig.savefig(png, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
