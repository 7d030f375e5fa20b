"3D views of volumes that have hardly anything to show, outside of a browser."

import numpy as np
import pytest

from egcnn_nb.show.scenes import view3d

SHAPES = [(24, 22, 1), (1, 22, 20), (24, 1, 1), (1, 1, 1), (5, 4, 3)]


def volumes(shape):
    "Noise, and volumes that are constant or hold no number"
    noise = np.random.default_rng(0).random(shape).astype(np.float32)
    return [noise, np.ones(shape), np.full(shape, np.nan), np.full(shape, np.inf)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [1, 0, -1])
def test_one_slice_one_voxel_and_nothing_to_see_are_drawn(shape, value):
    mask = np.full(shape, value, np.int32)
    for volume in volumes(shape):
        shown = view3d(volume, mask, edge=mask > 0, heat=volume)
        assert len(shown.static().axes) >= 3
        shown.close()
