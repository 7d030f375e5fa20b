"""Label a scan by an ONNX file of egcnn_export, with numpy, nibabel and onnxruntime alone.

    python run_onnx.py NET.onnx LABELS.nii.gz SCAN.nii.gz [SCAN.nii.gz ...]   # a scan per channel

What egcnn_predict can do besides is left out: probabilities, edges, uncertainty, several scans at
a time, a GPU, and checks of the files apart from their grid."""

import json
import sys
from functools import partial
from itertools import product

import nibabel as nib
import numpy as np
import onnxruntime


def normalized(scan, how):
    "Intensities of one scan, as in training"
    if how == "hu":
        return np.clip(scan / 1000, -1, 1)
    inside = np.ones(scan.shape, bool) if how == "zscore" else scan != 0
    values = scan[inside].astype(float)
    if len(np.unique(values)) < 2:
        return np.zeros(scan.shape)
    return np.where(inside, (scan - values.mean()) / values.std(), 0)


def resized(x, size):
    "Channels (C,D,H,W) on another grid, linear between the centres of voxels along each axis"
    for axis, new in enumerate(size, start=1):
        old = x.shape[axis]
        at = (np.arange(new) + 0.5) * old / new - 0.5
        x = np.apply_along_axis(partial(np.interp, at, np.arange(old)), axis, x)
    return x


def by_windows(answer, x, patch, outputs):
    "Weighted mean of the answers to windows, each of which covers a quarter of the one before"
    size = x.shape[1:]
    offsets = [np.linspace(1 / side - 1, 1 - 1 / side, side) * 4 for side in patch]
    squares = np.square(np.meshgrid(*offsets, indexing="ij"))
    weight = np.exp(-squares.sum(0) / 2).clip(1e-3)
    starts = []
    for n, side in zip(size, patch, strict=True):
        step = max(int(side * 0.75), 1)
        starts.append([*range(0, n - side, step), n - side])
    total, seen = np.zeros((outputs, *size)), np.zeros(size)
    for corner in product(*starts):
        window = tuple(slice(a, a + side) for a, side in zip(corner, patch, strict=True))
        total[:, *window] += answer(x[:, *window]) * weight
        seen[window] += weight
    return total / seen


def labelled(prob, about):
    "The likeliest label, or nested regions from outside in, each by a label that is in no smaller"
    if about["activation"] == "softmax":
        values = [int(label) for label in about["labels"]]
        return np.array(values)[prob.argmax(0)]
    labels = np.zeros(prob.shape[1:], int)
    regions = [about["regions"][name] for name in about["outputs"]]
    for region in sorted(regions, key=len, reverse=True):
        smaller = sum([other for other in regions if len(other) < len(region)], [])
        own = [value for value in region if value not in smaller] or region
        labels[prob[regions.index(region)] > 0.5] = own[0]
    return labels


def main(net, out, *paths):
    session = onnxruntime.InferenceSession(net, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    about = {name: json.loads(facts[name]) for name in facts if not name.startswith("pkg.")}

    def answer(x):
        return session.run(["logits"], {"image": x[None].astype(np.float32)})[0][0]

    # the scans, turned to RAS
    images = [nib.as_closest_canonical(nib.load(path)) for path in paths]
    affine = images[0].affine
    if not all(np.allclose(image.affine, affine, atol=1e-3) for image in images):
        sys.exit("The scans do not lie on one grid. Resample them to one.")
    scans = np.stack([np.asarray(image.dataobj, np.float32) for image in images])

    # cut to what is there (air and fat are -500 HU at most), normalised, at the trained voxel size
    how = about["normalize"]
    there = scans > -500 if how == "hu" else scans != 0
    box = tuple(slice(at.min(), at.max() + 1) for at in np.nonzero(there.any(0)))
    x = np.stack([normalized(scan, how)[box] for scan in scans])
    own_size = x.shape[1:]
    ratio = np.divide(nib.affines.voxel_sizes(affine), about["spacing"])
    x = resized(x, [max(1, round(n)) for n in own_size * ratio])

    # filled up to a window; one that hardly exceeds a window is taken whole
    size = x.shape[1:]
    patch = about["patch_size"] or size
    before = [max(side - n, 0) // 2 for n, side in zip(size, patch, strict=True)]
    after = [max(side - n, 0) - b for n, side, b in zip(size, patch, before, strict=True)]
    x = np.pad(x, [(0, 0), *zip(before, after, strict=True)], mode="edge")
    if all(n <= 1.25 * side for n, side in zip(x.shape[1:], patch, strict=True)):
        patch = x.shape[1:]
    logits = by_windows(answer, x, patch, len(about["outputs"]))
    logits = logits[:, *[slice(b, b + n) for b, n in zip(before, size, strict=True)]]

    # probabilities at the scan's voxel size, as labels on its grid
    if about["activation"] == "softmax":
        prob = np.exp(logits - logits.max(0))
        prob /= prob.sum(0)
    else:
        prob = 1 / (1 + np.exp(-logits))
    labels = np.zeros(scans.shape[1:], np.int16)
    labels[box] = labelled(resized(prob, own_size), about)
    first = nib.load(paths[0])
    turn = nib.orientations.ornt_transform(*map(nib.io_orientation, [affine, first.affine]))
    nib.save(nib.Nifti1Image(labels, affine).as_reoriented(turn), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
