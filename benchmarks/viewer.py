"""How long one step of a slider takes in `view`, and how a large volume opens.

    python benchmarks/viewer.py            # a table; --json FILE keeps the numbers

A volume of 240×240×155 with four channels, label and prediction; each step moves one slider and draws
all three planes. Then a volume of 512×512×400 is opened: seconds, and the peak of memory beside the
volume's own."""

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


def boxes(size):
    "Labels of three nested boxes in a volume (D,H,W)"
    label = np.zeros(size, np.uint8)
    for value, half in ((2, 50), (1, 35), (4, 20)):
        across = slice(120 - half, 120 + half)
        label[across, across, 80 - half : 80 + half] = value
    return label


def steps(count):
    "Milliseconds of each of some steps through the three sliders in turn"
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 1000, (4, 240, 240, 155)).astype(np.int16)
    label = boxes(volume.shape[1:])
    viewer = view(volume, label, pred=np.roll(label, 3, 0))
    milliseconds = []
    for i in range(count):
        slider = viewer.controls["ijk"[i % 3]]
        start = time.perf_counter()
        slider.value = 20 + (slider.value + 7) % (slider.max - 40)
        seconds = time.perf_counter() - start
        milliseconds.append(1e3 * seconds)
    return milliseconds


def peak_memory():
    "The most memory in bytes that this process has had"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def opening():
    "Seconds to open 512×512×400, and peak memory over the volume's own"
    volume = np.zeros((512, 512, 400), np.int16)
    volume[100:400, 100:400, 100:300] = 700
    label = (volume > 0).astype(np.uint8)
    own = volume.nbytes + label.nbytes
    gc.collect()
    before = peak_memory()
    start = time.perf_counter()
    view(volume, label)
    seconds = time.perf_counter() - start
    added = max(0, peak_memory() - before)
    return seconds, 1 + added / own


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seconds, ratio = opening()
    milliseconds = sorted(steps(args.steps))
    result = {
        "step median ms": statistics.median(milliseconds),
        "step p95 ms": milliseconds[int(0.95 * len(milliseconds))],
        "open seconds": seconds,
        "memory ratio": ratio,
        "machine": f"{platform.machine()} {platform.system()}",
        "numpy": np.__version__,
    }
    for name, value in result.items():
        shown = f"{value:.3g}" if isinstance(value, float) else value
        print(f"| {name} | {shown} |")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
