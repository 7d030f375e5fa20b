"""Draw the animated picture of the README: a phantom slice by slice, and what the two streams of the shipped network see in it.

    python tools/animate.py [nbs/images/method.gif]

The phantom (number 1 of data_samples/) was not among those that the network was trained on (`tools/pretrain.py`)."""

import io
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from egcnn_nb.core import BRATS, COLOURS
from egcnn_nb.data.prepare import load_case
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.method.sobel import edge_target
from egcnn_nb.show.anatomy import pretrained
from egcnn_nb.tensors import probabilities, to_target

ROOT = Path(__file__).parents[1]


def frame(maps, k):
    "One slice of all maps, as a picture"
    fig = Figure(figsize=(9.6, 2.25), layout="constrained")
    axes = fig.subplots(1, 5)
    for ax, (title, image, mask, kind) in zip(axes, maps):
        ax.imshow(image[..., k].T, origin="lower", **kind)
        ax.set_title(title, fontsize=9)
        ax.axis("off")
        for m, colour in mask:
            if m[..., k].any() and not m[..., k].all():
                ax.contour(m[..., k].T, [0.5], colors=[colour], linewidths=1.2)
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=75)
    return Image.open(out).convert("RGB")


def main():
    path = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "nbs/images/method.gif")
    case = load_case(find_dataset(ROOT / "data_samples/brats2019").cases[0], BRATS, need_label=True)
    with torch.no_grad():
        logits, edges, alphas = pretrained("eg")(case.x[None], return_attention=True)
    truth = to_target(case.labels[None].long(), BRATS)[0, 0].numpy()
    found = (probabilities(logits, "sigmoid")[0, 0] > 0.5).float().numpy()
    flair = case.x[-1].numpy()
    gray = dict(cmap="gray")
    heat = dict(cmap="inferno", vmin=0.5, vmax=1)
    gray |= dict(zip(("vmin", "vmax"), np.percentile(flair, (2, 99.5))))
    target = edge_target(torch.as_tensor(truth)[None, None])[0, 0].numpy()
    maps = [
        ("scan (FLAIR)", flair, [], gray),
        ("edge target (Sobel)", target, [], gray | dict(vmin=0, vmax=1)),
        ("attention α, fine gate", alphas[-1][0, 0].numpy(), [], heat),
        ("predicted edge", edges.sigmoid()[0, 0].numpy(), [], dict(cmap="inferno", vmin=0, vmax=1)),
        (
            "prediction and truth",
            flair,
            [(truth, COLOURS["truth"]), (found, COLOURS["prediction"])],
            gray,
        ),
    ]
    there = np.flatnonzero(truth.any((0, 1)))
    ks = range(max(there[0] - 2, 0), min(there[-1] + 3, flair.shape[2]))
    frames = [
        frame(maps, k).quantize(64, dither=Image.Dither.NONE)
        for k in [*ks[::2], *reversed(ks[1::2])]
    ]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=220, loop=0, optimize=True
    )
    print(f"{path}: {len(frames)} pictures, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
