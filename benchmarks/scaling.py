"""Two processes against one that computes the whole batch: torchrun, gloo, one thread each.

    python benchmarks/scaling.py [--processes 2] [--again 5] [--json FILE]

EG-CNN on Seg-Net (a): width 8, 3 levels, patches of 1x48x64x48, two a process. One process computes
all of them; rounds alternate."""

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

from egcnn_nb.core import processor_name
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN

SHAPE = (1, 48, 64, 48)  # of a patch


def network():
    "The network that is trained"
    return EGCNN(SegNet(1, 3, 8, 3))


def nothing():
    "What happens between the steps of one process"


def timed(train, again, between=nothing):
    "Median seconds of a step; one before, which finds memory, is not counted"
    train()
    seconds = []
    for _ in range(again):
        between()
        start = time.perf_counter()
        train()
        between()
        spent = time.perf_counter() - start
        seconds.append(spent)
    return statistics.median(seconds)


def one_rank(out, again):
    "Median seconds of a step of this process's share, written by the first process"
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = network()
    parameters = sum(weight.numel() for weight in net.parameters())
    shared = torch.nn.parallel.DistributedDataParallel(net)
    batch = problem((2, *SHAPE))
    train = step(shared, *batch, eg=True)
    seconds = timed(train, again, between=dist.barrier)
    if dist.get_rank() == 0:
        found = {"seconds": seconds, "gradient_bytes": 4 * parameters}
        text = json.dumps(found)
        Path(out).write_text(text)
    dist.barrier()
    dist.destroy_process_group()


def alone(processes, again):
    "Median seconds of a step of one process that has all of it"
    torch.set_num_threads(1)
    net = network()
    patches = 2 * processes
    batch = problem((patches, *SHAPE))
    train = step(net, *batch)
    return timed(train, again)


def together(processes, again, out):
    "Median seconds of a step of several processes, and the bytes of a gradient"
    line = [sys.executable, "-m", "torch.distributed.run"]
    line += ["--standalone", f"--nproc_per_node={processes}"]
    line += [__file__, "--rank_out", out, "--again", str(again)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(line, check=True, capture_output=True, env=env)
    text = Path(out).read_text()
    return json.loads(text)


def measure(processes, again=5, rounds=3):
    "Seconds of a step: one process, several processes, and the bytes of a gradient"
    one = []
    many = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            one.append(alone(processes, again))
            many.append(together(processes, again, f"{folder}/out.json"))
    return {
        "processes": processes,
        "one_s": statistics.median(one),
        "many_s": statistics.median(found["seconds"] for found in many),
        "gradient_bytes": many[0]["gradient_bytes"],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--again", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rank_out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_out:
        return one_rank(args.rank_out, args.again)
    found = measure(args.processes, args.again)
    one = 1e3 * found["one_s"]
    many = 1e3 * found["many_s"]
    faster = one / many
    megabytes = found["gradient_bytes"] / 1e6
    print(f"one process {one:.0f} ms, {args.processes} processes {many:.0f} ms:", end=" ")
    print(f"{faster:.2f} times as fast; a gradient has {megabytes:.2f} MB")
    found["cpu"] = processor_name()
    if args.json:
        text = json.dumps(found, indent=1)
        Path(args.json).write_text(text)


if __name__ == "__main__":
    main()
