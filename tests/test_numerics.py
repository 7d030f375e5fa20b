"Layers with and without kernels, in half types and at every mean, compared with float64. Then the check of a run."

import copy
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import egcnn_nb.fast as fast
from egcnn_nb.core import KITS
from egcnn_nb.fast.layers import (
    Conv2d,
    Conv3d,
    ConvTranspose2d,
    ConvTranspose3d,
    GroupNorm,
    PReLU,
    channels_last,
    conv_transpose,
    mix_channels,
    norm,
)
from egcnn_nb.method.losses import EGLoss, EGOutput
from egcnn_nb.run.models import make_model
from egcnn_nb.run.self_check import WrongLayer, compute_in_float32, describe_check, wrong_layers
from egcnn_nb.run.settings import Settings
from egcnn_nb.tensors import to_target

BF16 = torch.bfloat16
UNIT = 2**-8  # bfloat16 rounds by no more than this share


@pytest.fixture(params=[True, False], ids=["kernels", "plain"])
def kernels(request, monkeypatch):
    "The switch of the kernels, on and off"
    monkeypatch.setattr(fast, "enabled", request.param)
    return request.param


both_ways = pytest.mark.usefixtures("kernels")


def litter():
    "Leave huge numbers in memory that is free again, so that what is never written is seen"
    for n in (64, 256, 1024, 4096, 16384, 65536):
        shape = (n,)
        torch.full(shape, 3e38)
        torch.full(shape, 3e38, dtype=BF16)


def passed(layer, x, grad):
    "Output, and derivatives of x and of each parameter"
    return with_derivatives(layer, layer, x, grad)


def with_derivatives(function, layer, x, grad):
    "Output of a function of x, and its derivatives with respect to x and each parameter of a layer"
    x = x.detach()
    x.requires_grad_()
    y = function(x)
    grad = grad.to(y.dtype)
    inputs = [x]
    inputs += layer.parameters()
    derivatives = torch.autograd.grad(y, inputs, grad)
    output = y.detach()
    return [output, *derivatives]


def rounded(layer, kind=BF16):
    "The layer's weights become what `kind` can hold"
    with torch.no_grad():
        for p in layer.parameters():
            nearest = p.to(kind)
            p.copy_(nearest)
    return layer


def numbers(*shape, kind=BF16):
    "Normal numbers that a type can hold, as float32"
    drawn = torch.randn(shape)
    held = drawn.to(kind)
    return held.float()


def off(found, truth):
    "Error as a share of the truth, over all numbers"
    found = found.double()
    truth = truth.double()
    difference = found - truth
    error = difference.norm()
    size = truth.norm()
    share = error / size.clamp(min=1e-30)
    return share.item()


THEIRS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ARGUMENTS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


def class_of_torch(layer):
    "torch's class from which a layer is derived"
    for theirs in THEIRS:
        if isinstance(layer, theirs):
            return theirs
    raise AssertionError(layer)


def judge_of(layer):
    "torch's own layer in float64, which no library for half types computes"
    theirs = class_of_torch(layer)
    settings = {name: getattr(layer, name) for name in ARGUMENTS}
    has_bias = layer.bias is not None
    judge = theirs(bias=has_bias, **settings)
    judge.double()
    judge.load_state_dict(layer.state_dict())
    return judge


def in_bfloat16(layer, x, grad, pure):
    "What a layer gives with weights in bfloat16, or within autocast"
    if pure:
        layer = layer.to(BF16)
        return passed(layer, x.to(BF16), grad)
    with torch.autocast("cpu", BF16):
        return passed(layer, x, grad)


def check(layer, size, batch=2, pure=False):
    "Output and gradients of one layer on one size, within what the rounding of results explains"
    rounded(layer)
    judge = judge_of(layer)
    x = numbers(batch, layer.in_channels, *size)
    exact_x = x.double()
    exact_y = judge(exact_x)
    grad = numbers(*exact_y.shape)
    exact_grad = grad.double()
    truth = passed(judge, exact_x, exact_grad)
    litter()
    found = in_bfloat16(layer, x, grad, pure)
    output = found[0]
    assert output.dtype == BF16
    allowed = 4 * UNIT  # some libraries round between the taps of a kernel
    _, _, *new_size = output.shape
    smallest = min(*size, *new_size)
    if smallest < 8:
        allowed = UNIT
    expect_near(found, truth, allowed)


PASSED = ("output", "input gradient", "weight gradient", "bias gradient")


def expect_near(found, truth, allowed):
    "Outputs and derivatives are off by no more than a share"
    assert len(found) == len(truth)
    for name, u, v in zip(PASSED, found, truth, strict=False):  # a layer may have no bias
        assert u.shape == v.shape
        error = off(u, v)
        assert error < allowed, (name, error)


def thin_sizes():
    "Sizes of 9, but for one axis"
    found = []
    for axis in range(3):
        for n in (1, 2, 3, 5, 7, 8):
            size = [9, 9, 9]
            size[axis] = n
            found.append(tuple(size))
    return found


CUBES = [(n, n, n) for n in range(1, 9)]
PLATES = [(1, 2, 9), (2, 1, 9), (2, 9, 2), (9, 2, 2), (3, 2, 1), (4, 3, 2), (2, 4, 8), (8, 2, 4)]
SIZES = [*CUBES, *thin_sizes(), *PLATES]


def fits(size, kernel, padding):
    "Whether a kernel fits into a padded volume"
    smallest = min(size)
    padded = smallest + 2 * padding
    return padded >= kernel


@both_ways
@pytest.mark.parametrize(
    "kernel,stride,padding",
    [(1, 1, 0), (1, 2, 0), (2, 1, 0), (2, 2, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (4, 2, 1)],
)
def test_a_convolution_in_bfloat16_is_right_on_every_size(kernel, stride, padding):
    torch.manual_seed(0)
    channels = itertools.cycle(CHANNELS)
    for number, size in enumerate(SIZES):
        inner, outer = next(channels)
        if fits(size, kernel, padding):
            has_bias = number % 3 == 0
            layer = Conv3d(inner, outer, kernel, stride, padding, bias=has_bias)
            check_numbered(layer, size, number)


CHANNELS = ((8, 16), (16, 32), (3, 8), (8, 4))


def check_numbered(layer, size, number):
    "A check with one case or two, every fifth with weights in bfloat16"
    is_odd = number % 2
    is_fifth = number % 5 == 0
    check(layer, size, batch=1 + is_odd, pure=is_fifth)


@both_ways
@pytest.mark.parametrize("channels", [(8, 16), (16, 32), (8, 8), (1, 8)])
def test_two_planes_have_right_weight_gradients(channels):
    torch.manual_seed(1)
    for size in TWO_PLANES:
        layer = Conv3d(*channels, kernel_size=3, padding=1, bias=False)
        check(layer, size)


TWO_PLANES = ((2, 8, 8), (2, 16, 16), (1, 8, 8), (2, 2, 2), (8, 2, 8), (8, 8, 2), (2, 5, 16))
PAIRED = ((2, 4, 6), (8, 8, 8), (8, 8, 14), (8, 9, 16), (9, 8, 18))


def test_pairs_of_voxels_are_right(monkeypatch):
    monkeypatch.setattr("egcnn_nb.fast.layers._LANES", 16)
    torch.manual_seed(2)
    for size in PAIRED:
        for channels in ((8, 8), (3, 4), (16, 8)):
            rounded_twice = Conv3d(*channels, 3, padding=1, bias=False)
            check(rounded_twice, size)


@both_ways
@pytest.mark.parametrize(
    "kernel,stride,padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (4, 2, 1), (1, 1, 0)]
)
def test_a_transposed_convolution_in_bfloat16_is_right_on_every_size(kernel, stride, padding):
    torch.manual_seed(3)
    channels = itertools.cycle([(16, 8), (8, 3)])
    sizes = SIZES[::2]
    for number, size in enumerate(sizes):
        inner, outer = next(channels)
        steps = min(size) - 1
        shortest = steps * stride - 2 * padding + kernel
        if shortest > 0:
            layer = ConvTranspose3d(inner, outer, kernel, stride, padding)
            check_numbered(layer, size, number)


@both_ways
def test_two_dimensions_in_bfloat16_are_right_on_every_size():
    torch.manual_seed(4)
    sides = (1, 2, 3, 5, 7, 8)
    sizes = itertools.product(sides, repeat=2)
    for number, size in enumerate(sizes):
        stride = 1 + number % 2
        layer = Conv2d(8, 16, 3, stride, 1)
        check(layer, size)
        every_fifth = number % 5 == 0
        transposed = ConvTranspose2d(8, 4, 2, 2)
        check(transposed, size, pure=every_fifth)
    layer = conv_transpose(2, 8, 4, 2)
    assert isinstance(layer, ConvTranspose2d)


@both_ways
@pytest.mark.parametrize(
    "odd",
    [
        {"groups": 2},
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "padding_mode": "replicate"},
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
    ],
)
def test_whatever_else_a_convolution_can_do_is_right_in_bfloat16(odd):
    torch.manual_seed(5)
    padded = odd.get("padding", "valid") != "valid"
    settings = {"kernel_size": 3, **odd}
    for size in ((2, 8, 8), (3, 3, 3), (8, 2, 9), (9, 8, 8), (9, 10, 11)):
        if padded or min(size) >= 3:
            layer = Conv3d(8, 16, **settings)
            check(layer, size)


@both_ways
def test_channels_are_mixed_rightly_in_bfloat16():
    torch.manual_seed(6)
    for size in SIZES:
        x = numbers(2, 8, *size)
        w = numbers(5, 8, 1, 1, 1)
        exact = F.conv3d(x.double(), w.double())
        x = x.to(BF16)
        w = w.to(BF16)
        with torch.autocast("cpu", BF16):
            mixed = mix_channels(x, w)
        assert mixed.dtype == BF16
        assert off(mixed, exact) < UNIT


def gradients_of(layer, x, inputs):
    "Gradients of a loss, which can be differentiated once more"
    y = layer(x)
    loss = y.square().sum()
    return torch.autograd.grad(loss, inputs, create_graph=True)


def second_derivatives(layer, x):
    "Derivatives of the squared length of a gradient"
    inputs = [x]
    inputs += layer.parameters()
    length = torch.zeros(())
    found = gradients_of(layer, x, inputs)
    for gradient in found:
        squares = gradient.square()
        length = length + squares.sum()
    return torch.autograd.grad(length, inputs, allow_unused=True)


def is_by_function(layer):
    "Whether a kernel computes a layer by an autograd.Function of its own"
    if isinstance(layer, GroupNorm):
        return True
    kernel = getattr(layer, "kernel_size", None)
    return kernel == (3, 3, 3)


SECOND = [  # a layer, and the size of a volume that its kernel computes
    (Conv3d(2, 2, 3, padding=1, bias=False), (3, 4, 6)),
    (Conv3d(8, 3, 1), (3, 4, 5)),
    (GroupNorm(2, 4), (33, 32, 34)),
    (PReLU(4), (3, 4, 5)),
]


@pytest.mark.parametrize("layer, size", SECOND, ids=lambda v: type(v).__name__)
def test_a_second_derivative_is_right_or_refused(layer, size, kernels, monkeypatch):
    monkeypatch.setattr("egcnn_nb.fast.layers._LANES", 16)
    torch.manual_seed(11)
    channels = getattr(layer, "in_channels", 4)
    x = torch.randn(2, channels, *size, requires_grad=True)
    if kernels and is_by_function(layer):
        with pytest.raises(RuntimeError, match="EGCNN_PLAIN=1 or egcnn_nb.fast.enabled = False"):
            second_derivatives(layer, x)
        return
    exact = copy.deepcopy(layer).double()
    exact_x = x.detach().double()
    exact_x.requires_grad_()
    found = second_derivatives(layer, x)
    expected = second_derivatives(exact, exact_x)
    for u, v in zip(found, expected, strict=True):
        assert off(u, v) < 1e-4


def test_the_switch_is_read_when_a_layer_runs(monkeypatch):
    layer = Conv3d(3, 9, 3, padding=1)
    x = torch.randn(2, 3, 4, 5, 6)

    def is_deep():
        y = layer(x)
        return y.is_contiguous(memory_format=torch.channels_last_3d)

    monkeypatch.setattr(fast, "enabled", True)
    assert is_deep()
    monkeypatch.setattr(fast, "enabled", False)
    assert not is_deep()
    assert layer(x).is_contiguous()
    monkeypatch.setattr(fast, "enabled", True)
    assert is_deep()


@pytest.mark.parametrize("value, on", [("", True), ("0", True), ("1", False)])
def test_an_environment_variable_turns_the_kernels_off(value, on):
    code = "import egcnn_nb.fast as fast; print(fast.enabled)"
    environment = {**os.environ, "EGCNN_PLAIN": value}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.strip()
    assert printed == str(on)


def noting(operation, seen):
    "An operation of torch that notes the type of its output and the smallest side of its maps"

    def call(x, weight, *args, **kwargs):
        out = operation(x, weight, *args, **kwargs)
        _, _, *before = x.shape
        _, _, *after = out.shape
        smallest = min(*before, *after)
        noted = (out.dtype, smallest)
        seen.append(noted)
        return out

    return call


def layers_of_each_kind():
    "Layers of four channels that a kernel may compute"
    return [
        Conv3d(4, 9, 3, padding=1),
        Conv3d(4, 4, 3, 2, 1),
        ConvTranspose3d(4, 9, 2, 2),
        Conv3d(4, 4, 3, padding=1, bias=False),
    ]


@both_ways
def test_no_thin_map_is_convolved_in_a_half_type(monkeypatch):
    "Whatever the processor: what torch's operations are given on this one"
    seen = []
    for name in ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d"):
        operation = getattr(F, name)
        monkeypatch.setattr(F, name, noting(operation, seen))
    for kind in (BF16, torch.float16):
        for size in SIZES:
            expect_kind(kind, size)
    single = torch.float32
    halves = [small for dtype, small in seen if dtype != single]
    assert halves
    assert min(halves) >= 8
    assert (single, 1) in seen


def expect_kind(kind, size):
    "Within autocast every layer gives the half type"
    with torch.autocast("cpu", kind), torch.no_grad():
        for layer in layers_of_each_kind():
            x = torch.randn(2, 4, *size)
            y = layer(x)
            assert y.dtype == kind


def exactly(parameter):
    "A parameter in float64, if there is one"
    if parameter is None:
        return None
    return parameter.double()


def normalised(layer, x):
    "What GroupNorm makes of x in float64, in the order of memory in which torch's is exact"
    exact_x = x.double().contiguous()
    weight = exactly(layer.weight)
    bias = exactly(layer.bias)
    return F.group_norm(exact_x, layer.num_groups, weight, bias, layer.eps)


def passed_exactly(layer, x, grad):
    "The same of GroupNorm in float64"
    function = partial(
        normalised,
        layer,
    )
    return with_derivatives(function, layer, x, grad)


def check_norm(layer, x, grad, kind, kernels):
    "Output and derivatives of a GroupNorm; its kernel returns channels last, or the order of x"
    rounded_once = 3e-6 if kernels else 1e-4  # torch sums gradients of weights in float32
    allowed = rounded_once if kind == torch.float32 else UNIT
    x = x.to(kind)
    grad = grad.to(kind)
    found = passed(layer, x, grad)
    truth = passed_exactly(layer, x, grad)
    assert found[0].dtype == kind
    expect_near(found, truth, allowed)
    return found[0]


@pytest.mark.parametrize(
    "mean,deviation",
    [(0, 0.1), (0, 1), (100, 0.1), (100, 1), (1000, 0.1), (1000, 1), (-1000, 0.1), (3, 1)],
)
@pytest.mark.parametrize("size", [(4, 5, 6), (2, 1, 3), (33, 32, 30), (6, 5), (130, 128)])
def test_group_norm_keeps_its_digits_at_any_mean(mean, deviation, size, kernels):
    torch.manual_seed(7)
    channels = 12
    is_deep = len(size) == 3
    last = torch.channels_last_3d if is_deep else torch.channels_last
    for groups, affine in ((1, True), (4, True), (12, True), (6, False)):
        layer = GroupNorm(groups, channels, affine=affine)
        for p in layer.parameters():
            nn.init.normal_(p)
        for order in (torch.contiguous_format, last):
            x = mean + deviation * torch.randn(2, channels, *size)
            x = x.contiguous(memory_format=order)
            grad = torch.randn_like(x)
            slabs = is_deep and x.numel() > 1 << 17  # channels last, whatever was given
            expected_order = last if slabs else order
            for kind in (torch.float32, BF16):
                y = check_norm(layer, x, grad, kind, kernels)
                if kernels:
                    assert y.is_contiguous(memory_format=expected_order)


@both_ways
def test_groups_of_different_means_do_not_disturb_each_other():
    torch.manual_seed(8)
    means = torch.tensor([0.0, 0, 1000, 1000, -300, -300, 0.01, 100])
    for size in ((5, 6, 7), (33, 32, 30)):
        noise = 0.1 * torch.randn(2, 8, *size)
        x = channels_last(means.view(-1, 1, 1, 1) + noise)
        grad = torch.randn_like(x)
        for groups in (8, 4, 2):
            layer = GroupNorm(groups, 8)
            found = passed(layer, x, grad)
            truth = passed_exactly(layer, x, grad)
            expect_near(found, truth, 1e-5)


@both_ways
def test_group_norm_of_bfloat16_weights_is_right():
    torch.manual_seed(9)
    layer = norm(8)
    layer.to(BF16)
    for size in ((4, 5, 6), (33, 32, 34)):
        noise = torch.randn(2, 8, *size)
        x = channels_last(5 + noise)
        x = x.to(BF16)
        found = layer(x)
        truth = normalised(layer, x)
        error = off(found, truth)
        assert found.dtype == BF16
        assert error < UNIT


@both_ways
def test_slopes_in_bfloat16_are_right_on_every_size():
    torch.manual_seed(10)
    layer = rounded(PReLU(8))
    exact = nn.PReLU(8).double()
    for size in SIZES:
        x = torch.randn(2, 8, *size).to(BF16)
        grad = torch.randn(2, 8, *size).to(BF16)
        with torch.autocast("cpu", BF16):
            found = passed(layer, x, grad)
        exact_x = x.double()
        exact_grad = grad.double()
        truth = passed(exact, exact_x, exact_grad)
        expect_near(found[:2], truth[:2], UNIT)
        expect_near(found[2:], truth[2:], 4 * UNIT)


class WrongWeights(Conv3d):
    "A convolution whose weight gradient is garbage within autocast"

    def forward(self, input):
        y = super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            return Garbage.apply(y, self.weight)
        return y


class Garbage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight):
        ctx.shape = weight.shape
        return y.clone()

    @staticmethod
    def backward(ctx, *grads):
        garbage = torch.full(ctx.shape, 0.1)
        return grads[0], garbage


def halved(layer, args, out):
    "A hook that makes an output wrong within autocast"
    if torch.is_autocast_enabled("cpu"):
        return out / 2
    return None


@dataclass
class SmallRun:
    "What the check of a run is given"

    settings: Settings
    model: nn.Module
    loss: EGLoss
    x: torch.Tensor
    target: torch.Tensor

    def wrong(self):
        "The layers that the check finds"
        return wrong_layers(self.model, self.loss, self.x, self.target, self.settings)

    def wrong_names(self):
        "Their names"
        layers = self.wrong()
        return [layer.name for layer in layers]


def seeded(*shape):
    "Normal numbers that are the same each time"
    generator = torch.Generator()
    generator.manual_seed(0)
    return torch.randn(*shape, generator=generator)


def small_run(backbone, edge=True, levels=3):
    "A network, its loss and one batch"
    settings = Settings("", "", backbone, edge, width=4, levels=levels, precision="bf16")
    labels = torch.zeros(2, 16, 16, 16, dtype=torch.int64)
    labels[:, 3:12, 4:12, 5:13] = 1
    labels[:, 6:9, 6:10, 7:11] = 2
    target = to_target(labels, KITS)
    noise = seeded(2, 1, 16, 16, 16)
    x = labels[:, None] + 0.5 * noise
    model = make_model(settings, KITS)
    loss = EGLoss(KITS.activation)
    return SmallRun(settings, model, loss, x, target)


@pytest.mark.parametrize("backbone", ["segnet", "unet", "vnet", "segresnet", "dynunet"])
def test_no_layer_of_ours_or_of_monai_is_found_wrong(backbone):
    fewest = 3 if backbone == "dynunet" else 2
    for edge in (True, False):
        run = small_run(backbone, edge, levels=fewest)
        wrong = run.wrong()
        assert wrong == []


def copied(model):
    "A copy of the state of a network"
    state = model.state_dict()
    return copy.deepcopy(state)


def expect_same_tensors(found, expected):
    "Two lists of tensors are the same"
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_exactly_the_wrong_layers_are_found_and_then_gone():
    run = small_run("vnet")
    model = run.model
    wrong = ["main.stem", "main.decoder.0.layers.3", "edge.blocks.1.conv1"]
    for name in wrong[1:]:
        layer = model.get_submodule(name)
        layer.__class__ = WrongWeights
    stem = model.get_submodule(wrong[0])
    stem.register_forward_hook(halved)
    before = copied(model)
    model.eval()
    found = run.wrong()
    assert not model.training
    names = [layer.name for layer in found]
    assert sorted(names) == sorted(wrong)
    for layer in found:
        assert isinstance(layer, WrongLayer)
        assert layer.error > 10 * layer.allowed
    lines = describe_check(found)
    for name, line in zip(names, lines, strict=True):
        assert name in line
    compute_in_float32(model, names)
    after = model.state_dict()
    assert list(after) == list(before)
    expect_same_tensors(after.values(), before.values())
    assert run.wrong_names() == ["main.stem"]  # a hook lies outside of the layer


def gradients(model):
    "The gradients of a network"
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad)
    return found


def test_the_check_leaves_running_statistics_gradients_and_random_numbers_as_they_are():
    run = small_run("segnet", False)
    run.model = model = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv3d(4, 3, 1),
    )
    total = model(run.x).sum()
    total.backward()
    buffers = copy.deepcopy(list(model.buffers()))
    before = copy.deepcopy(gradients(model))
    random = torch.get_rng_state()
    wrong = run.wrong()
    assert wrong == []
    expect_same_tensors(model.buffers(), buffers)
    after = gradients(model)
    expect_same_tensors(after, before)
    random_after = torch.get_rng_state()
    assert torch.equal(random_after, random)


@pytest.fixture
def group(tmp_path):
    "A group of one process"
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_layer_in_float32_trains_with_ddp(group):
    run = small_run("segnet")
    model = run.model
    name = "main.encoder.0.0.conv1"
    run.model = network = nn.parallel.DistributedDataParallel(model)
    compute_in_float32(network, [name])
    assert run.wrong() == []
    with torch.autocast("cpu", BF16):
        out = network(run.x)
    total = run.loss(out, run.target)
    total.backward()
    for gradient in gradients(model):
        assert gradient.isfinite().all()
    twin = copy.deepcopy(model)
    layer = twin.get_submodule(name)
    forward: Any = layer.forward
    assert forward.layer is layer


def test_large_logits_in_half_do_not_make_the_loss_infinite():
    "An output that is left out of the loss counts 0 times its sum, and the sum of a volume of halves exceeds 65504"
    from egcnn_nb.run.steps import _total

    logits = torch.zeros(1, 2, 8, 8, 8, requires_grad=True)
    main = torch.full((1, 2, 64, 64, 64), 3.0, dtype=torch.float16, requires_grad=True)
    loss = EGLoss(supervise="fused")
    out = EGOutput(logits, logits, main)
    terms = {"total": logits.sum() + 1.5}
    total = _total(terms, loss, out)
    total.backward()
    assert total.item() == 1.5
    assert total.dtype == torch.float32
    assert main.grad is not None
    assert not main.grad.any()


def computed_in_float32(model):
    "Names of the layers whose forward is replaced"
    found = []
    for name, layer in model.named_modules():
        own = vars(layer)
        if "forward" in own:
            found.append(name)
    return found


def is_rounded_once(layer):
    "Whether a layer within autocast computes in float32, and rounds at the end"
    x = seeded(1, 1, 8, 8, 8)
    x = x.repeat(1, layer.in_channels, 1, 1, 1)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", BF16):
            found = layer(x)
    expected = exact.to(BF16)
    return torch.equal(found, expected)


def test_a_trained_run_predicts_with_the_float32_layers_of_its_training(tmp_path):
    "They are named in model.safetensors, whose weights were chosen by a validation that computed them so"
    import json

    from safetensors.torch import save_file

    from egcnn_nb.run.folders import describe
    from egcnn_nb.run.predict import load_run

    settings = Settings("", "", width=4, levels=2, precision="bf16", patch_size=(16, 16, 16))
    model = make_model(settings, KITS)
    name = "main.encoder.0.0.conv1"
    config = describe(settings, KITS, [], [])
    text = json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    weights = tmp_path / "model.safetensors"
    for names in ([name], []):
        about = {"float32": json.dumps(names)} if names else None
        save_file(model.state_dict(), weights, about)
        loaded, *_ = load_run(tmp_path)
        assert computed_in_float32(loaded) == names
        layer = loaded.get_submodule(name)
        assert is_rounded_once(layer) == bool(names)
