"""What the gates of trained networks contribute, on the validation cases of each run.

    python results/ablation/audit.py DATA RUN... --csv FILE

Each attention is replaced as `gate_audit` does it: by its mean, by 1/2, by 1, by 0 and by that of another case. From
each case comes one patch of the size that the network was trained with, around the centre of the foreground."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from arguments import read_arguments, table_of_runs
from torch import Tensor

from egcnn_nb.core import exit_on_error
from egcnn_nb.data.prepare import load_case
from egcnn_nb.run.predict import load_run
from egcnn_nb.study.evaluation import validation_cases
from egcnn_nb.study.gate_audit import attention_at_border, audit_gates, dead_gates
from egcnn_nb.tensors import to_target


def patch_around(volume: Tensor, centre: list, size: tuple) -> Tensor:
    "The patch (C,*size) around a voxel, moved inside the volume; zeros where the volume is smaller"
    padding = []
    for axis, (middle, wanted) in enumerate(zip(centre, size, strict=True), start=1):
        have = volume.shape[axis]
        first = max(0, min(middle - wanted // 2, have - wanted))
        volume = volume.narrow(axis, first, min(wanted, have))
        padding = [0, max(0, wanted - have), *padding]
    return F.pad(volume, padding)


def centre_of(labels: Tensor) -> list:
    "The voxel in the middle of the foreground"
    foreground = labels.nonzero().float()
    return foreground.mean(0).round().int().tolist()


def cases_of(run: Path, data: str, settings, task) -> tuple:
    "Images (B,C,D,H,W) and masks without background (B,K,D,H,W) of the validation cases of a run"
    cases = validation_cases(run, data)
    loaded = [load_case(case, task, need_label=True, spacing=settings.spacing) for case in cases]
    size = tuple(settings.patch_size)
    images, labels = [], []
    for case in loaded:
        centre = centre_of(case.labels)
        images.append(patch_around(case.x, centre, size))
        labels.append(patch_around(case.labels[None], centre, size)[0])
    x = torch.stack(images)
    masks = to_target(torch.stack(labels), task)
    background = 1 if task.activation == "softmax" else 0
    return x, masks[:, background:]


def audit(run: Path, data: str) -> list:
    "The rows of one run: a dict for each replacement"
    model, settings, task = load_run(run)
    x, masks = cases_of(run, data, settings, task)
    border = attention_at_border(model, x, masks)
    dead = dead_gates(model, x)
    rows = []
    for row in audit_gates(model, x, masks):
        about = {"run": run.name, **row}
        about |= {f"alpha_{name}": value for name, value in border.items()}
        about |= {"dead_gates": sum(dead), "gates": len(dead)}
        rows.append(about)
    return rows


def main() -> None:
    args = read_arguments(__doc__.splitlines()[0])
    table = table_of_runs(args, audit)
    table.to_csv(args.csv, index=False, float_format="%.4f")
    print(table.to_markdown(index=False, floatfmt=".3f"))


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
