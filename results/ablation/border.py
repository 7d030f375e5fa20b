"""How much of the width of a predicted edge is the border's, and how much is the stream's.

    python results/ablation/border.py DATA RUN... --csv FILE

Give runs of one arm with several seeds. Every run segments its own validation cases. The width of an edge is
measured against the true border, so it grows in two ways: an edge is thick, or it is thin and lies beside the
border. Two more edges tell them apart. The Sobel edge of the predicted mask is always thin, so its width says how
far the network misses the border. The width of the predicted edge around the border of the network's own mask says
how thick it is. Where two runs have a case in common, the Sobel edge of the one mask around the border of the other
says how well two networks agree on where the border is."""

import sys
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from arguments import read_arguments

from egcnn_nb.core import exit_on_error, require
from egcnn_nb.run.edge_metrics import sobel_edges
from egcnn_nb.run.metrics import edge_width
from egcnn_nb.run.predict import case_maps, labels_of, load_run
from egcnn_nb.study.evaluation import class_masks, edge_maps, validation_cases


@dataclass
class Answer:
    "What one network says about one case"

    edges: np.ndarray  # bool (K,D,H,W)
    masks: np.ndarray  # bool (K,D,H,W)


def answer(run: tuple, case) -> tuple:
    "The answer of a run of `load_run` about a case, and the true masks by their names"
    _, settings, task = run
    require(settings.edge, f"{settings.out} has no edge stream. Give runs that have one.")
    maps, loaded = case_maps([run], case, inside=True)
    own_labels = labels_of(maps.maps, task)
    edges = edge_maps(maps, run)
    masks = class_masks(own_labels, task)
    true = class_masks(loaded.labels.numpy(), task)
    return Answer(edges > 0.5, masks), dict(zip(task.classes, true, strict=True))


def width_around(edge: np.ndarray, mask: np.ndarray) -> float:
    "Width of an edge around the border of a mask, in voxels; NaN where one of them is missing"
    has_border = mask.any() and not mask.all()
    if has_border and edge.any():
        return edge_width(edge, mask)
    return float("nan")


def widths(mine: Answer, true: dict) -> list:
    "A row for each class: the four widths of one network in one case"
    thin_edges = sobel_edges(mine.masks)
    maps = zip(true.items(), mine.edges, thin_edges, mine.masks, strict=True)
    rows = []
    for (name, true_mask), edge, thin, mask in maps:
        row: dict = {"region": name}
        row["edge_width"] = width_around(edge, true_mask)
        row["mask_edge_width"] = width_around(thin, true_mask)
        row["edge_width_own"] = width_around(edge, mask)
        row["mask_edge_width_own"] = width_around(thin, mask)
        rows.append(row)
    return rows


def between(first: Answer, second: Answer, names: list) -> list:
    "A row for each class: how far the borders of two networks are from each other"
    of_first = sobel_edges(first.masks)
    of_second = sobel_edges(second.masks)
    rows = []
    for k, name in enumerate(names):
        there = width_around(of_first[k], second.masks[k])
        back = width_around(of_second[k], first.masks[k])
        row = {"region": name, "mask_edge_width_other": (there + back) / 2}
        rows.append(row)
    return rows


def answers_of(data: str, folders: list) -> tuple:
    "The answer of each seed about each of its validation cases, and the true masks of the cases"
    answers: dict = {}
    truth: dict = {}
    for folder in folders:
        run = load_run(folder)
        _, settings, _ = run
        for case in validation_cases(folder, data):
            answers[settings.seed, case.name], truth[case.name] = answer(run, case)
    return answers, truth


def compare(data: str, folders: list) -> pd.DataFrame:
    "A row for each class of each run and case, and of each two runs with a case in common"
    answers, truth = answers_of(data, folders)
    rows = []
    for (seed, case), mine in answers.items():
        about = {"seeds": str(seed), "case": case}
        rows += [about | row for row in widths(mine, truth[case])]
    for (one, case), (other, its) in combinations(answers, 2):
        if case != its:
            continue
        both = answers[one, case], answers[other, case]
        about = {"seeds": f"{one} and {other}", "case": case}
        rows += [about | row for row in between(*both, list(truth[case]))]
    return pd.DataFrame(rows)


def say(table: pd.DataFrame) -> None:
    "Print the mean of each width, and whether thick edges lie where the border is missed"
    columns = [name for name in table if "width" in name]
    means = table.groupby("region")[columns].mean()
    print(means.to_markdown(floatfmt=".3f"))
    alone = table.dropna(subset=["mask_edge_width", "edge_width_own"])
    correlation = alone["mask_edge_width"].corr(alone["edge_width_own"])
    print(
        f"\nHow far the border is missed and how thick the edge is: correlation {correlation:.2f}"
    )


def main() -> None:
    args = read_arguments(__doc__)
    table = compare(args.data, args.runs)
    table.to_csv(args.csv, index=False, float_format="%.4f")
    say(table)


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
