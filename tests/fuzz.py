"""Twenty thousand broken files: each is read right or refused with our own error, within 5 seconds and 1 GiB, and nobody else's traceback.

    python tests/fuzz.py [--count 20000] [--seed 0] [--one KIND NUMBER]        # --one shows a single input again

A seeded mutator flips bits, writes numbers that hurt, cuts, repeats and inserts. What is accepted is compared: voxels and affine with nibabel's, a
checkpoint with the one it was made from."""

import argparse
import gzip
import json
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from egcnn_nb.core import InputError
from egcnn_nb.data.check import expect_files
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.nifti import read_array
from egcnn_nb.run.checkpoints import read_checkpoint, save_checkpoint
from egcnn_nb.run.predict import load_run

MM = {0: 1, 1: 1000, 2: 1, 3: 0.001}  # code of a unit -> mm
HURT = [
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\xff\xff",
    b"\x00\x80",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
]
WORDS = [
    "null",
    "-1",
    "0",
    "1e999",
    "NaN",
    '""',
    "[]",
    "{}",
    "[[[[",
    "true",
    "99999999999999999999",
    '"../x"',
    '"\\u0000"',
    "\x00",
    ",",
    '"',
    "\n",
    "é",
    "'",
    "[0, [1]]",
    '{"a": {"b": []}}',
]


def mutate(data, rng, text=False):
    "Between one and four changes"
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, what = rng.randrange(len(data) + 1), rng.random()
        if text and what < 0.8:
            spots = [
                m.span()
                for m in re.finditer(
                    rb'"[^"]*"|-?\d+|\w+' if what < 0.7 else rb"[\[\]{}:,]", bytes(data)
                )
            ] or [(0, 0)]
            a, b = rng.choice(spots)
            data[a:b] = rng.choice(WORDS).encode()
        elif what < 0.3:
            data[at : at + 1] = bytes(
                [(data[at] if at < len(data) else 0) ^ (1 << rng.randrange(8))]
            )
        elif what < 0.6:
            word = rng.choice(HURT)
            data[at : at + len(word)] = word
        elif what < 0.7:
            del data[at:]
        elif what < 0.8:
            del data[at : at + rng.randint(1, 16)]
        elif what < 0.9:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        else:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
    return bytes(data)


def header_mutated(data, rng):
    "Mostly one or two whole fields of the header"
    if rng.random() < 0.3:
        return mutate(data, rng)
    data = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        kind, at = nib.Nifti1Header.template_dtype.fields[
            rng.choice(nib.Nifti1Header.template_dtype.names)
        ][:2]
        base = kind.base
        at += base.itemsize * rng.randrange(max(kind.itemsize // base.itemsize, 1))
        data[at : at + base.itemsize] = (
            rng.randbytes(base.itemsize)
            if rng.random() < 0.5
            else (rng.choice(HURT) * 8)[: base.itemsize]
        )
    return bytes(data)


def nifti(path):
    "Read a NIfTI file, and compare its voxels and its affine in mm with nibabel's"
    array, affine, header = read_array(path)
    try:
        theirs = nib.load(path)
        voxels = np.asanyarray(theirs.dataobj)
    except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError):
        return  # nibabel is stricter with fields that say nothing of the voxels
    ours = np.asarray(array).reshape(theirs.shape)
    expected = np.asarray(voxels).astype(array.dtype)
    assert np.allclose(ours, expected, rtol=1e-6, equal_nan=True), "other voxels than nibabel's"
    unit = MM[int(theirs.header["xyzt_units"]) & 7]
    in_mm = (
        np.diag([unit, unit, unit, 1]) @ theirs.affine
    )  # nibabel hands out the numbers in the file's unit
    assert np.allclose(affine, in_mm, atol=1e-8 * unit), "another affine than nibabel's"
    assert np.allclose(header.get_best_affine(), in_mm, rtol=1e-5, atol=1e-4), (
        "a header of another place"
    )


def description(path):
    found = find_dataset(path.parent)
    for case in found.cases[:2]:
        expect_files(case, found.task)


def honest_volumes(path):
    "Volumes of several types, forms and units, as bytes"
    rng = np.random.default_rng(0)
    kinds = [
        (dtype, slope, "both", "unknown", 1)
        for dtype, slope in ((np.int16, 1), (np.float32, 1), (np.uint8, 0.5))
    ]
    kinds += [
        (np.int16, 1, form, unit, per_mm)
        for form in ("qform", "neither", "both")
        for unit, per_mm in (("mm", 1), ("meter", 0.001), ("micron", 1000), ("unknown", 1))
    ]
    found = []
    for dtype, slope, form, unit, per_mm in kinds:
        voxels = rng.integers(0, 3, (3, 4, 5)).astype(dtype)
        image = nib.Nifti1Image(voxels, np.diag([per_mm, per_mm, 2 * per_mm, 1]))
        image.set_qform(image.affine, 1 if form in ("both", "qform") else 0)
        image.set_sform(image.affine, 2 if form == "both" else 0)
        image.header.set_xyzt_units(unit)
        image.header.set_slope_inter(slope, 0)
        nib.save(image, path)
        found.append(path.read_bytes())
    return found


class Inputs:
    "The honest files, and what reads their mutations"

    def __init__(self, tmp):
        volumes = honest_volumes(tmp / "x.nii")
        for folder in ("decathlon", "nnunet", "table", "run", "scan"):
            (tmp / folder).mkdir()
        for folder, names in (("decathlon", ("a.nii", "al.nii")), ("table", ("a.nii", "al.nii"))):
            [(tmp / folder / n).write_bytes(volumes[0]) for n in names]
        (tmp / "nnunet/imagesTr").mkdir()
        (tmp / "nnunet/imagesTr/a_0000.nii").write_bytes(volumes[0])
        decathlon = json.dumps(
            {
                "name": "x",
                "modality": {"0": "MRI"},
                "labels": {"0": "background", "1": "a"},
                "training": [{"image": "./a.nii", "label": "./al.nii"}],
                "test": [],
            }
        ).encode()
        nnunet = json.dumps(
            {
                "channel_names": {"0": "MRI"},
                "labels": {"background": 0, "a": [1, 2], "b": 2},
                "regions_class_order": [1, 2],
                "numTraining": 1,
                "file_ending": ".nii",
            }
        ).encode()
        state = {
            "model": {"w": torch.arange(300.0)},
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
            "rows": [{"epoch": 0, "lr": 0.1}],
            "best": 0.5,
        }
        self.whole = read_checkpoint(save_checkpoint(tmp, 1, state))
        checkpoint = (tmp / "checkpoint-00000001.pt").read_bytes()
        from dataclasses import asdict

        from safetensors.torch import save_file

        from egcnn_nb.core import KITS
        from egcnn_nb.run.models import make_model
        from egcnn_nb.run.settings import Settings

        s = Settings("d", "r", width=2, levels=2, patch_size=(8, 8, 8))
        save_file(make_model(s, KITS).state_dict(), tmp / "run/model.safetensors")
        config, weights = (
            json.dumps(
                {
                    "settings": asdict(s),
                    "task": asdict(KITS),
                    "split": {"train": [], "validation": []},
                }
            ).encode(),
            (tmp / "run/model.safetensors").read_bytes(),
        )
        (tmp / "run/config.json").write_bytes(config)
        # kind: share of all inputs, honest files, the place they go to, the mutator, what reads them
        text = lambda d, r: mutate(d, r, text=True)
        self.kinds = {
            "NIfTI header": (0.35, volumes, tmp / "scan/h.nii", header_mutated, nifti),
            "NIfTI gzip": (
                0.2,
                [gzip.compress(v) for v in volumes],
                tmp / "scan/g.nii.gz",
                mutate,
                nifti,
            ),
            "NIfTI body, packed": (
                0.1,
                volumes,
                tmp / "scan/b.nii.gz",
                lambda d, r: gzip.compress(header_mutated(d, r), 1),
                nifti,
            ),
            "Decathlon json": (
                0.08,
                [decathlon],
                tmp / "decathlon/dataset.json",
                text,
                description,
            ),
            "nnU-Net json": (0.08, [nnunet], tmp / "nnunet/dataset.json", text, description),
            "cases.csv": (
                0.08,
                [b"case,scan,label\na,a.nii,al.nii\nb,a.nii,al.nii\n"],
                tmp / "table/cases.csv",
                text,
                description,
            ),
            "checkpoint": (
                0.05,
                [checkpoint],
                tmp / "c/checkpoint-00000001.pt",
                mutate,
                self.checkpoint,
            ),
            "config.json": (
                0.03,
                [config],
                tmp / "run/config.json",
                text,
                lambda p: load_run(p.parent),
            ),
            "model.safetensors": (
                0.03,
                [weights],
                tmp / "weights/model.safetensors",
                mutate,
                lambda p: load_run(p.parent),
            ),
        }
        (tmp / "c").mkdir()
        (tmp / "weights").mkdir()
        (tmp / "weights/config.json").write_bytes(config)

    def checkpoint(self, path):
        found = read_checkpoint(path)
        assert (
            torch.equal(found["model"]["w"], self.whole["model"]["w"])
            and found["rows"] == self.whole["rows"]
            and found["best"] == 0.5
        ), "another state"


class Hang(BaseException):
    "An input took longer than 5 seconds"


def hang(*_):
    raise Hang


def one(kinds, kind, number, seed):
    "Try one input: 'read', 'refused', or a finding"
    _, honest, path, change, read = kinds[kind]
    rng = random.Random(f"{seed} {kind} {number}")
    path.write_bytes(change(rng.choice(honest), rng))
    signal.alarm(5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
        return "read"
    except InputError:
        return "refused"
    except Hang:
        return "more than 5 seconds"
    except BaseException:
        return traceback.format_exc(limit=-6)
    finally:
        signal.alarm(0)


def fuzz(count, seed=0, show=None):
    "Findings, and a row for each kind: inputs, read, refused"
    signal.signal(signal.SIGALRM, hang)
    torch.set_num_threads(1)
    nib.imageglobals.logger.setLevel(100)
    findings, rows = [], []
    with tempfile.TemporaryDirectory() as tmp:
        kinds = Inputs(Path(tmp)).kinds
        now = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30),) * 2)
        for kind, (_, honest, path, _, read) in kinds.items():
            for data in honest:
                path.write_bytes(gzip.compress(data) if kind.endswith("packed") else data)
                read(path)  # the honest ones are read
        if show:
            return [one(kinds, show[0], int(show[1]), seed)], []
        for kind, (share, *_) in kinds.items():
            start, found = (
                time.time(),
                [one(kinds, kind, i, seed) for i in range(round(share * count))],
            )
            findings += [(kind, i, f) for i, f in enumerate(found) if f not in ("read", "refused")]
            rows.append(
                (kind, len(found), found.count("read"), found.count("refused"), time.time() - start)
            )
    return findings, rows


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--count", type=int, default=20_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--one", nargs=2, metavar=("KIND", "NUMBER"))
    args = p.parse_args()
    findings, rows = fuzz(args.count, args.seed, args.one)
    if args.one:
        print(findings[0])
        return
    print("| kind | inputs | read right | refused | seconds |\n|---|---|---|---|---|")
    [print(f"| {k} | {n} | {a} | {b} | {s:.0f} |") for k, n, a, b, s in rows]
    seen = set()
    for kind, i, f in findings:
        if (kind, f[-150:]) not in seen and len(seen) < 30:
            print(f"\n{kind} {i}: {f}")
        seen.add((kind, f[-150:]))
    print(f"\n{sum(r[1] for r in rows):,} inputs, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
