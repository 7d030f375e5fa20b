"""Two processes against one that computes the whole batch: torchrun, gloo, one thread each.

    python benchmarks/scaling.py [--processes 2] [--again 5] [--json FILE]

EG-CNN on Seg-Net (a): width 8, 3 levels, patches of 1x48x64x48, two a process. One process computes all of them; rounds alternate."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from speed import problem, step

from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN


def one_rank(out, again):
    "Median seconds of a step of this process's share"
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = EGCNN(SegNet(1, 3, 8, 3))
    parameters = sum(p.numel() for p in net.parameters())
    train = step(
        torch.nn.parallel.DistributedDataParallel(net), *problem((2, 1, 48, 64, 48)), eg=True
    )
    train()
    seconds = []
    for _ in range(again):
        dist.barrier()
        start = time.perf_counter()
        train()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        Path(out).write_text(
            json.dumps({"seconds": statistics.median(seconds), "gradient_bytes": 4 * parameters})
        )
    dist.barrier()
    dist.destroy_process_group()


def alone(n, again):
    "Median seconds of a step of one process that has all of it"
    torch.set_num_threads(1)
    train = step(EGCNN(SegNet(1, 3, 8, 3)), *problem((2 * n, 1, 48, 64, 48)))
    train()
    seconds = []
    for _ in range(again):
        start = time.perf_counter()
        train()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(n, again=5, rounds=3):
    "Seconds of a step: one process, n processes, and the bytes of a gradient"
    one = []
    many = []
    with tempfile.TemporaryDirectory() as tmp:
        for _ in range(rounds):
            one.append(alone(n, again))
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc_per_node={n}",
                    __file__,
                    "--rank_out",
                    f"{tmp}/out.json",
                    "--again",
                    str(again),
                ],
                check=True,
                capture_output=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            many.append(json.loads(Path(tmp, "out.json").read_text()))
    return {
        "processes": n,
        "one_s": statistics.median(one),
        "many_s": statistics.median(m["seconds"] for m in many),
        "gradient_bytes": many[0]["gradient_bytes"],
    }


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--again", type=int, default=5)
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--rank_out", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.rank_out:
        return one_rank(args.rank_out, args.again)
    found = measure(args.processes, args.again)
    print(
        f"one process {found['one_s'] * 1e3:.0f} ms, {args.processes} processes {found['many_s'] * 1e3:.0f} ms: {found['one_s'] / found['many_s']:.2f} times as fast; a gradient has {found['gradient_bytes'] / 1e6:.2f} MB"
    )
    found["cpu"] = next(
        (l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")),
        "a CPU",
    )
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
