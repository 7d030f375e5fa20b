"The consistency loss in each of its readings, against SciPy and plain loops in float64."

from itertools import product

import numpy as np
import pytest
import torch
from scipy.ndimage import sobel
from scipy.special import expit, softmax

from egcnn_nb.core import InputError
from egcnn_nb.method.losses import EGLoss, EGOutput, consistency_loss, edge_box, gumbel_noise
from egcnn_nb.method.sobel import sobel_magnitude

SHAPE = (14, 15, 16)
READINGS = list(product(("truth", "union", "all"), ("mean", "sum"), ("masks", "each", "any")))


def drawn(seed, *shape):
    "Normal numbers in float64"
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_cases():
    "Masks of two classes in two cases: boxes of which some touch the border of the volume; one class is absent"
    masks = torch.zeros(2, 2, *SHAPE, dtype=torch.float64)
    masks[0, 0, 3:8, 4:9, 5:10] = 1
    masks[0, 1, 5:7, 5:8, 6:9] = 1
    masks[1, 0, :4, 6:11, 11:] = 1
    return masks


def wrong_prediction():
    "Probabilities that are high on the masks, moved by two voxels, and on a body far away from them"
    moved = two_cases().roll(2, 2)
    moved[:, :, 10:13, :3, :4] = 1
    return torch.sigmoid(6 * (moved - 0.5) + 0.3 * drawn(1, *moved.shape))


def size_of_gradient(volume, eps=1e-8):
    "Length of SciPy's Sobel gradient (D,H,W); the library has this eps in its root"
    return np.sqrt(sum(sobel(volume, axis, mode="nearest") ** 2 for axis in range(3)) + eps)


def compared(prob, mask, where):
    "The set e+ of eq. 7"
    if where == "all":
        return np.ones(mask.shape, bool)
    edge = size_of_gradient(mask, 0) > 8
    if where == "union":
        edge |= size_of_gradient((prob > 0.5) * 1.0, 0) > 8
    return edge


def over(difference, voxels, reduce):
    "Sum or mean over the voxels, one after the other"
    total = sum(float(d) for d in difference[voxels])
    return total if reduce == "sum" else total / max(voxels.sum(), 1)


def by_hand(prob, masks, where, reduce, edge_logits=None):
    "Eq. 7, and the edge stream's part of it, from loops over cases, classes and voxels"
    masks_part, edge_part = [], []
    for b in range(len(prob)):
        gradients, sets = [], []
        for p, mask in zip(prob[b], masks[b], strict=False):
            gradients.append(size_of_gradient(p) / 16)
            sets.append(compared(p, mask, where))
            masks_part.append(
                over(abs(gradients[-1] - size_of_gradient(mask) / 16), sets[-1], reduce)
            )
        if edge_logits is None:
            continue
        if edge_logits.shape[1] == 1:
            gradients, sets = [np.max(gradients, 0)], [np.any(sets, 0)]
        for e, gradient, voxels in zip(edge_logits[b], gradients, sets, strict=False):
            edge_part.append(over(abs(expit(e) - np.minimum(gradient, 1)), voxels, reduce))
    return np.mean(masks_part) + (np.mean(edge_part) if edge_part else 0)


def edges_for(kind):
    "Scores of an edge stream, or None"
    channels = {"masks": 0, "each": 2, "any": 1}[kind]
    return 2 * drawn(2, 2, channels, *SHAPE) if channels else None


def as_numpy(x):
    return None if x is None else x.detach().numpy()


@pytest.mark.parametrize("where, reduce, kind", READINGS)
def test_every_reading_of_the_consistency_loss_is_that_of_scipy_and_loops(where, reduce, kind):
    prob, masks, edges = wrong_prediction(), two_cases(), edges_for(kind)
    expected = by_hand(as_numpy(prob), as_numpy(masks), where, reduce, as_numpy(edges))
    found = consistency_loss(prob, masks, where, consistency_reduce=reduce, edge_logits=edges)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    crop = (..., slice(0, 13), slice(2, 13), slice(3, 16))
    cut = None if edges is None else edges[crop]
    expected = by_hand(as_numpy(prob[crop]), as_numpy(masks[crop]), where, reduce, as_numpy(cut))
    found = consistency_loss(
        prob[crop], masks[crop], where, consistency_reduce=reduce, edge_logits=cut
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)


def criterion(where, reduce, kind, **more):
    "The loss of a task with a background and two classes"
    how = {
        "edge_classes": "any" if kind == "any" else "each",
        "consistency": "masks" if kind == "masks" else "both",
    }
    return EGLoss(where=where, consistency_reduce=reduce, **how, **more)


def softmax_task():
    "Fused and main logits with a background, and their one-hot target; its classes overlap nowhere"
    classes = two_cases()
    classes[:, 0] *= 1 - classes[:, 1]
    target = torch.cat([1 - classes.sum(1, keepdim=True), classes], 1)
    far = target.roll(3, 3)
    return 4 * far + drawn(3, *target.shape), 4 * far + drawn(4, *target.shape), target


@pytest.mark.parametrize("where, reduce, kind", READINGS)
def test_the_box_of_the_edges_changes_no_reading(where, reduce, kind):
    logits, main, target = softmax_task()
    edges = edges_for("each" if kind == "masks" else kind)
    loss = criterion(where, reduce, kind).eval()
    terms = loss.terms(EGOutput(logits, edges, main), target)
    assert all(v.dim() == 0 for v in terms.values())
    given = None if kind == "masks" else as_numpy(edges)
    masks = as_numpy(target[:, 1:])
    parts = [
        by_hand(softmax(as_numpy(z), 1)[:, 1:], masks, where, reduce, given) for z in (logits, main)
    ]
    assert terms["consistency"].item() == pytest.approx(np.mean(parts), rel=1e-12)
    assert terms["total"].item() == pytest.approx(
        sum(
            weight * terms[k].item()
            for k, weight in {
                "semantic": 1,
                "consistency": 1,
                "edge_dice": 1,
                "edge_bce": 0.5,
            }.items()
        )
    )


@pytest.mark.parametrize("where", ["union", "all"])
def test_a_box_would_change_what_is_compared_elsewhere(where):
    prob, masks = wrong_prediction()[:1], two_cases()[:1]
    box = (..., *edge_box(sobel_magnitude(masks)[0]))
    whole, inside = (
        by_hand(as_numpy(prob[b]), as_numpy(masks[b]), where, "sum") for b in ((...,), box)
    )
    assert inside < 0.95 * whole


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_both_parts_decide_with_the_same_noise(activation):
    logits, main, target = softmax_task()
    skip = 1 if activation == "softmax" else 0
    edges = drawn(5, 2, 3 - skip, *SHAPE)
    keys = [(0, 1, 2), (0, 1, 3)]
    loss = EGLoss(activation, where="all", consistency="both", tau=0.7, supervise="main").train()
    out = EGOutput(logits, edges, main)
    found = loss.terms(out, target, keys=keys)["consistency"].item()
    parts = []
    for b, key in enumerate(keys):
        z = as_numpy(main[b : b + 1])
        if activation == "softmax":
            decided = softmax((z + gumbel_noise(z.shape, [key]).numpy()) / 0.7, 1)
        else:
            noise = gumbel_noise((1, 2, *z.shape[1:]), [key])[0].numpy()
            decided = expit((z + noise[0] - noise[1]) / 0.7)
        truth = as_numpy(target[b : b + 1, skip:])
        parts.append(by_hand(decided[:, skip:], truth, "all", "mean", as_numpy(edges[b : b + 1])))
    assert found == pytest.approx(np.mean(parts), rel=1e-12)


def pulls(loss, where_to="consistency"):
    "Gradients of one term with respect to the edge logits, the fused logits and those of the main stream"
    logits, main, target = softmax_task()
    edges = 2 * drawn(2, 2, 1 if loss.edge["edge_classes"] == "any" else 2, *SHAPE)
    inputs = [t.requires_grad_() for t in (edges, logits, main)]
    out = EGOutput(inputs[1], inputs[0], inputs[2])
    term = loss.terms(out, target)[where_to]
    return torch.autograd.grad(term, inputs, allow_unused=True)


@pytest.mark.parametrize("where, reduce, kind", READINGS)
def test_the_edge_stream_is_reached_by_both_and_never_by_the_masks_alone(where, reduce, kind):
    edges, fused, main = pulls(criterion(where, reduce, kind))
    assert fused.abs().sum() > 0 and main.abs().sum() > 0
    if kind == "masks":
        assert edges is None or not edges.any()
    else:
        assert edges.abs().sum() > 0


def test_the_part_of_the_edge_stream_reaches_the_masks_too():
    "What both adds to the gradient of the masks"
    alone = pulls(EGLoss(supervise="fused", where="all").eval())[1]
    both = pulls(EGLoss(supervise="fused", where="all", consistency="both").eval())[1]
    assert (both - alone).abs().sum() > 0.1 * alone.abs().sum()


def test_the_gradient_of_the_edge_logits_by_hand():
    logits, _, target = softmax_task()
    edges = edges_for("each").requires_grad_()
    loss = EGLoss(where="all", consistency="both", supervise="fused").eval()
    loss.terms(EGOutput(logits, edges), target)["consistency"].backward()
    strength = [
        [np.minimum(size_of_gradient(p) / 16, 1) for p in case[1:]]
        for case in softmax(as_numpy(logits), 1)
    ]
    p = expit(as_numpy(edges))
    expected = np.sign(p - np.array(strength)) * p * (1 - p) / p.size
    assert edges.grad.numpy() == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_gradients_of_the_new_readings():
    "Against finite differences, at numbers where no absolute value has its corner"
    masks = torch.zeros(1, 2, 4, 4, 4, dtype=torch.float64)
    masks[:, 0, :2] = 1
    masks[:, 1, 1:3, 1:3] = 1
    prob = torch.sigmoid(drawn(6, *masks.shape)).requires_grad_()
    for where, channels in product(("truth", "all"), (1, 2)):
        edges = drawn(7, 1, channels, 4, 4, 4).requires_grad_()

        def loss(p, e, where=where):
            return consistency_loss(p, masks, where, None, "sum", e)

        assert torch.autograd.gradcheck(loss, (prob, edges), fast_mode=True)


def test_two_voxels_of_a_hard_face_answer():
    "One on each side of it, with 1; so an edge stream of that thickness agrees exactly, a thinner one does not"
    mask = torch.zeros(1, 1, 8, 8, 8, dtype=torch.float64)
    mask[:, :, :4] = 1
    edge = torch.zeros_like(mask)
    edge[:, :, 3:5] = 1

    def mismatch(e):
        return consistency_loss(mask, mask, "all", None, "sum", 80 * (2 * e - 1)).item()

    assert mismatch(edge) == pytest.approx(0, abs=6e-6 * mask.numel())
    assert mismatch(edge * mask) == pytest.approx(
        64, abs=6e-6 * mask.numel()
    )  # the outer layer is missing


def test_what_does_not_go_together_is_refused():
    logits, _, target = softmax_task()
    with pytest.raises(InputError, match="thickness is 1. Choose thickness=2"):
        EGLoss(consistency="both", thickness=1)
    with pytest.raises(InputError, match="there is none. Choose consistency='masks'"):
        EGLoss(consistency="both", consistency_alone=True)(logits, target)
    with pytest.raises(InputError, match="consistency_reduce is 'max'. Choose 'mean' or 'sum'"):
        EGLoss(consistency_reduce="max")
    with pytest.raises(InputError, match="consistency is 'edges'. Choose 'masks' or 'both'"):
        EGLoss(consistency="edges")
    with pytest.raises(InputError, match="where is 'edges'. Choose 'truth', 'union' or 'all'"):
        consistency_loss(target, target, "edges")
    with pytest.raises(InputError, match="edge_logits"):
        consistency_loss(target, target, edge_logits=target[:, :2])
