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
    words = ["--out", str(out)]
    words += ["--edge", edge]
    words += ["--epochs", str(epochs)]
    words = [str(DATA), *words, *FLAGS]
    line = " ".join(words)
    print(f"\n{name}: egcnn_train {line}", flush=True)
    script = [sys.executable, "-m", "egcnn_nb.train"]
    subprocess.run([*script, *words], check=True)


def held_out(run):
    "The cases that a run did not train on"
    text = (run / "config.json").read_text()
    config = json.loads(text)
    names = config["split"]["validation"]
    data = find_dataset(DATA)
    return [case for case in data.cases if case.name in names]


def truth_of(case):
    "The label map of a case"
    labels = read_labels(case.label)
    return labels.array.astype(int)


def number_of_labels(case):
    "How many labels a case has"
    found = np.unique(truth_of(case))
    return len(found)


def scored(run, case):
    "The label map that a run predicts, and its scores"
    _, _, task, *_ = run
    labels, loaded = predict_case(*run, case)
    spacing = loaded.grid.spacing
    scores = score_case(labels.astype(int), truth_of(case), task, spacing)
    return labels, scores


def results(out):
    """Predictions of both runs on the cases that neither trained on: (run, case) -> scores, and all
    that can be shown of one of them"""
    cases = held_out(out / "eg")
    richest = max(cases, key=number_of_labels)
    image = read_volume(richest.images[1])
    shown = {"truth": truth_of(richest), "image": image.array}
    scores = {}
    for name in ("bare", "eg"):
        run = load_run(out / name)
        for case in cases:
            labels, found = scored(run, case)
            scores[name, case.name] = found
            if case is richest:
                shown[name] = labels
    inside = look_inside(*run, richest)
    shown["edge"] = inside["edge"]
    shown["attention"] = inside["attention"]
    return scores, shown


def average(scores, run, region, metric):
    "Mean of a metric of a run over the cases"
    values = []
    for (name, _), found in scores.items():
        if name == run:
            values.append(found[region][metric])
    return sum(values) / len(values)


def table(scores):
    "Print Dice per region, bare against EG-CNN, averaged over the held-out cases"
    cases = sorted({case for _, case in scores})
    names = ", ".join(cases)
    print(f"\nHeld-out phantoms: {names}")
    print_columns("Dice", "bare", "EG-CNN")
    for region in scores["eg", cases[0]]:
        print_region(f"{region} ", scores, region, "dice")
    for metric in ("surface_dice", "hd95"):
        print_region(f"mean {metric}", scores, "mean", metric)


def print_region(title, scores, region, metric):
    "Print a line of the table"
    bare = average(scores, "bare", region, metric)
    eg = average(scores, "eg", region, metric)
    print_columns(title, f"{bare:.3f}", f"{eg:.3f}")


def print_columns(title, bare, eg):
    "Print three columns of a table"
    print(f"{title:22} {bare:>8} {eg:>8}")


def slices(shown):
    "The axial slice of each map with most tumour, with the front of the head up"
    tumour = shown["truth"] > 0
    sizes = tumour.sum((0, 1))
    k = sizes.argmax()
    cut = {}
    for name, array in shown.items():
        plane = array[:, ::-1, k]  # the phantoms' second axis runs to the back
        cut[name] = plane.T
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
        patch = plt.Rectangle((0, 0), 1, 1, color=COLOURS[value], alpha=0.6)
        handles.append(patch)
    line = plt.Line2D([], [], color="grey")
    handles.append(line)
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
    image, truth = cut["image"], cut["truth"]
    draw_labels(image_ax, "image (t1ce)", image)
    draw_labels(truth_ax, "truth", image, truth)
    draw_labels(bare_ax, "bare Seg-Net", image, cut["bare"])
    draw_labels(eg_ax, "Seg-Net + EG-CNN", image, cut["eg"])
    for ax in (bare_ax, eg_ax):
        ax.contour(truth > 0, [0.5], colors="white", linewidths=1)
    edge_ax.imshow(cut["edge"], cmap="inferno", vmin=0, vmax=1, origin="lower")
    edge_ax.set_title("predicted edges")
    draw_attention(attention_ax, cut["attention"])
    draw_legend(fig)
    fig.savefig(path, dpi=110)


def draw_attention(ax, attention):
    "The attention inside the head, with its scale"
    inside = np.ma.masked_equal(attention, 0)
    drawn = ax.imshow(inside, cmap="magma", vmin=0.5, vmax=1, origin="lower")
    ax.set_title("attention α of the finest gate")
    ax.figure.colorbar(drawn, ax=ax, shrink=0.7)


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
