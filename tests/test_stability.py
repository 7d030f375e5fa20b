"""A head that is stable: the first steps of Adam move no edge logit out of sight, and the loss does not jump.

The edge stream adds up what its blocks and gates put out.
The head of 0.1, `edge_head="plain"`, reads that sum as it is.
`edge_head="norm"` reads it after GroupNorm and ReLU.

Measured on the patch below with seed 0: the largest total, as a multiple of the first, and the largest edge logit.

| network (width, levels)    | plain head   | norm, layer | norm, block |
|----------------------------|--------------|-------------|-------------|
| Seg-Net (8, 3)             | 1.00,  12.1  | 1.00, 2.9   | 1.00, 2.7   |
| Seg-Net (8, 4)             | 1.47,  30.2  | 1.00, 2.3   | 1.00, 1.8   |
| Seg-Net (8, 5)             | 1.39,  18.5  | 1.00, 2.6   | 1.00, 2.2   |
| Seg-Net (16, 3)            | 1.38,  21.6  | 1.00, 2.5   | 1.00, 2.1   |
| Seg-Net (16, 4)            | 4.90, 241.6  | 1.00, 2.1   | 1.00, 1.9   |
| U-Net (16, 4)              | 1.18,  21.4  | 1.00, 2.8   | 1.00, 2.9   |
| V-Net (16, 4)              | 1.48,  29.9  | 1.00, 1.7   | 1.00, 2.7   |
| SegResNet of MONAI         | 1.43,  16.9  | 1.00, 2.5   | 1.00, 1.8   |
| BasicUNet of MONAI         | 1.00,  12.2  | 1.00, 2.1   | 1.00, 2.0   |

Over three seeds and all networks below the norm keeps every edge logit under 5.1, and no total rises above its start.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from egcnn_nb.core import BRATS_REGIONS
from egcnn_nb.data.volumes import brain
from egcnn_nb.method.backbones import BACKBONES
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss, EGOutput
from egcnn_nb.tensors import region_masks, seed_everything

warnings.filterwarnings("ignore")

PATCH = (16, 16, 16)  # voxels
STEPS = 12
LR = 3e-3
MOST_RISE = 1.5  # the total, as a multiple of the first total
MOST_LOGIT = 10.0  # an edge logit, whatever its sign
PHANTOM = 7


def normalised(images: dict) -> Tensor:
    "The images of a phantom, each with mean 0 and deviation 1 (4,D,H,W)"
    modalities = list(images.values())
    array = np.stack(modalities).astype(np.float32)
    x = torch.from_numpy(array)
    axes = (1, 2, 3)
    mean = x.mean(axes, keepdim=True)
    deviation = x.std(axes, keepdim=True)
    centred = x - mean
    return centred / deviation


def box_around(labels: np.ndarray, size: tuple) -> list[slice]:
    "A box of this size around the middle of what is labelled, inside the volume"
    voxels = np.argwhere(labels > 0)
    centre = voxels.mean(0).round()
    box = []
    for middle, n, whole in zip(centre, size, labels.shape, strict=True):
        start = int(middle) - n // 2
        start = max(start, 0)
        start = min(start, whole - n)
        end = start + n
        box.append(slice(start, end))
    return box


def patch(size: tuple = PATCH) -> tuple[Tensor, Tensor]:
    "A patch around the tumor of a phantom: normalised images (1,4,D,H,W) and region masks (1,3,D,H,W)"
    images, labels = brain(PHANTOM)
    x = normalised(images)
    x = x.unsqueeze(0)
    whole = torch.from_numpy(labels.astype(np.int64))
    whole = whole.unsqueeze(0)
    masks = region_masks(whole, BRATS_REGIONS)
    box = box_around(labels, size)
    inside = (..., *box)
    return x[inside], masks[inside]


def largest(logits: Tensor) -> float:
    "The largest logit, whatever its sign"
    sizes = logits.detach().abs()
    highest = sizes.max()
    return highest.item()


@dataclass
class FirstSteps:
    "What the first steps of training did"

    totals: list  # of the loss, the first one before any step
    edge: float  # largest edge logit, whatever its sign
    fused: float  # largest fused logit

    @property
    def rise(self) -> float:
        "Largest total, as a multiple of the first"
        first = self.totals[0]
        highest = max(self.totals)
        return highest / first

    def note(self, total: Tensor, out: EGOutput) -> None:
        "Note what a step did"
        value = total.item()
        edge = largest(out.edge)
        fused = largest(out.logits)
        self.totals.append(value)
        self.edge = max(self.edge, edge)
        self.fused = max(self.fused, fused)

    @property
    def calm(self) -> bool:
        "Whether the total never rises by more than half, and no edge logit is above ten"
        if self.rise > MOST_RISE:
            return False
        return self.edge <= MOST_LOGIT


def train(model: nn.Module, x: Tensor, masks: Tensor, steps: int = STEPS) -> FirstSteps:
    "Steps of Adam on one batch; the loss is Dice and cross entropy, with unweighted negatives"
    loss = EGLoss("sigmoid", semantic="dice_ce", weight_negatives=False)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    done = FirstSteps([], 0.0, 0.0)
    for step in range(steps + 1):
        out = model(x)
        key = (0, 0, step)
        total = loss(out, masks, keys=[key])
        done.note(total, out)
        if step < steps:
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    return done


NORM = {"edge_head": "norm"}
RESIDUALS = ("layer", "block")


def ours(name: str, width: int, levels: int, **readings) -> EGCNN:
    "One of our backbones with an edge stream"
    make = BACKBONES[name]
    net = make(4, 3, width=width, levels=levels)
    return EGCNN(net, activation="sigmoid", **readings)


OURS = {}  # id -> network, width, levels, residual layer in each gate; large networks have one kind
for _name in BACKBONES:
    for _width, _levels, _residual in (
        (8, 3, "layer"),
        (8, 3, "block"),
        (16, 3, "layer"),
        (16, 4, "block"),
    ):
        OURS[f"{_name}-{_width}-{_levels}-{_residual}"] = (_name, _width, _levels, _residual)
OURS["segnet-8-4-layer"] = ("segnet", 8, 4, "layer")
OURS["segnet-8-5-block"] = ("segnet", 8, 5, "block")


@pytest.mark.parametrize("case", OURS)
def test_the_first_steps_are_calm(case, seed=0):
    name, width, levels, residual = OURS[case]
    seed_everything(seed)
    model = ours(name, width, levels, gate_residual=residual, **NORM)
    x, masks = patch()
    done = train(model, x, masks)
    assert done.calm, done


def monai_net(name: str, *args, **options) -> nn.Module:
    "A network of MONAI, which takes seconds to import"
    import monai.networks.nets as nets

    make = getattr(nets, name)
    return make(*args, **options)


def mednext() -> nn.Module:
    "MedNeXt with one block a level"
    return monai_net(
        "MedNeXt",
        3,
        init_filters=8,
        in_channels=4,
        out_channels=3,
        encoder_expansion_ratio=2,
        decoder_expansion_ratio=2,
        bottleneck_expansion_ratio=2,
        blocks_down=(1, 1, 1),
        blocks_bottleneck=1,
        blocks_up=(1, 1, 1),
    )


def dynunet() -> nn.Module:
    "DynUNet with four levels"
    return monai_net(
        "DynUNet",
        3,
        4,
        3,
        kernel_size=[3, 3, 3, 3],
        strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2],
        filters=[8, 16, 32, 64],
    )


FOREIGN = {  # name -> network
    "UNet": partial(monai_net, "UNet", 3, 4, 3, (8, 16, 32), (2, 2), num_res_units=1),
    "SegResNet": partial(monai_net, "SegResNet", 3, 8, 4, 3),
    "DynUNet": dynunet,
    "BasicUNet": partial(monai_net, "BasicUNet", 3, 4, 3, (8, 8, 16, 32, 64, 8)),
    "AttentionUnet": partial(monai_net, "AttentionUnet", 3, 4, 3, (8, 16, 32), (2, 2)),
    "MedNeXt": mednext,
}
LARGER = {"BasicUNet": (32, 16, 16)}  # patches of networks that go down further


def foreign(name: str, x: Tensor, **readings) -> EGCNN:
    "A network of MONAI with an edge stream"
    make = FOREIGN[name]
    net = make()
    return EGCNN(net, x, activation="sigmoid", verbose=False, **readings)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("name", FOREIGN)
def test_the_first_steps_are_calm_around_other_networks(name, residual, seed=0):
    seed_everything(seed)
    size = LARGER.get(name, PATCH)
    x, masks = patch(size)
    model = foreign(name, x, gate_residual=residual, **NORM)
    done = train(model, x, masks)
    assert done.calm, done


def test_the_plain_head_of_0_1_explodes(seed=0):
    seed_everything(seed)
    model = ours("segnet", 16, 4, edge_head="plain")
    x, masks = patch()
    done = train(model, x, masks)
    assert done.rise > 2 * MOST_RISE, done
    assert done.edge > 5 * MOST_LOGIT, done


class Gain(nn.Module):
    "Its input times a number"

    def __init__(self, gain: float):
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Loud(nn.Module):
    "A U-Net whose maps are `gain` times as large where others read them; its output has no gain"

    def __init__(self, gain: float):
        super().__init__()
        self.gain = gain
        self.a = self.block(4, 8)
        self.b = self.block(8, 16, 2)
        self.c = self.block(16, 32, 2)
        self.up_b = self.up(32, 16)
        self.up_a = self.up(16, 8)
        self.d = self.block(32, 16)
        self.e = self.block(16, 8)
        self.out = nn.Conv3d(8, 3, 1, bias=False)

    def up(self, before: int, channels: int) -> nn.Sequential:
        "A transposed convolution that doubles the size, gain"
        conv = nn.ConvTranspose3d(before, channels, 2, 2)
        gain = Gain(self.gain)
        return nn.Sequential(conv, gain)

    def block(self, before: int, channels: int, stride: int = 1) -> nn.Sequential:
        "Convolution, normalisation, ReLU, gain"
        return nn.Sequential(
            nn.Conv3d(before, channels, 3, stride, 1),
            nn.InstanceNorm3d(channels),
            nn.ReLU(),
            Gain(self.gain),
        )

    def quiet(self, *maps: Tensor) -> Tensor:
        "Maps beside each other, without their gain"
        beside = torch.cat(maps, 1)
        return beside / self.gain

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        quiet = self.quiet(a)
        b = self.b(quiet)
        quiet = self.quiet(b)
        c = self.c(quiet)
        quiet = self.quiet(c)
        up = self.up_b(quiet)
        quiet = self.quiet(up, b)
        d = self.d(quiet)
        quiet = self.quiet(d)
        up = self.up_a(quiet)
        quiet = self.quiet(up, a)
        e = self.e(quiet)
        logits = self.out(e)
        return logits / self.gain


LOUD = 1024.0  # a power of two, so that scaling up and down again changes no digit


def loud(gain: float, x: Tensor, seed: int = 0, **readings) -> EGCNN:
    "The loud network with an edge stream, which begins with its up-sampled map"
    seed_everything(seed)
    return EGCNN(
        Loud(gain),
        x,
        activation="sigmoid",
        decoder_entry="up_b",
        verbose=False,
        **readings,
    )


def test_the_loud_network_itself_does_not_depend_on_its_gain():
    x, _ = patch()
    quiet = loud(1.0, x)
    same = loud(LOUD, x)
    with torch.no_grad():
        expected = quiet.main(x)
        found = same.main(x)
    assert torch.equal(found, expected)
    assert expected.std() > 0


READINGS: dict[str, Any] = {"gate_residual": "block", **NORM}


def edge_logits(gain: float, x: Tensor, entry_norm: bool) -> Tensor:
    "Edge logits of the stream around the loud network. Alpha is fixed, since the gates read loud maps too."
    model = loud(gain, x, entry_norm=entry_norm, fixed_attention=0.5, **READINGS)
    with torch.no_grad():
        out = model(x, full=True)
    return out.edge


def change_of_edges(entry_norm: bool) -> float:
    "How much the edge logits change when the maps are louder"
    x, _ = patch()
    quiet = edge_logits(1.0, x, entry_norm)
    noisy = edge_logits(LOUD, x, entry_norm)
    change = noisy - quiet
    return largest(change)


def test_a_stream_that_begins_with_a_norm_does_not_depend_on_the_size_of_the_maps():
    change = change_of_edges(entry_norm=True)
    assert change < 1e-3
    change = change_of_edges(entry_norm=False)
    assert change > 0.1  # the blocks are lost beside what they are added to


def gradient_of_the_first_block(gain: float, entry_norm: bool) -> float:
    "Norm of the gradient of the stream's deepest block before the first step"
    x, masks = patch()
    model = loud(gain, x, entry_norm=entry_norm, **READINGS)
    loss = EGLoss("sigmoid", weight_negatives=False)
    out = model(x, full=True)
    total = loss(out, masks, keys=[(0, 0, 0)])
    total.backward()
    block = model.edge.blocks[0]
    gradients = []
    for parameter in block.parameters():
        gradient = parameter.grad
        assert gradient is not None
        gradients.append(gradient.flatten())
    whole = torch.cat(gradients)
    size = whole.norm()
    return size.item()


def test_the_gradient_reaches_the_first_block_of_a_stream_that_begins_with_a_norm():
    quiet = gradient_of_the_first_block(1.0, True)
    with_norm = gradient_of_the_first_block(LOUD, True)
    without = gradient_of_the_first_block(LOUD, False)
    assert with_norm > quiet / 2
    assert without < quiet / 50


@pytest.mark.parametrize("entry_norm", [False, True], ids=["raw entry", "entry_norm"])
def test_the_first_steps_are_calm_beside_maps_1000_times_as_large(entry_norm, seed=0):
    x, masks = patch()
    model = loud(LOUD, x, seed, entry_norm=entry_norm, **READINGS)
    done = train(model, x, masks)
    assert done.calm, done


def test_the_plain_head_of_0_1_starts_with_huge_logits_beside_maps_1000_times_as_large():
    x, masks = patch()
    model = loud(LOUD, x, edge_head="plain")
    done = train(model, x, masks, steps=0)
    assert done.edge > 10 * MOST_LOGIT


@pytest.mark.parametrize("name", BACKBONES)
def test_the_first_steps_are_calm_where_the_fusion_reads_features(name, seed=0):
    seed_everything(seed)
    model = ours(name, 8, 3, fuse="features", **READINGS)
    x, masks = patch()
    done = train(model, x, masks)
    assert done.calm, done
