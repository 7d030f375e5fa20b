"The consistency loss in each of its readings, against SciPy and plain loops in float64."

from dataclasses import dataclass
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
each_reading = pytest.mark.parametrize("where, reduce, kind", READINGS)


def drawn(seed, *shape):
    "Normal numbers in float64"
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def two_cases():
    "Masks of two classes in two cases: boxes of which some touch the border of the volume; one class is absent"
    masks = torch.zeros(2, 2, *SHAPE, dtype=torch.float64)
    masks[0, 0, 3:8, 4:9, 5:10] = 1
    masks[0, 1, 5:7, 5:8, 6:9] = 1
    masks[1, 0, :4, 6:11, 11:] = 1
    return masks


def wrong_prediction():
    "Probabilities that are high on the masks, moved by two voxels, and on a body far away from them"
    masks = two_cases()
    moved = masks.roll(2, 2)
    moved[:, :, 10:13, :3, :4] = 1
    noise = drawn(1, *moved.shape)
    sign = moved - 0.5
    logits = 6 * sign + 0.3 * noise
    return logits.sigmoid()


# ---- the loss by hand


def size_of_gradient(volume, eps=1e-8):
    "Length of SciPy's Sobel gradient (D,H,W); the library has this eps in its root"
    squared = 0
    for axis in range(3):
        derivative = sobel(volume, axis, mode="nearest")
        squared = squared + derivative**2
    return np.sqrt(squared + eps)


def strength(volume):
    "Length of the gradient, where a flat face counts 1"
    size = size_of_gradient(volume)
    return size / 16


def edge_of(mask):
    "The edge voxels of a mask"
    size = size_of_gradient(mask, 0)
    return size > 8


def compared(prob, mask, where):
    "The set e+ of eq. 7"
    if where == "all":
        return np.ones(mask.shape, bool)
    edge = edge_of(mask)
    if where == "union":
        predicted = prob > 0.5
        edge |= edge_of(predicted.astype(float))
    return edge


def over(difference, voxels, reduce):
    "Sum or mean over the voxels, one after the other"
    total = 0
    for value in difference[voxels]:
        total += float(value)
    if reduce == "sum":
        return total
    count = voxels.sum()
    return total / max(count, 1)


@dataclass
class Class:
    "One class of one case, as eq. 7 sees it"

    predicted: np.ndarray  # strength of its edges
    truth: np.ndarray
    voxels: np.ndarray  # that are compared

    def masks_part(self, reduce):
        "Eq. 7"
        difference = abs(self.predicted - self.truth)
        return over(difference, self.voxels, reduce)

    def edge_part(self, edge, reduce):
        "The same of the scores of the edge stream"
        found = expit(edge)
        wanted = np.minimum(self.predicted, 1)
        difference = abs(found - wanted)
        return over(difference, self.voxels, reduce)


def classes_of(prob, masks, where):
    "The classes of one case"
    found = []
    for p, mask in zip(prob, masks, strict=True):
        voxels = compared(p, mask, where)
        predicted = strength(p)
        truth = strength(mask)
        one = Class(predicted, truth, voxels)
        found.append(one)
    return found


def any_class(classes):
    "All classes as one: the strongest edge, and the voxels of any"
    first = classes[0]
    strongest = first.predicted
    voxels = first.voxels
    for one in classes[1:]:
        strongest = np.maximum(strongest, one.predicted)
        voxels = voxels | one.voxels
    return Class(strongest, strongest, voxels)


def by_hand(prob, masks, where, reduce, edge_logits=None):
    "Eq. 7, and the edge stream's part of it, from loops over cases, classes and voxels"
    masks_part = []
    edge_part = []
    for b, case in enumerate(prob):
        classes = classes_of(case, masks[b], where)
        masks_part += [one.masks_part(reduce) for one in classes]
        if edge_logits is None:
            continue
        edges = edge_logits[b]
        if len(edges) == 1:
            classes = [any_class(classes)]
        for edge, one in zip(edges, classes, strict=True):
            part = one.edge_part(edge, reduce)
            edge_part.append(part)
    if not edge_part:
        return np.mean(masks_part)
    return np.mean(masks_part) + np.mean(edge_part)


CHANNELS = {"masks": 0, "each": 2, "any": 1}  # of the edge stream


def edges_for(kind):
    "Scores of an edge stream, or None"
    channels = CHANNELS[kind]
    if channels == 0:
        return None
    return 2 * drawn(2, 2, channels, *SHAPE)


def as_numpy(x):
    "A tensor as an array; None stays"
    if x is None:
        return None
    return x.detach().numpy()


def exactly(value):
    "What a number must be in float64"
    return pytest.approx(value, rel=1e-12)


def check_consistency(prob, masks, edges, where, reduce):
    "The loss is that of the loops"
    found = consistency_loss(prob, masks, where, consistency_reduce=reduce, edge_logits=edges)
    prob = as_numpy(prob)
    masks = as_numpy(masks)
    edges = as_numpy(edges)
    expected = by_hand(prob, masks, where, reduce, edges)
    assert found.item() == exactly(expected)


@each_reading
def test_every_reading_of_the_consistency_loss_is_that_of_scipy_and_loops(where, reduce, kind):
    prob = wrong_prediction()
    masks = two_cases()
    edges = edges_for(kind)
    check_consistency(prob, masks, edges, where, reduce)
    crop = (..., slice(0, 13), slice(2, 13), slice(3, 16))
    prob = prob[crop]
    masks = masks[crop]
    if edges is not None:
        edges = edges[crop]
    check_consistency(prob, masks, edges, where, reduce)


# ---- the loss of a network


def criterion(where, reduce, kind, **more):
    "The loss of a task with a background and two classes"
    return EGLoss(
        where=where,
        consistency_reduce=reduce,
        edge_classes="any" if kind == "any" else "each",
        consistency="masks" if kind == "masks" else "both",
        **more,
    )


def softmax_task():
    "Fused and main logits with a background, and their one-hot target; its classes overlap nowhere"
    first, second = two_cases().unbind(1)
    first = first * (1 - second)
    background = 1 - first - second
    target = torch.stack([background, first, second], 1)
    far = 4 * target.roll(3, 3)
    noise = drawn(3, *target.shape)
    fused = far + noise
    noise = drawn(4, *target.shape)
    main = far + noise
    return fused, main, target


def foreground(logits):
    "Probabilities of the two classes"
    z = as_numpy(logits)
    prob = softmax(z, 1)
    return prob[:, 1:]


WEIGHTS = {"semantic": 1, "consistency": 1, "edge_dice": 1, "edge_bce": 0.5}


def weighted(terms):
    "The sum of the terms with their weights"
    total = 0
    for name, weight in WEIGHTS.items():
        total += weight * terms[name].item()
    return total


@each_reading
def test_the_box_of_the_edges_changes_no_reading(where, reduce, kind):
    logits, main, target = softmax_task()
    edges = edges_for("each" if kind == "masks" else kind)
    assert edges is not None
    loss = criterion(where, reduce, kind)
    loss.eval()
    out = EGOutput(logits, edges, main)
    terms = loss.terms(out, target)
    for value in terms.values():
        assert value.dim() == 0
    given = None if kind == "masks" else as_numpy(edges)
    masks = as_numpy(target[:, 1:])
    total = 0
    for stream in (logits, main):
        prob = foreground(stream)
        total += by_hand(prob, masks, where, reduce, given)
    mean = total / 2
    assert terms["consistency"].item() == exactly(mean)
    total = weighted(terms)
    assert terms["total"].item() == pytest.approx(total)


@pytest.mark.parametrize("where", ["union", "all"])
def test_a_box_would_change_what_is_compared_elsewhere(where):
    prob = wrong_prediction()[:1].numpy()
    masks = two_cases()[:1]
    strengths = sobel_magnitude(masks)
    box = (..., *edge_box(strengths[0]))
    masks = masks.numpy()
    whole = by_hand(prob, masks, where, "sum")
    inside = by_hand(prob[box], masks[box], where, "sum")
    assert inside < 0.95 * whole


TAU = 0.7


def decided(logits, key, activation):
    "What the Gumbel form makes of the logits of one case"
    z = logits.detach().numpy()
    if activation == "softmax":
        noise = gumbel_noise(z.shape, [key]).numpy()
        noisy = z + noise
        return softmax(noisy / TAU, 1)
    _, *own = z.shape
    noise = gumbel_noise((1, 2, *own), [key]).numpy()
    for_class, against = noise[0]
    noisy = z + for_class - against
    return expit(noisy / TAU)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_both_parts_decide_with_the_same_noise(activation):
    logits, main, target = softmax_task()
    skip = 1 if activation == "softmax" else 0
    edges = drawn(5, 2, 3 - skip, *SHAPE)
    keys = [(0, 1, 2), (0, 1, 3)]
    loss = EGLoss(activation, where="all", consistency="both", tau=TAU, supervise="main")
    out = EGOutput(logits, edges, main)
    terms = loss.terms(out, target, keys=keys)
    parts = []
    for b, key in enumerate(keys):
        case = slice(b, b + 1)
        prob = decided(main[case], key, activation)
        prob = prob[:, skip:]
        truth = as_numpy(target[case, skip:])
        given = as_numpy(edges[case])
        part = by_hand(prob, truth, "all", "mean", given)
        parts.append(part)
    mean = np.mean(parts)
    assert terms["consistency"].item() == exactly(mean)


# ---- gradients


@dataclass
class Pulls:
    "Gradients of the consistency loss"

    edge: torch.Tensor | None
    fused: torch.Tensor | None
    main: torch.Tensor | None


def pulls(loss):
    "Gradients with respect to the edge logits, the fused logits and those of the main stream"
    fused, main, target = softmax_task()
    edge_classes = loss.edge["edge_classes"]
    channels = 1 if edge_classes == "any" else 2
    edge = 2 * drawn(2, 2, channels, *SHAPE)
    inputs = (edge, fused, main)
    for tensor in inputs:
        tensor.requires_grad_()
    out = EGOutput(fused, edge, main)
    terms = loss.terms(out, target)
    found = torch.autograd.grad(terms["consistency"], inputs, allow_unused=True)
    return Pulls(*found)


def size(gradient):
    "Sum of the absolute values"
    sizes = gradient.abs()
    return sizes.sum()


@each_reading
def test_the_edge_stream_is_reached_by_both_and_never_by_the_masks_alone(where, reduce, kind):
    loss = criterion(where, reduce, kind)
    found = pulls(loss)
    edge = found.edge
    assert size(found.fused) > 0
    assert size(found.main) > 0
    if kind != "masks":
        assert size(edge) > 0
    elif edge is not None:
        assert size(edge) == 0


def test_the_part_of_the_edge_stream_reaches_the_masks_too():
    "What both adds to the gradient of the masks"
    masks = EGLoss(supervise="fused", where="all")
    both = EGLoss(supervise="fused", where="all", consistency="both")
    masks.eval()
    both.eval()
    alone = pulls(masks).fused
    together = pulls(both).fused
    assert alone is not None
    assert together is not None
    added = together - alone
    assert size(added) > 0.1 * size(alone)


def test_the_gradient_of_the_edge_logits_by_hand():
    logits, _, target = softmax_task()
    edges = edges_for("each")
    assert edges is not None
    edges.requires_grad_()
    loss = EGLoss(where="all", consistency="both", supervise="fused")
    loss.eval()
    out = EGOutput(logits, edges)
    terms = loss.terms(out, target)
    terms["consistency"].backward()
    p = expit(as_numpy(edges))
    prob = foreground(logits)
    wanted = np.zeros_like(p)
    for place in np.ndindex(2, 2):
        found = strength(prob[place])
        wanted[place] = np.minimum(found, 1)
    slope = p * (1 - p)
    side = np.sign(p - wanted)
    expected = side * slope / p.size
    assert edges.grad is not None
    gradient = edges.grad.numpy()
    assert gradient == pytest.approx(expected, rel=1e-9, abs=1e-15)


def small_masks():
    "Masks of two classes in one small case"
    masks = torch.zeros(1, 2, 4, 4, 4, dtype=torch.float64)
    masks[:, 0, :2] = 1
    masks[:, 1, 1:3, 1:3] = 1
    return masks


@pytest.mark.parametrize("where", ["truth", "all"])
@pytest.mark.parametrize("channels", [1, 2])
def test_gradients_of_the_new_readings(where, channels):
    "Against finite differences, at numbers where no absolute value has its corner"
    masks = small_masks()
    logits = drawn(6, *masks.shape)
    prob = torch.sigmoid(logits)
    edges = drawn(7, 1, channels, 4, 4, 4)
    inputs = (prob, edges)
    for tensor in inputs:
        tensor.requires_grad_()

    def loss(p, e):
        return consistency_loss(p, masks, where, None, "sum", e)

    right = torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    assert right


def half_volume():
    "A mask that fills half of a volume"
    mask = torch.zeros(1, 1, 8, 8, 8, dtype=torch.float64)
    mask[:, :, :4] = 1
    return mask


def mismatch(mask, edge):
    "How much an edge stream that says exactly this differs from the edges of a mask, summed"
    sign = 2 * edge - 1
    logits = 80 * sign
    loss = consistency_loss(mask, mask, "all", None, "sum", logits)
    return loss.item()


def test_two_voxels_of_a_hard_face_answer():
    "One on each side of it, with 1; so an edge stream of that thickness agrees exactly, a thinner one does not"
    mask = half_volume()
    edge = torch.zeros_like(mask)
    edge[:, :, 3:5] = 1
    inner = edge * mask  # the outer layer is missing
    near = 6e-6 * mask.numel()
    of_both = mismatch(mask, edge)
    of_inner = mismatch(mask, inner)
    assert of_both == pytest.approx(0, abs=near)
    assert of_inner == pytest.approx(64, abs=near)


@pytest.mark.parametrize(
    "readings, told",
    [
        ({"consistency": "both", "thickness": 1}, "thickness is 1. Choose thickness=2"),
        ({"consistency_reduce": "max"}, "consistency_reduce is 'max'. Choose 'mean' or 'sum'"),
        ({"consistency": "edges"}, "consistency is 'edges'. Choose 'masks' or 'both'"),
    ],
)
def test_readings_that_do_not_go_together_are_refused(readings, told):
    with pytest.raises(InputError, match=told):
        EGLoss(**readings)


def test_what_does_not_go_together_is_refused():
    logits, _, target = softmax_task()
    loss = EGLoss(consistency="both", consistency_alone=True)
    with pytest.raises(InputError, match="there is none. Choose consistency='masks'"):
        loss(logits, target)
    with pytest.raises(InputError, match="where is 'edges'. Choose 'truth', 'union' or 'all'"):
        consistency_loss(target, target, "edges")
    with pytest.raises(InputError, match="edge_logits"):
        consistency_loss(target, target, edge_logits=target[:, :2])
