"""What a GPU computes beside what the CPU computes. Skipped where there is no GPU."""

import csv
import subprocess
import time

import pytest
import tiny
import torch
from torch import nn

from egcnn_nb.commands import train
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss, gumbel_noise
from egcnn_nb.run.predict import load_run, predict
from egcnn_nb.tensors import seed_everything

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU here.")

FORMS = {
    "0.1": {"edge_head": "plain", "gate_residual": "none"},
    "layer": {"edge_head": "norm", "gate_residual": "layer"},
    "block": {"edge_head": "norm", "gate_residual": "block", "attention_relu": False},
}


def network(form):
    "A small EG-CNN whose fusion is not zero any more, in float64"
    seed_everything(0)
    net = EGCNN(SegNet(2, 3, width=8, levels=3), **FORMS[form])
    nn.init.normal_(net.fusion.weight, std=0.1)
    return net.double()


def batch():
    "Images and one-hot masks of two cases, in float64"
    seed_everything(1)
    x = torch.randn(2, 2, 24, 32, 20, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 1, 6, 8, 5))
    labels = labels.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    target = torch.cat([labels == k for k in range(3)], 1)
    return x, target.double()


def computed(form, device):
    "Outputs, losses and gradients on a device, brought back to the CPU"
    net = network(form).to(device)
    x, target = (t.to(device) for t in batch())
    out = net(x)
    loss = EGLoss().eval()  # without noise, which a GPU draws on its own
    terms = loss.terms(out, target)
    terms["total"].backward()
    grads = {name: p.grad.cpu() for name, p in net.named_parameters()}
    outputs = {"logits": out.logits, "edge": out.edge, "main": out.main}
    outputs |= {f"alpha {k}": alpha for k, alpha in enumerate(out.attention)}
    outputs |= terms
    return {name: t.detach().cpu() for name, t in outputs.items()}, grads


@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_computes_what_the_cpu_computes(form):
    outputs, grads = computed(form, "cpu")
    on_gpu, grads_on_gpu = computed(form, "cuda")
    torch.testing.assert_close(on_gpu, outputs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(grads_on_gpu, grads, rtol=1e-7, atol=1e-9)


def test_a_wrapped_network_starts_equal_to_the_bare_one():
    seed_everything(0)
    bare = SegNet(2, 3, width=8, levels=3).cuda().eval()
    x = batch()[0].float().cuda()
    with torch.no_grad():
        alone = bare(x)
        out = EGCNN(bare).eval()(x, full=True)
    assert torch.equal(out.main, out.logits)
    torch.testing.assert_close(out.logits, alone, rtol=1e-5, atol=1e-5)


def test_noise_is_drawn_on_the_gpu_and_depends_on_its_keys():
    keys = [(0, 1, 5), (0, 1, 6)]
    noise = gumbel_noise((2, 100_000), keys, "cuda")
    assert noise.is_cuda
    assert torch.equal(noise, gumbel_noise((2, 100_000), keys, "cuda"))
    assert torch.equal(noise[1:], gumbel_noise((1, 100_000), keys[1:], "cuda"))
    assert not torch.equal(noise[0], noise[1])
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.03


def rows(out):
    "metrics.csv of a run"
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def trained(data, out, *words):
    "A run of the command in this process"
    flags = [*tiny.SMALL[:-2], "--cache", "off", *words]
    code = train.main([str(data), "--out", str(out), *flags])
    assert code == 0
    return rows(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.dataset(tmp_path_factory.mktemp("gpu") / "data")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_learns_in_every_precision(data, tmp_path, precision):
    found = trained(
        data, tmp_path / "run", "--epochs", "12", "--lr", "1e-2", "--precision", precision
    )
    losses = [float(row["total"]) for row in found]
    assert losses[-1] < 0.95 * losses[0]
    assert float(found[-1]["dice_mean"]) > float(found[0]["dice_mean"])


def test_a_run_goes_on_where_it_stopped(data, tmp_path):
    words = ["--precision", "fp32"]
    whole = trained(data, tmp_path / "whole", "--epochs", "6", *words)
    out = tmp_path / "parts"
    stopped = tiny.command(data, out, "--epochs", "6", "--cache", "off")
    process = subprocess.Popen(stopped, env=tiny.ENV, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while tiny.epochs_logged(out) < 2 and time.time() < deadline:
        time.sleep(0.01)
    process.terminate()
    process.wait()
    parts = trained(data, out, "--epochs", "6", "--resume", *words)
    assert len(parts) == len(whole) == 6
    last, wanted = float(parts[-1]["total"]), float(whole[-1]["total"])
    assert abs(last - wanted) < 0.02 * wanted


def test_a_prediction_is_that_of_the_cpu(data, tmp_path):
    out = tmp_path / "run"
    trained(data, out, "--epochs", "2", "--precision", "fp32")
    model, settings, _ = load_run(out)
    x = torch.randn(1, 30, 22, 26)
    on_cpu = predict(model, x, settings.patch_size)
    on_gpu = predict(model.cuda(), x, settings.patch_size)
    difference = (on_gpu.cpu() - on_cpu).abs().max()
    assert difference < 1e-2  # convolutions use TF32 on a GPU
