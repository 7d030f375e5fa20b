"A dataset so small that a step takes a hundredth of a second, and the command that trains on it."

import csv
import os
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = (
    "--width 4 --levels 2 --patch_size 16 16 16 --batch_size 4 --lr 1e-3 "
    "--validation 2 --precision fp32"
).split()


def ball(rng, grid):
    "A ball at a random place, with another one inside, as labels and as an image with noise"
    centre = rng.uniform(6, 10, (3, 1, 1, 1))
    radius = np.sqrt(((grid - centre) ** 2).sum(0))
    labels = (radius < 5).astype(np.uint8)
    labels += radius < 3
    noise = rng.normal(0, 0.5, radius.shape).astype(np.float32)
    image = labels + noise
    return image.astype(np.float32), labels


def dataset(folder, cases=12, shape=(18, 17, 16)):
    "Balls of two labels in noise, as a cases.csv folder"
    folder = Path(folder)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    axes = [np.arange(n) for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    rows = [["case", "scan", "label"]]
    for i in range(cases):
        image, labels = ball(rng, grid)
        scan, label = f"scan{i:02}.nii.gz", f"label{i:02}.nii.gz"
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / scan)
        nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / label)
        rows.append([f"case{i:02}", scan, label])
    with open(folder / "cases.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def command(data, out, *words, processes=1, launch=()):
    """egcnn_train on it, under torchrun where there are processes or words for it

    Its 10 training cases come in batches of 4, 4 and 2.
    """
    script = ["-m", "egcnn_nb.train", data, "--out", out, *SMALL, *words]
    torchrun = []
    if processes > 1 or launch:
        how = launch or ["--standalone"]
        torchrun = ["-m", "torch.distributed.run", *how, f"--nproc_per_node={processes}"]
    return [sys.executable, *torchrun, *map(str, script)]


def epochs_logged(out):
    "Number of the epochs in the log of a run that may not have one yet"
    log = Path(out) / "log.txt"
    return log.read_text().count("epoch ") if log.exists() else 0


def begun(process, out, epochs=2):
    "Wait until so many epochs are in the log of a run that a process trains"
    deadline = time.time() + 200
    while epochs_logged(out) < epochs:
        alive = process.poll() is None and time.time() < deadline
        assert alive, process.communicate()[1][-2000:]
        time.sleep(0.01)


def children(pid):
    "Processes that a process has started"
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        found += (thread / "children").read_text().split()
    return [int(child) for child in found]


def after(n):
    "A function that says stop from this question on"
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > n

    return stop
