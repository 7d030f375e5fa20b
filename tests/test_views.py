"3D views of volumes that have hardly anything to show, outside of a browser."

import numpy as np
import pytest

from egcnn_nb.show.scenes import view3d

SHAPES = [(24, 22, 1), (1, 22, 20), (24, 1, 1), (1, 1, 1), (5, 4, 3)]


def volumes(shape):
    "Noise, and volumes that are constant or hold no number"
    noise = np.random.default_rng(0).random(shape)
    return {
        "noise": noise.astype(np.float32),
        "constant": np.ones(shape),
        "nan": np.full(shape, np.nan),
        "infinite": np.full(shape, np.inf),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [1, 0, -1])
def test_one_slice_one_voxel_and_nothing_to_see_are_drawn(shape, value):
    mask = np.full(shape, value, np.int32)
    edge = mask > 0
    for name, volume in volumes(shape).items():
        shown = view3d(volume, mask, edge=edge, heat=volume)
        figure = shown.static()
        assert len(figure.axes) >= 3, name
        shown.close()
