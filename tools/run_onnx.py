"""Label a scan by an ONNX file of egcnn_export, with numpy, nibabel and onnxruntime alone.

    python run_onnx.py NET.onnx LABELS.nii.gz SCAN.nii.gz [SCAN.nii.gz ...]   # a scan per channel

It does what egcnn_predict does, so copy it and translate it to where you need it."""

import json
import sys
from itertools import product

import nibabel as nib
import numpy as np
import onnxruntime


def normalized(x, how):
    "Intensities of one scan, as in training"
    if how == "hu":
        return np.clip(x / 1000, -1, 1)
    inside = x != 0 if how == "zscore_nonzero" else np.ones(x.shape, bool)
    values = x[inside].astype(float)
    return np.where(inside, (x - values.mean()) / values.std(), 0)


def resized(x, size):
    "Channels (C,D,H,W) on another grid, linear along one axis after the other"
    for axis, (old, new) in enumerate(zip(x.shape[1:], size, strict=True), start=1):
        at = (np.arange(new) + 0.5) * old / new - 0.5
        at = at.clip(0, old - 1)
        low = at.astype(int)
        high = np.minimum(low + 1, old - 1)
        share = np.expand_dims(at - low, [a for a in range(4) if a != axis])
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


def answer(session, x, multiple):
    "Logits of a window, which is filled up to sides that the network takes"
    more = [(0, 0)] + [(0, -n % multiple) for n in x.shape[1:]]
    image = np.pad(x, more, mode="edge")[None].astype(np.float32)
    (logits,) = session.run(["logits"], {"image": image})
    depth, height, width = x.shape[1:]
    return logits[0, :, :depth, :height, :width]


def starts(size, side):
    "Where windows begin along an axis; they overlap by a quarter"
    step = max(int(side * 0.75), 1)
    return [min(i * step, size - side) for i in range(-(-(size - side) // step) + 1)]


def slid(session, x, patch, multiple):
    "Logits of a whole volume: at once, or the mean of windows with Gaussian weights"
    if all(n <= 1.25 * side for n, side in zip(x.shape[1:], patch, strict=True)):
        return answer(session, x, multiple)
    bells = [np.exp(-(((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) / 2) for n in patch]
    weight = np.einsum("i,j,k->ijk", *bells).clip(1e-3)
    total = seen = 0
    for corner in product(*map(starts, x.shape[1:], patch)):
        window = tuple(slice(a, a + n) for a, n in zip(corner, patch, strict=True))
        logits = answer(session, x[(slice(None), *window)], multiple) * weight
        if isinstance(total, int):
            total = np.zeros((len(logits), *x.shape[1:]))
            seen = np.zeros(x.shape[1:])
        total[(slice(None), *window)] += logits
        seen[window] += weight
    return total / seen


def probabilities(logits, activation):
    "Numbers in [0,1] from logits (K,D,H,W)"
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(0))
    return powers / powers.sum(0)


def labelled(prob, about):
    "The likeliest label, or nested regions above one half, the inner ones last"
    if about["activation"] == "softmax":
        values = np.array([int(value) for value in about["labels"]])
        return values[prob.argmax(0)]
    labels = np.zeros(prob.shape[1:], int)
    regions = [about["regions"][name] for name in about["outputs"]]
    for region, map_of in zip(regions, prob, strict=True):
        smaller = {v for other in regions if len(other) < len(region) for v in other}
        own = [value for value in region if value not in smaller] or region
        labels[map_of > 0.5] = own[0]
    return labels


def main(net, out, *scans):
    session = onnxruntime.InferenceSession(net, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    about = {name: json.loads(facts[name]) for name in facts if not name.startswith("pkg.")}
    images = [nib.as_closest_canonical(nib.load(path)) for path in scans]
    arrays = [np.asarray(image.dataobj, np.float32) for image in images]
    threshold = [a > -500 if about["normalize"] == "hu" else a != 0 for a in arrays]
    found = np.nonzero(np.any(threshold, 0))
    box = tuple(slice(int(f.min()), int(f.max()) + 1) for f in found)
    x = np.stack([normalized(a, about["normalize"])[box] for a in arrays])
    size = x.shape[1:]
    voxel = np.divide(images[0].header.get_zooms()[:3], about["spacing"])
    x = resized(x, [max(1, round(n * float(r))) for n, r in zip(size, voxel, strict=True)])
    patch = about["patch_size"] or x.shape[1:]
    missing = [max(p - n, 0) for p, n in zip(patch, x.shape[1:], strict=True)]
    filled = np.pad(x, [(0, 0)] + [(m // 2, m - m // 2) for m in missing], mode="edge")
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, x.shape[1:], strict=True))
    logits = slid(session, filled, patch, about["multiple"])[(slice(None), *inside)]
    whole = np.zeros(arrays[0].shape, np.int16)
    prob = probabilities(logits, about["activation"])
    whole[box] = labelled(resized(prob, size), about)
    first = nib.load(scans[0])
    back = nib.orientations.ornt_transform(
        nib.io_orientation(images[0].affine), nib.io_orientation(first.affine)
    )
    turned = nib.orientations.apply_orientation(whole, back)
    nib.save(nib.Nifti1Image(turned, first.affine), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
