"""How fast it is, as ratios to what others would run: both in this process, in turn, the median of several.

    python benchmarks/speed.py [ROW ...] [--threads 1] [--json FILE] [--keep_memory]     # default: every row

Rows: sobel sobel_backward losses step segresnet bf16 batch_1 predict distances startup.
Seg-Net (a): width 8, 3 levels, batch 2 of 1×48×64×48; (b): width 16, 4 levels, batch 1 of 4×96³; 3 classes, readings by default.
With --keep_memory the allocator keeps freed memory, as egcnn_train and egcnn_predict do, for both sides."""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jupyter_client.manager import start_new_kernel

from egcnn_nb.core import keep_memory
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss
from egcnn_nb.method.sobel import sobel_magnitude
from egcnn_nb.run.metrics import distances
from egcnn_nb.run.models import autocast, best_precision, infer
from egcnn_nb.tensors import one_hot


def medians(again=5, **what):
    "Milliseconds of each function, run in turn, after one round that does not count"
    times = {n: [] for n in what}
    for i in range(again + 1):
        for name, f in what.items():
            start = time.perf_counter()
            f()
            if i:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {n: statistics.median(t) for n, t in times.items()}


def status(name):
    "A line of /proc/self/status in bytes"
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def extra_memory(f):
    "The most memory in bytes that a call adds to what is there"
    f()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    f()
    return max(status("VmHWM") - before, 4096)


def matmul_rate(dtype=torch.float32, n=2048):
    "Multiply-adds a second of a product of two square matrices"
    m = torch.randn(n, n).to(dtype)
    return n**3 / (1e-3 * medians(5, mm=lambda: m @ m)["mm"])


def row(what, ours, peers, must, better="times as fast"):
    "One line of the table: the best of the peers is what counts"
    name, peer = min(peers.items(), key=lambda p: p[1])
    ratio = peer / ours if better == "times as fast" else ours / peer
    return {
        "what": what,
        "ours_ms": round(ours, 2),
        "peer": name,
        "peer_ms": round(peer, 2),
        "ratio": round(ratio, 2),
        "is": better,
        "must be": must,
        "all": {k: round(v, 1) for k, v in peers.items()},
    }


# ---- Sobel

_K = torch.stack(
    [
        torch.einsum("i,j,k->ijk", *v)
        for d, s in [(torch.tensor([-1.0, 0, 1]), torch.tensor([1.0, 2, 1]))]
        for v in ((d, s, s), (s, d, s), (s, s, d))
    ]
)[:, None]


def by_convolution(x):
    "The magnitude by one depthwise convolution"
    g = F.conv3d(F.pad(x, (1,) * 6, mode="replicate").flatten(0, 1)[:, None], _K)
    return (g.square().sum(1) + 1e-8).sqrt().view_as(x)


def by_scipy(x):
    from scipy.ndimage import sobel

    return np.sqrt(
        sum(
            np.stack([sobel(c, axis=a, mode="nearest") for c in x[0].numpy()]) ** 2
            for a in range(3)
        )
    )


def sobel():
    from monai.transforms import SobelGradients

    x = torch.randn(1, 3, 128, 128, 128)
    monai = SobelGradients(padding_mode="replicate")
    assert np.allclose(sobel_magnitude(x)[0].numpy(), by_scipy(x), atol=1e-3) and torch.allclose(
        sobel_magnitude(x), by_convolution(x), atol=1e-3
    )
    t = medians(
        ours=lambda: sobel_magnitude(x),
        scipy=lambda: by_scipy(x),
        conv3d=lambda: by_convolution(x),
        MONAI=lambda: [monai(c[None]).square().sum(0).sqrt() for c in x[0]],
    )
    compiled = torch.compile(sobel_magnitude)
    fast = medians(compiled=lambda: compiled(x))["compiled"]
    return [
        row("Sobel magnitude, 3×128³", t.pop("ours"), t, "2.5"),
        row("the same, torch.compile", fast, t, "5"),
    ]


def sobel_backward():
    x = torch.randn(1, 3, 128, 128, 128)

    def there_and_back(f):
        y = x.clone().requires_grad_()
        f(y).sum().backward()
        return y.grad

    assert torch.allclose(
        there_and_back(sobel_magnitude), there_and_back(by_convolution), atol=1e-2
    )
    t = medians(
        ours=lambda: there_and_back(sobel_magnitude), conv3d=lambda: there_and_back(by_convolution)
    )
    return [row("Sobel magnitude, forward and backward", t.pop("ours"), t, "3")]


# ---- training steps

SETTINGS = {"a": (8, 3, (2, 1, 48, 64, 48)), "b": (16, 4, (1, 4, 96, 96, 96))}


def problem(shape):
    "An image and a target with two nested boxes of an eighth of each side and more"
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.long)
    n = shape[2:]
    labels[(slice(None), *[slice(s // 4, 3 * s // 4) for s in n])] = 1
    labels[(slice(None), *[slice(s // 3, s // 2) for s in n])] = 2
    return torch.randn(shape), one_hot(labels, range(3))


def step(net, x, target, precision="fp32", eg=None):
    "A function that trains one step, as egcnn_train does; `eg`: whether the network has an edge stream, where its class does not say"
    loss = EGLoss()
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)
    eg = isinstance(net, EGCNN) if eg is None else eg
    keys = [(0, i) for i in range(len(x))]

    def train():
        with autocast(precision, x.device):
            out = net(x, return_main=True) if eg else (net(x), None, None)
        value = loss(out[0], out[1], target, out[2], keys)["total"]
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return train


def cost(net, x):
    "Parameters and multiply-adds, as the network is written: on a CPU ours multiplies with some zeros besides (`layers`)"
    from copy import deepcopy

    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as c:
        deepcopy(net).to("meta")(x.to("meta"))
    return sum(p.numel() for p in net.parameters()), c.get_total_flops() // 2


def losses():
    found = []
    for name, (width, levels, shape) in SETTINGS.items():
        x, target = problem(shape)
        net = EGCNN(SegNet(shape[1], 3, width, levels))
        loss = EGLoss()
        keys = [(0, i) for i in range(len(x))]
        with torch.no_grad():
            outs = net(x, return_main=True)

        def alone():
            a, e, m = [o.clone().requires_grad_() for o in outs]
            loss(a, e, target, m, keys)["total"].backward()

        t = medians(5 if name == "a" else 3, losses=alone, step=step(net, x, target))
        found.append(
            row(
                f"edge targets and all losses, ({name})",
                t["losses"],
                {"the whole step": t["step"]},
                "0.05",
                "of the peer's time",
            )
        )
    return found


def steps():
    found = []
    for name, (width, levels, shape) in SETTINGS.items():
        x, target = problem(shape)
        eg = EGCNN(SegNet(shape[1], 3, width, levels))
        bare = SegNet(shape[1], 3, width, levels)
        parameters, adds = cost(eg, x)
        wider = next(
            net
            for w in range(width, 3 * width)
            for net in [SegNet(shape[1], 3, w, levels)]
            if all(a >= b for a, b in zip(cost(net, x), (parameters, adds)))
        )
        t = medians(
            7 if name == "a" else 3,
            ours=step(eg, x, target),
            bare=step(bare, x, target),
            wider=step(wider, x, target),
        )
        found.append(
            row(
                f"a step of EG-CNN, ({name})",
                t["ours"],
                {"the bare backbone": t["bare"]},
                "1.25",
                "of the peer's time",
            )
        )
        found.append(
            row(
                f"a step of EG-CNN, ({name})",
                t["ours"],
                {f"bare, width {wider.channels[0]}": t["wider"]},
                "1.0",
                "of the peer's time",
            )
        )
    return found


def segresnet():
    from monai.networks.nets import SegResNet

    found = []
    for name, (width, levels, shape) in SETTINGS.items():
        x, target = problem(shape)
        # batch 2: neither on torch's slow path
        x = x.expand(2, *x.shape[1:]).clone()
        target = target.expand(2, *target.shape[1:]).clone()
        ours = SegNet(shape[1], 3, width, levels)
        theirs = SegResNet(
            3,
            width,
            shape[1],
            3,
            blocks_down=(1, 2, 2, 4)[:levels],
            blocks_up=(1,) * (levels - 1),
        )
        own = cost(ours, x)
        other = cost(theirs, x)
        assert own == other, (own, other)
        t = medians(
            7 if name == "a" else 3, ours=step(ours, x, target), theirs=step(theirs, x, target)
        )
        found.append(
            row(
                f"a step of Seg-Net, ({name}), batch 2",
                t["ours"],
                {"MONAI SegResNet": t["theirs"]},
                "1.0",
                "of the peer's time",
            )
        )
        spent = {torch.float32: t["ours"]}
        if best_precision(torch.device("cpu")) == "bf16":
            spent[torch.bfloat16] = medians(3, ours=step(ours, x, target, "bf16"))["ours"]
        for dtype, ms in spent.items():
            print(
                f"Seg-Net ({name}) in {dtype}: {3 * own[1] / (1e-3 * ms) / matmul_rate(dtype):.0%} of the rate of a matrix product"
            )  # forward, and backward twice as much
    return found


def bf16():
    if best_precision(torch.device("cpu")) != "bf16":
        return []
    found = []
    for name, (width, levels, shape) in SETTINGS.items():
        x, target = problem(shape)
        nets = [EGCNN(SegNet(shape[1], 3, width, levels)) for _ in range(2)]
        t = medians(ours=step(nets[0], x, target, "bf16"), fp32=step(nets[1], x, target))
        found.append(row(f"a step in bfloat16, ({name})", t.pop("ours"), t, "1.8"))
    return found


def batch_1():
    width, levels, shape = SETTINGS["a"]
    x, target = problem(shape)
    x = x[..., :40, :56, :40].contiguous()
    target = target[..., :40, :56, :40].contiguous()
    net = EGCNN(SegNet(1, 3, width, levels))
    t = medians(ours=step(net, x[:1], target[:1]), two=step(net, x, target))
    return [
        row(
            "a step at batch 1, 40×56×40",
            t["ours"],
            {"half a step at batch 2": t["two"] / 2},
            "about 1",
            "of the peer's time",
        )
    ]


# ---- the rest


def predict():
    from monai.inferers import sliding_window_inference

    net = SegNet(4, 3, 8, 4).eval()
    x = torch.zeros(4, 240, 240, 155)
    x[:, 40:200, 25:215, 5:150] = torch.randn(4, 160, 190, 145)
    inside = x[:, 40:200, 25:215, 5:150].contiguous()
    with torch.no_grad():
        theirs = lambda v: sliding_window_inference(
            v[None], (96,) * 3, 2, net, 0.25, mode="gaussian", padding_mode="replicate"
        )[0]
        assert torch.allclose(infer(net, inside, (96,) * 3), theirs(inside), atol=1e-4)
        t = medians(
            2,
            ours=lambda: infer(net, inside, (96,) * 3),
            theirs=lambda: theirs(x),
            cropped=lambda: theirs(inside),
        )
    extra = {
        n: extra_memory(f) / 2**20
        for n, f in (
            ("ours", lambda: infer(net, inside, (96,) * 3)),
            ("theirs", lambda: theirs(x)),
            ("cropped", lambda: theirs(inside)),
        )
    }
    print("most memory that it adds, MiB: " + ", ".join(f"{n} {m:.0f}" for n, m in extra.items()))
    return [
        row(
            "240×240×155×4, windows of 96³",
            t["ours"],
            {"MONAI, whole image": t["theirs"]},
            "0.8",
            "of the peer's time",
        ),
        row(
            "the same, both cropped to the head",
            t["ours"],
            {"MONAI": t["cropped"]},
            "1.0",
            "of the peer's time",
        ),
    ]


def metric():
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    g = torch.stack(
        torch.meshgrid(*[torch.arange(n) - n / 2 for n in (240, 240, 155)], indexing="ij")
    )
    truth = (g / torch.tensor([30, 40, 25]).view(3, 1, 1, 1)).square().sum(0)[None, None] < 1
    pred = truth.roll(2, 2) | (g.square().sum(0)[None, None] < 27**2)
    theirs = lambda: (
        compute_hausdorff_distance(pred, truth, include_background=True, percentile=95),
        compute_surface_dice(pred, truth, [1.0], include_background=True),
    )
    assert all(
        torch.allclose(a, b.float(), atol=1e-4) for a, b in zip(distances(pred, truth), theirs())
    )
    t = medians(3, ours=lambda: distances(pred, truth), MONAI=theirs)
    return [row("HD95 and surface Dice, 240×240×155", t.pop("ours"), t, "5")]


LESSON = Path(__file__).parents[1] / "nbs/1_method"


def first_picture():
    "Start a kernel and run the cells of 02_scans_and_masks until a picture has arrived"
    manager, client = start_new_kernel(cwd=str(LESSON))
    seen = lambda m: pictures.append(m) if "image/png" in m["content"].get("data", {}) else None
    cells = [
        c
        for c in json.loads((LESSON / "02_scans_and_masks.ipynb").read_text())["cells"]
        if c["cell_type"] == "code"
    ]
    pictures = []
    try:
        while not pictures:
            assert (
                client.execute_interactive("".join(cells.pop(0)["source"]), output_hook=seen)[
                    "content"
                ]["status"]
                == "ok"
            )
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
    return [
        row(
            "egcnn_train --help",
            t["help"],
            {"import monai": t["monai"]},
            "0.5 s",
            "of the peer's time",
        ),
        row(
            "import egcnn_nb.method.sobel",
            t["sobel"],
            {"import torch": t["torch"]},
            "+ 0.1 s",
            "of the peer's time",
        ),
        row(
            "first picture of 02_scans_and_masks, a fresh kernel",
            t["picture"],
            {"import monai": t["monai"]},
            "3 s",
            "of the peer's time",
        ),
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


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("rows", nargs="*", metavar="ROW", help=f"out of {' '.join(ROWS)}")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--keep_memory", action="store_true")
    args = p.parse_args()
    odd = set(args.rows) - set(ROWS)
    if odd:
        p.error(f"no row {sorted(odd)}")
    torch.set_num_threads(args.threads)
    kept = keep_memory() if args.keep_memory else False
    cpu = (
        next(
            (l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")),
            platform.processor(),
        )
        if platform.system() == "Linux"
        else platform.processor()
    )
    about = {
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": args.threads,
        "memory kept": kept,
        **{n: version(n) for n in ("torch", "monai", "scipy", "numpy")},
    }
    print(
        ", ".join(f"{k} {v}" for k, v in about.items())
        + "\n\n| work | ms | against | ms | ratio | must be |\n|---|---|---|---|---|---|"
    )
    found = []
    for name in args.rows or ROWS:
        for r in ROWS[name]():
            found.append(r)
            sign = (
                {"times as fast": "≥ ", "of the peer's time": "≤ "}[r["is"]]
                if r["must be"][0].isdigit()
                else ""
            )
            print(
                f"| {r['what']} | {r['ours_ms']} | {r['peer']} | {r['peer_ms']} | {r['ratio']} {r['is']} | {sign}{r['must be']} |",
                flush=True,
            )
    if args.json:
        open(args.json, "w").write(json.dumps({"about": about, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
