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
from functools import partial
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
WINDOW = (96, 96, 96)  # of prediction
LARGE = 192  # volumes with sides from here on are computed once
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # the allocator gives everything back at once


def memory(name, side):
    """The most memory in bytes that a call adds, in a process of its own whose allocator gives
    everything back at once"""
    words = [sys.executable, __file__, "--one", name, str(side)]
    environment = os.environ | GIVE_BACK
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


def measured(call, again):
    "Median seconds; a call before, which finds memory, is not counted"
    call()
    seconds = []
    for _ in range(again):
        start = time.perf_counter()
        call()
        spent = time.perf_counter() - start
        seconds.append(spent)
    return statistics.median(seconds)


def network():
    "Seg-Net with its edge stream"
    backbone = SegNet(1, 3, 8, 3)
    return EGCNN(backbone)


def sobel(side):
    "A call of Sobel's magnitude"
    shape = (1, 3, side, side, side)
    x = torch.randn(shape)
    return partial(sobel_magnitude, x)


def losses(side):
    "A call of all losses, forward and backward"
    size = (side, side, side)
    _, target = problem((1, 1, *size))
    loss = EGLoss()
    logits = torch.randn(1, 3, *size, requires_grad=True)
    edge = torch.randn(1, 2, *size, requires_grad=True)
    main = torch.randn(1, 3, *size, requires_grad=True)

    def there_and_back():
        out = EGOutput(logits, edge, main)
        total = loss(out, target, keys=[(0, 0)])
        total.backward()

    return there_and_back


def train(side):
    "A step of training"
    net = network()
    shape = (1, 1, side, side, side)
    x, target = problem(shape)
    return step(net, x, target)


def prediction(side):
    "A call of prediction"
    net = network()
    net.eval()
    shape = (1, side, side, side)
    x = torch.randn(shape)
    return partial(infer, net, x, WINDOW)


@dataclass
class Roofs:
    "The fastest that this machine can do"

    per_byte: float  # seconds to copy a byte
    per_add: float  # seconds for a multiply-add of a float32 matrix product
    adds: float  # multiply-adds of the network for each voxel, forward


def seconds_to_copy():
    "Seconds to copy a byte: each float32 is read and written, eight bytes"
    x = torch.randn(2**25)
    y = torch.empty_like(x)
    copy = partial(y.copy_, x)
    seconds = measured(copy, 5)
    moved = 8 * x.numel()
    return seconds / moved


def adds_a_voxel():
    "Multiply-adds of the network for each voxel, forward"
    net = network()
    x = torch.zeros(1, 1, 64, 64, 64)
    _, adds = cost(net, x)
    voxels = x.numel()
    return adds / voxels


def roofs():
    "Measure the roofs"
    per_byte = seconds_to_copy()
    adds = adds_a_voxel()
    per_add = 1 / matmul_rate()
    return Roofs(per_byte, per_add, adds)


def no_floor(roof):
    "No bound is known"
    return None


def floor_of_sobel(roof):
    "Three channels of four bytes are read and written"
    return 24 * roof.per_byte


def floor_of_training(roof):
    "Forward once, and backward twice as much"
    forward = floor_of_prediction(roof)
    return 3 * forward


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
    largest = sides[-3:]
    log_voxels = 3 * np.log(largest)
    highest = values[-3:]
    log_values = np.log(highest)
    exponent, _ = np.polyfit(log_voxels, log_values, 1)
    return float(exponent)


@dataclass
class Curves:
    "What was measured of one kind of work, a value for each volume"

    name: str
    sides: list
    seconds: list
    extra: list  # bytes that it adds at most
    least: list  # seconds at least, or empty where no bound is known

    def voxels(self):
        "How many voxels each volume has"
        found = []
        for side in self.sides:
            found.append(side**3)
        return found


def measure(name, work, args, roof):
    "Measure one kind of work at each of its sizes"
    sides = [side for side in work.sides if side <= args.largest]
    seconds = [seconds_of(work, side, args.again) for side in sides]
    extra = [memory(name, side) for side in sides]
    least = []
    floor = work.floor(roof)
    if floor:
        least = [floor * side**3 for side in sides]
    return Curves(name, sides, seconds, extra, least)


def seconds_of(work, side, again):
    "Seconds at one side; the largest volumes are computed once"
    call = work.make(side)
    if side >= LARGE:
        again = 1
    return measured(call, again)


def draw(curves, axes, colour):
    "Draw time with its bound, and memory"
    time_ax, memory_ax = axes
    voxels = curves.voxels()
    style = {"ms": 4, "color": colour, "label": curves.name}
    time_ax.loglog(voxels, curves.seconds, "o-", **style)
    extra = np.array(curves.extra)
    mebibytes = extra / 2**20
    memory_ax.loglog(voxels, mebibytes, "o-", **style)
    if curves.least:
        time_ax.loglog(voxels, curves.least, ":", lw=1.3, color=colour)


def share_of_roof(curves):
    "How near the largest volume comes to the bound, as it is printed"
    if not curves.least:
        return ""
    least = curves.least[-1]
    seconds = curves.seconds[-1]
    share = least / seconds
    return f"{share:.0%}"


def print_row(curves):
    "Print the row of one kind of work"
    sides = curves.sides
    time = slope(sides, curves.seconds)
    space = slope(sides, curves.extra)
    share = share_of_roof(curves)
    cells = [
        curves.name,
        f"{sides[0]}³ to {sides[-1]}³",
        f"{time:.2f}",
        f"{space:.2f}",
        share,
    ]
    row = " | ".join(cells)
    print(f"| {row} |", flush=True)


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


def arguments():
    "The arguments of the command line"
    beside = Path(__file__).with_name("growth.png")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", type=int, default=3)
    parser.add_argument("--largest", type=int, default=256, help="longest side")
    parser.add_argument("--png", default=str(beside))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def print_memory(name, side):
    "Print the bytes that one kind of work adds: a process of its own does this for `memory`"
    work = WORK[name]
    call = work.make(int(side))
    extra = extra_memory(call)
    print(extra)


def print_head(roof):
    "Print the roofs, and the head of the table"
    copied = 1e-9 / roof.per_byte
    computed = 2e-9 / roof.per_add
    print(
        f"copy {copied:.1f} GB/s, matrix product {computed:.0f} GFLOP/s, "
        f"{roof.adds:.0f} multiply-adds a voxel forward\n\n"
        "| work | volumes | exponent of time | of memory | of the roof at the largest |\n"
        "|---|---|---|---|---|"
    )


def report(args):
    "Measure all kinds of work, print a row of each, and draw them"
    roof = roofs()
    print_head(roof)
    fig = Figure(figsize=(11, 4.2), layout="constrained")
    axes = fig.subplots(1, 2)
    for k, (name, work) in enumerate(WORK.items()):
        curves = measure(name, work, args, roof)
        draw(curves, axes, f"C{k}")
        print_row(curves)
    finish(axes)
    fig.savefig(args.png, dpi=90)


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.one:
        print_memory(*args.one)
        return
    keep_memory()  # as egcnn_train and egcnn_predict do
    report(args)


if __name__ == "__main__":
    main()
