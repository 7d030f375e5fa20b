"A dataset so small that a step takes a hundredth of a second, and the command that trains on it."

import csv
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np

from egcnn_nb.run.settings import Settings

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = (
    "--width 4 --levels 2 --patch_size 16 16 16 --batch_size 4 --lr 1e-3 "
    "--validation 2 --precision fp32"
).split()
QUICK: dict[str, Any] = dict(
    epochs=2,
    width=4,
    levels=2,
    patch_size=(16, 16, 16),
    batch_size=4,
    lr=1e-3,
    validation=2,
    precision="fp32",
)


def settings(data, out, cache, **changes):
    "Settings of a quick run, as `SMALL` gives them to the command"
    given = QUICK | changes
    return Settings(
        str(data),
        str(out),
        cache=str(cache),
        **given,
    )


def ball(rng, grid):
    "A ball at a random place, with another one inside, as labels and as an image with noise"
    centre = rng.uniform(6, 10, (3, 1, 1, 1))
    squares = (grid - centre) ** 2
    radius = np.sqrt(squares.sum(0))
    outer = radius < 5
    labels = outer.astype(np.uint8)
    labels += radius < 3
    noise = rng.normal(0, 0.5, radius.shape)
    image = labels + noise.astype(np.float32)
    return image.astype(np.float32), labels


def save(path, voxels):
    "Write a NIfTI file of voxels of 1 mm"
    image = nib.Nifti1Image(voxels, np.eye(4))
    nib.save(image, path)


def dataset(folder, cases=12, shape=(18, 17, 16)):
    "Balls of two labels in noise, as a cases.csv folder"
    folder = Path(folder)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    grid = np.indices(shape)
    rows = [["case", "scan", "label"]]
    for i in range(cases):
        image, labels = ball(rng, grid)
        scan, label = f"scan{i:02}.nii.gz", f"label{i:02}.nii.gz"
        save(folder / scan, image)
        save(folder / label, labels)
        rows.append([f"case{i:02}", scan, label])
    with open(folder / "cases.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def command(data, out, *words, processes=1, launch=()):
    """egcnn_train on it, under torchrun where there are processes or words for it

    Its 10 training cases come in batches of 4, 4 and 2.
    """
    line = [sys.executable]
    if processes > 1 or launch:
        how = launch or ["--standalone"]
        line += ["-m", "torch.distributed.run", *how]
        line += [f"--nproc_per_node={processes}"]
    line += ["-m", "egcnn_nb.train", data, "--out", out]
    line += [*SMALL, *words]
    return [str(word) for word in line]


def epochs_logged(out):
    "Number of the epochs in the log of a run that may not have one yet"
    log = Path(out) / "log.txt"
    if not log.exists():
        return 0
    text = log.read_text()
    return text.count("epoch ")


def begun(process, out, epochs=2):
    "Wait until so many epochs are in the log of a run that a process trains"
    deadline = time.time() + 200
    while epochs_logged(out) < epochs:
        if process.poll() is not None or time.time() > deadline:
            _, err = process.communicate()
            raise AssertionError(err[-2000:])
        time.sleep(0.01)


def children(pid):
    "Processes that a process has started"
    found = []
    tasks = Path(f"/proc/{pid}/task")
    for thread in tasks.iterdir():
        listed = (thread / "children").read_text()
        found += listed.split()
    return [int(child) for child in found]


class Writer:
    "Stands for the writer of TensorBoard: the names and numbers that it was given"

    made = []  # all of them

    def __init__(self, folder, purge_step=None):
        self.folder = Path(folder)
        self.purge_step = purge_step
        self.scalars = []
        self.closed = False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        "Note a number"
        self.scalars.append((name, value, step))

    def names(self):
        "The names that were written"
        return {name for name, *_ in self.scalars}

    def steps(self):
        "The names with the steps at which they were written"
        return {(name, step) for name, _, step in self.scalars}

    def flush(self):
        "Nothing waits"

    def close(self):
        "Note that it is closed"
        self.closed = True


def replace_tensorboard(monkeypatch):
    "Let a `Writer` stand for TensorBoard; the list of those that are made"
    board: Any = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    Writer.made = []
    monkeypatch.setitem(sys.modules, board.__name__, board)
    return Writer.made


def after(n):
    "A function that says stop from this question on"
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > n

    return stop
