"""What a whole volume costs in egcnn_predict: seconds and peak memory of the command, from the file to the saved label map.

    python benchmarks/predict.py [--precision fp32] [--edge on]

A BraTS-sized case (240x240x155, 4 channels, 1 mm) and a KiTS-sized CT (512x512x300, 0.8x0.8x1 mm), made of phantoms;
EG-CNN on Seg-Net, width 8, 4 levels, windows of 128^3, random weights (the cost does not depend on them)."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import save_file

from egcnn_nb.core import BRATS, KITS
from egcnn_nb.data.volumes import abdomen, brain
from egcnn_nb.run.folders import describe
from egcnn_nb.run.models import make_model
from egcnn_nb.run.settings import Settings


def enlarge(array, shape):
    "A phantom at the size of a real scan, by repeating voxels"
    return array[np.ix_(*[np.arange(n) * m // n for n, m in zip(shape, array.shape)])]


def brats_case(folder):
    "A case folder of four files, 240x240x155"
    folder = folder / "BraTS19_LARGE_1"
    folder.mkdir()
    for name, array in brain(1)[0].items():
        nib.save(
            nib.Nifti1Image(
                np.pad(enlarge(array, (160, 190, 145)), ((40, 40), (25, 25), (5, 5))),
                np.diag([-1.0, -1, 1, 1]),
            ),
            folder / f"BraTS19_LARGE_1_{name}.nii.gz",
        )
    return folder


def kits_case(folder):
    "A CT of 512x512x300"
    folder = folder / "case_00000"
    folder.mkdir()
    hu = enlarge(np.moveaxis(abdomen(np.random.default_rng(0))[0], 0, -1), (512, 512, 300))
    nib.save(nib.Nifti1Image(hu, np.diag([0.8, 0.8, 1, 1])), folder / "imaging.nii.gz")
    return folder


def run_folder(folder, task, precision, edge):
    "A run as egcnn_train writes it, never trained"
    settings = Settings("", str(folder), edge=edge, precision=precision, patch_size=(128,) * 3)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(describe(settings, task, [], [])))
    save_file(make_model(settings, task).state_dict(), folder / "model.safetensors")
    return folder


def measured(words):
    "Seconds and peak memory in GiB of a command"
    start = time.time()
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, words
    return time.time() - start, usage.ru_maxrss / 2**20


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    p.add_argument("--edge", choices=["on", "off"], default="on")
    args = p.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.precision}, edge stream {args.edge}\n\n| volume | seconds | peak memory, GiB |\n|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as tmp:
        for name, task, case in (
            ("240×240×155×4", BRATS, brats_case),
            ("512×512×300 CT", KITS, kits_case),
        ):
            tmp_case = Path(tmp) / task.name
            tmp_case.mkdir()
            run = run_folder(tmp_case / "run", task, args.precision, args.edge == "on")
            seconds, gib = measured(
                [
                    sys.executable,
                    "-c",
                    "import sys; from egcnn_nb.commands.predict import main; sys.exit(main())",
                    str(run),
                    str(case(tmp_case)),
                    "--out",
                    str(tmp_case / "out"),
                    "--save",
                    "edges",
                    "attention",
                ][: None if args.edge == "on" else -3]
            )
            print(f"| {name} | {seconds:.0f} | {gib:.2f} |", flush=True)


if __name__ == "__main__":
    main()
