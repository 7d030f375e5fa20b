"""A warm epoch of data, augmented and collated: ours beside MONAI's CacheDataset and
PersistentDataset and TorchIO's Queue.

    python benchmarks/data.py DATA [--exclude FILE]     # small cases, one thread, no worker
    python benchmarks/data.py large                     # six phantoms of 240x240x155x4, two workers

DATA is a Decathlon folder such as Task04_Hippocampus. `large` prints seconds an epoch and memory of
all processes. Each side takes one random patch of every case, mirrors its axes, shifts and scales its
intensity. TorchIO is no dependency: pip install torchio."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch.utils.data import DataLoader

from egcnn_nb.data.cache import prepared_cases
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.patches import EpochBatches, Patches

# ---- the sides: each returns a function that runs an epoch and returns the size of each batch


def ours(cases, task, patch, workers, cache):
    "Patches of cases that lie in the cache, mapped into memory"
    prepared = prepared_cases(cases, task, cache, quiet=True)
    patches = Patches(prepared, patch)
    batches = EpochBatches(len(cases), 2)
    loader = DataLoader(
        patches,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def epoch():
        batches.epoch += 1
        sizes = []
        for images, *_ in loader:
            size = len(images)
            sizes.append(size)
        return sizes

    return epoch


def monai_transforms(cases, patch):
    "MONAI's transforms: those without chance, then those with it"
    from monai import transforms as T

    keys = ["x", "y"]
    if len(cases[0].images) > 1:
        load = [T.LoadImaged(keys, image_only=True, ensure_channel_first=True)]
    else:
        channel = T.EnsureChannelFirstd(keys, channel_dim="no_channel")
        load = [T.LoadImaged(keys, image_only=True), channel]
    steady = [
        T.CropForegroundd(keys, "x", allow_smaller=False),
        T.NormalizeIntensityd("x", channel_wise=True),
        T.SpatialPadd(keys, patch),
    ]
    chance = [
        T.RandSpatialCropd(keys, patch, random_size=False),
        *[T.RandFlipd(keys, 0.5, axis) for axis in range(3)],
        T.RandScaleIntensityd("x", 0.1, 1),
        T.RandShiftIntensityd("x", 0.1, prob=1),
        T.ToTensord(keys, track_meta=False),
    ]
    return T.Compose([*load, *steady, *chance])


def monai_files(cases):
    "The files of each case, as MONAI's loader takes them"
    files = []
    for case in cases:
        images = [str(path) for path in case.images]
        label = str(case.label)
        image = images if len(images) > 1 else images[0]
        entry = {"x": image, "y": label}
        files.append(entry)
    return files


def by_monai(cases, patch, workers, dataset, **options):
    "An epoch of one of MONAI's datasets"
    files = monai_files(cases)
    transforms = monai_transforms(cases, patch)
    loader = DataLoader(
        dataset(files, transforms, **options),
        2,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )

    def epoch():
        sizes = []
        for batch in loader:
            images = batch["x"]
            size = len(images)
            sizes.append(size)
        return sizes

    return epoch


def cached(cases, task, patch, workers, cache):
    "MONAI's CacheDataset"
    from monai.data import CacheDataset

    return by_monai(cases, patch, workers, CacheDataset, progress=False)


def cached_uncopied(cases, task, patch, workers, cache):
    "MONAI's CacheDataset, which hands out its cases without a copy"
    from monai.data import CacheDataset

    options = dict(progress=False, copy_cache=False)
    return by_monai(cases, patch, workers, CacheDataset, **options)


def persistent(cases, task, patch, workers, cache):
    "MONAI's PersistentDataset"
    from monai.data import PersistentDataset

    folder = cache / "monai"
    return by_monai(cases, patch, workers, PersistentDataset, cache_dir=folder)


def same(x):
    "A volume as it is"
    return x


def uniform(lowest, highest):
    "A number that is drawn between two numbers"
    share = torch.rand(1)
    span = highest - lowest
    return lowest + span * share


def shift_and_scale(x):
    "A volume, a little brighter or darker"
    scale = uniform(0.9, 1.1)
    shift = uniform(-0.1, 0.1)
    scaled = x * scale
    return scaled + shift


def largest_shape(cases, patch):
    "A shape that holds every case and a patch"
    shapes = [patch]
    for case in cases:
        image = nib.Nifti1Image.load(case.images[0])
        shapes.append(image.shape)
    largest = np.max(shapes, 0)
    return largest.tolist()


def torchio_subjects(cases):
    "The cases, as TorchIO takes them"
    import torchio as tio  # pyright: ignore[reportMissingImports]

    subjects = []
    for case in cases:
        channels = case.images
        x = tio.ScalarImage(channels if len(channels) > 1 else channels[0])
        y = tio.LabelMap(case.label)
        subject = tio.Subject(x=x, y=y)
        subjects.append(subject)
    return subjects


def queue(cases, task, patch, workers, cache):
    "An epoch of TorchIO's queue of patches"
    import torchio as tio  # pyright: ignore[reportMissingImports]

    fit = tio.Lambda(same)
    if len(cases[0].images) == 1:
        fit = tio.CropOrPad(largest_shape(cases, patch))
    flip = tio.RandomFlip((0, 1, 2))
    intensity = tio.Lambda(shift_and_scale, types_to_apply=[tio.INTENSITY])
    change = tio.Compose([tio.ZNormalization(), fit, flip, intensity])
    subjects = torchio_subjects(cases)
    if workers == 0:
        for subject in subjects:
            subject.load()
    patches = tio.Queue(
        tio.SubjectsDataset(subjects, transform=change),
        max_length=len(cases),
        samples_per_volume=1,
        sampler=tio.UniformSampler(patch),
        num_workers=workers,
    )
    loader = tio.SubjectsLoader(patches, batch_size=2)

    def epoch():
        sizes = []
        for batch in loader:
            images = batch["x"]["data"]
            size = len(images)
            sizes.append(size)
        return sizes

    return epoch


SIDES = {
    "ours": ours,
    "MONAI CacheDataset": cached,
    "the same, copy_cache=False": cached_uncopied,
    "MONAI PersistentDataset": persistent,
    "TorchIO Queue": queue,
}

# ---- memory


def children(process):
    "Numbers of the processes that a process has started"
    found = []
    tasks = Path(f"/proc/{process}/task")
    for thread in tasks.iterdir():
        listed = (thread / "children").read_text()
        found += listed.split()
    return found


def pages_of(process):
    "What the kernel tells of the memory of a process: name -> kilobytes"
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    _, *lines = text.splitlines()
    found = {}
    for line in lines:
        name, _, value = line.partition(":")
        kilobytes, _ = value.split()
        found[name] = int(kilobytes)
    return found


def memory():
    """GiB of this process and its children, shared pages counted once: all of it, and without the
    pages of mapped files, which the system takes back when it needs them"""
    family = [str(os.getpid())]
    for process in family:  # it grows on the way
        family += children(process)
    kilobytes = 0
    mapped = 0
    for process in family:
        pages = pages_of(process)
        kilobytes += pages["Pss"]
        mapped += pages["Pss_File"]
    gib = 2**20
    return kilobytes / gib, (kilobytes - mapped) / gib


# ---- what is measured


def seconds_of(epoch, cases):
    "Seconds of one epoch, in which every case is seen once"
    start = time.perf_counter()
    seen = sum(epoch())
    seconds = time.perf_counter() - start
    assert seen == len(cases)
    return seconds


def small_cases(dataset, exclude):
    "At most a hundred cases with labels, without those that are left out"
    left_out = set()
    if exclude:
        text = Path(exclude).read_text()
        left_out = set(text.split())
    cases = []
    for case in dataset.cases:
        if case.label and case.name not in left_out:
            cases.append(case)
    return cases[:100]


def small(data, exclude, again=5):
    "Every side in turn on small cases: print the rates"
    torch.set_num_threads(1)
    dataset = find_dataset(data)
    cases = small_cases(dataset, exclude)
    patch = (40, 56, 40)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        epochs = {}
        for name, make in SIDES.items():
            epochs[name] = make(cases, dataset.task, patch, 0, cache)
        seconds = in_turn(epochs, cases, again)
    count = len(cases)
    print(f"{count} cases, patch {patch}, one thread, no worker")
    print("\n| loader | cases a second | ours is times as fast |\n|---|---|---|")
    of_ours = seconds["ours"]
    for name, median in seconds.items():
        rate = count / median
        faster = median / of_ours
        print(f"| {name} | {rate:.0f} | {faster:.1f} |")


def in_turn(epochs, cases, again):
    "Median seconds of an epoch of each side, which run in turn; the first of each is not counted"
    seconds = {name: [] for name in epochs}
    for _ in range(again + 1):
        for name, epoch in epochs.items():
            spent = seconds_of(epoch, cases)
            seconds[name].append(spent)
    medians = {}
    for name, (_, *counted) in seconds.items():
        medians[name] = statistics.median(counted)
    return medians


def one_large(name, folder, again=3):
    "One side on the large phantoms: print seconds of each warm epoch, and memory"
    torch.set_num_threads(1)
    dataset = find_dataset(folder / "data")
    cases = dataset.cases
    patch = (128, 128, 128)
    make = SIDES[name]
    epoch = make(cases, dataset.task, patch, 2, folder / "cache")
    epoch()
    seconds = [seconds_of(epoch, cases) for _ in range(again)]
    found = {"seconds": seconds, "memory": memory()}
    print(json.dumps(found))


def write_large(folder, number):
    "A case of 240x240x155x4, with its labels"
    from predict import brats_case, brats_volume, save

    from egcnn_nb.data.volumes import brain

    case = brats_case(folder)
    old = case.name
    _, labels, *_ = brain(1)
    whole = brats_volume(labels)
    path = case / f"{old}_seg.nii.gz"
    save(whole.astype(np.uint8), [-1.0, -1, 1, 1], path)
    new = case.with_name(f"BraTS19_LARGE_{number}_1")
    case.rename(new)
    for file in new.iterdir():
        name = file.name.replace(old, new.name)
        target = new / name
        file.rename(target)


def run_large(name, folder):
    "One side on the large phantoms in a process of its own"
    place = str(folder)
    words = [sys.executable, __file__, "--one", name, place]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    *_, last = done.stdout.splitlines()
    return json.loads(last)


def large(rounds=3, count=6):
    "Every side in turn on large phantoms: print seconds and memory"
    found = {name: [] for name in SIDES if "copy" not in name}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("data/HGG", "data/LGG", "cache"):
            place = folder / part
            place.mkdir(parents=True)
        for number in range(count):
            write_large(folder / "data/HGG", number)
        for _ in range(rounds):
            for side, runs in found.items():
                runs.append(run_large(side, folder))
    print(f"{count} cases of 240×240×155×4, patch 128³, two workers, warm")
    print("\n| loader | seconds an epoch | memory, GiB | without mapped files |\n|---|---|---|---|")
    for side, runs in found.items():
        print_large(side, runs)


def print_large(name, runs):
    "Print the medians of one side"
    seconds = []
    everything = []
    unmapped = []
    for run in runs:
        seconds += run["seconds"]
        gib, without_files = run["memory"]
        everything.append(gib)
        unmapped.append(without_files)
    words = [name]
    for values in (seconds, everything, unmapped):
        median = statistics.median(values)
        words.append(f"{median:.2f}")
    cells = " | ".join(words)
    print(f"| {cells} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA|large")
    parser.add_argument("--exclude", metavar="FILE")
    parser.add_argument("--one", metavar="LOADER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one_large(args.one, Path(args.data))
    elif args.data == "large":
        large()
    else:
        small(args.data, args.exclude)


if __name__ == "__main__":
    main()
