"What must hold for every input, tried on many by Hypothesis."

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

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
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def masks(seed, shape, classes=2):
    "Random masks (2,K,D,H,W) of a seed"
    numbers = drawn(seed, 2, classes, *shape)
    inside = numbers > 0.3
    return inside.double()


@tries
@given(seeds, shapes, st.floats(-5, 5), st.floats(-5, 5))
def test_sobel_is_linear(seed, shape, a, b):
    x, y = drawn(seed, 2, 1, 2, *shape)
    both = a * x + b * y
    of_x = sobel_gradient(x)
    of_y = sobel_gradient(y)
    of_both = sobel_gradient(both)
    summed = a * of_x + b * of_y
    assert_close(of_both, summed, atol=1e-10, rtol=1e-10)


@tries
@given(seeds, shapes, st.integers(0, 2))
def test_sobel_moves_with_the_image(seed, shape, axis):
    x = drawn(seed, 1, 1, *shape)
    moved = x.roll(1, 2 + axis)
    before = [slice(1, -1)] * 3
    behind = [slice(1, -1)] * 3
    before[axis] = slice(1, -2)
    behind[axis] = slice(2, -1)
    gradient = sobel_gradient(x)
    gradient_of_moved = sobel_gradient(moved)
    assert_close(gradient_of_moved[..., *behind], gradient[..., *before])


@tries
@given(seeds, shapes, st.floats(-3, 3))
def test_a_constant_does_not_matter(seed, shape, c):
    x = drawn(seed, 1, 2, *shape)
    brighter = x + c
    found = sobel_magnitude(brighter)
    expected = sobel_magnitude(x)
    assert_close(found, expected)


@tries
@given(seeds, shapes)
def test_a_mask_and_its_complement_have_one_edge(seed, shape):
    mask = masks(seed, shape)
    rest = 1 - mask
    edge = edge_target(mask)
    edge_of_rest = edge_target(rest)
    assert torch.equal(edge, edge_of_rest)
    full = torch.ones_like(mask)
    edge = edge_target(full)
    assert not edge.any()


@tries
@given(seeds, shapes)
def test_dice_lies_between_0_and_1_and_does_not_know_which_is_which(seed, shape):
    logits = drawn(seed, 2, 2, 3, *shape)
    p, q = logits.sigmoid()
    value = dice_loss(p, q)
    exchanged = dice_loss(q, p)
    assert 0 <= value <= 1
    assert_close(value, exchanged)


@tries
@given(seeds, shapes)
def test_dice_of_a_mask_with_itself_is_perfect(seed, shape):
    mask = masks(seed, shape)
    value = dice_loss(mask, mask)
    assert value < 1e-12


@tries
@given(seeds, shapes)
def test_consistency_is_zero_for_a_mask_with_itself_and_never_below(seed, shape):
    mask = masks(seed, shape)
    logits = drawn(seed, 2, 2, *shape)
    p = logits.sigmoid()
    with_itself = consistency_loss(mask, mask)
    with_another = consistency_loss(p, mask)
    assert with_itself == 0
    assert with_another >= 0
    strengths = sobel_magnitude(mask)
    at_a_corner = flat_face(3) * 3**0.5
    assert strengths.max() <= at_a_corner + 1e-6


@tries
@given(seeds, shapes)
def test_balanced_cross_entropy_weighs_both_sides_the_same(seed, shape):
    mask = masks(seed, shape)
    rest = 1 - mask
    logits = drawn(seed, 2, 2, *shape)
    value = balanced_bce(logits, mask, weight_negatives=True)
    exchanged = balanced_bce(-logits, rest, weight_negatives=True)
    assert value >= 0
    assert_close(value, exchanged)


@tries
@given(seeds, shapes)
def test_edge_voxels_weigh_the_share_of_the_others_and_the_others_one(seed, shape):
    mask = masks(seed, shape)
    logits = drawn(seed, 2, 2, *shape)
    value = balanced_bce(logits, mask)
    total = 0
    for case in range(2):
        for channel in range(2):
            edge = mask[case, channel] > 0
            others = edge.logical_not()
            score = logits[case, channel]
            share_of_the_others = others.double().mean()
            of_edge = -logsigmoid(score[edge])
            total = total + share_of_the_others * of_edge.sum()
            of_others = -logsigmoid(-score[others])
            total = total + of_others.sum()
    assert_close(value, total / mask.numel())


def label_values(labels):
    "The labels that a map has"
    found = labels.unique()
    return set(found.tolist())


@tries
@given(seeds, st.tuples(*[st.integers(1, 6)] * 3), st.sampled_from([3, 5]))
def test_labels_on_a_finer_grid_and_back_are_the_same(seed, shape, factor):
    generator = torch.Generator()
    generator.manual_seed(seed)
    labels = torch.randint(4, shape, generator=generator)
    finer = [n * factor for n in shape]
    fine = resample_labels(labels, finer)
    back = resample_labels(fine, shape)
    assert torch.equal(back, labels)
    known = label_values(labels)
    assert label_values(fine) <= known


class Constant(torch.nn.Module):
    "A network whose logits are one number everywhere"

    def __init__(self, c):
        super().__init__()
        value = torch.tensor(c)
        self.c = torch.nn.Parameter(value)

    def forward(self, x):
        cases, _, *size = x.shape
        return self.c.expand(cases, 2, *size)


@settings(tries, max_examples=15)
@given(
    st.tuples(*[st.integers(4, 30)] * 3),
    st.tuples(*[st.integers(4, 16)] * 3),
    st.floats(-9, 9, width=32),
)
def test_windows_of_a_constant_network_are_the_whole(shape, patch, c):
    network = Constant(c)
    volume = torch.zeros(1, *shape)
    by_windows = infer(network, volume, patch)
    whole = torch.full((2, *shape), c)
    assert_close(by_windows, whole, atol=1e-4, rtol=1e-4)


@tries
@given(st.integers(2, 60), seeds, st.floats(0.05, 0.9))
def test_a_split_is_disjoint_and_complete(n, seed, share):
    numbers = list(range(n))
    cases = [SimpleNamespace(name=i) for i in numbers]
    wanted = round(n * share)
    held = max(wanted, 1)
    if n <= held:
        return
    train, val = split_cases(cases, seed, share)
    names = [case.name for case in train + val]
    names.sort()
    assert names == numbers
    assert len(val) == held


def counted_cases(shares, weights, step):
    "Cases of a step that count, of all processes"
    found = []
    for share, weight in zip(shares, weights, strict=True):
        if weight:
            found += share[step]
    return found


@tries
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), seeds)
def test_shares_of_a_batch_are_disjoint_complete_and_weighted(cases, batch, world, seed):
    if batch < world:
        return
    ranks = [EpochBatches(cases, batch, seed, rank, world) for rank in range(world)]
    shares = [list(rank) for rank in ranks]
    batches = ranks[0].whole()
    seen = []
    for step, whole in enumerate(batches):
        weights = [rank.weight(step) for rank in ranks]
        counted = counted_cases(shares, weights, step)
        assert sorted(counted) == sorted(whole)
        difference = sum(weights) - world
        assert abs(difference) < 1e-9
        for _, _, case in whole:
            seen.append(case)
    seen.sort()
    assert seen == list(range(cases))
