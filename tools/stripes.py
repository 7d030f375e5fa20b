"""Draw what networks say about a case, cut along two axes: stripes along one axis are seen in one of the cuts only.

    python tools/stripes.py DATA CASE PNG CREDIT RUN TITLE [RUN TITLE ...]

RUN is a folder written by egcnn_train; of the last one the predicted edges are shown too, if it has an edge stream."""

import sys

import numpy as np
from matplotlib.figure import Figure

from egcnn_nb.core import COLOURS
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.volumes import read_labels
from egcnn_nb.run.inside import look_inside
from egcnn_nb.run.predict import load_run
from egcnn_nb.study.report import _overlay


def main(data, case, png, credit, *runs):
    case = next(c for c in find_dataset(data).cases if c.name == case)
    seen = {
        title: look_inside(*load_run(run), case)
        for run, title in zip(runs[::2], runs[1::2], strict=True)
    }
    last = list(seen.values())[-1]
    maps = {
        "truth": read_labels(case.label).array.astype(int),
        **{title: s["labels"] for title, s in seen.items()},
        **({"its edges": last["edge"]} if "edge" in last else {}),
    }
    fig = Figure(figsize=(2.3 * len(maps), 5.2), layout="constrained")
    for row, axis in zip(fig.subplots(2, len(maps)), (2, 0)):
        at = int(
            (maps["truth"] == 1).sum(tuple({0, 1, 2} - {axis})).argmax()
        )  # where the first class is largest
        for ax, (title, m) in zip(row, maps.items()):
            cut = np.take(m, at, axis).T
            ax.set(xticks=[], yticks=[])
            if title == "its edges":
                ax.imshow(cut, cmap="inferno", vmin=0, vmax=1, origin="lower")
                continue
            ax.imshow(np.take(last["image"], at, axis).T, cmap="gray", origin="lower")
            _overlay(ax, cut, {v: COLOURS[v] for v in range(1, int(maps["truth"].max()) + 1)})
        row[0].set_ylabel(
            ("D, H" if axis == 2 else "H, W") + f": plane {at} of " + "DHW"[axis], fontsize=9
        )
        if axis == 2:
            for ax, title in zip(row, maps):
                ax.set_title(title, fontsize=9)
    fig.suptitle(credit, fontsize=7, color="gray")
    fig.savefig(png, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
