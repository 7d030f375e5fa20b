"What must hold for every input, tried on many by Hypothesis."

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from egcnn_nb.data.prepare import resample_labels
from egcnn_nb.data.patches import EpochBatches, split_cases
from egcnn_nb.method.losses import balanced_bce, consistency_loss, dice_loss
from egcnn_nb.method.sobel import (
    edge_target,
    flat_face,
    sobel_gradient,
    sobel_magnitude,
)
from egcnn_nb.run.models import infer

tries = settings(max_examples=40, deadline=None, derandomize=True)
seeds, sides = st.integers(0, 2**31), st.integers(3, 9)
shapes = st.tuples(sides, sides, sides)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(seed, shape, classes=2):
    return (drawn(seed, 2, classes, *shape) > 0.3).double()


@tries
@given(seeds, shapes, st.floats(-5, 5), st.floats(-5, 5))
def test_sobel_is_linear(seed, shape, a, b):
    x, y = drawn(seed, 2, 1, 2, *shape)
    torch.testing.assert_close(
        sobel_gradient(a * x + b * y),
        a * sobel_gradient(x) + b * sobel_gradient(y),
        atol=1e-10,
        rtol=1e-10,
    )


@tries
@given(seeds, shapes, st.integers(0, 2))
def test_sobel_moves_with_the_image(seed, shape, axis):
    x = drawn(seed, 1, 1, *shape)
    moved = x.roll(1, 2 + axis)
    inside = (
        slice(None),
        slice(None),
        slice(None),
        *[slice(2, -1) if i == axis else slice(1, -1) for i in range(3)],
    )
    before = (
        slice(None),
        slice(None),
        slice(None),
        *[slice(1, -2) if i == axis else slice(1, -1) for i in range(3)],
    )
    torch.testing.assert_close(sobel_gradient(moved)[inside], sobel_gradient(x)[before])


@tries
@given(seeds, shapes, st.floats(-3, 3))
def test_a_constant_does_not_matter(seed, shape, c):
    x = drawn(seed, 1, 2, *shape)
    torch.testing.assert_close(sobel_magnitude(x + c), sobel_magnitude(x))


@tries
@given(seeds, shapes)
def test_a_mask_and_its_complement_have_one_edge(seed, shape):
    mask = masks(seed, shape)
    assert torch.equal(edge_target(mask), edge_target(1 - mask))
    assert not edge_target(torch.ones_like(mask)).any()


@tries
@given(seeds, shapes)
def test_dice_lies_between_0_and_1_and_does_not_know_which_is_which(seed, shape):
    p, q = drawn(seed, 2, 2, 3, *shape).sigmoid()
    value = dice_loss(p, q)
    assert 0 <= value <= 1
    torch.testing.assert_close(value, dice_loss(q, p))
    mask = masks(seed, shape)
    assert dice_loss(mask, mask) < 1e-12


@tries
@given(seeds, shapes)
def test_consistency_is_zero_for_a_mask_with_itself_and_never_below(seed, shape):
    mask, p = masks(seed, shape), drawn(seed, 2, 2, *shape).sigmoid()
    assert (
        consistency_loss(mask, mask) == 0
        and consistency_loss(p, mask) >= 0
        and sobel_magnitude(mask).max() <= flat_face(3) * 3**0.5 + 1e-6
    )


@tries
@given(seeds, shapes)
def test_balanced_cross_entropy_weighs_both_sides_the_same(seed, shape):
    mask, logits = masks(seed, shape), drawn(seed, 2, 2, *shape)
    assert balanced_bce(logits, mask) >= 0
    torch.testing.assert_close(balanced_bce(logits, mask), balanced_bce(-logits, 1 - mask))


@tries
@given(seeds, st.tuples(*[st.integers(1, 6)] * 3), st.sampled_from([3, 5]))
def test_labels_on_a_finer_grid_and_back_are_the_same(seed, shape, factor):
    labels = torch.randint(4, shape, generator=torch.Generator().manual_seed(seed))
    fine = resample_labels(labels, [n * factor for n in shape])
    assert torch.equal(resample_labels(fine, shape), labels) and set(fine.unique().tolist()) <= set(
        labels.unique().tolist()
    )


class Constant(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = torch.nn.Parameter(torch.tensor(c))

    def forward(self, x):
        return self.c.expand(len(x), 2, *x.shape[2:])


@settings(tries, max_examples=15)
@given(
    st.tuples(*[st.integers(4, 30)] * 3),
    st.tuples(*[st.integers(4, 16)] * 3),
    st.floats(-9, 9, width=32),
)
def test_windows_of_a_constant_network_are_the_whole(shape, patch, c):
    torch.testing.assert_close(
        infer(Constant(c), torch.zeros(1, *shape), patch),
        torch.full((2, *shape), c),
        atol=1e-4,
        rtol=1e-4,
    )


@tries
@given(st.integers(2, 60), seeds, st.floats(0.05, 0.9))
def test_a_split_is_disjoint_and_complete(n, seed, share):
    cases = [SimpleNamespace(name=i) for i in range(n)]
    if n <= max(round(n * share), 1):
        return
    train, val = split_cases(cases, seed, share)
    assert sorted(c.name for c in train + val) == list(range(n)) and len(val) == max(
        round(n * share), 1
    )


@tries
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), seeds)
def test_shares_of_a_batch_are_disjoint_complete_and_weighted(cases, batch, world, seed):
    if batch < world:
        return
    ranks = [EpochBatches(cases, batch, seed, r, world) for r in range(world)]
    for step, (whole, *shares) in enumerate(zip(ranks[0].whole(), *ranks)):
        weights = [r.weight(step) for r in ranks]
        counted = [k for s, w in zip(shares, weights) if w for k in s]
        assert sorted(counted) == sorted(whole) and abs(sum(weights) - world) < 1e-9
    assert sorted(i for b in ranks[0].whole() for _, _, i in b) == list(range(cases))
