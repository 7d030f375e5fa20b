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
    count = len(panels)
    for ax, panel in zip(fig.subplots(1, count), panels, strict=True):
        image = panel.image[..., k]
        ax.imshow(image.T, origin="lower", **panel.style)
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
    model = pretrained("eg")
    with torch.no_grad():
        out = model(case.x[None], full=True)
    prob = probabilities(out.logits, "sigmoid")
    found = prob[0, 0] > 0.5
    mask = torch.as_tensor(truth)
    target = edge_target(mask[None, None])
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
    _, _, depth = mask.shape
    lowest, *_, highest = np.flatnonzero(mask.any((0, 1)))
    first = max(lowest - 2, 0)
    last = min(highest + 3, depth)
    up = range(first, last, 2)
    down = range(first + 1, last, 2)
    return [*up, *reversed(down)]


def main():
    path = ROOT / "nbs/images/method.gif"
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
    data = find_dataset(ROOT / "data_samples/brats2019")
    phantom = data.cases[0]
    case = load_case(phantom, BRATS, need_label=True)
    assert case.labels is not None
    labels = case.labels.long()
    masks = to_target(labels[None], BRATS)
    truth = masks[0, 0].numpy()
    panels = panels_of(case, truth)
    pictures = []
    for k in slices_through(truth):
        picture = frame(panels, k)
        pictures.append(picture)
    first, *others = pictures
    first.save(path, save_all=True, append_images=others, duration=220, loop=0, optimize=True)
    count = len(pictures)
    kilobytes = path.stat().st_size / 1e3
    print(f"{path}: {count} pictures, {kilobytes:.0f} kB")


if __name__ == "__main__":
    main()
