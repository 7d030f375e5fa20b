"""What a whole volume costs in egcnn_predict: seconds and peak memory of the command, from the file
to the saved label map.

    python benchmarks/predict.py [--precision fp32] [--edge on]

A BraTS-sized case (240x240x155, 4 channels, 1 mm) and a KiTS-sized CT (512x512x300, 0.8x0.8x1 mm),
made of phantoms; EG-CNN on Seg-Net, width 8, 4 levels, windows of 128^3, random weights (the cost
does not depend on them)."""

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

HEAD = (160, 190, 145)  # voxels of the head in a volume of 240x240x155
AROUND = ((40, 40), (25, 25), (5, 5))  # voxels of air around it
PREDICT = "import sys; from egcnn_nb.commands.predict import main; sys.exit(main())"


def enlarge(array, shape):
    "A phantom at the size of a real scan, by repeating voxels"
    for axis, n in enumerate(shape):
        m = array.shape[axis]
        places = np.arange(n)
        source = places * m // n
        array = array.take(source, axis)
    return array


def save(array, diagonal, path):
    "Write an array as NIfTI; `diagonal`: that of its affine"
    image = nib.Nifti1Image(
        array,
        affine=np.diag(diagonal),
    )
    nib.save(image, path)


def brats_volume(array):
    "A phantom's head in a volume of 240x240x155"
    head = enlarge(array, HEAD)
    return np.pad(head, AROUND)


LPS = (-1.0, -1, 1, 1)  # 1 mm


def brats_case(folder):
    "A case folder of four files, 240x240x155"
    folder = folder / "BraTS19_LARGE_1"
    folder.mkdir()
    images, _ = brain(1)
    for name, array in images.items():
        path = folder / f"BraTS19_LARGE_1_{name}.nii.gz"
        volume = brats_volume(array)
        save(volume, LPS, path)
    return folder


def kits_case(folder):
    "A CT of 512x512x300"
    folder = folder / "case_00000"
    folder.mkdir()
    rng = np.random.default_rng(0)
    image, *_ = abdomen(rng)
    turned = np.moveaxis(image, 0, -1)
    hu = enlarge(turned, (512, 512, 300))
    path = folder / "imaging.nii.gz"
    save(hu, [0.8, 0.8, 1, 1], path)
    return folder


def run_folder(folder, task, precision, edge):
    "A run as egcnn_train writes it, never trained"
    settings = Settings(
        "",
        str(folder),
        edge=edge,
        precision=precision,
        patch_size=(128, 128, 128),
    )
    folder.mkdir()
    config = describe(settings, task, [], [])
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    model = make_model(settings, task)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def measured(words):
    "Seconds and peak memory in GiB of a command"
    start = time.time()
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.time() - start
    assert status == 0, words
    kib = usage.ru_maxrss
    gib = kib / 2**20
    return seconds, gib


def predict(folder, task, make_case, precision, edge):
    "Seconds and peak memory of egcnn_predict on one case"
    folder.mkdir()
    out = folder / "out"
    run = run_folder(folder / "run", task, precision, edge)
    case = make_case(folder)
    line = [sys.executable, "-c", PREDICT, run, case, "--out", out]
    if edge:
        line += ["--save", "edges", "attention"]
    words = [str(word) for word in line]
    return measured(words)


VOLUMES = (
    ("240×240×155×4", BRATS, brats_case),
    ("512×512×300 CT", KITS, kits_case),
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--edge", choices=["on", "off"], default="on")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    print(
        f"torch {torch.__version__}, {threads} threads, {args.precision}, edge stream {args.edge}"
    )
    print("\n| volume | seconds | peak memory, GiB |\n|---|---|---|")
    edge = args.edge == "on"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for volume, task, make_case in VOLUMES:
            place = folder / task.name
            seconds, gib = predict(place, task, make_case, args.precision, edge)
            print(f"| {volume} | {seconds:.0f} | {gib:.2f} |", flush=True)


if __name__ == "__main__":
    main()
