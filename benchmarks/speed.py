"""How fast it is, as ratios to what others would run: both in this process, in turn, the median of
several.

    python benchmarks/speed.py [ROW ...] [--threads 1] [--json FILE] [--keep_memory]

Rows (default: all): sobel sobel_backward losses step segresnet bf16 batch_1 predict distances startup.
Seg-Net (a): width 8, 3 levels, batch 2 of 1×48×64×48; (b): width 16, 4 levels, batch 1 of 4×96³; 3
classes, readings by default. With --keep_memory the allocator keeps freed memory, as egcnn_train and
egcnn_predict do, for both sides."""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jupyter_client.manager import start_new_kernel

from egcnn_nb.core import keep_memory
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss, EGOutput
from egcnn_nb.method.sobel import sobel_magnitude
from egcnn_nb.run.metrics import distances
from egcnn_nb.run.models import autocast, best_precision, infer
from egcnn_nb.tensors import one_hot

CPU = torch.device("cpu")
FASTER = "times as fast"
SHARE = "of the peer's time"


def medians(again=5, **calls):
    "Milliseconds of each function, run in turn, after one round that does not count"
    times = {name: [] for name in calls}
    for turn in range(again + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            if turn > 0:
                times[name].append(1e3 * seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def status(name):
    "A line of /proc/self/status in bytes"
    lines = Path("/proc/self/status").read_text()
    kilobytes = re.search(rf"{name}:\s+(\d+)", lines)[1]
    return int(kilobytes) * 1024


def extra_memory(call):
    "The most memory in bytes that a call adds to what is there"
    call()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return max(status("VmHWM") - before, 4096)


def matmul_rate(dtype=torch.float32, n=2048):
    "Multiply-adds a second of a product of two square matrices"
    matrix = torch.randn(n, n).to(dtype)
    found = medians(5, product=lambda: matrix @ matrix)
    seconds = 1e-3 * found["product"]
    return n**3 / seconds


def row(what, ours, peers, must, better=FASTER):
    "One line of the table: the best of the peers is what counts"
    name = min(peers, key=peers.get)
    peer = peers[name]
    ratio = peer / ours if better == FASTER else ours / peer
    return {
        "what": what,
        "ours_ms": round(ours, 2),
        "peer": name,
        "peer_ms": round(peer, 2),
        "ratio": round(ratio, 2),
        "is": better,
        "must be": must,
        "all": {name: round(value, 1) for name, value in peers.items()},
    }


# ---- Sobel


def sobel_kernels():
    "The three kernels of Sobel, along each axis (3,1,3,3,3)"
    difference = torch.tensor([-1.0, 0, 1])
    smooth = torch.tensor([1.0, 2, 1])
    kernels = []
    for axis in range(3):
        along = [smooth, smooth, smooth]
        along[axis] = difference
        kernels.append(torch.einsum("i,j,k->ijk", *along))
    return torch.stack(kernels)[:, None]


KERNELS = sobel_kernels()


def by_convolution(x):
    "The magnitude by one depthwise convolution"
    padded = F.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate")
    gradient = F.conv3d(padded.flatten(0, 1)[:, None], KERNELS)
    squared = gradient.square().sum(1)
    return (squared + 1e-8).sqrt().view_as(x)


def by_scipy(x):
    "The magnitude by scipy, channel by channel"
    from scipy.ndimage import sobel

    squared = 0
    for axis in range(3):
        channels = [sobel(channel, axis=axis, mode="nearest") for channel in x[0].numpy()]
        squared = squared + np.stack(channels) ** 2
    return np.sqrt(squared)


def by_monai(x, gradients):
    "The magnitude by MONAI's transform, channel by channel"
    return [gradients(channel[None]).square().sum(0).sqrt() for channel in x[0]]


def sobel():
    from monai.transforms import SobelGradients

    gradients = SobelGradients(padding_mode="replicate")
    x = torch.randn(1, 3, 128, 128, 128)
    ours = sobel_magnitude(x)
    assert np.allclose(ours[0].numpy(), by_scipy(x), atol=1e-3)
    assert torch.allclose(ours, by_convolution(x), atol=1e-3)
    t = medians(
        ours=lambda: sobel_magnitude(x),
        scipy=lambda: by_scipy(x),
        conv3d=lambda: by_convolution(x),
        MONAI=lambda: by_monai(x, gradients),
    )
    compiled = torch.compile(sobel_magnitude)
    fast = medians(compiled=lambda: compiled(x))
    return [
        row("Sobel magnitude, 3×128³", t.pop("ours"), t, "2.5"),
        row("the same, torch.compile", fast["compiled"], t, "5"),
    ]


def sobel_backward():
    x = torch.randn(1, 3, 128, 128, 128)

    def there_and_back(magnitude):
        y = x.clone().requires_grad_()
        magnitude(y).sum().backward()
        return y.grad

    ours = there_and_back(sobel_magnitude)
    theirs = there_and_back(by_convolution)
    assert torch.allclose(ours, theirs, atol=1e-2)
    t = medians(
        ours=lambda: there_and_back(sobel_magnitude),
        conv3d=lambda: there_and_back(by_convolution),
    )
    return [row("Sobel magnitude, forward and backward", t.pop("ours"), t, "3")]


# ---- training steps


@dataclass
class Size:
    "A network and a batch that are measured"

    name: str
    width: int
    levels: int
    shape: tuple  # of the batch (B,C,D,H,W)
    again: int  # repetitions

    def segnet(self, width=None):
        "Seg-Net of this size, perhaps of another width"
        return SegNet(self.shape[1], 3, width or self.width, self.levels)

    def egcnn(self):
        "The same with an edge stream"
        return EGCNN(self.segnet())


SMALL = Size("a", 8, 3, (2, 1, 48, 64, 48), 7)
SIZES = (SMALL, Size("b", 16, 4, (1, 4, 96, 96, 96), 3))


def problem(shape):
    "An image and a target with two nested boxes of an eighth of each side and more"
    batch, _, *size = shape
    labels = torch.zeros(batch, *size, dtype=torch.long)
    outer = [slice(n // 4, 3 * n // 4) for n in size]
    inner = [slice(n // 3, n // 2) for n in size]
    labels[(slice(None), *outer)] = 1
    labels[(slice(None), *inner)] = 2
    return torch.randn(shape), one_hot(labels, range(3))


def keys_of(x):
    "Names of the noise, one a case"
    return [(0, i) for i in range(len(x))]


def step(net, x, target, precision="fp32", eg=None):
    """A function that trains one step, as egcnn_train does; `eg`: whether the network has an edge
    stream, where its class does not say"""
    loss = EGLoss()
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)
    keys = keys_of(x)
    if eg is None:
        eg = isinstance(net, EGCNN)

    def train():
        with autocast(precision, x.device):
            out = net(x, full=True) if eg else net(x)
        total = loss(out, target, keys=keys)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return train


def cost(net, x):
    """Parameters and multiply-adds, as the network is written: on a CPU ours multiplies with some
    zeros besides (`layers`)"""
    from torch.utils.flop_counter import FlopCounterMode

    twin = deepcopy(net).to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(x.to("meta"))
    parameters = sum(weight.numel() for weight in net.parameters())
    return parameters, counter.get_total_flops() // 2


def losses():
    found = []
    for size in SIZES:
        x, target = problem(size.shape)
        net = size.egcnn()
        loss = EGLoss()
        keys = keys_of(x)
        with torch.no_grad():
            outputs = net(x, full=True)[:3]

        def alone(loss=loss, outputs=outputs, target=target, keys=keys):
            out = EGOutput(*[output.clone().requires_grad_() for output in outputs])
            loss(out, target, keys=keys).backward()

        t = medians(min(size.again, 5), losses=alone, step=step(net, x, target))
        what = f"edge targets and all losses, ({size.name})"
        found.append(row(what, t["losses"], {"the whole step": t["step"]}, "0.05", SHARE))
    return found


def wider_than(size, x, least):
    "The narrowest Seg-Net with at least this cost"
    for width in count(size.width):
        net = size.segnet(width)
        parameters, adds = cost(net, x)
        if parameters >= least[0] and adds >= least[1]:
            return net


def steps():
    found = []
    for size in SIZES:
        x, target = problem(size.shape)
        eg = size.egcnn()
        bare = size.segnet()
        wider = wider_than(size, x, cost(eg, x))
        t = medians(
            size.again,
            ours=step(eg, x, target),
            bare=step(bare, x, target),
            wider=step(wider, x, target),
        )
        what = f"a step of EG-CNN, ({size.name})"
        name = f"bare, width {wider.channels[0]}"
        found.append(row(what, t["ours"], {"the bare backbone": t["bare"]}, "1.25", SHARE))
        found.append(row(what, t["ours"], {name: t["wider"]}, "1.0", SHARE))
    return found


def monai_segresnet(size):
    "MONAI's network with the same parameters"
    from monai.networks.nets import SegResNet

    return SegResNet(
        3,
        size.width,
        size.shape[1],
        3,
        blocks_down=(1, 2, 2, 4)[: size.levels],
        blocks_up=(1,) * (size.levels - 1),
    )


def print_rate(size, adds, milliseconds, dtype):
    "Print the share of a matrix product's rate; forward, and backward twice as much"
    rate = 3 * adds / (1e-3 * milliseconds)
    share = rate / matmul_rate(dtype)
    print(f"Seg-Net ({size.name}) in {dtype}: {share:.0%} of the rate of a matrix product")


def segresnet():
    found = []
    for size in SIZES:
        x, target = problem(size.shape)
        # batch 2: neither is on torch's slow path
        x = x.expand(2, *x.shape[1:]).clone()
        target = target.expand(2, *target.shape[1:]).clone()
        ours = size.segnet()
        theirs = monai_segresnet(size)
        own = cost(ours, x)
        other = cost(theirs, x)
        assert own == other, (own, other)
        t = medians(size.again, ours=step(ours, x, target), theirs=step(theirs, x, target))
        what = f"a step of Seg-Net, ({size.name}), batch 2"
        found.append(row(what, t["ours"], {"MONAI SegResNet": t["theirs"]}, "1.0", SHARE))
        _, adds = own
        print_rate(size, adds, t["ours"], torch.float32)
        if best_precision(CPU) == "bf16":
            half = medians(3, ours=step(ours, x, target, "bf16"))
            print_rate(size, adds, half["ours"], torch.bfloat16)
    return found


def bf16():
    if best_precision(CPU) != "bf16":
        return []
    found = []
    for size in SIZES:
        x, target = problem(size.shape)
        half = step(size.egcnn(), x, target, "bf16")
        t = medians(ours=half, fp32=step(size.egcnn(), x, target))
        found.append(row(f"a step in bfloat16, ({size.name})", t.pop("ours"), t, "1.8"))
    return found


def batch_1():
    x, target = problem(SMALL.shape)
    x = x[..., :40, :56, :40].contiguous()
    target = target[..., :40, :56, :40].contiguous()
    net = SMALL.egcnn()
    t = medians(ours=step(net, x[:1], target[:1]), two=step(net, x, target))
    half = {"half a step at batch 2": t["two"] / 2}
    return [row("a step at batch 1, 40×56×40", t["ours"], half, "about 1", SHARE)]


# ---- the rest


def predict():
    from monai.inferers import sliding_window_inference

    window = (96, 96, 96)
    net = SegNet(4, 3, 8, 4).eval()
    head = (slice(None), slice(40, 200), slice(25, 215), slice(5, 150))
    whole = torch.zeros(4, 240, 240, 155)
    whole[head] = torch.randn(4, 160, 190, 145)
    inside = whole[head].contiguous()

    def by_monai_of(volume):
        options = {"mode": "gaussian", "padding_mode": "replicate"}
        return sliding_window_inference(volume[None], window, 2, net, 0.25, **options)[0]

    calls = {
        "ours": lambda: infer(net, inside, window),
        "theirs": lambda: by_monai_of(whole),
        "cropped": lambda: by_monai_of(inside),
    }
    with torch.no_grad():
        assert torch.allclose(calls["ours"](), calls["cropped"](), atol=1e-4)
        t = medians(2, **calls)
    extra = []
    for name, call in calls.items():
        extra.append(f"{name} {extra_memory(call) / 2**20:.0f}")
    print("most memory that it adds, MiB: " + ", ".join(extra))
    what = "240×240×155×4, windows of 96³"
    same = "the same, both cropped to the head"
    return [
        row(what, t["ours"], {"MONAI, whole image": t["theirs"]}, "0.8", SHARE),
        row(same, t["ours"], {"MONAI": t["cropped"]}, "1.0", SHARE),
    ]


def two_masks():
    "A mask of an ellipsoid, and one that is a little off (1,1,240,240,155)"
    axes = [torch.arange(n) - n / 2 for n in (240, 240, 155)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    radii = torch.tensor([30, 40, 25]).view(3, 1, 1, 1)
    truth = (grid / radii).square().sum(0)[None, None] < 1
    ball = grid.square().sum(0)[None, None] < 27**2
    return truth.roll(2, 2) | ball, truth


def metric():
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    found, truth = two_masks()

    def by_monai_metrics():
        distance = compute_hausdorff_distance(found, truth, include_background=True, percentile=95)
        dice = compute_surface_dice(found, truth, [1.0], include_background=True)
        return distance, dice

    for ours, theirs in zip(distances(found, truth), by_monai_metrics(), strict=True):
        assert torch.allclose(ours, theirs.float(), atol=1e-4)
    t = medians(3, ours=lambda: distances(found, truth), MONAI=by_monai_metrics)
    return [row("HD95 and surface Dice, 240×240×155", t.pop("ours"), t, "5")]


LESSON = Path(__file__).parents[1] / "nbs/1_method"


def first_picture():
    "Start a kernel and run the cells of 02_scans_and_masks until a picture has arrived"
    notebook = json.loads((LESSON / "02_scans_and_masks.ipynb").read_text())
    pictures = []

    def keep(message):
        if "image/png" in message["content"].get("data", {}):
            pictures.append(message)

    manager, client = start_new_kernel(cwd=str(LESSON))
    try:
        for cell in notebook["cells"]:
            if pictures:
                return
            if cell["cell_type"] == "code":
                reply = client.execute_interactive("".join(cell["source"]), output_hook=keep)
                assert reply["content"]["status"] == "ok"
        assert pictures, "the notebook draws no picture"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def startup():
    def run(*words):
        return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)

    t = medians(
        3,
        picture=first_picture,
        help=run("-m", "egcnn_nb.train", "--help"),
        sobel=run("-c", "import egcnn_nb.method.sobel"),
        torch=run("-c", "import torch"),
        monai=run("-c", "import monai"),
    )
    monai = {"import monai": t["monai"]}
    picture = "first picture of 02_scans_and_masks, a fresh kernel"
    imported = {"import torch": t["torch"]}
    return [
        row("egcnn_train --help", t["help"], monai, "0.5 s", SHARE),
        row("import egcnn_nb.method.sobel", t["sobel"], imported, "+ 0.1 s", SHARE),
        row(picture, t["picture"], monai, "3 s", SHARE),
    ]


ROWS = {
    "sobel": sobel,
    "sobel_backward": sobel_backward,
    "losses": losses,
    "step": steps,
    "segresnet": segresnet,
    "bf16": bf16,
    "batch_1": batch_1,
    "predict": predict,
    "distances": metric,
    "startup": startup,
}


def processor():
    "The name of this machine's processor"
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                _, _, name = line.partition(":")
                return name.strip()
    return platform.processor() or "a CPU"


def print_row(found):
    "Print one line of the table"
    sign = ""
    if found["must be"][0].isdigit():
        sign = "≥ " if found["is"] == FASTER else "≤ "
    print(
        f"| {found['what']} | {found['ours_ms']} | {found['peer']} | {found['peer_ms']} "
        f"| {found['ratio']} {found['is']} | {sign}{found['must be']} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"out of {' '.join(ROWS)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--keep_memory", action="store_true")
    args = parser.parse_args()
    odd = set(args.rows) - set(ROWS)
    if odd:
        parser.error(f"no row {sorted(odd)}")
    torch.set_num_threads(args.threads)
    about = {
        "cpu": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": args.threads,
        "memory kept": keep_memory() if args.keep_memory else False,
    }
    for package in ("torch", "monai", "scipy", "numpy"):
        about[package] = version(package)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("\n| work | ms | against | ms | ratio | must be |\n|---|---|---|---|---|---|")
    found = []
    for name in args.rows or ROWS:
        for result in ROWS[name]():
            found.append(result)
            print_row(result)
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
