"""Steps and predictions on a GPU: EG-CNN beside its bare backbone, and bfloat16 beside float32.

    python benchmarks/gpu.py [--json FILE]

Every row is a ratio. Both sides run in one process, in turn, and the median of several counts."""

import argparse
import json
import sys
from statistics import median
from time import perf_counter

import torch

from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss
from egcnn_nb.run.models import autocast
from egcnn_nb.tensors import seed_everything

# name -> width, levels, and the batch (B,C,D,H,W)
SIZES = {
    "a": (8, 3, (2, 1, 48, 64, 48)),
    "b": (16, 4, (1, 4, 96, 96, 96)),
    "c": (32, 5, (2, 4, 128, 128, 128)),
}
FORMS = {
    "0.1": {"edge_head": "plain", "gate_residual": "none"},
    "one layer": {"edge_head": "norm", "gate_residual": "layer"},
    "block": {"edge_head": "norm", "gate_residual": "block"},
}


def problem(shape):
    "Random images and one-hot masks of four classes in blocks"
    seed_everything(0)
    x = torch.randn(shape, device="cuda")
    coarse = torch.randn(shape[0], 4, *(n // 8 for n in shape[2:]), device="cuda")
    logits = torch.nn.functional.interpolate(coarse, shape[2:])
    target = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1)
    return x, target


def step_of(net, x, target, precision):
    "A function that takes one training step"
    loss = EGLoss()
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)
    keys = [(0, i) for i in range(len(x))]

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
            times[name].append(seconds(step))
    return {name: median(of) for name, of in times.items()}


def peak(step):
    "GiB that a step takes at most"
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def measured(name, again):
    "The rows of one size"
    width, levels, shape = SIZES[name]
    x, target = problem(shape)
    rows = []
    for precision in ("fp32", "bf16"):
        steps = {"bare": step_of(SegNet(shape[1], 4, width, levels).cuda(), x, target, precision)}
        for form, readings in FORMS.items():
            net = EGCNN(SegNet(shape[1], 4, width, levels), **readings).cuda()
            steps[form] = step_of(net, x, target, precision)
        found = medians(steps, again)
        for form, took in found.items():
            rows.append(
                {
                    "size": name,
                    "precision": precision,
                    "network": form,
                    "ms": 1000 * took,
                    "of bare": took / found["bare"],
                    "GiB": peak(steps[form]),
                }
            )
        del steps
        torch.cuda.empty_cache()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    parser.add_argument("--again", type=int, default=9, help="steps of each (default: 9)")
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help="of a, b and c")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here. benchmarks/speed.py measures the processor.")
    rows = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| size | precision | network | ms a step | of bare | GiB |")
    print("|---|---|---|---|---|---|")
    for name in args.sizes:
        for row in measured(name, args.again):
            rows.append(row)
            cells = f"{row['ms']:.1f} | {row['of bare']:.2f} | {row['GiB']:.2f}"
            print(f"| ({name}) | {row['precision']} | {row['network']} | {cells} |", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
