"""Train the small networks that ship with the package, EG-CNN and its bare twin, on phantoms made for it.

    OMP_NUM_THREADS=1 python tools/pretrain.py OUT          # about 20 minutes on one core; OUT/eg and OUT/bare are run folders

Forty brain phantoms, numbers 101 to 140, none of which is in data_samples/. What egcnn_nb/pretrained/ holds is OUT's config.json,
metrics.csv and model.safetensors of each."""
import os, sys
from pathlib import Path

from egcnn_nb.core import exit_on_error, expect
from egcnn_nb.training import Settings, fit
from egcnn_nb.volumes import write_brain

def main():
    expect(len(sys.argv) == 2, "arguments", sys.argv[1:], "a new folder", "python tools/pretrain.py OUT")
    out = Path(sys.argv[1]); expect(not out.exists(), out, "a folder that exists", "a new folder"); out.mkdir(parents=True)
    os.chdir(out)                                                  # so that config.json names no folder of this machine
    for number in range(101, 141): write_brain(Path("phantoms"), number)
    for name, edge in (("eg", True), ("bare", False)):
        fit(Settings("phantoms", name, edge=edge, epochs=40, levels=3, lr=3e-3, patch_size=(40, 48, 40), precision="bf16"))

if __name__ == "__main__": sys.exit(exit_on_error(main))
