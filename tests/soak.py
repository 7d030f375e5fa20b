"""Train, resume and predict in one process for hours: memory and file handles must stay flat.

    python tests/soak.py [--minutes 120]

Each round trains two epochs on a tiny dataset (every third with a loader's process), stops one in
the middle and resumes it, and predicts a case with all maps. Printed: what the process holds after
each tenth of the time, and the slope over the second half, by least squares. "In use" is what was
allocated and not given back, as glibc counts it; "resident" also holds what the allocator keeps
between pieces in use, which settles slowly. Both are read after each twentieth round, once Python
has collected its cycles, which it does by itself only when they are a quarter of all it holds."""

import argparse
import ctypes
import gc
import os
import re
import shutil
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tiny import after, dataset, settings

from egcnn_nb.run.predict import predict_all
from egcnn_nb.run.training import fit

MALLINFO = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo(ctypes.Structure):
    "What mallinfo2 of glibc returns"

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO.split()]


def in_use():
    "MiB allocated and not given back; NaN where the C library is not glibc"
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return float("nan")
    mallinfo2.restype = _Mallinfo
    found = mallinfo2()
    return (found.uordblks + found.hblkhd) / 2**20


@dataclass
class Held:
    "What the process holds"

    minutes: float  # since the start
    resident: float  # MiB
    in_use: float  # MiB
    files: int  # that are open
    threads: int


def status(name):
    "A number that the kernel tells of this process"
    path = Path("/proc/self/status")
    text = path.read_text()
    found = re.search(rf"{name}:\s+(\d+)", text)
    assert found, name
    return int(found[1])


def held(minutes):
    "What the process holds now"
    open_files = os.listdir("/proc/self/fd")
    return Held(
        minutes,
        resident=status("VmRSS") / 1024,
        in_use=in_use(),
        files=len(open_files),
        threads=status("Threads"),
    )


ALL_MAPS = ("probabilities", "edges", "attention")


def one_round(tmp, i):
    "Train, stop in the middle, resume, predict; nothing is left behind"
    run = tmp / f"run{i}"
    out = tmp / f"out{i}"
    data = tmp / "data"
    cache = tmp / "cache"
    every_third = i % 3 == 0
    workers = 1 if every_third else 0
    config = settings(data, run, cache, workers=workers)
    fit(config, quiet=True, stop=after(4))
    fit(config, True, quiet=True)
    scan = data / "scan00.nii.gz"
    predict_all([run], [scan], out, ALL_MAPS)
    shutil.rmtree(run)
    shutil.rmtree(out)


def print_row(rounds, now, minutes):
    "A row of the table"
    cells = [
        f"{minutes:.1f}",
        f"{rounds}",
        f"{now.resident:.0f}",
        f"{now.in_use:.2f}",
        f"{now.files}",
        f"{now.threads}",
    ]
    row = " | ".join(cells)
    print(f"| {row} |", flush=True)


def slope(rows, name):
    "How fast a number grows an hour, by least squares"
    hours = []
    values = []
    for row in rows:
        hour = row.minutes / 60
        value = getattr(row, name)
        hours.append(hour)
        values.append(value)
    slope, _ = np.polyfit(hours, values, 1)
    return slope


def print_slopes(rounds, rows):
    "Print how fast what the process holds grew over the second half"
    middle = len(rows) // 2
    late = rows[middle:]
    resident = slope(late, "resident")
    used = slope(late, "in_use")
    files = slope(late, "files")
    threads = slope(late, "threads")
    print(
        f"\n{rounds} rounds; slope over the second half: {resident:+.2f} MiB resident, "
        f"{used:+.2f} MiB in use, {files:+.2f} files, {threads:+.2f} threads an hour"
    )


def rounds_for(minutes, tmp):
    "Rounds for so long, with a row of the table each tenth; their number, and what was held"
    start = time.time()
    rows = []
    rounds = 0
    due = 0
    while True:
        now = (time.time() - start) / 60
        if now >= minutes:
            return rounds, rows
        one_round(tmp, rounds)
        rounds += 1
        if rounds % 20 == 1:
            gc.collect()
            rows.append(held(now))
        if now >= due:
            print_row(rounds, rows[-1], now)
            due += minutes / 10


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| minutes | rounds | MiB resident | MiB in use | open files | threads |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        dataset(folder / "data")
        rounds, rows = rounds_for(args.minutes, folder)
    print_slopes(rounds, rows)


if __name__ == "__main__":
    main()
