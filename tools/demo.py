"""Watch EG-CNN learn: train it and its bare backbone on the brain phantoms, predict a held-out one, draw both.

    python tools/demo.py [--epochs 80] [--out demo]

Writes demo/bare and demo/eg (run folders) and demo/demo.png."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from egcnn_nb.core import COLOURS, exit_on_error, expect
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.volumes import read_labels, read_volume
from egcnn_nb.run.inside import look_inside
from egcnn_nb.run.metrics import score_case
from egcnn_nb.run.predict import load_run, predict_case

DATA = Path(__file__).parents[1] / "data_samples/brats2019"


def train(out, edge, epochs):
    "One run of the command egcnn_train, its progress bar in this terminal"
    flags = "--levels 3 --width 8 --lr 3e-3 --batch_size 2 --patch_size 40 48 40"
    print(
        f"\n{'EG-CNN' if edge == 'on' else 'bare Seg-Net'}: egcnn_train {DATA} --out {out} --edge {edge} --epochs {epochs} {flags}",
        flush=True,
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "egcnn_nb.train",
            str(DATA),
            "--out",
            str(out),
            "--edge",
            edge,
            "--epochs",
            str(epochs),
            *flags.split(),
        ],
        check=True,
    )


def results(out):
    "Predictions of both runs on the cases that neither trained on: name -> scores, and all that can be shown of one of them"
    held_out = json.loads((out / "eg/config.json").read_text())["split"]["validation"]
    cases = [c for c in find_dataset(DATA).cases if c.name in held_out]
    truth = {c.name: read_labels(c.label).array.astype(int) for c in cases}
    first = max(cases, key=lambda c: len(np.unique(truth[c.name])))  # the one with most to see
    scores = {}
    shown = {"truth": truth[first.name], "image": read_volume(first.images[1]).array}
    for name in ("bare", "eg"):
        run = load_run(out / name)
        for case in cases:
            labels, loaded = predict_case(*run, case)
            scores[name, case.name] = score_case(
                labels.astype(int), truth[case.name], run[2], loaded.grid.spacing
            )
            if case is first:
                shown[name] = labels
    return scores, {
        **shown,
        **{n: m for n, m in look_inside(*run, first).items() if n in ("edge", "attention")},
    }


def table(scores):
    "Dice per region, bare against EG-CNN, averaged over the held-out cases"
    cases = sorted({c for _, c in scores})
    print(f"\nHeld-out phantoms: {', '.join(cases)}\n{'Dice':22} {'bare':>8} {'EG-CNN':>8}")
    for region in scores["eg", cases[0]]:
        for metric in ("dice",) if region != "mean" else ("dice", "surface_dice", "hd95"):
            bare, eg = [
                sum(scores[n, c][region][metric] for c in cases) / len(cases)
                for n in ("bare", "eg")
            ]
            print(f"{region + ' ' + (metric if metric != 'dice' else ''):22} {bare:8.3f} {eg:8.3f}")


def picture(path, shown):
    "Image, truth, bare, EG-CNN, edges, attention (white outside the head, where it is not computed): one axial slice"
    k = int((shown["truth"] > 0).sum((0, 1)).argmax())
    cut = {
        n: a[:, ::-1, k].T for n, a in shown.items()
    }  # the phantoms' second axis runs to the back: the front comes up
    fig, axes = plt.subplots(2, 3, figsize=(10.5, 8), layout="constrained")
    for ax in axes.flat:
        ax.axis("off")

    def anatomy(ax, title, labels=None):
        ax.imshow(cut["image"], cmap="gray", origin="lower", interpolation="bilinear")
        ax.set_title(title)
        for value in (2, 4, 1):
            if labels is not None and (cut[labels] == value).any():
                ax.contourf(cut[labels] == value, [0.5, 1.5], colors=[COLOURS[value]], alpha=0.45)

    anatomy(axes[0, 0], "image (t1ce)")
    anatomy(axes[0, 1], "truth", "truth")
    anatomy(axes[0, 2], "bare Seg-Net", "bare")
    anatomy(axes[1, 0], "Seg-Net + EG-CNN", "eg")
    for ax in (axes[0, 2], axes[1, 0]):
        ax.contour(cut["truth"] > 0, [0.5], colors="white", linewidths=1)
    axes[1, 1].imshow(cut["edge"], cmap="inferno", vmin=0, vmax=1, origin="lower")
    axes[1, 1].set_title("predicted edges")
    im = axes[1, 2].imshow(
        np.ma.masked_equal(cut["attention"], 0), cmap="magma", vmin=0.5, vmax=1, origin="lower"
    )
    axes[1, 2].set_title("attention α of the finest gate")
    fig.colorbar(im, ax=axes[1, 2], shrink=0.7)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[v], alpha=0.6) for v in (2, 4, 1)] + [
        plt.Line2D([], [], color="grey")
    ]
    fig.legend(
        handles,
        ["edema", "enhancing", "necrosis", "outline of the truth (white)"],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    fig.savefig(path, dpi=110)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--epochs", type=int, default=80)
    p.add_argument("--out", type=Path, default=Path("demo"))
    args = p.parse_args()
    expect(
        not args.out.exists(),
        args.out,
        "a folder that exists",
        "a new folder",
        "remove it or choose another --out",
    )
    for name, edge in (("bare", "off"), ("eg", "on")):
        train(args.out / name, edge, args.epochs)
    scores, shown = results(args.out)
    table(scores)
    picture(args.out / "demo.png", shown)
    print(f"\nThe picture: {args.out / 'demo.png'}")


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
