"""Draw the animated picture of the README: a phantom slice by slice, and what the two streams of the
shipped network see in it.

    python tools/animate.py [nbs/images/method.gif]

The phantom (number 1 of data_samples/) was not among those that the network was trained on
(`tools/pretrain.py`)."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from egcnn_nb.core import BRATS, COLOURS
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.prepare import load_case
from egcnn_nb.method.sobel import edge_target
from egcnn_nb.show.anatomy import pretrained
from egcnn_nb.tensors import probabilities, to_target

ROOT = Path(__file__).parents[1]


@dataclass
class Panel:
    "One of the pictures beside each other"

    title: str
    image: np.ndarray  # (D,H,W)
    style: dict  # for imshow
    outlines: tuple = ()  # (mask, colour) of each


def frame(panels, k):
    "One slice of all panels, as a picture"
    fig = Figure(figsize=(9.6, 2.25), layout="constrained")
    for ax, panel in zip(fig.subplots(1, len(panels)), panels, strict=True):
        ax.imshow(panel.image[..., k].T, origin="lower", **panel.style)
        ax.set_title(panel.title, fontsize=9)
        ax.axis("off")
        for mask, colour in panel.outlines:
            cut = mask[..., k].T
            if cut.any() and not cut.all():
                ax.contour(cut, [0.5], colors=[colour], linewidths=1.2)
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=75)
    picture = Image.open(file).convert("RGB")
    return picture.quantize(64, dither=Image.Dither.NONE)


def panels_of(case, truth):
    "The panels of a case; `truth` is its mask of the outer region"
    with torch.no_grad():
        out = pretrained("eg")(case.x[None], full=True)
    found = probabilities(out.logits, "sigmoid")[0, 0] > 0.5
    target = edge_target(torch.as_tensor(truth)[None, None])
    flair = case.x[-1].numpy()
    darkest, brightest = np.percentile(flair, (2, 99.5))
    gray = {"cmap": "gray", "vmin": darkest, "vmax": brightest}
    black_and_white = {"cmap": "gray", "vmin": 0, "vmax": 1}
    from_half = {"cmap": "inferno", "vmin": 0.5, "vmax": 1}
    from_zero = {"cmap": "inferno", "vmin": 0, "vmax": 1}
    attention = out.attention[-1][0, 0].numpy()
    edge = out.edge.sigmoid()[0, 0].numpy()
    outlines = (
        (truth, COLOURS["truth"]),
        (found.float().numpy(), COLOURS["prediction"]),
    )
    return [
        Panel("scan (FLAIR)", flair, gray),
        Panel("edge target (Sobel)", target[0, 0].numpy(), black_and_white),
        Panel("attention α, fine gate", attention, from_half),
        Panel("predicted edge", edge, from_zero),
        Panel("prediction and truth", flair, gray, outlines),
    ]


def slices_through(mask):
    "Every second slice through a mask and two beyond, up, and the others down again"
    there = np.flatnonzero(mask.any((0, 1)))
    first = max(there[0] - 2, 0)
    last = min(there[-1] + 3, mask.shape[2])
    slices = range(first, last)
    return [*slices[::2], *reversed(slices[1::2])]


def main():
    path = ROOT / "nbs/images/method.gif"
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
    phantom = find_dataset(ROOT / "data_samples/brats2019").cases[0]
    case = load_case(phantom, BRATS, need_label=True)
    assert case.labels is not None
    truth = to_target(case.labels[None].long(), BRATS)[0, 0].numpy()
    panels = panels_of(case, truth)
    first, *others = [frame(panels, k) for k in slices_through(truth)]
    first.save(path, save_all=True, append_images=others, duration=220, loop=0, optimize=True)
    print(f"{path}: {len(others) + 1} pictures, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
