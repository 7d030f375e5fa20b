"Layers with and without kernels, in half types and at every mean, compared with float64. Then the check of a run."

import copy
import itertools
import os
import subprocess
import sys
from functools import partial

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
        torch.full((n,), 3e38)
        torch.full((n,), 3e38, dtype=BF16)


def passed(layer, x, grad):
    "Output, and derivatives of x and of each parameter"
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), grad.to(y.dtype))]


def rounded(layer, kind=BF16):
    "The layer's weights become what `kind` can hold"
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.to(kind))
    return layer


def off(found, truth):
    "Error as a share of the truth, over all numbers"
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


def judge_of(layer):
    "torch's own layer in float64, which no library for half types computes"
    for theirs in (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        if isinstance(layer, theirs):
            break
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    settings = {n: getattr(layer, n) for n in names}
    judge = theirs(
        layer.in_channels, layer.out_channels, bias=layer.bias is not None, **settings
    ).double()
    judge.load_state_dict(layer.state_dict())
    return judge


def check(layer, size, batch=2, pure=False):
    "Output and gradients of one layer on one size, within what the rounding of results explains"
    rounded(layer)
    judge = judge_of(layer)
    x = torch.randn(batch, layer.in_channels, *size).to(BF16).float()
    grad = torch.randn_like(judge(x.double())).to(BF16).float()
    truth = passed(judge, x.double(), grad.double())
    litter()
    if pure:
        found = passed(layer.to(BF16), x.to(BF16), grad)
    else:
        with torch.autocast("cpu", BF16):
            found = passed(layer, x, grad)
    assert found[0].dtype == BF16
    thin = min(*size, *found[0].shape[2:]) < 8
    allowed = UNIT if thin else 4 * UNIT  # some libraries round between the taps of a kernel
    names = ("output", "input gradient", "weight gradient", "bias gradient")
    for what, u, v in zip(names, found, truth, strict=False):  # a layer may have no bias
        assert u.shape == v.shape
        assert off(u, v) < allowed, (layer, size, batch, what, off(u, v))


CUBES = [(n, n, n) for n in range(1, 9)]
THIN = [
    tuple(n if axis == i else 9 for i in range(3)) for axis in range(3) for n in (1, 2, 3, 5, 7, 8)
]
PLATES = [(1, 2, 9), (2, 1, 9), (2, 9, 2), (9, 2, 2), (3, 2, 1), (4, 3, 2), (2, 4, 8), (8, 2, 4)]
SIZES = [*CUBES, *THIN, *PLATES]


def fits(size, kernel, padding):
    return min(size) + 2 * padding >= kernel


@both_ways
@pytest.mark.parametrize(
    "kernel,stride,padding",
    [(1, 1, 0), (1, 2, 0), (2, 1, 0), (2, 2, 0), (3, 1, 1), (3, 2, 1), (3, 1, 0), (4, 2, 1)],
)
def test_a_convolution_in_bfloat16_is_right_on_every_size(kernel, stride, padding):
    torch.manual_seed(0)
    for number, size in enumerate(SIZES):
        if not fits(size, kernel, padding):
            continue
        channels = ((8, 16), (16, 32), (3, 8), (8, 4))[number % 4]
        layer = Conv3d(*channels, kernel, stride, padding, bias=number % 3 == 0)
        check(layer, size, batch=1 + number % 2, pure=number % 5 == 0)


@both_ways
@pytest.mark.parametrize("channels", [(8, 16), (16, 32), (8, 8), (1, 8)])
def test_two_planes_have_right_weight_gradients(channels):
    torch.manual_seed(1)
    for size in ((2, 8, 8), (2, 16, 16), (1, 8, 8), (2, 2, 2), (8, 2, 8), (8, 8, 2), (2, 5, 16)):
        check(Conv3d(*channels, 3, padding=1, bias=False), size)


def test_pairs_of_voxels_are_right(monkeypatch):
    monkeypatch.setattr("egcnn_nb.fast.layers._LANES", 16)
    torch.manual_seed(2)
    for size in ((2, 4, 6), (8, 8, 8), (8, 8, 14), (8, 9, 16), (9, 8, 18)):
        for channels in ((8, 8), (3, 4), (16, 8)):
            rounded_twice = Conv3d(*channels, 3, padding=1, bias=False)
            check(rounded_twice, size)


@both_ways
@pytest.mark.parametrize(
    "kernel,stride,padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (4, 2, 1), (1, 1, 0)]
)
def test_a_transposed_convolution_in_bfloat16_is_right_on_every_size(kernel, stride, padding):
    torch.manual_seed(3)
    for number, size in enumerate(SIZES[::2]):
        if any((n - 1) * stride - 2 * padding + kernel < 1 for n in size):
            continue
        layer = ConvTranspose3d(*((16, 8), (8, 3))[number % 2], kernel, stride, padding)
        check(layer, size, batch=1 + number % 2, pure=number % 5 == 0)


@both_ways
def test_two_dimensions_in_bfloat16_are_right_on_every_size():
    torch.manual_seed(4)
    for number, size in enumerate(itertools.product((1, 2, 3, 5, 7, 8), repeat=2)):
        check(Conv2d(8, 16, 3, 1 + number % 2, 1), size)
        check(ConvTranspose2d(8, 4, 2, 2), size, pure=number % 5 == 0)
    assert isinstance(conv_transpose(2, 8, 4, 2), ConvTranspose2d)


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
    for size in ((2, 8, 8), (3, 3, 3), (8, 2, 9), (9, 8, 8), (9, 10, 11)):
        if odd.get("padding", "valid") == "valid" and min(size) < 3:
            continue
        check(Conv3d(8, 16, **{"kernel_size": 3, **odd}), size)


@both_ways
def test_channels_are_mixed_rightly_in_bfloat16():
    torch.manual_seed(6)
    for size in SIZES:
        x = torch.randn(2, 8, *size).to(BF16)
        w = torch.randn(5, 8, 1, 1, 1).to(BF16)
        with torch.autocast("cpu", BF16):
            mixed = mix_channels(x, w)
        assert mixed.dtype == BF16
        assert off(mixed, F.conv3d(x.double(), w.double())) < UNIT


def gradients_of(layer, x, create_graph):
    "Gradients of a loss with respect to x and the parameters"
    loss = layer(x).square().sum()
    return torch.autograd.grad(loss, (x, *layer.parameters()), create_graph=create_graph)


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
    inputs = (x, *layer.parameters())
    exact = copy.deepcopy(layer).double()
    exact_x = x.detach().double().requires_grad_()
    exact_inputs = (exact_x, *exact.parameters())

    def second(layer, x, inputs):
        first = gradients_of(layer, x, create_graph=True)
        length = sum(g.square().sum() for g in first)
        return torch.autograd.grad(length, inputs, allow_unused=True)

    by_function = isinstance(layer, GroupNorm) or getattr(layer, "kernel_size", None) == (3, 3, 3)
    if kernels and by_function:
        with pytest.raises(RuntimeError, match="EGCNN_PLAIN=1 or egcnn_nb.fast.enabled = False"):
            second(layer, x, inputs)
        return
    found = second(layer, x, inputs)
    expected = second(exact, exact_x, exact_inputs)
    for u, v in zip(found, expected, strict=True):
        assert off(u, v) < 1e-4


def test_the_switch_is_read_when_a_layer_runs(monkeypatch):
    layer = Conv3d(3, 9, 3, padding=1)
    x = torch.randn(2, 3, 4, 5, 6)
    deep = torch.channels_last_3d
    assert layer(x).is_contiguous(memory_format=deep)
    monkeypatch.setattr(fast, "enabled", False)
    assert layer(x).is_contiguous() and not layer(x).is_contiguous(memory_format=deep)
    monkeypatch.setattr(fast, "enabled", True)
    assert layer(x).is_contiguous(memory_format=deep)


@pytest.mark.parametrize("value, on", [("", True), ("0", True), ("1", False)])
def test_an_environment_variable_turns_the_kernels_off(value, on):
    code = "import egcnn_nb.fast as fast; print(fast.enabled)"
    environment = {**os.environ, "EGCNN_PLAIN": value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.stdout.decode().strip() == str(on)


@both_ways
def test_no_thin_map_is_convolved_in_a_half_type(monkeypatch):
    "Whatever the processor: what torch's operations are given on this one"
    seen = []

    def noting(operation):
        def call(x, weight, *args, **kwargs):
            out = operation(x, weight, *args, **kwargs)
            small = min(*x.shape[2:], *out.shape[2:])
            seen.append((out.dtype, small))
            return out

        return call

    for name in ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d"):
        monkeypatch.setattr(F, name, noting(getattr(F, name)))
    for kind in (BF16, torch.float16):
        for size in SIZES:
            with torch.autocast("cpu", kind), torch.no_grad():
                for layer in (
                    Conv3d(4, 9, 3, padding=1),
                    Conv3d(4, 4, 3, 2, 1),
                    ConvTranspose3d(4, 9, 2, 2),
                    Conv3d(4, 4, 3, padding=1, bias=False),
                ):
                    assert layer(torch.randn(2, 4, *size)).dtype == kind
    halves = [small for dtype, small in seen if dtype != torch.float32]
    assert halves and min(halves) >= 8
    assert any(small == 1 for dtype, small in seen if dtype == torch.float32)


def normalised(layer, x):
    "What GroupNorm makes of x in float64, in the order of memory in which torch's is exact"
    weight, bias = (None if p is None else p.double() for p in (layer.weight, layer.bias))
    return F.group_norm(x.double().contiguous(), layer.num_groups, weight, bias, layer.eps)


def normed(f, layer, x, grad):
    x = x.detach().requires_grad_()
    y = f(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), grad.to(y.dtype))]


@pytest.mark.parametrize(
    "mean,deviation",
    [(0, 0.1), (0, 1), (100, 0.1), (100, 1), (1000, 0.1), (1000, 1), (-1000, 0.1), (3, 1)],
)
@pytest.mark.parametrize("size", [(4, 5, 6), (2, 1, 3), (33, 32, 30), (6, 5), (130, 128)])
def test_group_norm_keeps_its_digits_at_any_mean(mean, deviation, size, kernels):
    torch.manual_seed(7)
    channels = 12
    flat, deep = torch.channels_last, torch.channels_last_3d
    for groups, affine in ((1, True), (4, True), (12, True), (6, False)):
        layer = GroupNorm(groups, channels, affine=affine)
        for p in layer.parameters():
            nn.init.normal_(p)
        for order in (torch.contiguous_format, deep if len(size) == 3 else flat):
            x = (mean + deviation * torch.randn(2, channels, *size)).contiguous(memory_format=order)
            grad = torch.randn_like(x)
            rounded_once = 3e-6 if kernels else 1e-4  # torch sums gradients of weights in float32
            for kind, allowed in ((torch.float32, rounded_once), (BF16, UNIT)):
                given, g = x.to(kind), grad.to(kind)
                found = normed(layer, layer, given, g)
                truth = normed(partial(normalised, layer), layer, given, g)
                slabs = len(size) == 3 and x.numel() > 1 << 17  # channels last, whatever was given
                assert found[0].dtype == kind
                if kernels:
                    assert found[0].is_contiguous(memory_format=deep if slabs else order)
                for u, v in zip(found, truth, strict=True):
                    assert off(u, v) < allowed, (groups, order, kind, off(u, v))


@both_ways
def test_groups_of_different_means_do_not_disturb_each_other():
    torch.manual_seed(8)
    means = torch.tensor([0.0, 0, 1000, 1000, -300, -300, 0.01, 100]).view(-1, 1, 1, 1)
    layer = norm(8)
    for size in ((5, 6, 7), (33, 32, 30)):
        x = channels_last(means + 0.1 * torch.randn(2, 8, *size))
        grad = torch.randn_like(x)
        for groups in (8, 4, 2):
            layer = GroupNorm(groups, 8)
            found = normed(layer, layer, x, grad)
            truth = normed(partial(normalised, layer), layer, x, grad)
            for u, v in zip(found, truth, strict=True):
                assert off(u, v) < 1e-5, (size, groups, off(u, v))


@both_ways
def test_group_norm_of_bfloat16_weights_is_right():
    torch.manual_seed(9)
    layer = norm(8).to(BF16)
    for size in ((4, 5, 6), (33, 32, 34)):
        x = channels_last(5 + torch.randn(2, 8, *size)).to(BF16)
        found, truth = layer(x).detach(), normalised(layer, x).detach()
        assert found.dtype == BF16 and off(found, truth) < UNIT


@both_ways
def test_slopes_in_bfloat16_are_right_on_every_size():
    torch.manual_seed(10)
    layer = rounded(PReLU(8))
    for size in SIZES:
        x, grad = torch.randn(2, 8, *size).to(BF16), torch.randn(2, 8, *size).to(BF16)
        with torch.autocast("cpu", BF16):
            found = passed(layer, x, grad)
        truth = passed(nn.PReLU(8).double(), x.double(), grad.double())
        assert (
            off(found[0], truth[0]) < UNIT
            and off(found[1], truth[1]) < UNIT
            and off(found[2], truth[2]) < 4 * UNIT
        )


class WrongWeights(Conv3d):
    "A convolution whose weight gradient is garbage within autocast"

    def forward(self, x):
        y = super().forward(x)
        return Garbage.apply(y, self.weight) if torch.is_autocast_enabled("cpu") else y


class Garbage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight):
        ctx.shape = weight.shape
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.full(ctx.shape, 0.1)


def halved(layer, args, out):
    "A hook that makes an output wrong within autocast"
    return out / 2 if torch.is_autocast_enabled("cpu") else None


def small_run(backbone, edge=True, levels=3):
    "Settings, network, loss and one batch"
    run = Settings("", "", backbone, edge, width=4, levels=levels, precision="bf16")
    labels = torch.zeros(2, 16, 16, 16, dtype=torch.int64)
    labels[:, 3:12, 4:12, 5:13] = 1
    labels[:, 6:9, 6:10, 7:11] = 2
    x = labels[:, None] + 0.5 * torch.randn(
        2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)
    )
    return run, make_model(run, KITS), EGLoss(KITS.activation), x, to_target(labels, KITS)


@pytest.mark.parametrize("backbone", ["segnet", "unet", "vnet", "segresnet", "dynunet"])
def test_no_layer_of_ours_or_of_monai_is_found_wrong(backbone):
    for edge in (True, False):
        run, model, loss, x, target = small_run(
            backbone, edge, levels=3 if backbone == "dynunet" else 2
        )  # its least
        assert wrong_layers(model, loss, x, target, run) == []


def test_exactly_the_wrong_layers_are_found_and_then_gone():
    run, model, loss, x, target = small_run("vnet")
    wrong = ["main.stem", "main.decoder.0.layers.3", "edge.blocks.1.conv1"]
    for name in wrong[1:]:
        model.get_submodule(name).__class__ = WrongWeights
    model.get_submodule(wrong[0]).register_forward_hook(halved)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.eval()
    found = wrong_layers(model, loss, x, target, run)
    assert not model.training and sorted(f.name for f in found) == sorted(wrong)
    assert all(isinstance(f, WrongLayer) and f.error > 10 * f.allowed for f in found)
    lines = describe_check(found)
    assert len(lines) == 3 and all(f.name in line for f, line in zip(found, lines, strict=True))
    compute_in_float32(model, [f.name for f in found])
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert [f.name for f in wrong_layers(model, loss, x, target, run)] == [
        wrong[0]
    ]  # a hook lies outside of the layer


def test_the_check_leaves_running_statistics_gradients_and_random_numbers_as_they_are():
    run, _, loss, x, target = small_run("segnet", False)
    model = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv3d(4, 3, 1),
    )
    model(x).sum().backward()
    buffers = [b.clone() for b in model.buffers()]
    grads = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    assert wrong_layers(model, loss, x, target, run) == []
    assert all(map(torch.equal, buffers, model.buffers()))
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state())


def test_a_layer_in_float32_trains_with_ddp(tmp_path):
    run, model, loss, x, target = small_run("segnet")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = nn.parallel.DistributedDataParallel(model)
        compute_in_float32(network, ["main.encoder.0.0.conv1"])
        assert wrong_layers(network, loss, x, target, run) == []
        with torch.autocast("cpu", BF16):
            out = network(x)
        loss(out, target).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    finally:
        dist.destroy_process_group()
    twin = copy.deepcopy(model)
    layer = twin.get_submodule("main.encoder.0.0.conv1")
    assert layer.forward.layer is layer


def test_large_logits_in_half_do_not_make_the_loss_infinite():
    "An output that is left out of the loss counts 0 times its sum, and the sum of a volume of halves exceeds 65504"
    from egcnn_nb.run.steps import _total

    logits = torch.zeros(1, 2, 8, 8, 8, requires_grad=True)
    main = torch.full((1, 2, 64, 64, 64), 3.0, dtype=torch.float16, requires_grad=True)
    loss = EGLoss(supervise="fused")
    out = EGOutput(logits, logits, main)
    total = _total({"total": logits.sum() + 1.5}, loss, out)
    total.backward()
    assert total.item() == 1.5 and total.dtype == torch.float32
    assert main.grad is not None and not main.grad.any()


def test_a_trained_run_predicts_with_the_float32_layers_of_its_training(tmp_path):
    "They are named in model.safetensors, whose weights were chosen by a validation that computed them so"
    import json

    from safetensors.torch import save_file

    from egcnn_nb.run.folders import describe
    from egcnn_nb.run.predict import load_run

    settings = Settings("", "", width=4, levels=2, precision="bf16", patch_size=(16, 16, 16))
    model, name = make_model(settings, KITS), "main.encoder.0.0.conv1"
    (tmp_path / "config.json").write_text(json.dumps(describe(settings, KITS, [], [])))
    for about, names in (({"float32": json.dumps([name])}, [name]), (None, [])):
        save_file(model.state_dict(), tmp_path / "model.safetensors", about)
        loaded = load_run(tmp_path)[0]
        assert [n for n, m in loaded.named_modules() if "forward" in vars(m)] == names
        layer = dict(loaded.named_modules())[name]
        x = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(
            1, layer.in_channels, 1, 1, 1
        )
        with torch.no_grad(), torch.autocast("cpu", BF16):
            found = layer(x)
        with torch.no_grad():
            exact = layer(x)
        assert torch.equal(found, exact.to(BF16)) == bool(names)  # rounded once, at the end
