"""Label a scan by an ONNX file of egcnn_export, with numpy, nibabel and onnxruntime alone.

    python run_onnx.py NET.onnx LABELS.nii.gz SCAN.nii.gz [SCAN.nii.gz ...]   # a scan per channel

It does what egcnn_predict does, so copy it and translate it to where you need it."""

import json
import sys
from itertools import product
from math import ceil

import nibabel as nib
import numpy as np
import onnxruntime

OVERLAP = 0.25  # share of a window that the next one covers again


# ---- reading


def open_network(path):
    "The session of an ONNX file, and what its metadata say about data and labels"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    about = {}
    for name, text in metadata.items():
        if not name.startswith("pkg."):  # those are the exporter's own
            about[name] = json.loads(text)
    return session, about


def read_scan(path):
    "A scan turned to RAS: its image, and its intensities (D,H,W)"
    image = nib.as_closest_canonical(nib.load(path))
    voxels = np.asarray(image.dataobj, np.float32)
    return image, voxels


# ---- before the network


def box_of(scans, how):
    "The smallest box with everything that is there, as slices"
    floor = -500 if how == "hu" else 0  # Hounsfield units above that of fat and lung
    there = np.zeros(scans[0].shape, bool)
    for scan in scans:
        there |= scan > floor if how == "hu" else scan != floor
    box = []
    for positions in np.nonzero(there):
        first, last = positions.min(), positions.max()
        box.append(slice(int(first), int(last) + 1))
    return tuple(box)


def normalized(scan, how):
    "Intensities of one scan, as in training"
    if how == "hu":
        return np.clip(scan / 1000, -1, 1)
    inside = np.ones(scan.shape, bool)
    if how == "zscore_nonzero":
        inside = scan != 0
    values = scan[inside].astype(float)
    standard = (scan - values.mean()) / values.std()
    return np.where(inside, standard, 0)


def resized_axis(x, axis, new):
    "An array with another number of voxels along one axis, linear between the centres of the old ones"
    old = x.shape[axis]
    centres = np.arange(new) + 0.5
    at = centres * old / new - 0.5
    at = at.clip(0, old - 1)
    low = at.astype(int)
    high = np.minimum(low + 1, old - 1)
    shape = [1] * x.ndim
    shape[axis] = new
    share = (at - low).reshape(shape)
    return x.take(low, axis) * (1 - share) + x.take(high, axis) * share


def resized(x, size):
    "Channels (C,D,H,W) on another grid, one axis after the other"
    for axis, new in enumerate(size, start=1):
        x = resized_axis(x, axis, new)
    return x


def size_in_training(size, image, spacing):
    "The number of voxels along each axis where voxels are as large as in training"
    voxel = image.header.get_zooms()[:3]
    found = []
    for n, own, wanted in zip(size, voxel, spacing, strict=True):
        ratio = float(np.divide(own, wanted))
        found.append(max(1, round(n * ratio)))
    return found


# ---- the network, window by window


def answer(session, x, multiple):
    "Logits of a window, which is filled up to sides that the network takes"
    depth, height, width = x.shape[1:]
    more = [(0, -n % multiple) for n in x.shape[1:]]
    filled = np.pad(x, [(0, 0), *more], mode="edge")
    image = filled[None].astype(np.float32)
    (logits,) = session.run(["logits"], {"image": image})
    return logits[0, :, :depth, :height, :width]


def starts(size, side):
    "Where windows begin along an axis"
    step = max(int(side * (1 - OVERLAP)), 1)
    last = size - side
    count = ceil(last / step) + 1
    return [min(number * step, last) for number in range(count)]


def windows(size, patch):
    "Every window of a volume, as slices"
    corners = product(*map(starts, size, patch))
    for corner in corners:
        yield tuple(slice(a, a + n) for a, n in zip(corner, patch, strict=True))


def bell(side):
    "Weights along a side of a window, highest in the middle"
    middle = (side - 1) / 2
    deviations = (np.arange(side) - middle) / (side / 8)
    return np.exp(-(deviations**2) / 2)


def fits_at_once(size, patch):
    "Whether a volume is hardly larger than a window"
    return all(n <= 1.25 * side for n, side in zip(size, patch, strict=True))


def logits_of(session, x, patch, multiple):
    "Logits of a whole volume: at once, or the mean of windows with Gaussian weights"
    size = x.shape[1:]
    if fits_at_once(size, patch):
        return answer(session, x, multiple)
    bells = [bell(side) for side in patch]
    weight = np.einsum("i,j,k->ijk", *bells).clip(1e-3)
    total, seen = None, np.zeros(size)
    for window in windows(size, patch):
        place = (slice(None), *window)
        logits = answer(session, x[place], multiple)
        if total is None:
            total = np.zeros((len(logits), *size))
        total[place] += logits * weight
        seen[window] += weight
    return total / seen


def filled_to(x, patch):
    "A volume that is no smaller than a window, and where the volume lies in it, as slices"
    padding, inside = [(0, 0)], [slice(None)]
    for n, side in zip(x.shape[1:], patch, strict=True):
        missing = max(side - n, 0)
        before = missing // 2
        padding.append((before, missing - before))
        inside.append(slice(before, before + n))
    return np.pad(x, padding, mode="edge"), tuple(inside)


# ---- after the network


def probabilities(logits, activation):
    "Numbers in [0,1] from logits (K,D,H,W)"
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(0))
    return powers / powers.sum(0)


def own_value(region, regions):
    "The label of a region that no smaller region has"
    inner = set()
    for other in regions:
        if len(other) < len(region):
            inner |= set(other)
    own = [value for value in region if value not in inner]
    return own[0] if own else region[0]


def labelled(prob, about):
    "The likeliest label, or nested regions above one half, the inner ones last"
    if about["activation"] == "softmax":
        values = np.array([int(value) for value in about["labels"]])
        return values[prob.argmax(0)]
    labels = np.zeros(prob.shape[1:], int)
    regions = [about["regions"][name] for name in about["outputs"]]
    for region, map_of in zip(regions, prob, strict=True):
        labels[map_of > 0.5] = own_value(region, regions)
    return labels


def turned_as(labels, image, like):
    "Labels on the grid of the RAS image, turned to the axes of another"
    here = nib.io_orientation(image.affine)
    there = nib.io_orientation(like.affine)
    back = nib.orientations.ornt_transform(here, there)
    return nib.orientations.apply_orientation(labels, back)


def main(net, out, *paths):
    session, about = open_network(net)
    images, scans = zip(*map(read_scan, paths), strict=True)
    how = about["normalize"]
    box = box_of(scans, how)
    cropped = np.stack([normalized(scan, how)[box] for scan in scans])
    size = cropped.shape[1:]
    x = resized(cropped, size_in_training(size, images[0], about["spacing"]))
    patch = about["patch_size"] or x.shape[1:]
    filled, inside = filled_to(x, patch)
    logits = logits_of(session, filled, patch, about["multiple"])[inside]
    prob = resized(probabilities(logits, about["activation"]), size)
    whole = np.zeros(scans[0].shape, np.int16)
    whole[box] = labelled(prob, about)
    first = nib.load(paths[0])
    labels = turned_as(whole, images[0], first)
    nib.save(nib.Nifti1Image(labels, first.affine), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
