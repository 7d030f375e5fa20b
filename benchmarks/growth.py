"""How time and memory grow with the volume: Sobel, losses, a training step, prediction, from 32^3 to
256^3.

    python benchmarks/growth.py [--threads 1] [--again 3] [--largest 256]
                                [--png benchmarks/growth.png]

Seg-Net of width 8 with 3 levels and an edge stream, 3 classes, one channel, batch 1; prediction by
windows of 96^3. The exponent is the slope of log time (or memory) against log voxels over the three
largest volumes. The roofs are measured too: a copy for Sobel (which reads and writes each voxel at
least once), a matrix product for the network (the multiply-adds of its convolutions at that rate)."""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from speed import cost, extra_memory, matmul_rate, problem, step

from egcnn_nb.core import keep_memory
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss, EGOutput
from egcnn_nb.method.sobel import sobel_magnitude
from egcnn_nb.run.models import infer

SIDES = (32, 48, 64, 96, 128, 192, 256)


def memory(name, side):
    """The most memory in bytes that a call adds, in a process of its own whose allocator gives
    everything back at once"""
    words = [sys.executable, __file__, "--one", name, str(side)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=env)
    return int(done.stdout)


def measured(call, again):
    "Median seconds; a call before, which finds memory, is not counted"
    call()
    seconds = []
    for _ in range(again):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def network():
    "Seg-Net with its edge stream"
    return EGCNN(SegNet(1, 3, 8, 3))


def sobel(side):
    "A call of Sobel's magnitude"
    x = torch.randn(1, 3, side, side, side)
    return lambda: sobel_magnitude(x)


def losses(side):
    "A call of all losses, forward and backward"
    size = (side, side, side)
    _, target = problem((1, 1, *size))
    loss = EGLoss()
    logits = torch.randn(1, 3, *size, requires_grad=True)
    edge = torch.randn(1, 2, *size, requires_grad=True)
    main = torch.randn(1, 3, *size, requires_grad=True)

    def there_and_back():
        loss(EGOutput(logits, edge, main), target, keys=[(0, 0)]).backward()

    return there_and_back


def train(side):
    "A step of training"
    x, target = problem((1, 1, side, side, side))
    return step(network(), x, target)


def prediction(side):
    "A call of prediction"
    net = network().eval()
    x = torch.randn(1, side, side, side)
    return lambda: infer(net, x, (96, 96, 96))


@dataclass
class Roofs:
    "The fastest that this machine can do"

    per_byte: float  # seconds to copy a byte
    per_add: float  # seconds for a multiply-add of a float32 matrix product
    adds: float  # multiply-adds of the network for each voxel, forward


def roofs():
    "Measure the roofs"
    x = torch.randn(2**25)
    y = torch.empty_like(x)
    copy = measured(lambda: y.copy_(x), 5)
    _, adds = cost(network(), torch.zeros(1, 1, 64, 64, 64))
    return Roofs(copy / (8 * x.numel()), 1 / matmul_rate(), adds / 64**3)


def no_floor(roof):
    "No bound is known"
    return None


def floor_of_sobel(roof):
    "Three channels of four bytes are read and written"
    return 24 * roof.per_byte


def floor_of_training(roof):
    "Forward once, and backward twice as much"
    return 3 * roof.adds * roof.per_add


def floor_of_prediction(roof):
    "Forward once"
    return roof.adds * roof.per_add


@dataclass
class Work:
    "What is measured"

    make: Callable  # side of the volume -> a function that does the work
    sides: tuple
    floor: Callable  # roofs -> seconds a voxel at least, or None


WORK = {
    "Sobel magnitude, 3 channels": Work(sobel, SIDES, floor_of_sobel),
    "all losses, forward and backward": Work(losses, SIDES, no_floor),
    "a training step": Work(train, (32, 48, 64, 96, 128, 160, 192), floor_of_training),
    "prediction": Work(prediction, SIDES, floor_of_prediction),
}


def slope(sides, values):
    "Exponent over the three largest volumes"
    voxels = 3 * np.log(sides[-3:])
    exponent, _ = np.polyfit(voxels, np.log(values[-3:]), 1)
    return float(exponent)


def seconds_of(work, sides, again):
    "Seconds at each side; the largest volumes are computed once"
    seconds = []
    for side in sides:
        call = work.make(side)
        seconds.append(measured(call, again if side < 192 else 1))
    return seconds


def report(name, work, args, roof, axes, colour):
    "Measure one kind of work, draw its two curves, and print its row"
    time_ax, memory_ax = axes
    sides = [side for side in work.sides if side <= args.largest]
    voxels = [side**3 for side in sides]
    seconds = seconds_of(work, sides, args.again)
    extra = [memory(name, side) for side in sides]
    style = {"ms": 4, "color": colour, "label": name}
    time_ax.loglog(voxels, seconds, "o-", **style)
    memory_ax.loglog(voxels, np.array(extra) / 2**20, "o-", **style)
    share = ""
    floor = work.floor(roof)
    if floor:
        least = [floor * n for n in voxels]
        time_ax.loglog(voxels, least, ":", lw=1.3, color=colour)
        share = f"{least[-1] / seconds[-1]:.0%}"
    grows = f"{slope(sides, seconds):.2f} | {slope(sides, extra):.2f}"
    print(f"| {name} | {sides[0]}³ to {sides[-1]}³ | {grows} | {share} |", flush=True)


def finish(axes):
    "Titles, grid and legend"
    time_ax, memory_ax = axes
    time_ax.plot([], [], ":", color="gray", label="roof: copy, or matrix product")
    time_ax.set(ylabel="seconds", title="seconds")
    memory_ax.set(ylabel="most memory that a call adds, MiB", title="most memory that a call adds")
    for ax in axes:
        ax.set_xlabel("voxels")
        ax.grid(alpha=0.3)
    time_ax.legend(frameon=False, fontsize=8)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", type=int, default=3)
    parser.add_argument("--largest", type=int, default=256, help="longest side")
    parser.add_argument("--png", default=str(Path(__file__).with_name("growth.png")))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        name, side = args.one
        call = WORK[name].make(int(side))
        return print(extra_memory(call))
    keep_memory()  # as egcnn_train and egcnn_predict do
    roof = roofs()
    print(
        f"copy {1e-9 / roof.per_byte:.1f} GB/s, matrix product {2e-9 / roof.per_add:.0f} GFLOP/s, "
        f"{roof.adds:.0f} multiply-adds a voxel forward\n\n"
        "| work | volumes | exponent of time | of memory | of the roof at the largest |\n"
        "|---|---|---|---|---|"
    )
    fig = Figure(figsize=(11, 4.2), layout="constrained")
    axes = fig.subplots(1, 2)
    for k, (name, work) in enumerate(WORK.items()):
        report(name, work, args, roof, axes, f"C{k}")
    finish(axes)
    fig.savefig(args.png, dpi=90)


if __name__ == "__main__":
    main()
