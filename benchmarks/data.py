"""A warm epoch of data, augmented and collated: ours beside MONAI's CacheDataset and PersistentDataset and TorchIO's Queue.

    python benchmarks/data.py DATA [--exclude FILE]     # small cases, one thread, no worker: DATA is a Decathlon folder such as Task04_Hippocampus
    python benchmarks/data.py large                     # six phantoms of 240x240x155x4, two workers: seconds an epoch and memory of all processes

Each takes one random patch of every case, mirrors its axes, shifts and scales its intensity; TorchIO, which is no dependency: pip install torchio."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from egcnn_nb.data.cache import prepared_cases
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.patches import EpochBatches, Patches


def ours(cases, task, patch, workers, cache):
    "Patches of cases that lie in the cache, mapped into memory"
    patches = Patches(prepared_cases(cases, task, cache, quiet=True), patch)
    batches = EpochBatches(len(cases), 2)
    loader = DataLoader(
        patches, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0
    )

    def epoch():
        batches.epoch += 1
        return [b[0].shape[0] for b in loader]

    return epoch


def _monai(cases, patch, workers, make):
    from monai import transforms as T

    keys = ["x", "y"]
    steady = [
        T.LoadImaged(keys, image_only=True),
        T.EnsureChannelFirstd(keys, channel_dim="no_channel"),
        T.CropForegroundd(keys, "x", allow_smaller=False),
        T.NormalizeIntensityd("x", channel_wise=True),
        T.SpatialPadd(keys, patch),
    ]
    if len(cases[0].images) > 1:
        steady = [T.LoadImaged(keys, image_only=True, ensure_channel_first=True), *steady[2:]]
    chance = [
        T.RandSpatialCropd(keys, patch, random_size=False),
        *[T.RandFlipd(keys, 0.5, a) for a in range(3)],
        T.RandScaleIntensityd("x", 0.1, 1),
        T.RandShiftIntensityd("x", 0.1, prob=1),
        T.ToTensord(keys, track_meta=False),
    ]
    data = make(
        [
            {
                "x": list(map(str, c.images)) if len(c.images) > 1 else str(c.images[0]),
                "y": str(c.label),
            }
            for c in cases
        ],
        T.Compose(steady + chance),
    )
    loader = DataLoader(data, 2, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda: [b["x"].shape[0] for b in loader]


def cached(cases, task, patch, workers, cache):
    from monai.data import CacheDataset

    return _monai(cases, patch, workers, lambda d, t: CacheDataset(d, t, progress=False))


def cached_uncopied(cases, task, patch, workers, cache):
    from monai.data import CacheDataset

    return _monai(
        cases, patch, workers, lambda d, t: CacheDataset(d, t, progress=False, copy_cache=False)
    )


def persistent(cases, task, patch, workers, cache):
    from monai.data import PersistentDataset

    return _monai(cases, patch, workers, lambda d, t: PersistentDataset(d, t, cache / "monai"))


def _same(x):
    return x


def _shift_and_scale(x):
    return x * (0.9 + 0.2 * torch.rand(1)) + 0.2 * torch.rand(1) - 0.1


def queue(cases, task, patch, workers, cache):
    import torchio as tio

    change = tio.Compose(
        [
            tio.ZNormalization(),
            tio.CropOrPad(
                [
                    int(max(n, p))
                    for n, p in zip(np.max([np.asanyarray(_shape(c)) for c in cases], 0), patch)
                ]
            )
            if len(cases[0].images) == 1
            else tio.Lambda(_same),
            tio.RandomFlip((0, 1, 2)),
            tio.Lambda(_shift_and_scale, types_to_apply=[tio.INTENSITY]),
        ]
    )
    data = tio.SubjectsDataset(
        [
            tio.Subject(
                x=tio.ScalarImage(c.images if len(c.images) > 1 else c.images[0]),
                y=tio.LabelMap(c.label),
            )
            for c in cases
        ],
        transform=change,
    )
    if workers == 0:
        [s.load() for s in data._subjects]
    patches = tio.Queue(
        data,
        max_length=len(cases),
        samples_per_volume=1,
        sampler=tio.UniformSampler(patch),
        num_workers=workers,
    )
    loader = tio.SubjectsLoader(patches, batch_size=2)
    return lambda: [len(b["x"]["data"]) for b in loader]


def _shape(case):
    import nibabel as nib

    return nib.load(case.images[0]).shape


SIDES = {
    "ours": ours,
    "MONAI CacheDataset": cached,
    "the same, copy_cache=False": cached_uncopied,
    "MONAI PersistentDataset": persistent,
    "TorchIO Queue": queue,
}


def memory():
    "GiB of this process and its children, shared pages counted once: all of it, and without the pages of mapped files, which the system takes back when it needs them"
    children = lambda p: [
        c for t in Path(f"/proc/{p}/task").iterdir() for c in (t / "children").read_text().split()
    ]
    family = [str(os.getpid())]
    found = {"Pss": 0, "Pss_File": 0}
    for p in family:
        family += children(p)
    for p in family:
        for line in Path(f"/proc/{p}/smaps_rollup").read_text().splitlines():
            name = line.split(":")[0]
            if name in found:
                found[name] += int(line.split()[1])
    return found["Pss"] / 2**20, (found["Pss"] - found["Pss_File"]) / 2**20


def small(data, exclude, again=5):
    torch.set_num_threads(1)
    out = set(Path(exclude).read_text().split()) if exclude else set()
    dataset = find_dataset(data)
    cases = [c for c in dataset.cases if c.label and c.name not in out][:100]
    patch = (40, 56, 40)
    with tempfile.TemporaryDirectory() as tmp:
        sides = {n: f(cases, dataset.task, patch, 0, Path(tmp)) for n, f in SIDES.items()}
        seconds = {n: [] for n in sides}
        for i in range(again + 1):
            for name, epoch in sides.items():
                start = time.perf_counter()
                assert sum(epoch()) == len(cases)
                if i:
                    seconds[name].append(time.perf_counter() - start)
    rate = {n: len(cases) / statistics.median(s) for n, s in seconds.items()}
    print(
        f"{len(cases)} cases, patch {patch}, one thread, no worker\n\n| loader | cases a second | ours is times as fast |\n|---|---|---|"
    )
    for n, r in rate.items():
        print(f"| {n} | {r:.0f} | {rate['ours'] / r:.1f} |")


def one_large(name, folder, again=3):
    "One side on the large phantoms: prints seconds of each warm epoch, and memory"
    torch.set_num_threads(1)
    dataset = find_dataset(folder / "data")
    epoch = SIDES[name](dataset.cases, dataset.task, (128,) * 3, 2, folder / "cache")
    epoch()
    seconds = []
    for _ in range(again):
        start = time.perf_counter()
        assert sum(epoch()) == len(dataset.cases)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "memory": memory()}))


def large(rounds=3, n=6):
    import nibabel as nib
    from predict import brats_case, enlarge

    from egcnn_nb.data.volumes import brain

    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp / "data/HGG").mkdir(parents=True)
        (tmp / "data/LGG").mkdir()
        (tmp / "cache").mkdir()
        for i in range(n):
            case = brats_case(tmp / "data/HGG")
            labels = np.pad(
                enlarge(brain(1)[1], (160, 190, 145)), ((40, 40), (25, 25), (5, 5))
            ).astype(np.uint8)
            nib.save(
                nib.Nifti1Image(labels, np.diag([-1.0, -1, 1, 1])), case / f"{case.name}_seg.nii.gz"
            )
            new = case.with_name(f"BraTS19_LARGE_{i}_1")
            case.rename(new)
            for f in new.iterdir():
                f.rename(new / f.name.replace("BraTS19_LARGE_1", new.name))
        found = {n: [] for n in SIDES if "copy" not in n}
        for _ in range(rounds):
            for name in found:
                found[name].append(
                    json.loads(
                        subprocess.run(
                            [sys.executable, __file__, "--one", name, str(tmp)],
                            check=True,
                            stdout=subprocess.PIPE,
                            text=True,
                        ).stdout.splitlines()[-1]
                    )
                )
    print(
        f"{n} cases of 240×240×155×4, patch 128³, two workers, warm\n\n| loader | seconds an epoch | memory, GiB | without mapped files |\n|---|---|---|---|"
    )
    for name, runs in found.items():
        print(
            f"| {name} | {statistics.median(s for r in runs for s in r['seconds']):.2f} | {statistics.median(r['memory'][0] for r in runs):.2f} | {statistics.median(r['memory'][1] for r in runs):.2f} |"
        )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("data", metavar="DATA|large")
    p.add_argument("--exclude", metavar="FILE")
    p.add_argument("--one", metavar="LOADER", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        one_large(args.one, Path(args.data))
    elif args.data == "large":
        large()
    else:
        small(args.data, args.exclude)


if __name__ == "__main__":
    main()
