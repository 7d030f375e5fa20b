"The rule by which a form of the edge stream becomes the default, on scores made by hand."

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "results/ablation"))
import border
import choose
import compare
import in_plane
import invented

from egcnn_nb.run.edge_metrics import sobel_edges


def scores(**arms):
    "Rows of validation_scores.csv: arm -> (edge F1, Dice) of each pair of seed and case"
    rows = []
    for arm, (edge, dice) in arms.items():
        for i, (f1, overlap) in enumerate(zip(edge, dice, strict=True)):
            seed, case = divmod(i, 2)
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "case": case,
                    "output": "fused",
                    "edge_f1": f1,
                    "dice": overlap,
                }
            )
    return pd.DataFrame(rows)


def test_the_name_of_an_arm_is_found_in_that_of_its_run():
    name = "segnet-eg+edge_head=norm+gate_residual=none+weight_negatives=True-all-0-lr0.002"
    assert choose.arm_of(name) == "eg+edge_head=norm+gate_residual=none+weight_negatives=True"
    assert choose.arm_of("segnet-bare-all-2-lr0.002") == "bare"


def test_the_rule_by_hand():
    even = [0.9] * 4
    rows = scores(
        best=([0.90, 0.92, 0.94, 0.96], even),
        near=([0.91, 0.90, 0.95, 0.94], even),
        far=([0.80, 0.82, 0.84, 0.86], even),
        unsafe=([0.90, 0.92, 0.93, 0.96], [0.80, 0.81, 0.80, 0.81]),
    )
    found = choose.judge(rows)
    near = found.loc["near"]
    difference = np.array([0.01, -0.02, 0.01, -0.02])
    error = difference.std(ddof=1) / 2
    assert_allclose(near["edge F1 to best"], difference.mean(), atol=1e-12)
    assert_allclose(near["± edge"], error, atol=1e-12)
    good = found["good enough"]
    assert dict(good) == {"best": True, "near": True, "far": False, "unsafe": True}
    safe = found["safe"]
    assert dict(safe) == {"best": True, "near": True, "far": True, "unsafe": False}
    costs = {"best": 3, "near": 2, "far": 1, "unsafe": 1}
    assert choose.chosen([found], costs) == ["near", "best"]


def test_with_equal_cost_unweighted_negatives_come_first():
    table = pd.DataFrame(
        {"good enough": True, "safe": True},
        index=["a+weight_negatives=True", "a+weight_negatives=False"],
    )
    costs = dict.fromkeys(table.index, 1.0)
    first, *_ = choose.chosen([table], costs)
    assert first == "a+weight_negatives=False"


def validation_rows(folder):
    "A file of one arm and one case that lacks the class B"
    kinds = {"A": (0.8, 0.6), "B": (0.0, np.nan), "mean": (0.4, 0.6)}
    rows = []
    for region, (edge, deep) in kinds.items():
        scores = dict.fromkeys(choose.EDGE, edge)
        row = {"run": "segnet-eg-all-0-lr0.002", "seed": 0, "case": "c", "output": "fused"}
        rows.append(row | {"region": region, "dice": 0.5, "deep_share": deep} | scores)
    pd.DataFrame(rows).to_csv(folder / "validation_scores.csv", index=False)


def test_a_class_that_a_case_lacks_counts_in_no_edge_score(tmp_path):
    validation_rows(tmp_path)
    (row,) = choose.read_scores(tmp_path).to_dict("records")
    assert row["edge_f1"] == row["ods"] == 0.8
    assert row["dice"] == 0.5


def test_without_a_winner_the_safe_arm_that_loses_least_comes_first():
    first = pd.DataFrame(
        {"edge F1 to best": [0.0, -0.03, -0.01], "safe": [True, True, False]}, ["a", "b", "c"]
    )
    second = pd.DataFrame(
        {"edge F1 to best": [-0.05, 0.0, -0.01], "safe": [True, True, True]}, ["a", "b", "c"]
    )
    assert choose.least_loss([first, second]) == ["b", "a"]


def test_the_first_part_has_three_readings():
    form = "eg+edge_head=norm+gate_residual=none+weight_negatives=True"
    assert choose.is_of_first_part(form)
    assert not choose.is_of_first_part(form + "+gate_bias=1")
    assert not choose.is_of_first_part("bare")


@pytest.mark.parametrize("name", ["phantoms", "hippocampus"])
def test_the_recorded_scores_choose_no_arm(name):
    rows = choose.read_scores(choose.HERE / name)
    of_first_part = rows.arm.map(choose.is_of_first_part)
    table = choose.judge(rows.loc[of_first_part])
    assert len(table) == 7
    good = set(table.index[table["good enough"] & table.safe])
    weighted = {arm for arm in good if arm.endswith("weight_negatives=True")}
    assert good and good == (weighted if name == "phantoms" else good - weighted)


def test_an_arm_is_compared_over_the_pairs_that_both_have():
    rows = scores(
        base=([np.nan] * 4, [0.90, 0.80, 0.70, 0.60]),
        other=([0.50, 0.70, 0.90, 0.70], [0.91, 0.83, 0.70, 0.64]),
    )
    rows = rows.drop(index=rows.index[-1])  # `other` has three of the four pairs
    rows["mask_edge_f1"] = 0.8
    rows["surface_dice"] = rows.dice
    difference = np.array([0.01, 0.03, 0.00])
    error = difference.std(ddof=1) / np.sqrt(3)
    table = compare.table_to(rows.assign(arm="eg_" + rows.arm), "eg_base")
    other = table.loc["eg_other"]
    # two pairs of seed 0, one of seed 1
    assert other.dice == f"+0.013 ± {error:.3f} (+0.020, +0.000)"
    assert other.surface_dice == other.dice
    assert other.edge_f1 == ""  # the base has no edges
    assert other["edge_f1 minus mask_edge_f1"] == "-0.100 ± 0.115 (-0.200, +0.100)"


def half_space(first):
    "The mask (1,20,6,6) of all voxels from a plane on"
    mask = np.zeros((1, 20, 6, 6), bool)
    mask[:, first:] = True
    return mask


def test_an_edge_that_is_thin_and_beside_the_border_is_told_from_a_thick_one():
    true = half_space(10)
    missed = half_space(11)  # by one voxel
    thin = border.Answer(sobel_edges(missed), missed)
    [row] = border.widths(thin, {"half": true[0]})
    assert row["edge_width"] == row["mask_edge_width"] == 4  # at 1/2 and 3/2 of the border
    assert row["edge_width_own"] == row["mask_edge_width_own"] == 2
    four_planes = sobel_edges(true, thickness=4)
    thick = border.Answer(four_planes, true)
    [row] = border.widths(thick, {"half": true[0]})
    assert row["edge_width"] == row["edge_width_own"] == 4
    assert row["mask_edge_width"] == 2
    [row] = border.between(thin, thick, ["half"])
    assert row["mask_edge_width_other"] == 4


def test_voxels_of_a_missing_region_are_counted_and_placed():
    there = half_space(10)  # its border lies between planes 9 and 10
    masks = np.concatenate([there, np.zeros_like(there)])
    found = np.zeros_like(masks)
    found[1, 10:12, 0, 0] = True  # 1/2 and 3/2 voxels from the border
    found[1, 15, :2, 0] = True
    [row] = invented.invented(found, masks, ["there", "missing"])
    assert row == {"region": "missing", "voxels": 4, "at_border": 0.5, "expected": 0.2}
    [row] = invented.invented(masks, masks, ["there", "missing"])
    assert row["voxels"] == 0
    assert np.isnan(row["at_border"])


def test_slices_are_scored_one_by_one_and_without_absent_classes():
    masks = np.zeros((2, 16, 16, 3), bool)
    masks[0, 4:12, 4:12, :2] = True  # class 0 in two slices, class 1 in none
    target = sobel_edges(masks)
    filled = target[0, 7, 7, 1]  # a slice without the class lies above
    assert filled and not target[0, 7, 7, 0]
    edges = np.zeros_like(target)
    for number in (0, 1):
        one = np.s_[..., number : number + 1]
        edges[one] = sobel_edges(masks[one])
    edges[1, 8, 8, 0] = True  # a false edge of the absent class
    numbers = in_plane.score_slices(edges.astype(np.float32), masks, masks, 2)
    assert (numbers["f1"], numbers["width"], numbers["filled"]) == (1, 2, 0)
    assert numbers["mask_f1"] == 1
    bare = in_plane.score_slices(None, masks, masks, 2)
    assert np.isnan(bare["f1"])
    assert bare["mask_f1"] == 1
    of_target = in_plane.score_slices(target.astype(np.float32), masks, masks, 2)
    assert of_target["filled"] == 0.5  # all of one slice, nothing of the other
