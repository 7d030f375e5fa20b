"A dataset so small that a step takes a hundredth of a second, and the command that trains on it."

import csv
import os
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def dataset(folder, cases=12, shape=(18, 17, 16)):
    "Balls of two labels in noise, as a cases.csv folder"
    folder = Path(folder)
    folder.mkdir(parents=True)
    rng, grid = (
        np.random.default_rng(0),
        np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")),
    )
    with open(folder / "cases.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["case", "scan", "label"])
        for i in range(cases):
            r = np.sqrt(((grid - rng.uniform(6, 10, (3, 1, 1, 1))) ** 2).sum(0))
            labels = ((r < 5).astype(np.uint8) + (r < 3)).astype(np.uint8)
            image = labels + rng.normal(0, 0.5, shape).astype(np.float32)
            for name, array in (("scan", image.astype(np.float32)), ("label", labels)):
                nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}{i:02}.nii.gz")
            table.writerow([f"case{i:02}", f"scan{i:02}.nii.gz", f"label{i:02}.nii.gz"])
    return folder


def command(data, out, *words, processes=1, launch=()):
    "egcnn_train on it, under torchrun where there are processes or words for it; 10 training cases in batches of 4, 4 and 2"
    script = [
        "-m",
        "egcnn_nb.train",
        data,
        "--out",
        out,
        *"--width 4 --levels 2 --patch_size 16 16 16 --batch_size 4 --lr 1e-3 --validation 2 --precision fp32".split(),
        *words,
    ]
    torchrun = (
        [
            "-m",
            "torch.distributed.run",
            *(launch or ["--standalone"]),
            f"--nproc_per_node={processes}",
        ]
        if processes > 1 or launch
        else []
    )
    return [sys.executable, *torchrun, *map(str, script)]


def begun(process, out, epochs=2):
    "Wait until so many epochs are in the log of a run that a process trains"
    log, deadline = Path(out) / "log.txt", time.time() + 200
    while not (log.exists() and log.read_text().count("epoch ") >= epochs):
        assert process.poll() is None and time.time() < deadline, process.communicate()[1][-2000:]
        time.sleep(0.01)


def children(pid):
    "Processes that a process has started"
    return [
        int(c)
        for t in Path(f"/proc/{pid}/task").iterdir()
        for c in (t / "children").read_text().split()
    ]
