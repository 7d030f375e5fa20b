"The rule by which a form of the edge stream becomes the default, on scores made by hand."

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.testing import assert_allclose

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "results/ablation"))
import choose


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
