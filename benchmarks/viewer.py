"""How long one step of a slider takes in `view`, and how a large volume opens.

    python benchmarks/viewer.py            # a table; --json FILE keeps the numbers

A volume of 240×240×155 with four channels, label and prediction; each step moves one slider and draws all three planes. Then
a volume of 512×512×400 is opened: seconds, and the peak of memory beside the volume's own."""

import argparse
import gc
import json
import platform
import resource
import statistics
import time
from pathlib import Path

import numpy as np

from egcnn_nb.show.viewers import view


def steps(n):
    "Milliseconds of each of `n` steps through the three sliders in turn"
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 1000, (4, 240, 240, 155)).astype(np.int16)
    label = np.zeros(volume.shape[1:], np.uint8)
    for value, r in ((2, 50), (1, 35), (4, 20)):
        label[120 - r : 120 + r, 120 - r : 120 + r, 80 - r : 80 + r] = value
    v = view(volume, label, pred=np.roll(label, 3, 0))
    out = []
    for i in range(n):
        slider = v.controls["ijk"[i % 3]]
        start = time.perf_counter()
        slider.value = 20 + (slider.value + 7) % (slider.max - 40)
        out.append(1e3 * (time.perf_counter() - start))
    return out


def opening():
    "Seconds to open 512×512×400, and peak memory over the volume's own"
    volume = np.zeros((512, 512, 400), np.int16)
    volume[100:400, 100:400, 100:300] = 700
    label = (volume > 0).astype(np.uint8)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = volume.nbytes + label.nbytes
    start = time.perf_counter()
    view(volume, label)
    seconds = time.perf_counter() - start
    return seconds, 1 + max(
        0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    ) / own


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    seconds, ratio = opening()
    ms = sorted(steps(args.steps))
    result = {
        "step median ms": statistics.median(ms),
        "step p95 ms": ms[int(0.95 * len(ms))],
        "open seconds": seconds,
        "memory ratio": ratio,
        "machine": f"{platform.machine()} {platform.system()}",
        "numpy": np.__version__,
    }
    for name, value in result.items():
        print(f"| {name} | {value:.3g} |" if isinstance(value, float) else f"| {name} | {value} |")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
