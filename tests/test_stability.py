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

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from egcnn_nb.core import BRATS_REGIONS
from egcnn_nb.data.volumes import brain
from egcnn_nb.method.backbones import BACKBONES
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss
from egcnn_nb.tensors import region_masks, seed_everything

warnings.filterwarnings("ignore")

PATCH = (16, 16, 16)  # voxels
STEPS = 12
LR = 3e-3
MOST_RISE = 1.5  # the total, as a multiple of the first total
MOST_LOGIT = 10.0  # an edge logit, whatever its sign
PHANTOM = 7


def patch(size: tuple = PATCH) -> tuple[Tensor, Tensor]:
    "A patch around the tumor of a phantom: normalised images (1,4,D,H,W) and region masks (1,3,D,H,W)"
    images, labels = brain(PHANTOM)
    modalities = np.stack(list(images.values())).astype(np.float32)
    x = torch.from_numpy(modalities)
    x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
    masks = region_masks(torch.from_numpy(labels.astype(np.int64))[None], BRATS_REGIONS)
    centre = np.argwhere(labels > 0).mean(0).round().astype(int)
    box = []
    for middle, n, whole in zip(centre, size, labels.shape, strict=True):
        start = int(np.clip(middle - n // 2, 0, whole - n))
        box.append(slice(start, start + n))
    return x[:, *box][None], masks[:, :, *box]


@dataclass
class FirstSteps:
    "What the first steps of training did"

    totals: list  # of the loss, the first one before any step
    edge: float  # largest edge logit, whatever its sign
    fused: float  # largest fused logit

    @property
    def rise(self) -> float:
        "Largest total, as a multiple of the first"
        return max(self.totals) / self.totals[0]

    @property
    def calm(self) -> bool:
        "Whether the total never rises by more than half, and no edge logit is above ten"
        return self.rise <= MOST_RISE and self.edge <= MOST_LOGIT


def train(model: nn.Module, x: Tensor, masks: Tensor, steps: int = STEPS) -> FirstSteps:
    "Steps of Adam on one batch; the loss is Dice and cross entropy, with unweighted negatives"
    loss = EGLoss("sigmoid", semantic="dice_ce", weight_negatives=False)
    optimizer = torch.optim.Adam(model.parameters(), LR)
    done = FirstSteps([], 0.0, 0.0)
    for step in range(steps + 1):
        out = model(x)
        total = loss(out, masks, keys=[(0, 0, step)])
        done.totals.append(total.item())
        done.edge = max(done.edge, out.edge.detach().abs().max().item())
        done.fused = max(done.fused, out.logits.detach().abs().max().item())
        if step < steps:
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    return done


NORM = {"edge_head": "norm"}
RESIDUALS = ("layer", "block")


def ours(name: str, width: int, levels: int, **readings) -> EGCNN:
    "One of our backbones with an edge stream"
    net = BACKBONES[name](4, 3, width=width, levels=levels)
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
    done = train(model, *patch())
    assert done.calm, done


def monai_net(name: str, *args, **options) -> nn.Module:
    "A network of MONAI, which takes seconds to import"
    import monai.networks.nets as nets

    return getattr(nets, name)(*args, **options)


def mednext() -> nn.Module:
    "MedNeXt with one block a level"
    ratios = {f"{part}_expansion_ratio": 2 for part in ("encoder", "decoder", "bottleneck")}
    blocks = {"blocks_down": (1, 1, 1), "blocks_bottleneck": 1, "blocks_up": (1, 1, 1)}
    return monai_net(
        "MedNeXt", 3, init_filters=8, in_channels=4, out_channels=3, **ratios, **blocks
    )


def dynunet() -> nn.Module:
    "DynUNet with four levels"
    return monai_net("DynUNet", 3, 4, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[8, 16, 32, 64])


FOREIGN = {  # name -> (network, size of the patch)
    "UNet": (lambda: monai_net("UNet", 3, 4, 3, (8, 16, 32), (2, 2), num_res_units=1), PATCH),
    "SegResNet": (lambda: monai_net("SegResNet", 3, 8, 4, 3), PATCH),
    "DynUNet": (dynunet, PATCH),
    "BasicUNet": (lambda: monai_net("BasicUNet", 3, 4, 3, (8, 8, 16, 32, 64, 8)), (32, 16, 16)),
    "AttentionUnet": (lambda: monai_net("AttentionUnet", 3, 4, 3, (8, 16, 32), (2, 2)), PATCH),
    "MedNeXt": (mednext, PATCH),
}


def foreign(name: str, x: Tensor, **readings) -> EGCNN:
    "A network of MONAI with an edge stream"
    return EGCNN(FOREIGN[name][0](), x, activation="sigmoid", verbose=False, **readings)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("name", FOREIGN)
def test_the_first_steps_are_calm_around_other_networks(name, residual, seed=0):
    seed_everything(seed)
    x, masks = patch(FOREIGN[name][1])
    done = train(foreign(name, x, gate_residual=residual, **NORM), x, masks)
    assert done.calm, done


def test_the_plain_head_of_0_1_explodes(seed=0):
    seed_everything(seed)
    done = train(ours("segnet", 16, 4, edge_head="plain"), *patch())
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
        self.up_b = nn.Sequential(nn.ConvTranspose3d(32, 16, 2, 2), Gain(gain))
        self.up_a = nn.Sequential(nn.ConvTranspose3d(16, 8, 2, 2), Gain(gain))
        self.d = self.block(32, 16)
        self.e = self.block(16, 8)
        self.out = nn.Conv3d(8, 3, 1, bias=False)

    def block(self, before: int, channels: int, stride: int = 1) -> nn.Sequential:
        "Convolution, normalisation, ReLU, gain"
        layers = [nn.Conv3d(before, channels, 3, stride, 1), nn.InstanceNorm3d(channels), nn.ReLU()]
        return nn.Sequential(*layers, Gain(self.gain))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a / self.gain)
        c = self.c(b / self.gain)
        d = self.d(torch.cat([self.up_b(c / self.gain), b], 1) / self.gain)
        e = self.e(torch.cat([self.up_a(d / self.gain), a], 1) / self.gain)
        return self.out(e) / self.gain


LOUD = 1024.0  # a power of two, so that scaling up and down again changes no digit


def loud(gain: float, x: Tensor, seed: int = 0, **readings) -> EGCNN:
    "The loud network with an edge stream, which begins with its up-sampled map"
    seed_everything(seed)
    return EGCNN(
        Loud(gain), x, activation="sigmoid", decoder_entry="up_b", verbose=False, **readings
    )


def test_the_loud_network_itself_does_not_depend_on_its_gain():
    x, _ = patch()
    with torch.no_grad():
        quiet = loud(1.0, x).main(x)
        same = loud(LOUD, x).main(x)
    assert torch.equal(same, quiet) and quiet.std() > 0


READINGS = {"gate_residual": "block", **NORM}


def edge_logits(gain: float, x: Tensor, entry_norm: bool) -> Tensor:
    "Edge logits of the stream around the loud network. Alpha is fixed, since the gates read loud maps too."
    model = loud(gain, x, entry_norm=entry_norm, fixed_attention=0.5, **READINGS)
    with torch.no_grad():
        return model(x, full=True).edge


def test_a_stream_that_begins_with_a_norm_does_not_depend_on_the_size_of_the_maps():
    x, _ = patch()
    change = edge_logits(LOUD, x, True) - edge_logits(1.0, x, True)
    assert change.abs().max() < 1e-3
    change = edge_logits(LOUD, x, False) - edge_logits(1.0, x, False)
    assert change.abs().max() > 0.1  # the blocks are lost beside what they are added to


def gradient_of_the_first_block(gain: float, entry_norm: bool) -> float:
    "Norm of the gradient of the stream's deepest block before the first step"
    x, masks = patch()
    model = loud(gain, x, entry_norm=entry_norm, **READINGS)
    loss = EGLoss("sigmoid", weight_negatives=False)
    loss(model(x, full=True), masks, keys=[(0, 0, 0)]).backward()
    gradients = [p.grad.flatten() for p in model.edge.blocks[0].parameters()]
    return torch.cat(gradients).norm().item()


def test_the_gradient_reaches_the_first_block_of_a_stream_that_begins_with_a_norm():
    quiet = gradient_of_the_first_block(1.0, True)
    assert gradient_of_the_first_block(LOUD, True) > quiet / 2
    assert gradient_of_the_first_block(LOUD, False) < quiet / 50


@pytest.mark.parametrize("entry_norm", [False, True], ids=["raw entry", "entry_norm"])
def test_the_first_steps_are_calm_beside_maps_1000_times_as_large(entry_norm, seed=0):
    x, masks = patch()
    done = train(loud(LOUD, x, seed, entry_norm=entry_norm, **READINGS), x, masks)
    assert done.calm, done


def test_the_plain_head_of_0_1_starts_with_huge_logits_beside_maps_1000_times_as_large():
    x, masks = patch()
    assert train(loud(LOUD, x, edge_head="plain"), x, masks, steps=0).edge > 10 * MOST_LOGIT


@pytest.mark.parametrize("name", BACKBONES)
def test_the_first_steps_are_calm_where_the_fusion_reads_features(name, seed=0):
    seed_everything(seed)
    done = train(ours(name, 8, 3, fuse="features", **READINGS), *patch())
    assert done.calm, done
