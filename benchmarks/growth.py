"""How time and memory grow with the volume: Sobel, losses, a training step, prediction, from 32^3 to 256^3.

    python benchmarks/growth.py [--threads 1] [--again 3] [--largest 256] [--png benchmarks/growth.png]

Seg-Net of width 8 with 3 levels and an edge stream, 3 classes, one channel, batch 1; prediction by windows of 96^3. The exponent is the slope of log
time (or memory) against log voxels over the three largest volumes. The roofs are measured too: a copy for Sobel (which reads and writes each voxel at
least once), a matrix product for the network (the multiply-adds of its convolutions at that rate)."""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from speed import cost, extra_memory, matmul_rate, problem, step

from egcnn_nb.core import keep_memory
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss
from egcnn_nb.method.sobel import sobel_magnitude
from egcnn_nb.run.models import infer


def memory(name, n):
    "The most memory in bytes that a call adds, in a process of its own whose allocator gives everything back at once"
    words = [sys.executable, __file__, "--one", name, str(n)]
    return int(
        subprocess.run(
            words,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        ).stdout
    )


def measured(f, again):
    "Median seconds; a call before, which finds memory, is not counted"
    seconds = []
    f()
    for _ in range(again):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def sobel(n):
    x = torch.randn(1, 3, n, n, n)
    return lambda: sobel_magnitude(x)


def losses(n):
    x, target = problem((1, 1, n, n, n))
    loss = EGLoss()
    logits = torch.randn(1, 3, n, n, n)
    edge = torch.randn(1, 2, n, n, n)
    main = torch.randn(1, 3, n, n, n)
    return lambda: loss(
        logits.requires_grad_(), edge.requires_grad_(), target, main.requires_grad_(), [(0, 0)]
    )["total"].backward()


def train(n):
    return step(EGCNN(SegNet(1, 3, 8, 3)), *problem((1, 1, n, n, n)))


def prediction(n):
    net = EGCNN(SegNet(1, 3, 8, 3)).eval()
    x = torch.randn(1, n, n, n)
    return lambda: infer(net, x, (96,) * 3)


WORK = {
    "Sobel magnitude, 3 channels": (sobel, (32, 48, 64, 96, 128, 192, 256)),
    "all losses, forward and backward": (losses, (32, 48, 64, 96, 128, 192, 256)),
    "a training step": (train, (32, 48, 64, 96, 128, 160, 192)),
    "prediction": (prediction, (32, 48, 64, 96, 128, 192, 256)),
}


def roofs():
    "Seconds to copy a byte, seconds for a multiply-add of a float32 matrix product"
    x = torch.randn(2**25)
    y = torch.empty_like(x)
    return measured(lambda: y.copy_(x), 5) / (8 * x.numel()), 1 / matmul_rate()


def slope(sizes, values):
    return float(np.polyfit(3 * np.log(sizes[-3:]), np.log(values[-3:]), 1)[0])


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--again", type=int, default=3)
    p.add_argument("--largest", type=int, default=256, help="longest side")
    p.add_argument("--png", default=str(Path(__file__).with_name("growth.png")))
    p.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        return print(extra_memory(WORK[args.one[0]][0](int(args.one[1]))))
    keep_memory()  # as egcnn_train and egcnn_predict do
    a_byte, an_add = roofs()
    per_voxel = cost(EGCNN(SegNet(1, 3, 8, 3)), torch.zeros(1, 1, 64, 64, 64))[1] / 64**3
    print(
        f"copy {1e-9 / a_byte:.1f} GB/s, matrix product {2e-9 / an_add:.0f} GFLOP/s, {per_voxel:.0f} multiply-adds a voxel forward\n\n| work | volumes | exponent of time | of memory | of the roof at the largest |\n|---|---|---|---|---|"
    )
    fig = Figure(figsize=(11, 4.2), layout="constrained")
    axes = fig.subplots(1, 2)
    for k, (name, (make, sizes)) in enumerate(WORK.items()):
        sizes = [n for n in sizes if n <= args.largest]
        seconds = [measured(make(n), args.again if n < 192 else 1) for n in sizes]
        extra = [memory(name, n) for n in sizes]
        axes[0].loglog([n**3 for n in sizes], seconds, "o-", ms=4, color=f"C{k}", label=name)
        axes[1].loglog(
            [n**3 for n in sizes], np.array(extra) / 2**20, "o-", ms=4, color=f"C{k}", label=name
        )
        floor = {
            "Sobel": 24 * a_byte,
            "a tra": 3 * per_voxel * an_add,
            "predi": per_voxel * an_add,
        }.get(name[:5])
        if floor:
            axes[0].loglog(
                [n**3 for n in sizes], [floor * n**3 for n in sizes], ":", lw=1.3, color=f"C{k}"
            )
        print(
            f"| {name} | {sizes[0]}³ to {sizes[-1]}³ | {slope(sizes, seconds):.2f} | {slope(sizes, extra):.2f} | {f'{floor * sizes[-1] ** 3 / seconds[-1]:.0%}' if floor else ''} |",
            flush=True,
        )
    axes[0].plot([], [], ":", color="gray", label="roof: copy, or matrix product")
    for ax, what in zip(axes, ("seconds", "most memory that a call adds, MiB")):
        ax.set(xlabel="voxels", ylabel=what, title=what.split(",")[0])
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    fig.savefig(args.png, dpi=90)


if __name__ == "__main__":
    main()
