"""Steps on a GPU: EG-CNN beside its bare backbone, and bfloat16 beside float32.

    python benchmarks/gpu.py [--json FILE]

Every row is a ratio. Both sides run in one process, in turn, and the median of several counts."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss
from egcnn_nb.run.models import autocast
from egcnn_nb.tensors import seed_everything

CLASSES = 4
BLOCK = 8  # side of the blocks of a class, in voxels


@dataclass
class Size:
    "A network and a batch that are measured"

    width: int
    levels: int
    shape: tuple  # of the batch (B,C,D,H,W)

    def segnet(self):
        "Seg-Net of this size"
        channels = self.shape[1]
        return SegNet(channels, CLASSES, self.width, self.levels)


SIZES = {
    "a": Size(8, 3, (2, 1, 48, 64, 48)),
    "b": Size(16, 4, (1, 4, 96, 96, 96)),
    "c": Size(32, 5, (2, 4, 128, 128, 128)),
}
FORMS: dict[str, dict[str, Any]] = {
    "0.1": {"edge_head": "plain", "gate_residual": "none"},
    "one layer": {"edge_head": "norm", "gate_residual": "layer"},
    "block": {"edge_head": "norm", "gate_residual": "block"},
}


def problem(shape):
    "Random images and one-hot masks of the classes in blocks"
    seed_everything(0)
    x = torch.randn(shape, device="cuda")
    batch, _, *size = shape
    blocks = [n // BLOCK for n in size]
    coarse = torch.randn(batch, CLASSES, *blocks, device="cuda")
    logits = F.interpolate(coarse, size)
    winners = logits.argmax(1, keepdim=True)
    target = torch.zeros_like(logits)
    target.scatter_(1, winners, 1)
    return x, target


def step_of(net, x, target, precision):
    "A function that takes one training step"
    loss = EGLoss()
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)
    cases = len(x)
    keys = [(0, i) for i in range(cases)]

    def step():
        with autocast(precision, x.device):
            out = net(x)
        total = loss(out, target, keys=keys)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return step


def seconds(step):
    "How long one call takes on the GPU"
    torch.cuda.synchronize()
    begin = perf_counter()
    step()
    torch.cuda.synchronize()
    return perf_counter() - begin


def medians(steps, again):
    "name -> median seconds, the steps in turn"
    for step in steps.values():
        step()
        step()
    times = {name: [] for name in steps}
    for _ in range(again):
        for name, step in steps.items():
            took = seconds(step)
            times[name].append(took)
    return {name: median(values) for name, values in times.items()}


def peak(step):
    "GiB that a step takes at most"
    torch.cuda.reset_peak_memory_stats()
    step()
    bytes_held = torch.cuda.max_memory_allocated()
    return bytes_held / 2**30


def steps_of(size, x, target, precision):
    "name -> a training step of the bare backbone, and of EG-CNN in each of its forms"
    bare = size.segnet().cuda()
    steps = {"bare": step_of(bare, x, target, precision)}
    for form, readings in FORMS.items():
        backbone = size.segnet()
        net = EGCNN(backbone, **readings).cuda()
        steps[form] = step_of(net, x, target, precision)
    return steps


def rows_of(name, precision, steps, again):
    "The rows of one size in one precision"
    found = medians(steps, again)
    bare = found["bare"]
    rows = []
    for form, took in found.items():
        row = {
            "size": name,
            "precision": precision,
            "network": form,
            "ms": 1000 * took,
            "of bare": took / bare,
            "GiB": peak(steps[form]),
        }
        rows.append(row)
    return rows


def measured(name, again):
    "The rows of one size"
    size = SIZES[name]
    x, target = problem(size.shape)
    rows = []
    for precision in ("fp32", "bf16"):
        steps = steps_of(size, x, target, precision)
        rows += rows_of(name, precision, steps, again)
        del steps
        torch.cuda.empty_cache()
    return rows


def print_head():
    "Print the names of GPU and torch, and the head of the table"
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}")
    print("| size | precision | network | ms a step | of bare | GiB |")
    print("|---|---|---|---|---|---|")


def print_row(row):
    "Print one row of the table"
    cells = [
        f"({row['size']})",
        row["precision"],
        row["network"],
        f"{row['ms']:.1f}",
        f"{row['of bare']:.2f}",
        f"{row['GiB']:.2f}",
    ]
    line = " | ".join(cells)
    print(f"| {line} |", flush=True)


def arguments():
    "The arguments of the command line"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    parser.add_argument("--again", type=int, default=9, help="steps of each (default: 9)")
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help="of a, b and c")
    return parser.parse_args()


def main():
    args = arguments()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here. benchmarks/speed.py measures the processor.")
    print_head()
    rows = []
    for name in args.sizes:
        found = measured(name, args.again)
        rows += found
        for row in found:
            print_row(row)
    if args.json:
        text = json.dumps(rows, indent=1)
        Path(args.json).write_text(text)


if __name__ == "__main__":
    main()
