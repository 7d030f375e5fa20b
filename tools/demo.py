"""Watch EG-CNN learn: train it and its bare backbone on the brain phantoms, predict a held-out one, draw both.

    python tools/demo.py [--epochs 80] [--out demo]

Writes demo/bare and demo/eg (run folders) and demo/demo.png."""
import argparse, json, subprocess, sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from egcnn_nb.core import exit_on_error, expect
from egcnn_nb.datasets import find_dataset, load_case
from egcnn_nb.inference import load_run, predict_case
from egcnn_nb.metrics import score_case
from egcnn_nb.viewers import COLOURS

DATA = Path(__file__).parents[1]/"data_samples/brats2019"

def train(out, edge, epochs):
    "One run of the command egcnn_train, its progress bar in this terminal"
    fast = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)() or torch.cuda.is_available()
    flags = f"--levels 3 --width 8 --lr 3e-3 --batch_size 2 --patch_size 40 48 40 --precision {'bf16' if fast else 'fp32'}"
    print(f"\n{'EG-CNN' if edge == 'on' else 'bare Seg-Net'}: egcnn_train {DATA} --out {out} --edge {edge} --epochs {epochs} {flags}", flush=True)
    subprocess.run([sys.executable, "-m", "egcnn_nb.train", str(DATA), "--out", str(out), "--edge", edge, "--epochs", str(epochs), *flags.split()], check=True)

def results(out):
    "Predictions of both runs on the cases that neither trained on: name -> scores, and the first of them in full"
    held_out = json.loads((out/"eg/config.json").read_text())["split"]["validation"]
    cases = [c for c in find_dataset(DATA).cases if c.name in held_out]
    scores, shown = {}, {}
    for name in ("bare", "eg"):
        model, settings, task = load_run(out/name)
        for case in cases:
            labels, loaded = predict_case(model, settings, task, case)
            scores[name, case.name] = score_case(labels.astype(int), loaded.truth.astype(int), task, loaded.grid.spacing)
            shown[name, case.name] = labels
    first = max((load_case(c, task) for c in cases), key=lambda c: len(c.labels.unique()))     # the one with most to see
    with torch.no_grad(): edge = model(first.x[None])[1][0].sigmoid()
    return scores, {n: shown[n, first.name] for n in ("bare", "eg")}, first, edge, model.attention(first.x[None])

def table(scores):
    "Dice per region, bare against EG-CNN, averaged over the held-out cases"
    cases = sorted({c for _, c in scores})
    print(f"\nHeld-out phantoms: {', '.join(cases)}\n{'Dice':22} {'bare':>8} {'EG-CNN':>8}")
    for region in scores["eg", cases[0]]:
        for metric in ("dice",) if region != "mean" else ("dice", "surface_dice", "hd95"):
            bare, eg = [sum(scores[n, c][region][metric] for c in cases)/len(cases) for n in ("bare", "eg")]
            print(f"{region+' '+(metric if metric != 'dice' else ''):22} {bare:8.3f} {eg:8.3f}")

def picture(path, shown, first, edge, alphas):
    "Image, truth, bare, EG-CNN, edges, attention: one axial slice"
    k = int((first.truth > 0).sum((0, 1)).argmax())
    fig, axes = plt.subplots(2, 3, figsize=(10.5, 8), layout="constrained")
    for ax in axes.flat: ax.axis("off")
    def anatomy(ax, title, labels=None):
        image = first.x[1, ..., k]
        ax.imshow(torch.where(image != 0, image, image.min()).T, cmap="gray", origin="lower", interpolation="bilinear"); ax.set_title(title)
        for value, name in ((2, "edema"), (4, "enhancing"), (1, "necrosis")):
            if labels is not None and (labels[..., k] == value).any():
                ax.contourf((labels[..., k] == value).T, [.5, 1.5], colors=[COLOURS[value]], alpha=.45)
    anatomy(axes[0, 0], "image (t1ce)"); anatomy(axes[0, 1], "truth", first.truth)
    anatomy(axes[0, 2], "bare Seg-Net", shown["bare"]); anatomy(axes[1, 0], "Seg-Net + EG-CNN", shown["eg"])
    for ax in (axes[0, 2], axes[1, 0]): ax.contour((first.truth[..., k] > 0).T, [.5], colors="white", linewidths=1)
    axes[1, 1].imshow(edge[0, ..., k].T, cmap="inferno", vmin=0, vmax=1, origin="lower"); axes[1, 1].set_title("predicted edge of the whole tumor")
    alpha = max(alphas, key=lambda a: a.std())[0, 0].float()                   # the gate that says most; others may stay at one half
    im = axes[1, 2].imshow(alpha[..., k*alpha.shape[-1]//first.x.shape[-1]].T, cmap="magma", origin="lower")
    axes[1, 2].set_title(f"attention α at {tuple(alpha.shape)}"); fig.colorbar(im, ax=axes[1, 2], shrink=.7)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[v], alpha=.6) for v in (2, 4, 1)] + [plt.Line2D([], [], color="grey")]
    fig.legend(handles, ["edema", "enhancing", "necrosis", "outline of the truth (white)"], loc="outside lower center", ncols=4, frameon=False)
    fig.savefig(path, dpi=110)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epochs", type=int, default=80); p.add_argument("--out", type=Path, default=Path("demo"))
    args = p.parse_args()
    expect(not args.out.exists(), args.out, "a folder that exists", "a new folder", "remove it or choose another --out")
    for name, edge in (("bare", "off"), ("eg", "on")): train(args.out/name, edge, args.epochs)
    scores, *rest = results(args.out)
    table(scores); picture(args.out/"demo.png", *rest)
    print(f"\nThe picture: {args.out/'demo.png'}")

if __name__ == "__main__": sys.exit(exit_on_error(main))
