"Real MRI, where it is at hand: EGCNN_HIPPOCAMPUS names the folder of the Decathlon's Task04_Hippocampus."

import os
from pathlib import Path

import pytest

from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.prepare import load_case

FOLDER = os.environ.get("EGCNN_HIPPOCAMPUS", "")
pytestmark = pytest.mark.skipif(
    not FOLDER or not Path(FOLDER).is_dir(),
    reason="set EGCNN_HIPPOCAMPUS to the folder of Task04_Hippocampus",
)


def test_the_decathlon_layout_reads_real_cases():
    dataset = find_dataset(FOLDER)
    task = dataset.task
    assert list(task.labels) == [0, 1, 2]
    for case in dataset.cases[:5]:
        loaded = load_case(case, task, need_label=True)
        x = loaded.x
        assert abs(x.mean()) < 1e-3
        assert abs(x.std() - 1) < 1e-2
        assert loaded.labels is not None
        values = loaded.labels.unique()
        assert values.tolist() == [0, 1, 2]
