"""What a GPU computes beside what the CPU computes. Skipped where there is no GPU."""

import csv
import math
import subprocess
import time

import pytest
import tiny
import torch
from torch import nn
from torch.testing import assert_close

from egcnn_nb.commands import train
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss, gumbel_noise
from egcnn_nb.run.predict import load_run, predict
from egcnn_nb.tensors import one_hot, seed_everything

has_gpu = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not has_gpu, reason="There is no GPU here.")

FORMS = {
    "0.1": {"edge_head": "plain", "gate_residual": "none"},
    "layer": {"edge_head": "norm", "gate_residual": "layer"},
    "block": {"edge_head": "norm", "gate_residual": "block", "attention_relu": False},
}
VARIANCE = math.pi**2 / 6  # of the Gumbel law
MEAN = 0.5772


def backbone():
    "A small Seg-Net, always the same"
    seed_everything(0)
    return SegNet(2, 3, width=8, levels=3)


def network(form):
    "A small EG-CNN whose fusion is not zero any more, in float64"
    readings = FORMS[form]
    net = EGCNN(backbone(), **readings)
    weight = net.fusion.weight
    nn.init.normal_(weight, std=0.1)
    return net.double()


def images():
    "Images of two cases, in float64"
    seed_everything(1)
    return torch.randn(2, 2, 24, 32, 20, dtype=torch.float64)


def masks():
    "One-hot masks of two cases, in blocks of four voxels, in float64"
    seed_everything(2)
    blocks = torch.randint(0, 3, (2, 6, 8, 5))
    for axis in (1, 2, 3):
        blocks = blocks.repeat_interleave(4, axis)
    target = one_hot(blocks, (0, 1, 2))
    return target.double()


def on_cpu(tensors):
    "name -> tensor, brought back"
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.detach().cpu()
    return found


def maps_of(out):
    "The tensors of an EGOutput by name"
    maps = {
        "logits": out.logits,
        "edge": out.edge,
        "main": out.main,
    }
    for number, alpha in enumerate(out.attention):
        maps[f"alpha {number}"] = alpha
    return maps


def gradients_of(net):
    "name -> gradient of each weight"
    found = {}
    for name, weight in net.named_parameters():
        found[name] = weight.grad
    return found


def computed(form, device):
    "Outputs with losses, and gradients, on a device"
    net = network(form).to(device)
    x = images().to(device)
    target = masks().to(device)
    loss = EGLoss()
    loss.eval()  # without noise, which a GPU draws on its own
    out = net(x)
    terms = loss.terms(out, target)
    total = terms["total"]
    total.backward()
    outputs = maps_of(out) | terms
    gradients = gradients_of(net)
    return on_cpu(outputs), on_cpu(gradients)


@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_computes_what_the_cpu_computes(form):
    outputs, gradients = computed(form, "cpu")
    outputs_there, gradients_there = computed(form, "cuda")
    assert_close(outputs_there, outputs, rtol=1e-9, atol=1e-10)
    assert_close(gradients_there, gradients, rtol=1e-7, atol=1e-9)


def test_a_wrapped_network_starts_equal_to_the_bare_one():
    bare = backbone()
    bare.cuda().eval()
    model = EGCNN(bare)
    model.eval()
    x = images().float()
    x = x.cuda()
    with torch.no_grad():
        alone = bare(x)
        out = model(x, full=True)
    assert torch.equal(out.main, out.logits)
    assert_close(out.logits, alone, rtol=1e-5, atol=1e-5)


def noise_of(*keys):
    "A hundred thousand numbers of each key, drawn on the GPU"
    cases = len(keys)
    shape = (cases, 100_000)
    return gumbel_noise(shape, keys, "cuda")


def test_noise_is_drawn_on_the_gpu_by_its_keys():
    one, other = (0, 1, 5), (0, 1, 6)
    noise = noise_of(one, other)
    assert noise.is_cuda
    assert torch.equal(noise, noise_of(one, other))
    assert torch.equal(noise[1:], noise_of(other))
    assert not torch.equal(noise[0], noise[1])


def test_noise_of_the_gpu_has_gumbels_law():
    noise = noise_of((0, 1, 5))
    assert noise.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert noise.var().item() == pytest.approx(VARIANCE, abs=0.03)


def rows_of(out):
    "metrics.csv of a run"
    path = out / "metrics.csv"
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    "The numbers of a column"
    return [float(row[name]) for row in rows]


def trained(data, out, words):
    "The rows of a run of the command in this process"
    without_precision = tiny.SMALL[:-2]
    line = [str(data), "--out", str(out), *without_precision, "--cache", "off"]
    code = train.main([*line, *words.split()])
    assert code == 0
    return rows_of(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    place = folder / "data"
    return tiny.dataset(place)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_learns_in_every_precision(data, tmp_path, precision):
    words = f"--epochs 12 --lr 1e-2 --precision {precision}"
    rows = trained(data, tmp_path / "run", words)
    first_loss, *_, last_loss = column(rows, "total")
    first_dice, *_, last_dice = column(rows, "dice_mean")
    assert last_loss < 0.95 * first_loss
    assert last_dice > first_dice


def stop_after_two_epochs(line, out):
    "Run a command until two epochs are in its log, then end it"
    process = subprocess.Popen(line, env=tiny.ENV, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while tiny.epochs_logged(out) < 2 and time.time() < deadline:
        time.sleep(0.01)
    process.terminate()
    process.wait()


def test_a_run_goes_on_where_it_stopped(data, tmp_path):
    words = "--epochs 6 --precision fp32"
    whole = trained(data, tmp_path / "whole", words)
    out = tmp_path / "parts"
    line = tiny.command(data, out, "--cache", "off", *words.split())
    stop_after_two_epochs(line, out)
    parts = trained(data, out, f"{words} --resume")
    *before, last = column(parts, "total")
    *_, wanted = column(whole, "total")
    assert len(before) == 5
    assert last == pytest.approx(wanted, rel=0.02)


def test_a_prediction_is_that_of_the_cpu(data, tmp_path):
    out = tmp_path / "run"
    trained(data, out, "--epochs 2 --precision fp32")
    model, settings, _ = load_run(out)
    x = torch.randn(1, 30, 22, 26)
    here = predict(model, x, settings.patch_size)
    there = predict(model.cuda(), x, settings.patch_size)
    difference = there.cpu() - here
    assert difference.abs().max() < 1e-2  # convolutions use TF32 on a GPU
