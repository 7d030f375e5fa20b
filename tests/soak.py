"""Train, resume and predict in one process for hours: memory and file handles must stay flat.

    python tests/soak.py [--minutes 120]

Each round trains two epochs on a tiny dataset (every third with a loader's process), stops one in the middle and resumes it, and predicts a case with
all maps. Printed: what the process holds after each tenth of the time, and the slope over the second half, by least squares. "In use" is what was
allocated and not given back, as glibc counts it; "resident" also holds what the allocator keeps between pieces in use, which settles slowly.
Both are read after each twentieth round, once Python has collected its cycles, which it does by itself only when they are a quarter of all it holds."""

import argparse
import ctypes
import gc
import os
import re
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tiny import dataset

from egcnn_nb.run.predict import predict_all
from egcnn_nb.run.settings import Settings
from egcnn_nb.run.training import fit


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_size_t)
        for n in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def in_use():
    "MiB allocated and not given back; NaN where the C library is not glibc"
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return float("nan")
    mallinfo2.restype = _Mallinfo
    found = mallinfo2()
    return (found.uordblks + found.hblkhd) / 2**20


def held():
    "MiB resident, MiB in use, open files, threads"
    status = Path("/proc/self/status").read_text()
    number = lambda name: int(re.search(rf"{name}:\s+(\d+)", status)[1])
    return number("VmRSS") / 1024, in_use(), len(os.listdir("/proc/self/fd")), number("Threads")


def one_round(tmp, i):
    run, out = tmp / f"run{i}", tmp / f"out{i}"
    s = lambda: Settings(
        str(tmp / "data"),
        str(run),
        cache=str(tmp / "cache"),
        epochs=2,
        width=4,
        levels=2,
        patch_size=(16, 16, 16),
        batch_size=4,
        lr=1e-3,
        validation=2,
        precision="fp32",
        workers=int(i % 3 == 0),
    )
    seen = []
    fit(s(), quiet=True, stop=lambda: seen.append(1) or len(seen) > 4)
    fit(s(), True, quiet=True)
    predict_all([run], [tmp / "data/scan00.nii.gz"], out, ("probabilities", "edges", "attention"))
    shutil.rmtree(run)
    shutil.rmtree(out)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--minutes", type=float, default=120)
    args = p.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, start, told = [], time.time(), 0
    print(
        "| minutes | rounds | MiB resident | MiB in use | open files | threads |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        dataset(tmp / "data")
        rounds = 0
        while (minutes := (time.time() - start) / 60) < args.minutes:
            one_round(tmp, rounds)
            rounds += 1
            if rounds % 20 == 1:
                gc.collect()
                rows.append((minutes, *held()))
            if minutes >= told:
                print(
                    f"| {minutes:.1f} | {rounds} | {rows[-1][1]:.0f} | {rows[-1][2]:.2f} | {rows[-1][3]} | {rows[-1][4]} |",
                    flush=True,
                )
                told += args.minutes / 10
    late = np.array(rows[len(rows) // 2 :])
    slope = lambda c: np.polyfit(late[:, 0] / 60, late[:, c], 1)[0]
    print(
        f"\n{rounds} rounds; slope over the second half: {slope(1):+.2f} MiB resident, {slope(2):+.2f} MiB in use, {slope(3):+.2f} files, {slope(4):+.2f} threads an hour"
    )


if __name__ == "__main__":
    main()
