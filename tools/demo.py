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
FLAGS = "--levels 3 --width 8 --lr 3e-3 --batch_size 2 --patch_size 40 48 40".split()
CLASSES = {2: "edema", 4: "enhancing", 1: "necrosis"}  # label -> name, the outer first


def train(out, edge, epochs):
    "One run of the command egcnn_train, its progress bar in this terminal"
    name = "EG-CNN" if edge == "on" else "bare Seg-Net"
    words = [str(DATA), "--out", str(out), "--edge", edge, "--epochs", str(epochs), *FLAGS]
    print(f"\n{name}: egcnn_train {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "egcnn_nb.train", *words], check=True)


def results(out):
    """Predictions of both runs on the cases that neither trained on: (run, case) -> scores, and all
    that can be shown of one of them"""
    held_out = json.loads((out / "eg/config.json").read_text())["split"]["validation"]
    cases = [case for case in find_dataset(DATA).cases if case.name in held_out]
    truth = {}
    for case in cases:
        truth[case.name] = read_labels(case.label).array.astype(int)
    richest = max(cases, key=lambda case: len(np.unique(truth[case.name])))
    shown = {"truth": truth[richest.name], "image": read_volume(richest.images[1]).array}
    scores = {}
    for name in ("bare", "eg"):
        run = load_run(out / name)
        _, _, task, *_ = run
        for case in cases:
            labels, loaded = predict_case(*run, case)
            spacing = loaded.grid.spacing
            found = score_case(labels.astype(int), truth[case.name], task, spacing)
            scores[name, case.name] = found
            if case is richest:
                shown[name] = labels
    inside = look_inside(*run, richest)
    shown["edge"] = inside["edge"]
    shown["attention"] = inside["attention"]
    return scores, shown


def table(scores):
    "Print Dice per region, bare against EG-CNN, averaged over the held-out cases"
    cases = sorted({case for _, case in scores})

    def average(run, region, metric):
        values = [scores[run, case][region][metric] for case in cases]
        return sum(values) / len(values)

    print(f"\nHeld-out phantoms: {', '.join(cases)}\n{'Dice':22} {'bare':>8} {'EG-CNN':>8}")
    for region in scores["eg", cases[0]]:
        metrics = ["dice"]
        if region == "mean":
            metrics += ["surface_dice", "hd95"]
        for metric in metrics:
            bare = average("bare", region, metric)
            eg = average("eg", region, metric)
            title = f"{region} " if metric == "dice" else f"{region} {metric}"
            print(f"{title:22} {bare:8.3f} {eg:8.3f}")


def slices(shown):
    "The axial slice of each map with most tumour, with the front of the head up"
    sizes = (shown["truth"] > 0).sum((0, 1))
    k = int(sizes.argmax())
    cut = {}
    for name, array in shown.items():
        cut[name] = array[:, ::-1, k].T  # the phantoms' second axis runs to the back
    return cut


def draw_labels(ax, title, image, labels=None):
    "An image, with its labels in colour"
    ax.imshow(image, cmap="gray", origin="lower", interpolation="bilinear")
    ax.set_title(title)
    if labels is None:
        return
    for value in CLASSES:
        mask = labels == value
        if mask.any():
            ax.contourf(mask, [0.5, 1.5], colors=[COLOURS[value]], alpha=0.45)


def draw_legend(fig):
    "The colours of the classes"
    handles = []
    for value in CLASSES:
        handles.append(plt.Rectangle((0, 0), 1, 1, color=COLOURS[value], alpha=0.6))
    handles.append(plt.Line2D([], [], color="grey"))
    names = [*CLASSES.values(), "outline of the truth (white)"]
    fig.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)


def picture(path, shown):
    """Image, truth, bare, EG-CNN, edges, attention (white outside the head, where it is not
    computed): one axial slice"""
    cut = slices(shown)
    fig, axes = plt.subplots(2, 3, figsize=(10.5, 8), layout="constrained")
    image_ax, truth_ax, bare_ax, eg_ax, edge_ax, attention_ax = axes.flat
    for ax in axes.flat:
        ax.axis("off")
    draw_labels(image_ax, "image (t1ce)", cut["image"])
    draw_labels(truth_ax, "truth", cut["image"], cut["truth"])
    draw_labels(bare_ax, "bare Seg-Net", cut["image"], cut["bare"])
    draw_labels(eg_ax, "Seg-Net + EG-CNN", cut["image"], cut["eg"])
    for ax in (bare_ax, eg_ax):
        ax.contour(cut["truth"] > 0, [0.5], colors="white", linewidths=1)
    edge_ax.imshow(cut["edge"], cmap="inferno", vmin=0, vmax=1, origin="lower")
    edge_ax.set_title("predicted edges")
    attention = np.ma.masked_equal(cut["attention"], 0)
    drawn = attention_ax.imshow(attention, cmap="magma", vmin=0.5, vmax=1, origin="lower")
    attention_ax.set_title("attention α of the finest gate")
    fig.colorbar(drawn, ax=attention_ax, shrink=0.7)
    draw_legend(fig)
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
