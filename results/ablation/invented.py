"""How many voxels of a region a network finds in cases that lack it, and where they lie.

    python results/ablation/invented.py DATA RUN... --csv FILE

Each row is a validation case without a region. `at_border` is the share of the found voxels that lie within two voxels
of the border of another region, where an edge would be. It is empty where nothing was found. `expected` is that share
for all voxels of the other regions, which you would get by chance."""

import sys
from pathlib import Path

import numpy as np
from arguments import read_arguments, table_of_runs

from egcnn_nb.core import exit_on_error
from egcnn_nb.run.metrics import border_distance
from egcnn_nb.run.predict import case_maps, labels_of, load_run
from egcnn_nb.study.evaluation import class_masks, validation_cases

NEAR = 2  # voxels from the border


def near_borders(masks: np.ndarray) -> np.ndarray:
    "Voxels (D,H,W) within two voxels of the border of a mask (K,D,H,W) that is there"
    near = np.zeros(masks.shape[1:], bool)
    for mask in masks:
        if mask.any():
            near |= border_distance(mask) <= NEAR
    return near


def invented(found: np.ndarray, masks: np.ndarray, names: list) -> list:
    "A row for each region that `masks` (K,D,H,W) lacks: the voxels that were found, and their share near a border"
    rows = []
    near = near_borders(masks)
    expected = near[masks.any(0)].mean()
    for name, mask, true in zip(names, found, masks, strict=True):
        if not true.any():
            at_border = near[mask].mean() if mask.any() else np.nan
            numbers = {"voxels": int(mask.sum()), "at_border": at_border, "expected": expected}
            rows.append({"region": name, **numbers})
    return rows


def score_run(folder: Path, data: str) -> list:
    "The rows of all validation cases of a run"
    run = load_run(folder)
    _, settings, task = run
    rows = []
    for case in validation_cases(folder, data):
        maps, loaded = case_maps([run], case)
        found = class_masks(labels_of(maps.maps, task), task)
        masks = class_masks(loaded.labels.numpy(), task)
        about = {"run": folder.name, "seed": settings.seed, "case": case.name}
        rows += [about | row for row in invented(found, masks, list(task.classes))]
    return rows


def main() -> None:
    args = read_arguments(__doc__)
    table = table_of_runs(args, score_run)
    table.to_csv(args.csv, index=False, float_format="%.4f")
    print(
        table.groupby("run", sort=False)[["voxels", "at_border", "expected"]].mean().to_markdown()
    )


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
