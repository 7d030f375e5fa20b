"""Train the small networks that ship with the package: EG-CNN, EG-CNN without the inner ReLU, and
their bare twin.

    OMP_NUM_THREADS=1 python tools/pretrain.py OUT          # about 15 minutes on one core

Forty brain phantoms, numbers 101 to 140, none of which is in data_samples/. `egcnn_nb/pretrained/`
holds config.json, metrics.csv and model.safetensors of each run folder in OUT. The seed is 1: with
seed 0, on the machine where these were trained, the ET channel of EG-CNN died in the first epochs
(validation Dice 0.02; the bare network's did not)."""

import os
import sys
from pathlib import Path

from egcnn_nb.core import exit_on_error, expect
from egcnn_nb.data.volumes import write_brain
from egcnn_nb.run.settings import Settings
from egcnn_nb.run.training import fit

RUNS = {"eg": {}, "eg_no_relu": {"readings": {"attention_relu": False}}, "bare": {"edge": False}}


def main():
    expect(
        len(sys.argv) == 2,
        "arguments",
        sys.argv[1:],
        "a new folder",
        "python tools/pretrain.py OUT",
    )
    out = Path(sys.argv[1])
    expect(not out.exists(), out, "a folder that exists", "a new folder")
    out.mkdir(parents=True)
    os.chdir(out)  # so that config.json names no folder of this machine
    for number in range(101, 141):
        write_brain(Path("phantoms"), number)
    for name, kind in RUNS.items():
        settings = Settings(
            "phantoms",
            name,
            epochs=40,
            levels=3,
            lr=3e-3,
            patch_size=(40, 48, 40),
            precision="bf16",
            seed=1,
            **kind,
        )
        fit(settings)


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
