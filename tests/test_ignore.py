"What the loss takes: outputs and targets of each form, and voxels that are left out of every term."

from itertools import product

import pytest
import torch
from torch import Tensor

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
    {"weight_negatives": False, "supervise": "main"},
    {"semantic": "dice", "supervise": "fused"},
    {"edge_classes": "any", "thickness": 4},
    {"thickness": 1},
]


def drawn(seed: int, *shape: int) -> Tensor:
    "Normal numbers in float64"
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def class_indices() -> Tensor:
    "Two cases (B,D,H,W) of two bodies, far from the slab that is left out"
    labels = torch.zeros(2, *SPACE, dtype=torch.int64)
    labels[:, 2:7, 3:8, 2:9] = 1
    labels[0, 3:5, 4:6, 4:7] = 2
    return labels


def one_hot(labels: Tensor) -> Tensor:
    "Masks (B,3,D,H,W) of class indices"
    return torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).double()


def output(activation: str = "softmax", edge_classes: str = "each") -> EGOutput:
    "What a network might put out, with a gradient"
    each = 2 if activation == "softmax" else 3
    edges = 1 if edge_classes == "any" else each
    logits, edge, main = drawn(1, 2, 3, *SPACE), drawn(2, 2, edges, *SPACE), drawn(3, 2, 3, *SPACE)
    return EGOutput(logits.requires_grad_(), edge.requires_grad_(), main.requires_grad_())


def slab() -> Tensor:
    "Bool (B,1,D,H,W): the last planes"
    mask = torch.zeros(2, 1, *SPACE, dtype=torch.bool)
    mask[:, :, -SLAB:] = True
    return mask


def speckles() -> Tensor:
    "Bool (B,1,D,H,W): some voxels anywhere, on bodies and on their edges too, others in each case"
    chosen = torch.rand(2, 1, *SPACE, generator=torch.Generator().manual_seed(4))
    return chosen < 0.01


def values(terms: dict) -> list:
    "Numbers of the terms"
    return [term.item() for term in terms.values()]


def cropped(out: EGOutput, planes: int) -> EGOutput:
    "An output without its last planes"
    assert out.main is not None
    return EGOutput(out.logits[:, :, :-planes], out.edge[:, :, :-planes], out.main[:, :, :-planes])


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_without_ignore_the_terms_are_those_of_before(activation):
    loss = EGLoss(activation, weight_negatives=True).train()
    terms = loss.terms(output(activation), one_hot(class_indices()), keys=[(0, 1), (0, 2)])
    assert tuple(terms) == ("total", *TERMS)
    assert values(terms) == pytest.approx(KNOWN[activation], rel=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_the_total_is_what_a_call_returns(reading):
    loss = EGLoss(**reading).eval()
    out, target = output(edge_classes=reading.get("edge_classes", "each")), one_hot(class_indices())
    for ignore in (None, slab()):
        total = loss(out, target, ignore)
        assert total.dim() == 0
        assert torch.equal(total, loss.terms(out, target, ignore)["total"])


@pytest.mark.parametrize("training", [True, False])
def test_class_indices_are_one_hot_masks_to_the_bit(training):
    loss = EGLoss().train(training)
    out, labels = output(), class_indices()
    keys = [(0, 1), (0, 2)]
    expected = values(loss.terms(out, one_hot(labels).float(), keys=keys))
    for target in (labels, labels[:, None], labels.to(torch.uint8), labels.int()[:, None]):
        assert values(loss.terms(out, target, keys=keys)) == expected
    assert loss(out.logits, labels).item() == loss(out.logits, one_hot(labels).float()).item()


def test_a_bare_network_has_the_semantic_term_alone():
    terms = EGLoss().eval().terms(output().logits, class_indices())
    assert terms["total"].item() == terms["semantic"].item() > 0
    assert not any(terms[name].item() for name in TERMS[1:])


@pytest.mark.parametrize("reading, activation", product(READINGS, ["softmax", "sigmoid"]))
def test_what_is_ignored_has_no_gradient_and_no_value(reading, activation):
    "Exactly none: neither the logits nor the target there change any term, in noise of training too"
    loss = EGLoss(activation, **reading).train()
    out = output(activation, reading.get("edge_classes", "each"))
    target, ignored = one_hot(class_indices()), speckles()
    keys = [(0, 1), (0, 2)]
    terms = loss.terms(out, target, ignored, keys)
    assert all(torch.isfinite(term) for term in terms.values())
    grads = torch.autograd.grad(terms["total"], out[:3], allow_unused=True)
    near = torch.nn.functional.max_pool3d(ignored.double(), 3, 1, 1) > 0
    for grad, where in zip(grads, (ignored, near, ignored), strict=True):
        if grad is not None:
            assert not grad[where.expand_as(grad)].any()
            assert grad[~where.expand_as(grad)].any()
    with torch.no_grad():
        changed = [z.masked_fill(ignored, float("nan")) for z in (out.logits, out.edge, out.main)]
        odd = target.masked_fill(ignored, 1.0)
        assert values(loss.terms(EGOutput(*changed), odd, ignored, keys)) == values(terms)


@pytest.mark.parametrize("reading", READINGS)
def test_semantic_terms_are_those_of_a_volume_without_what_is_ignored(reading):
    loss = EGLoss(**reading).eval()
    out, target = output(edge_classes=reading.get("edge_classes", "each")), one_hot(class_indices())
    found = loss.terms(out, target, slab())["semantic"].item()
    expected = loss.terms(cropped(out, SLAB), target[:, :, :-SLAB])["semantic"].item()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_edge_terms_are_those_of_a_volume_without_one_plane_more(reading):
    "Where nothing is compared beside the slab, since Sobel reads one plane further than a crop has"
    loss = EGLoss(**reading).eval()
    out, target = output(edge_classes=reading.get("edge_classes", "each")), one_hot(class_indices())
    found = loss.terms(out, target, slab())
    expected = loss.terms(cropped(out, SLAB + 1), target[:, :, : -SLAB - 1])
    names = ["edge_dice", "edge_bce"]
    if reading.get("where", "truth") == "truth":
        names.append("consistency")
    for name in names:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-12), name


def test_an_index_ignores_what_a_mask_ignores():
    loss, out = EGLoss().eval(), output()
    labels, ignored = class_indices(), speckles()
    expected = values(loss.terms(out, labels, ignored))
    assert values(loss.terms(out, labels, ignored[:, 0])) == expected
    for index in (255, -1):
        target = labels.masked_fill(ignored[:, 0], index)
        assert values(loss.terms(out, target, ignore=index)) == expected
        assert values(loss.terms(out, target[:, None], ignore=index)) == expected
    assert values(loss.terms(out, labels, labels == 2)) == values(loss.terms(out, labels, 2))


def test_an_edge_beside_what_is_ignored_is_no_edge():
    "The border of a label that nobody trusts is not learned"
    labels = torch.zeros(1, *SPACE, dtype=torch.int64)
    labels[:, 5:9, 4:8, 4:8] = 255
    edge = torch.full((1, 2, *SPACE), -20.0)  # no edge anywhere
    terms = EGLoss().eval().terms(EGOutput(drawn(1, 1, 3, *SPACE), edge), labels, 255)
    assert terms["edge_bce"].item() < 1e-6
    assert terms["consistency"].item() == 0


def test_everything_ignored_is_no_loss():
    out = output()
    terms = EGLoss().eval().terms(out, class_indices(), torch.ones(2, 1, *SPACE, dtype=torch.bool))
    assert values(terms) == pytest.approx([0] * 5, abs=1e-12)


def test_the_weight_of_edges_counts_the_voxels_that_are_kept():
    "A quarter of the voxels that count are edges, whatever is left out"
    target = torch.zeros(1, 1, 4, 4, 4)
    target[..., 0] = 1
    keep = torch.ones(1, 1, 4, 4, 4, dtype=torch.bool)
    keep[:, :, 2:] = False
    logits = drawn(5, 1, 1, 4, 4, 4)
    for found in (balanced_bce, edge_loss):
        part = found(logits[:, :, :2], target[:, :, :2])
        assert found(logits, target, keep=keep).item() == pytest.approx(part.item(), rel=1e-12)


def ignores_nothing(logits, target, loss):
    "A loss of the masks that has no argument keep"
    return (logits - target).square().mean()


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
    with pytest.raises(InputError, match=told):
        EGLoss()(output(), target, ignore)


def test_what_no_loss_can_read_is_refused():
    out, labels = output(), class_indices()
    with pytest.raises(InputError, match="The loss cannot read a tuple. Give an EGOutput"):
        EGLoss()(tuple(out[:3]), labels)
    with pytest.raises(InputError, match="regions have no index. Give masks .2, 3, 16, 12, 13."):
        EGLoss("sigmoid")(output("sigmoid"), labels)
    own = EGLoss()
    own.mask_loss = ignores_nothing
    assert own(out, labels).isfinite()
    with pytest.raises(InputError, match="has no argument keep, so it cannot leave out voxels"):
        own(out, labels, slab())


def test_a_network_answers_with_a_tensor_or_with_everything():
    model = EGCNN(SegNet(1, 3, width=4, levels=2))
    x = torch.randn(1, 1, 8, 8, 8)
    out = model(x)
    assert isinstance(out, EGOutput)
    assert out._fields == ("logits", "edge", "main", "attention")
    assert out.edge.shape == (1, 2, 8, 8, 8)
    assert len(out.attention) == len(model.edge.gates)
    logits = model.eval()(x)
    assert type(logits) is Tensor
    full = model(x, full=True)
    assert torch.equal(full.logits, logits)
    assert torch.equal(full.edge, out.edge)
    leaves, _ = torch.utils._pytree.tree_flatten(out)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    exported = torch.export.export(model, (x,)).module()(x)
    assert type(exported) is Tensor
    assert torch.allclose(exported, logits, atol=1e-5)
    traced = torch.jit.trace(model, x)(x)
    assert torch.allclose(traced, logits, atol=1e-5)
