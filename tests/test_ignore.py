"What the loss takes: outputs and targets of each form, and voxels that are left out of every term."

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten

from egcnn_nb import EGCNN, EGLoss, EGOutput, SegNet
from egcnn_nb.core import InputError
from egcnn_nb.method.losses import balanced_bce, edge_loss

SPACE = (16, 12, 13)
SLAB = 4  # planes at the end of the first axis that are left out
TERMS = ("semantic", "edge_dice", "edge_bce", "consistency")
# of version 0.1, for the same tensors: total and the four terms
KNOWN = {
    "softmax": (
        3.608909307977195,
        2.2830408318525808,
        0.829489733852981,
        0.10037174508934996,
        0.44619286972695843,
    ),
    "sigmoid": (
        2.8434606001858094,
        1.4869834227773358,
        0.7859980442936236,
        0.1273849942454486,
        0.5067866359921256,
    ),
}
READINGS = [
    {},
    {"where": "union"},
    {"where": "all"},
    {"consistency": "both"},
    {"where": "all", "consistency": "both", "consistency_reduce": "sum"},
    {"reduce": "batch", "beta_over": "batch"},
    {"weight_negatives": True, "supervise": "main"},
    {"semantic": "dice", "supervise": "fused"},
    {"edge_classes": "any", "thickness": 4},
    {"thickness": 1},
]


def drawn(seed: int, *shape: int) -> Tensor:
    "Normal numbers in float64"
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def class_indices() -> Tensor:
    "Two cases (B,D,H,W) of two bodies, far from the slab that is left out"
    labels = torch.zeros(2, *SPACE, dtype=torch.int64)
    labels[:, 2:7, 3:8, 2:9] = 1
    labels[0, 3:5, 4:6, 4:7] = 2
    return labels


def one_hot(labels: Tensor) -> Tensor:
    "Masks (B,3,D,H,W) of class indices"
    masks = F.one_hot(labels, 3)
    masks = masks.movedim(-1, 1)
    return masks.double()


def bodies() -> Tensor:
    "Masks (B,3,D,H,W) of the two cases"
    labels = class_indices()
    return one_hot(labels)


def output(activation: str = "softmax", edge_classes: str = "each") -> EGOutput:
    "What a network might put out, with a gradient"
    edges = 2 if activation == "softmax" else 3
    if edge_classes == "any":
        edges = 1
    logits = drawn(1, 2, 3, *SPACE)
    edge = drawn(2, 2, edges, *SPACE)
    main = drawn(3, 2, 3, *SPACE)
    for tensor in (logits, edge, main):
        tensor.requires_grad_()
    return EGOutput(logits, edge, main)


def output_for(reading: dict, activation: str = "softmax") -> EGOutput:
    "What a network might put out for a reading"
    edge_classes = reading.get("edge_classes", "each")
    return output(activation, edge_classes)


def slab() -> Tensor:
    "Bool (B,1,D,H,W): the last planes"
    mask = torch.zeros(2, 1, *SPACE, dtype=torch.bool)
    mask[:, :, -SLAB:] = True
    return mask


def speckles() -> Tensor:
    "Bool (B,1,D,H,W): some voxels anywhere, on bodies and on their edges too, others in each case"
    generator = torch.Generator()
    generator.manual_seed(4)
    chosen = torch.rand(2, 1, *SPACE, generator=generator)
    return chosen < 0.01


def values(terms: dict) -> list:
    "Numbers of the terms"
    found = []
    for term in terms.values():
        value = term.item()
        found.append(value)
    return found


def cropped(out: EGOutput, planes: int) -> EGOutput:
    "An output without its last planes"
    assert out.main is not None
    kept = slice(None, -planes)
    return EGOutput(
        out.logits[:, :, kept],
        out.edge[:, :, kept],
        out.main[:, :, kept],
    )


KEYS = [(0, 1), (0, 2)]  # of the noise, one a case


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_without_ignore_the_terms_are_those_of_before(activation):
    loss = EGLoss(activation, weight_negatives=True)
    out = output(activation)
    target = bodies()
    terms = loss.terms(out, target, keys=KEYS)
    assert list(terms) == ["total", *TERMS]
    known = KNOWN[activation]
    assert values(terms) == pytest.approx(known, rel=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_the_total_is_what_a_call_returns(reading):
    loss = EGLoss(**reading)
    loss.eval()
    out = output_for(reading)
    target = bodies()
    ignored = slab()
    for ignore in (None, ignored):
        total = loss(out, target, ignore)
        terms = loss.terms(out, target, ignore)
        assert total.dim() == 0
        assert torch.equal(total, terms["total"])


@pytest.mark.parametrize("training", [True, False])
def test_class_indices_are_one_hot_masks_to_the_bit(training):
    loss = EGLoss()
    loss.train(training)
    out = output()
    labels = class_indices()
    masks = one_hot(labels).float()
    terms = loss.terms(out, masks, keys=KEYS)
    expected = values(terms)
    with_channel = labels[:, None]
    small = labels.to(torch.uint8)
    for target in (labels, with_channel, small, with_channel.int()):
        terms = loss.terms(out, target, keys=KEYS)
        found = values(terms)
        assert found == expected
    of_labels = loss(out.logits, labels)
    of_masks = loss(out.logits, masks)
    assert torch.equal(of_labels, of_masks)


def test_a_bare_network_has_the_semantic_term_alone():
    loss = EGLoss()
    loss.eval()
    terms = loss.terms(output().logits, class_indices())
    total, semantic, *others = values(terms)
    assert total == semantic
    assert total > 0
    assert not any(others)


def expect_no_gradient(gradient, ignored):
    "A gradient is zero in every voxel that is ignored, and not everywhere; there may be none"
    if gradient is None:
        return
    inside = ignored.expand_as(gradient)
    assert not gradient[inside].any()
    assert gradient[~inside].any()


def grown(mask: Tensor) -> Tensor:
    "A mask, and one voxel around it"
    numbers = mask.double()
    largest = F.max_pool3d(numbers, 3, 1, 1)
    return largest > 0


def outputs_of(out: EGOutput) -> list[Tensor]:
    "Fused logits, edge logits, logits of the main stream"
    logits, edge, main, _ = out
    assert edge is not None
    assert main is not None
    return [logits, edge, main]


def spoilt(out: EGOutput, ignored: Tensor) -> EGOutput:
    "An output that is not a number where it is ignored"
    changed = []
    for logits in outputs_of(out):
        spoiled = logits.masked_fill(ignored, torch.nan)
        changed.append(spoiled)
    return EGOutput(*changed)


@pytest.mark.parametrize("reading, activation", product(READINGS, ["softmax", "sigmoid"]))
def test_what_is_ignored_has_no_gradient_and_no_value(reading, activation):
    "Exactly none: neither the logits nor the target there change any term, in noise of training too"
    loss = EGLoss(activation, **reading)
    out = output_for(reading, activation)
    target = bodies()
    ignored = speckles()
    terms = loss.terms(out, target, ignored, KEYS)
    for term in terms.values():
        assert term.isfinite()
    inputs = outputs_of(out)
    found = torch.autograd.grad(terms["total"], inputs, allow_unused=True)
    of_logits, of_edge, of_main = found
    beside = grown(ignored)
    expect_no_gradient(of_logits, ignored)
    expect_no_gradient(of_edge, beside)
    expect_no_gradient(of_main, ignored)
    odd = target.masked_fill(ignored, 1.0)
    spoilt_out = spoilt(out, ignored)
    with torch.no_grad():
        again = loss.terms(spoilt_out, odd, ignored, KEYS)
    expected = values(terms)
    assert values(again) == expected


def nearly(value: float):
    "What a number must be in float64"
    return pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_semantic_terms_are_those_of_a_volume_without_what_is_ignored(reading):
    loss = EGLoss(**reading)
    loss.eval()
    out = output_for(reading)
    target = bodies()
    ignored = slab()
    terms = loss.terms(out, target, ignored)
    found = terms["semantic"].item()
    rest = cropped(out, SLAB)
    terms = loss.terms(rest, target[:, :, :-SLAB])
    expected = terms["semantic"].item()
    assert found == nearly(expected)


@pytest.mark.parametrize("reading", READINGS)
def test_edge_terms_are_those_of_a_volume_without_one_plane_more(reading):
    "Where nothing is compared beside the slab, since Sobel reads one plane further than a crop has"
    loss = EGLoss(**reading)
    loss.eval()
    out = output_for(reading)
    target = bodies()
    found = loss.terms(out, target, slab())
    planes = SLAB + 1
    rest = cropped(out, planes)
    expected = loss.terms(rest, target[:, :, :-planes])
    names = ["edge_dice", "edge_bce"]
    if reading.get("where", "truth") == "truth":
        names.append("consistency")
    for name in names:
        term = expected[name].item()
        assert found[name].item() == nearly(term), name


def test_an_index_ignores_what_a_mask_ignores():
    loss = EGLoss()
    loss.eval()
    out = output()
    labels = class_indices()

    def terms(target, ignore):
        found = loss.terms(out, target, ignore)
        return values(found)

    ignored = speckles()
    without_channel = ignored[:, 0]
    expected = terms(labels, ignored)
    assert terms(labels, without_channel) == expected
    for index in (255, -1):
        target = labels.masked_fill(without_channel, index)
        assert terms(target, index) == expected
        assert terms(target[:, None], index) == expected
    last_class = labels == 2
    assert terms(labels, last_class) == terms(labels, 2)


def test_an_edge_beside_what_is_ignored_is_no_edge():
    "The border of a label that nobody trusts is not learned"
    labels = torch.zeros(1, *SPACE, dtype=torch.int64)
    labels[:, 5:9, 4:8, 4:8] = 255
    logits = drawn(1, 1, 3, *SPACE)
    edge = torch.full((1, 2, *SPACE), -20.0)  # no edge anywhere
    loss = EGLoss()
    loss.eval()
    out = EGOutput(logits, edge)
    terms = loss.terms(out, labels, 255)
    assert terms["edge_bce"] < 1e-6
    assert terms["consistency"] == 0


def test_everything_ignored_is_no_loss():
    out = output()
    labels = class_indices()
    everything = torch.ones(2, 1, *SPACE, dtype=torch.bool)
    loss = EGLoss()
    loss.eval()
    terms = loss.terms(out, labels, everything)
    for value in values(terms):
        assert abs(value) < 1e-12


def test_the_weight_of_edges_counts_the_voxels_that_are_kept():
    "A quarter of the voxels that count are edges, whatever is left out"
    shape = (1, 1, 4, 4, 4)
    target = torch.zeros(shape)
    target[..., 0] = 1
    keep = torch.ones(shape, dtype=torch.bool)
    keep[:, :, 2:] = False
    logits = drawn(5, *shape)
    kept_logits = logits[:, :, :2]
    kept_target = target[:, :, :2]
    for loss in (balanced_bce, edge_loss):
        found = loss(logits, target, keep=keep)
        expected = loss(kept_logits, kept_target)
        assert found.item() == nearly(expected.item())


def ignores_nothing(logits, target, loss):
    "A loss of the masks that has no argument keep"
    squared = (logits - target).square()
    return squared.mean()


@pytest.mark.parametrize(
    "target, ignore, told",
    [
        (class_indices().float(), None, "type torch.float32. Give whole numbers: target.long"),
        (class_indices() > 0, None, "type torch.bool. Give whole numbers"),
        (class_indices()[:1], None, "The target has the shape .1, 16, 12, 13.. Give class indices"),
        (one_hot(class_indices())[:, :2], None, "shape .2, 2, 16, 12, 13.. Give class indices"),
        (class_indices() + 2, None, "holds the class 4, but the network has 3 outputs"),
        (class_indices() - 1, None, "holds the class -1, .* or name it: ignore=-1"),
        (one_hot(class_indices()), 2, "ignore is the class 2, but the target holds masks"),
        (class_indices(), True, "ignore is True. Give a bool mask"),
        (class_indices(), slab().float(), "ignore has the type torch.float32. Give a bool mask"),
        (class_indices(), slab()[:, :, 1:], "ignore has the shape .2, 1, 15, 12, 13.. Give"),
    ],
)
def test_what_does_not_fit_is_refused(target, ignore, told):
    loss = EGLoss()
    out = output()
    with pytest.raises(InputError, match=told):
        loss(out, target, ignore)


def test_what_no_loss_can_read_is_refused():
    loss = EGLoss()
    out, labels = output(), class_indices()
    with pytest.raises(InputError, match="The loss cannot read a tuple. Give an EGOutput"):
        loss(tuple(out[:3]), labels)
    of_regions = EGLoss("sigmoid")
    with pytest.raises(InputError, match="regions have no index. Give masks .2, 3, 16, 12, 13."):
        of_regions(output("sigmoid"), labels)
    own = EGLoss()
    own.mask_loss = ignores_nothing
    assert own(out, labels).isfinite()
    with pytest.raises(InputError, match="has no argument keep, so it cannot leave out voxels"):
        own(out, labels, slab())


@pytest.fixture
def model() -> EGCNN:
    "A small network with an edge stream"
    net = SegNet(1, 3, width=4, levels=2)
    return EGCNN(net)


@pytest.fixture
def x() -> Tensor:
    "An image for it"
    return torch.randn(1, 1, 8, 8, 8)


def test_in_training_a_network_answers_with_everything(model, x):
    out = model(x)
    assert isinstance(out, EGOutput)
    assert out._fields == ("logits", "edge", "main", "attention")
    assert out.edge.shape == (1, 2, 8, 8, 8)
    gates = model.edge.gates
    assert len(out.attention) == len(gates)
    leaves, _ = tree_flatten(out)
    for leaf in leaves:
        assert isinstance(leaf, Tensor)


def test_in_evaluation_a_network_answers_with_a_tensor(model, x):
    out = model(x)
    model.eval()
    logits = model(x)
    full = model(x, full=True)
    assert type(logits) is Tensor
    assert torch.equal(full.logits, logits)
    assert torch.equal(full.edge, out.edge)


def test_a_network_can_be_exported_and_traced(model, x):
    model.eval()
    logits = model(x)
    program = torch.export.export(model, (x,))
    exported = program.module()
    found = exported(x)
    assert type(found) is Tensor
    assert torch.allclose(found, logits, atol=1e-5)
    traced: Any = torch.jit.trace(model, x)
    found = traced(x)
    assert torch.allclose(found, logits, atol=1e-5)
