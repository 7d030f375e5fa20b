"""Watch EG-CNN learn: train it and its bare backbone on brain phantoms, predict phantoms that
neither has seen, draw one of them.

    python tools/demo.py [--epochs 12] [--seed 0] [--out demo]

Writes demo/phantoms (28 of them), demo/bare and demo/eg (run folders) and demo/demo.png. The last
four phantoms are held out. They are of a high grade, so each has all three regions."""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from egcnn_nb.core import COLOURS, exit_on_error, expect
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.phantoms import write_phantom
from egcnn_nb.data.volumes import read_labels, read_volume
from egcnn_nb.run.inside import look_inside
from egcnn_nb.run.metrics import score_case
from egcnn_nb.run.predict import load_run, predict_case

TRAINED = range(301, 325)  # numbers of the phantoms
HELD_OUT = (325, 326, 328, 329)
FLAGS = "--levels 3 --width 8 --lr 3e-3 --batch_size 2 --patch_size 40 48 40 --augment intensity"
CLASSES = {2: "edema", 4: "enhancing", 1: "necrosis"}  # label -> name, the outer first
T1CE = 1  # which image of a case is drawn
RUNS = {"bare": "off", "eg": "on"}  # folder of a run -> its --edge


@dataclass
class Scores:
    "What both runs reach on the cases that neither trained on"

    cases: list  # names
    of: dict  # (run, name of a case) -> region -> metric -> value

    def regions(self):
        "The regions that are scored, and the mean of all"
        first = self.cases[0]
        return list(self.of["eg", first])

    def average(self, run, region, metric):
        "Mean of a metric of a run over the cases"
        values = []
        for case in self.cases:
            found = self.of[run, case]
            metrics = found[region]
            values.append(metrics[metric])
        return sum(values) / len(values)


def write_data(out):
    "Write the phantoms, and the list of those that are held out"
    for number in (*TRAINED, *HELD_OUT):
        write_phantom(out / "phantoms", number)
    names = [f"BraTS19_PHANTOM_{number}_1" for number in HELD_OUT]
    lines = "\n".join(names)
    (out / "held_out.txt").write_text(lines)


def train(out, name, epochs, seed):
    "One run of the command egcnn_train, its progress bar in this terminal"
    edge = RUNS[name]
    title = "EG-CNN" if edge == "on" else "bare Seg-Net"
    words = [str(out / "phantoms")]
    words += ["--out", str(out / name)]
    words += ["--edge", edge]
    words += ["--epochs", str(epochs)]
    words += ["--seed", str(seed)]
    words += ["--validation", str(out / "held_out.txt")]
    words += FLAGS.split()
    line = " ".join(words)
    print(f"\n{title}: egcnn_train {line}", flush=True)
    script = [sys.executable, "-m", "egcnn_nb.train"]
    subprocess.run([*script, *words], check=True)


def held_out(out):
    "The cases that neither run trained on"
    names = (out / "held_out.txt").read_text().split()
    data = find_dataset(out / "phantoms")
    return [case for case in data.cases if case.name in names]


def truth_of(case):
    "The label map of a case"
    labels = read_labels(case.label)
    return labels.array.astype(int)


def predicted(run, case):
    "The label map that a run predicts for a case, and its scores"
    _, _, task, *_ = run
    labels, loaded = predict_case(*run, case)
    labels = labels.astype(int)
    truth = truth_of(case)
    scores = score_case(labels, truth, task, loaded.grid.spacing)
    return labels, scores


def maps_before(case):
    "The maps of a case that need no run"
    truth = truth_of(case)
    image = read_volume(case.images[T1CE])
    return {"truth": truth, "image": image.array}


def results(out):
    "Scores of both runs on the cases that neither trained on, and all maps of one of these cases"
    cases = held_out(out)
    drawn = cases[0]
    shown = maps_before(drawn)
    scores = {}
    for name in RUNS:
        run = load_run(out / name)
        for case in cases:
            labels, found = predicted(run, case)
            scores[name, case.name] = found
            if case is drawn:
                shown[name] = labels
    inside = look_inside(*run, drawn)
    shown["edge"] = inside["edge"]
    shown["attention"] = inside["attention"]
    names = [case.name for case in cases]
    return Scores(names, scores), shown


def table(scores):
    "Print Dice per region, bare against EG-CNN, averaged over the held-out cases"
    cases = sorted(scores.cases)
    names = ", ".join(cases)
    print(f"\nHeld-out phantoms: {names}")
    print_columns("Dice", "bare", "EG-CNN")
    for region in scores.regions():
        print_region(f"{region} ", scores, region, "dice")
    for metric in ("surface_dice", "hd95"):
        print_region(f"mean {metric}", scores, "mean", metric)


def print_region(title, scores, region, metric):
    "Print a line of the table"
    bare = scores.average("bare", region, metric)
    eg = scores.average("eg", region, metric)
    print_columns(title, f"{bare:.3f}", f"{eg:.3f}")


def print_columns(title, bare, eg):
    "Print three columns of a table"
    cells = [title.ljust(22), bare.rjust(8), eg.rjust(8)]
    print(*cells)


def slices(shown):
    "The axial slice of each map with most tumour, with the front of the head up"
    tumour = shown["truth"] > 0
    voxels = tumour.sum((0, 1))
    k = voxels.argmax()
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
    "The colours of the classes, and the outline"
    handles = []
    names = []
    for value, name in CLASSES.items():
        colour = COLOURS[value]
        patch = plt.Rectangle((0, 0), 1, 1, color=colour, alpha=0.6)
        handles.append(patch)
        names.append(name)
    outline = plt.Line2D([], [], color="grey")
    handles.append(outline)
    names.append("outline of the truth (white)")
    fig.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)


def draw_prediction(ax, title, image, labels, truth):
    "The labels that a run predicts, with the outline of the truth"
    draw_labels(ax, title, image, labels)
    tumour = truth > 0
    ax.contour(tumour, [0.5], colors="white", linewidths=1)


def draw_edges(ax, edges):
    "The edges that a run predicts"
    ax.imshow(edges, cmap="inferno", vmin=0, vmax=1, origin="lower")
    ax.set_title("predicted edges")


def picture(path, shown):
    """Image, truth, bare, EG-CNN, edges, attention (white outside the head, where it is not
    computed): one axial slice"""
    cut = slices(shown)
    fig, axes = plt.subplots(2, 3, figsize=(10.5, 8), layout="constrained")
    image_ax, truth_ax, bare_ax, eg_ax, edge_ax, attention_ax = axes.flat
    for ax in axes.flat:
        ax.axis("off")
    image = cut["image"]
    truth = cut["truth"]
    draw_labels(image_ax, "image (t1ce)", image)
    draw_labels(truth_ax, "truth", image, truth)
    draw_prediction(bare_ax, "bare Seg-Net", image, cut["bare"], truth)
    draw_prediction(eg_ax, "Seg-Net + EG-CNN", image, cut["eg"], truth)
    draw_edges(edge_ax, cut["edge"])
    draw_attention(attention_ax, cut["attention"])
    draw_legend(fig)
    fig.savefig(path, dpi=110)


def draw_attention(ax, attention):
    "The attention inside the head, with its scale"
    inside = np.ma.masked_equal(attention, 0)
    drawn = ax.imshow(inside, cmap="magma", vmin=0.5, vmax=1, origin="lower")
    ax.set_title("attention α of the finest gate")
    figure = ax.figure
    figure.colorbar(drawn, ax=ax, shrink=0.7)


def arguments():
    "The arguments of the command line"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    return parser.parse_args()


def main():
    args = arguments()
    out = args.out
    expect(
        not out.exists(),
        out,
        "a folder that exists",
        "a new folder",
        "remove it or choose another --out",
    )
    write_data(out)
    for name in RUNS:
        train(out, name, args.epochs, args.seed)
    scores, shown = results(out)
    table(scores)
    drawn = out / "demo.png"
    picture(drawn, shown)
    print(f"\nThe picture: {drawn}")


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
