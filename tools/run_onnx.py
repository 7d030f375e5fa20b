"""Label a scan by an ONNX file of egcnn_export, with numpy, nibabel and onnxruntime alone.

    python run_onnx.py NET.onnx LABELS.nii.gz SCAN.nii.gz [SCAN.nii.gz ...]   # a scan per channel

The scans are turned to RAS, cut to what is there, normalised and resampled to the spacing of
training. The network answers for windows that overlap. The labels are put back on the grid of the
first scan. What egcnn_predict can do besides is left out: probabilities, edges, uncertainty,
several scans at a time, a GPU, and checks of the files apart from their grid."""

import json
import sys
from itertools import product
from math import ceil

import nibabel as nib
import numpy as np
import onnxruntime


def normalized(scan, how):
    "Intensities of one scan, as in training"
    if how == "hu":
        return np.clip(scan / 1000, -1, 1)
    inside = scan != 0 if how == "zscore_nonzero" else np.ones(scan.shape, bool)
    values = scan[inside].astype(float)
    standard = (scan - values.mean()) / values.std()
    return np.where(inside, standard, 0)


def box_of(scans, how):
    "The smallest box with everything that is there, as slices; air and fat are -500 HU at most"
    there = scans > -500 if how == "hu" else scans != 0
    positions = np.nonzero(there.any(0))
    return tuple(slice(found.min(), found.max() + 1) for found in positions)


def resized(x, size):
    "Channels (C,D,H,W) on another grid, linear between the centres of voxels along each axis"
    for axis, new in enumerate(size, start=1):
        old = x.shape[axis]
        centres = (np.arange(new) + 0.5) * old / new - 0.5
        at = centres.clip(0, old - 1)
        low = at.astype(int)
        high = np.minimum(low + 1, old - 1)
        share = (at - low).reshape([-1, *[1] * (3 - axis)])
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


def bell(side):
    "Weights along a side of a window, highest in the middle"
    middle = (side - 1) / 2
    deviations = (np.arange(side) - middle) / (side / 8)
    return np.exp(-(deviations**2) / 2)


def starts(size, side):
    "Where windows begin along an axis, each covering a quarter of the one before"
    step = max(int(side * 0.75), 1)
    last = size - side
    return [min(number * step, last) for number in range(ceil(last / step) + 1)]


def logits_of(answer, x, patch, outputs):
    "Logits of a volume: at once where it hardly exceeds a window, else the weighted mean of windows"
    missing = [max(side - n, 0) for n, side in zip(x.shape[1:], patch, strict=True)]
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, x.shape[1:], strict=True))
    x = np.pad(x, [(0, 0), *[(m // 2, m - m // 2) for m in missing]], mode="edge")
    size = x.shape[1:]
    if all(n <= 1.25 * side for n, side in zip(size, patch, strict=True)):
        return answer(x)[:, *inside]
    weight = np.einsum("i,j,k->ijk", *map(bell, patch)).clip(1e-3)
    total, seen = np.zeros((outputs, *size)), np.zeros(size)
    for corner in product(*map(starts, size, patch)):
        window = tuple(slice(a, a + n) for a, n in zip(corner, patch, strict=True))
        total[:, *window] += answer(x[:, *window]) * weight
        seen[window] += weight
    return (total / seen)[:, *inside]


def labelled(logits, size, about):
    "The likeliest label, or nested regions above one half; a region's label is in no smaller one"
    if about["activation"] == "softmax":
        powers = np.exp(logits - logits.max(0))
        prob = resized(powers / powers.sum(0), size)
        return np.array(list(map(int, about["labels"])))[prob.argmax(0)]
    labels = np.zeros(size, int)
    regions = [about["regions"][name] for name in about["outputs"]]
    for region, prob in zip(regions, resized(1 / (1 + np.exp(-logits)), size), strict=True):
        inner = {value for other in regions if len(other) < len(region) for value in other}
        own = [value for value in region if value not in inner] or region
        labels[prob > 0.5] = own[0]
    return labels


def main(net, out, *paths):
    session = onnxruntime.InferenceSession(net, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map.items()
    about = {name: json.loads(text) for name, text in facts if not name.startswith("pkg.")}
    first = nib.load(paths[0])
    images = [nib.as_closest_canonical(nib.load(path)) for path in paths]
    affine = images[0].affine
    if not all(np.allclose(image.affine, affine, atol=1e-3) for image in images):
        sys.exit("The scans do not lie on one grid. Resample them to one.")

    def answer(x):
        return session.run(["logits"], {"image": x[None].astype(np.float32)})[0][0]

    scans = np.stack([np.asarray(image.dataobj, np.float32) for image in images])
    how = about["normalize"]
    box = box_of(scans, how)
    x = np.stack([normalized(scan, how)[box] for scan in scans])
    ratio = np.divide(nib.affines.voxel_sizes(affine), about["spacing"])
    size = [max(1, round(n)) for n in x.shape[1:] * ratio]
    patch = about["patch_size"] or size
    logits = logits_of(answer, resized(x, size), patch, len(about["outputs"]))
    labels = np.zeros(scans.shape[1:], np.int16)
    labels[box] = labelled(logits, x.shape[1:], about)
    here, there = nib.io_orientation(affine), nib.io_orientation(first.affine)
    back = nib.orientations.ornt_transform(here, there)
    nib.save(nib.Nifti1Image(labels, affine).as_reoriented(back), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
