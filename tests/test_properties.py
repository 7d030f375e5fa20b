"What must hold for every input, tried on many by Hypothesis."

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from egcnn_nb.data.patches import EpochBatches, split_cases
from egcnn_nb.data.prepare import resample_labels
from egcnn_nb.method.losses import balanced_bce, consistency_loss, dice_loss
from egcnn_nb.method.sobel import (
    edge_target,
    flat_face,
    sobel_gradient,
    sobel_magnitude,
)
from egcnn_nb.run.models import infer

tries = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
sides = st.integers(3, 9)
shapes = st.tuples(sides, sides, sides)


def drawn(seed, *shape):
    "Normal numbers of a seed"
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def masks(seed, shape, classes=2):
    "Random masks (2,K,D,H,W) of a seed"
    numbers = drawn(seed, 2, classes, *shape)
    return (numbers > 0.3).double()


@tries
@given(seeds, shapes, st.floats(-5, 5), st.floats(-5, 5))
def test_sobel_is_linear(seed, shape, a, b):
    x, y = drawn(seed, 2, 1, 2, *shape)
    of_sum = sobel_gradient(a * x + b * y)
    sum_of = a * sobel_gradient(x) + b * sobel_gradient(y)
    torch.testing.assert_close(of_sum, sum_of, atol=1e-10, rtol=1e-10)


@tries
@given(seeds, shapes, st.integers(0, 2))
def test_sobel_moves_with_the_image(seed, shape, axis):
    x = drawn(seed, 1, 1, *shape)
    moved = x.roll(1, 2 + axis)
    inside = [slice(1, -1)] * 3
    before = [slice(1, -1)] * 3
    inside[axis] = slice(2, -1)
    before[axis] = slice(1, -2)
    after_move = sobel_gradient(moved)[(..., *inside)]
    torch.testing.assert_close(after_move, sobel_gradient(x)[(..., *before)])


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
    mask = masks(seed, shape)
    p = drawn(seed, 2, 2, *shape).sigmoid()
    assert consistency_loss(mask, mask) == 0
    assert consistency_loss(p, mask) >= 0
    assert sobel_magnitude(mask).max() <= flat_face(3) * 3**0.5 + 1e-6


@tries
@given(seeds, shapes)
def test_balanced_cross_entropy_weighs_both_sides_the_same(seed, shape):
    mask = masks(seed, shape)
    logits = drawn(seed, 2, 2, *shape)
    assert balanced_bce(logits, mask) >= 0
    torch.testing.assert_close(balanced_bce(logits, mask), balanced_bce(-logits, 1 - mask))


@tries
@given(seeds, st.tuples(*[st.integers(1, 6)] * 3), st.sampled_from([3, 5]))
def test_labels_on_a_finer_grid_and_back_are_the_same(seed, shape, factor):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, shape, generator=generator)
    fine = resample_labels(labels, [n * factor for n in shape])
    assert torch.equal(resample_labels(fine, shape), labels)
    invented = set(fine.unique().tolist()) - set(labels.unique().tolist())
    assert not invented


class Constant(torch.nn.Module):
    "A network whose logits are one number everywhere"

    def __init__(self, c):
        super().__init__()
        self.c = torch.nn.Parameter(torch.tensor(c))

    def forward(self, x):
        size = x.shape[2:]
        return self.c.expand(len(x), 2, *size)


@settings(tries, max_examples=15)
@given(
    st.tuples(*[st.integers(4, 30)] * 3),
    st.tuples(*[st.integers(4, 16)] * 3),
    st.floats(-9, 9, width=32),
)
def test_windows_of_a_constant_network_are_the_whole(shape, patch, c):
    by_windows = infer(Constant(c), torch.zeros(1, *shape), patch)
    whole = torch.full((2, *shape), c)
    torch.testing.assert_close(by_windows, whole, atol=1e-4, rtol=1e-4)


@tries
@given(st.integers(2, 60), seeds, st.floats(0.05, 0.9))
def test_a_split_is_disjoint_and_complete(n, seed, share):
    cases = [SimpleNamespace(name=i) for i in range(n)]
    held = max(round(n * share), 1)
    if n <= held:
        return
    train, val = split_cases(cases, seed, share)
    names = sorted(case.name for case in train + val)
    assert names == list(range(n))
    assert len(val) == held


@tries
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), seeds)
def test_shares_of_a_batch_are_disjoint_complete_and_weighted(cases, batch, world, seed):
    if batch < world:
        return
    ranks = [EpochBatches(cases, batch, seed, rank, world) for rank in range(world)]
    shares = [list(rank) for rank in ranks]
    seen = []
    for step, whole in enumerate(ranks[0].whole()):
        weights = [rank.weight(step) for rank in ranks]
        counted = []
        for own, weight in zip(shares, weights, strict=True):
            counted += own[step] if weight else []
        assert sorted(counted) == sorted(whole)
        assert abs(sum(weights) - world) < 1e-9
        seen += [case for _, _, case in whole]
    assert sorted(seen) == list(range(cases))
