"""How long one step of a slider takes in `view`, and how a large volume opens.

    python benchmarks/viewer.py            # a table; --json FILE keeps the numbers

A volume of 240×240×155 with four channels, label and prediction; each step moves one slider and draws
all three planes. Then a volume of 512×512×400 is opened: seconds, and the peak of memory beside the
volume's own."""

import argparse
import gc
import itertools
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
        along = slice(80 - half, 80 + half)
        label[across, across, along] = value
    return label


def steps(count):
    "Milliseconds of each of some steps through the three sliders in turn"
    size = (240, 240, 155)
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 1000, (4, *size), np.int16)
    label = boxes(size)
    predicted = np.roll(label, 3, 0)
    viewer = view(volume, label, pred=predicted)
    names = itertools.cycle("ijk")
    milliseconds = []
    for _ in range(count):
        name = next(names)
        slider = viewer.controls[name]
        seconds = move(slider)
        milliseconds.append(1e3 * seconds)
    return milliseconds


def move(slider):
    "Seconds of a step of a slider, which stays away from its ends"
    places = slider.max - 40
    start = time.perf_counter()
    slider.value = 20 + (slider.value + 7) % places
    return time.perf_counter() - start


def peak_memory():
    "The most memory in bytes that this process has had"
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_maxrss * 1024


def opening():
    "Seconds to open 512×512×400, and peak memory over the volume's own"
    volume = np.zeros((512, 512, 400), np.int16)
    volume[100:400, 100:400, 100:300] = 700
    inside = volume > 0
    label = inside.astype(np.uint8)
    own = volume.nbytes + label.nbytes
    gc.collect()
    before = peak_memory()
    start = time.perf_counter()
    view(volume, label)
    seconds = time.perf_counter() - start
    added = peak_memory() - before
    ratio = max(0, added) / own
    return seconds, 1 + ratio


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
        text = json.dumps(result, indent=1)
        args.json.write_text(text)


if __name__ == "__main__":
    main()
