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
    by_name = {case.name: case for case in find_dataset(data).cases}
    return by_name[name]


def largest_plane(labels, axis):
    "The plane across an axis in which the first class is largest"
    others = tuple({0, 1, 2} - {axis})
    sizes = (labels == 1).sum(others)
    return int(sizes.argmax())


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
    maps = {"truth": read_labels(case.label).array.astype(int)}
    for run, title in zip(runs, titles, strict=True):
        seen = look_inside(*load_run(run), case)
        maps[title] = seen["labels"]
    if "edge" in seen:
        maps[EDGES] = seen["edge"]
    return maps, seen["image"]


def main(data, name, png, credit, *runs):
    maps, image = maps_of(case_of(data, name), runs[::2], runs[1::2])
    classes = range(1, int(maps["truth"].max()) + 1)
    colours = {value: COLOURS[value] for value in classes}
    fig = Figure(figsize=(2.3 * len(maps), 5.2), layout="constrained")
    for row, (axis, shown) in zip(fig.subplots(2, len(maps)), AXES, strict=True):
        plane = largest_plane(maps["truth"], axis)
        for ax, (title, values) in zip(row, maps.items(), strict=True):
            cut = np.take(values, plane, axis).T
            draw(ax, title, cut, np.take(image, plane, axis).T, colours)
        row[0].set_ylabel(f"{shown}: plane {plane} of {'DHW'[axis]}", fontsize=9)
        if axis == 2:
            for ax, title in zip(row, maps, strict=True):
                ax.set_title(title, fontsize=9)
    fig.suptitle(credit, fontsize=7, color="gray")
    fig.savefig(png, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
