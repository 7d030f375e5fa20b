"""Train the small networks that ship with the package: EG-CNN, EG-CNN without the inner ReLU, and
their bare twin.

    OMP_NUM_THREADS=1 python tools/pretrain.py OUT [NAME...]    # about 15 minutes a network

Forty brain phantoms, numbers 101 to 140, none of which is in data_samples/. `egcnn_nb/pretrained/`
holds config.json, metrics.csv and model.safetensors of each run folder in OUT. The numbers of the
phantoms and the seed were fixed before the first of these networks was trained."""

import os
import sys
from pathlib import Path

from egcnn_nb.core import exit_on_error, expect
from egcnn_nb.data.phantoms import write_phantom
from egcnn_nb.run.settings import Settings
from egcnn_nb.run.training import fit

RUNS = {"eg": {}, "eg_no_relu": {"readings": {"attention_relu": False}}, "bare": {"edge": False}}


def write_phantoms():
    "Write the forty phantoms, unless they are there"
    folder = Path("phantoms")
    if folder.exists():
        return
    for number in range(101, 141):
        write_phantom(folder, number)


def train(name):
    "Train one of the networks"
    settings = Settings(
        "phantoms",
        name,
        epochs=30,
        levels=3,
        lr=2e-3,
        patch_size=(40, 48, 40),
        precision="fp32",
        seed=1,
        augment=("intensity",),
        **RUNS[name],
    )
    fit(settings)


def main():
    expect(
        len(sys.argv) >= 2,
        "arguments",
        sys.argv[1:],
        "a folder",
        "python tools/pretrain.py OUT",
    )
    out = Path(sys.argv[1])
    names = sys.argv[2:] or list(RUNS)
    for name in names:
        expect(name in RUNS, "a network", name, f"one of {', '.join(RUNS)}")
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)  # so that config.json names no folder of this machine
    write_phantoms()
    for name in names:
        train(name)


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
