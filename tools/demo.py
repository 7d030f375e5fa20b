"""Watch EG-CNN learn: train it and its bare backbone on brain phantoms, predict phantoms that
neither has seen, draw one of them.

    python tools/demo.py [--epochs 18] [--seed 0] [--out demo]

Writes demo/phantoms (49 of them, one of which chooses the best weights and is named in
demo/watched.txt), demo/held_out (four that no run reads before the end, each with all three
regions), demo/bare and demo/eg (run folders), demo/bare.txt (what the bare run printed) and
demo/demo.png. Both networks train at the same time, each on half of the processor's cores."""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from egcnn_nb.core import COLOURS, exit_on_error, expect, processors, require
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.phantoms import write_phantom
from egcnn_nb.data.volumes import read_labels, read_volume
from egcnn_nb.run.inside import look_inside
from egcnn_nb.run.predict import load_run, predict_case
from egcnn_nb.study.evaluation import score_run

TRAINED = (*range(301, 325), *range(330, 354))  # numbers of the phantoms
WATCHED = 355  # its Dice chooses the best weights
HELD_OUT = (325, 326, 328, 329)
FLAGS = "--levels 3 --width 8 --lr 3e-3 --batch_size 1 --patch_size 32 32 32 --augment intensity"
CLASSES = {2: "edema", 4: "enhancing", 1: "necrosis"}  # label -> name, the outer first
T1CE = 1  # which image of a case is drawn
EDGE_COLUMNS = {
    "edge_f1": "F1",
    "edge_width": "width",
    "filled": "filled",
    "mask_edge_f1": "F1 of Sobel on its mask",
}
RUNS = {"bare": "off", "eg": "on"}  # folder of a run -> its --edge


def write_data(out):
    "Write the phantoms: those that the runs may read, and apart from them those held out"
    data = out / "phantoms"
    apart = out / "held_out"
    watched = write_phantom(data, WATCHED)
    (out / "watched.txt").write_text(watched.name)
    with ProcessPoolExecutor(processors()) as pool:
        jobs = [pool.submit(write_phantom, data, number) for number in TRAINED]
        jobs += [pool.submit(write_phantom, apart, number) for number in HELD_OUT]
        for job in jobs:
            job.result()  # raises what went wrong there


def command(out, name, epochs, seed):
    "The command of one run, printed as a reader would type it"
    words = [str(out / "phantoms")]
    words += ["--out", str(out / name)]
    words += ["--edge", RUNS[name]]
    words += ["--epochs", str(epochs)]
    words += ["--seed", str(seed)]
    words += ["--validation", str(out / "watched.txt")]
    words += FLAGS.split()
    line = " ".join(words)
    print(f"\negcnn_train {line}", flush=True)
    return [sys.executable, "-m", "egcnn_nb.train", *words]


def train(out, epochs, seed):
    "Both runs at the same time, each on half of the cores; EG-CNN shows its progress"
    threads = max(processors() // 2, 1)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    log = out / "bare.txt"
    of_bare = command(out, "bare", epochs, seed)
    of_eg = command(out, "eg", epochs, seed)
    print(
        f"\nBoth train now. The bar is that of EG-CNN, the bare network writes {log}.", flush=True
    )
    with (
        open(log, "w") as file,
        subprocess.Popen(of_bare, stdout=file, stderr=file, env=environment) as bare,
    ):
        eg = subprocess.run(of_eg, env=environment)
        if eg.returncode:
            bare.terminate()
    require(eg.returncode == 0, "EG-CNN was not trained. What went wrong is said above.")
    require(bare.returncode == 0, f"The bare network was not trained. Read {log}.")


def score(out, cases):
    "Scores of both runs, a row for each case and region"
    tables = []
    for name in RUNS:
        run = load_run(out / name)
        rows = score_run(run, cases)
        table = pd.DataFrame(rows)
        table["run"] = name
        tables.append(table)
    return pd.concat(tables)


def side_by_side(means, score):
    "A score of both runs, a row for each region"
    columns = {"bare": means.loc["bare", score], "EG-CNN": means.loc["eg", score]}
    return pd.DataFrame(columns)


def print_tables(scores):
    "Print the means over the cases: the masks of both runs, and the edges of EG-CNN"
    means = scores.groupby(["run", "region"], sort=False).mean(numeric_only=True)
    dice = side_by_side(means, "dice")
    surface = side_by_side(means, "surface_dice")
    masks = pd.concat({"Dice": dice, "surface Dice": surface}, axis=1)
    edges = means.loc["eg", list(EDGE_COLUMNS)]
    edges = edges.rename(columns=EDGE_COLUMNS)
    print("\nMeans over the held-out phantoms", *sorted(set(scores["case"])))
    print(masks.rename_axis(None).to_string(float_format="{:.3f}".format))
    print("\nEdges that EG-CNN predicts (a true edge has width 2)")
    print(edges.rename_axis(None).to_string(float_format="{:.3f}".format))


def maps(out, case):
    "What is drawn of a case: image, truth, both predictions, edges and attention"
    labels = read_labels(case.label)
    image = read_volume(case.images[T1CE])
    shown = {"truth": labels.array.astype(int), "image": image.array}
    runs = {name: load_run(out / name) for name in RUNS}
    for name, (model, settings, task) in runs.items():
        found, _ = predict_case(model, settings, task, case)
        shown[name] = found.astype(int)
    model, settings, task = runs["eg"]
    inside = look_inside(model, settings, task, case)
    shown["edge"] = inside["edge"]
    shown["attention"] = inside["attention"]
    return shown


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
    "Image, truth, bare, EG-CNN, edges, attention (white outside the head): one axial slice"
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
    draw_attention(attention_ax, cut["attention"], image)
    draw_legend(fig)
    fig.savefig(path, dpi=110)


def draw_attention(ax, attention, image):
    "The attention inside the head, with its scale"
    inside = np.ma.masked_where(image == 0, attention)
    drawn = ax.imshow(inside, cmap="magma", vmin=0.5, vmax=1, origin="lower")
    ax.set_title("attention α of the finest gate")
    figure = ax.figure
    figure.colorbar(drawn, ax=ax, shrink=0.7)


def arguments():
    "The arguments of the command line"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=18)
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
    train(out, args.epochs, args.seed)
    cases = find_dataset(out / "held_out").cases
    scores = score(out, cases)
    print_tables(scores)
    drawn = out / "demo.png"
    shown = maps(out, cases[0])
    picture(drawn, shown)
    print(f"\nThe picture: {drawn}")


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
