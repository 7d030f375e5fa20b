"""How good predicted edges are slice by slice, for scans whose slices are thick.

    python results/ablation/in_plane.py DATA RUN... --csv FILE

Where slices are thick, few voxels lie deep inside a mask in 3D, so hardly any could be filled. Here every slice along
the last axis is compared for itself: the true edge is what Sobel finds in the mask of the slice, and depth is counted
within the slice. Slices without the class are left out, so false edges there do not count. Each slice counts alike,
small or large. The rows of the run `target` are those of the true edge in 3D, with which the networks were trained.
They say how much of an edge in a slice comes from the slices above and below. Every run segments its own validation
cases."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from arguments import read_arguments, table_of_runs

from egcnn_nb.core import exit_on_error
from egcnn_nb.run.edge_metrics import score_edges, sobel_edges
from egcnn_nb.run.predict import case_maps, labels_of, load_run
from egcnn_nb.study.evaluation import class_masks, edge_maps, thickness_of, validation_cases

NUMBERS = ["f1", "width", "filled", "mask_f1", "mask_width", "mask_filled", "deep"]


def score_slices(
    edges: np.ndarray | None, masks: np.ndarray, predicted: np.ndarray, thickness: int
) -> dict:
    "The mean of each number over the classes and the slices that have an edge"
    rows = []
    for k, number in np.argwhere(masks.any((1, 2))):
        one = np.s_[k : k + 1, :, :, number : number + 1]  # a class in a slice
        edge = None if edges is None else edges[one]
        rows += score_edges(edge, masks[one], predicted[one], thickness)
    table = pd.DataFrame(rows)[NUMBERS]
    return table.astype(float).mean().to_dict()


def score_case(run: tuple, case) -> dict:
    "The numbers of a run of `load_run` and of the true edge in 3D, for one case"
    _, settings, task = run
    thickness = thickness_of(settings)
    maps, loaded = case_maps([run], case, inside=settings.edge)
    masks = class_masks(loaded.labels.numpy(), task)
    predicted = class_masks(labels_of(maps.maps, task), task)
    target = sobel_edges(masks, thickness).astype(np.float32)
    return {
        "network": score_slices(edge_maps(maps, run), masks, predicted, thickness),
        "target": score_slices(target, masks, masks, thickness),
    }


def score_run(folder: Path, data: str) -> list:
    "A row for each validation case of a run, and one for its true edge in 3D"
    run = load_run(folder)
    _, settings, _ = run
    rows = []
    for case in validation_cases(folder, data):
        about = {"seed": settings.seed, "case": case.name}
        numbers = score_case(run, case)
        rows.append({"run": folder.name, **about, **numbers["network"]})
        rows.append({"run": "target", **about, **numbers["target"]})
    return rows


def main() -> None:
    args = read_arguments(__doc__)
    table = table_of_runs(args, score_run).drop_duplicates(["run", "seed", "case"])
    table.to_csv(args.csv, index=False, float_format="%.4f")
    means = table.groupby("run", sort=False)[NUMBERS].mean()
    print(means.to_markdown(floatfmt=".3f"))


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
