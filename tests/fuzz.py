"""Twenty thousand broken files: each is read right or refused with our own error, within 5 seconds and 1 GiB.

    python tests/fuzz.py [--count 20000] [--seed 0] [--one KIND NUMBER]        # --one shows a single input again

A seeded mutator flips bits, writes numbers that hurt, cuts, repeats and inserts. What is accepted is
compared: voxels and affine with nibabel's, a checkpoint with the one it was made from."""

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel import imageglobals
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from safetensors.torch import save_file

from egcnn_nb.core import KITS, InputError
from egcnn_nb.data.check import expect_files
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.nifti import read_array
from egcnn_nb.run.checkpoints import read_checkpoint, save_checkpoint
from egcnn_nb.run.folders import describe
from egcnn_nb.run.models import make_model
from egcnn_nb.run.predict import load_run
from egcnn_nb.run.settings import Settings

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


_WORD = rb'"[^"]*"|-?\d+|\w+'
_MARK = rb"[\[\]{}:,]"


def replace_word(data, rng, pattern):
    "Write a word that hurts in place of one that fits a pattern"
    found = re.finditer(pattern, bytes(data))
    spots = [match.span() for match in found]
    first, last = rng.choice(spots or [(0, 0)])
    word = rng.choice(WORDS)
    data[first:last] = word.encode()


def flip_bit(data, rng, at):
    "Flip a bit of a byte; behind the end a byte is added"
    if at == len(data):
        data.append(0)
    bit = rng.randrange(8)
    data[at] ^= 1 << bit


def change_bytes(data, rng, at, what):
    "One change at a place, chosen by a number from 0 to 1"
    if what < 0.3:
        flip_bit(data, rng, at)
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


def mutate(data, rng):
    "Between one and four changes of bytes"
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        change_bytes(data, rng, at, rng.random())
    return bytes(data)


def mutate_text(data, rng):
    "Between one and four changes, most of them of words and marks"
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        what = rng.random()
        if what < 0.7:
            replace_word(data, rng, _WORD)
        elif what < 0.8:
            replace_word(data, rng, _MARK)
        else:
            change_bytes(data, rng, at, what)
    return bytes(data)


def hurting_bytes(rng, size):
    "Random bytes, or a word that hurts, repeated"
    if rng.random() < 0.5:
        return rng.randbytes(size)
    word = rng.choice(HURT)
    repeated = word * 8
    return repeated[:size]


def header_mutated(data, rng):
    "Mostly one or two whole fields of the header"
    if rng.random() < 0.3:
        return mutate(data, rng)
    data = bytearray(data)
    template = nib.Nifti1Header.template_dtype
    fields = template.fields
    assert fields
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(template.names)
        kind, at, *_ = fields[name]
        size = kind.base.itemsize
        numbers = max(kind.itemsize // size, 1)
        at += size * rng.randrange(numbers)
        data[at : at + size] = hurting_bytes(rng, size)
    return bytes(data)


def packed_header_mutated(data, rng):
    "The same, packed by gzip"
    changed = header_mutated(data, rng)
    return gzip.compress(changed, 1)


def nifti(path):
    "Read a NIfTI file, and compare its voxels and its affine in mm with nibabel's"
    array, affine, header = read_array(path)
    try:
        theirs: Any = nib.load(path)
        voxels = np.asanyarray(theirs.dataobj)
    except (ImageFileError, HeaderDataError):
        return  # nibabel is stricter with fields that say nothing of the voxels
    ours = np.asarray(array).reshape(theirs.shape)
    expected = np.asarray(voxels).astype(array.dtype)
    assert np.allclose(ours, expected, rtol=1e-6, equal_nan=True), "other voxels than nibabel's"
    unit = MM[int(theirs.header["xyzt_units"]) & 7]
    # nibabel hands out the numbers in the file's unit
    in_mm = np.diag([unit, unit, unit, 1]) @ theirs.affine
    assert np.allclose(affine, in_mm, atol=1e-8 * unit), "another affine than nibabel's"
    assert np.allclose(header.get_best_affine(), in_mm, rtol=1e-5, atol=1e-4), (
        "a header of another place"
    )


def description(path):
    "Find the data set of a description, and look for the files of two cases"
    found = find_dataset(path.parent)
    first_two = found.cases[:2]
    for case in first_two:
        expect_files(case, found.task)


UNITS = {"mm": 1, "meter": 0.001, "micron": 1000, "unknown": 1}  # unit -> how many are in a mm


def kinds_of_volumes():
    "Types, slopes, forms and units"
    found = []
    for dtype, slope in ((np.int16, 1), (np.float32, 1), (np.uint8, 0.5)):
        found.append((dtype, slope, "both", "unknown"))
    for form in ("qform", "neither", "both"):
        for unit in UNITS:
            found.append((np.int16, 1, form, unit))
    return found


def honest_volumes(path):
    "Volumes of several types, forms and units, as bytes"
    rng = np.random.default_rng(0)
    found = []
    for dtype, slope, form, unit in kinds_of_volumes():
        per_mm = UNITS[unit]
        voxels = rng.integers(0, 3, (3, 4, 5))
        affine = np.diag([per_mm, per_mm, 2 * per_mm, 1])
        image = nib.Nifti1Image(voxels.astype(dtype), affine)
        qform, sform = CODES[form]
        image.set_qform(affine, qform)
        image.set_sform(affine, sform)
        header = image.header
        header.set_xyzt_units(unit)
        header.set_slope_inter(slope, 0)
        nib.save(image, path)
        found.append(path.read_bytes())
    return found


CODES = {"both": (1, 2), "qform": (1, 0), "neither": (0, 0)}  # of qform and sform


DECATHLON = {
    "name": "x",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "1": "a"},
    "training": [{"image": "./a.nii", "label": "./al.nii"}],
    "test": [],
}
NNUNET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "a": [1, 2], "b": 2},
    "regions_class_order": [1, 2],
    "numTraining": 1,
    "file_ending": ".nii",
}
TABLE = b"case,scan,label\na,a.nii,al.nii\nb,a.nii,al.nii\n"


def read_run(path):
    "Load the run folder in which a file lies"
    load_run(path.parent)


@dataclass
class Kind:
    "A kind of file that is spoilt"

    share: float  # of all inputs
    honest: list  # contents of honest files
    path: Path  # where they are written
    change: Callable  # the mutator
    read: Callable  # what reads the file
    packed: bool = False  # whether the mutator packs it by gzip


class Inputs:
    "The honest files, and what reads their mutations"

    def __init__(self, tmp):
        for folder in ("decathlon", "nnunet/imagesTr", "table", "run", "scan", "c", "weights"):
            (tmp / folder).mkdir(parents=True)
        volumes = honest_volumes(tmp / "x.nii")
        for name in (
            "decathlon/a",
            "decathlon/al",
            "table/a",
            "table/al",
            "nnunet/imagesTr/a_0000",
        ):
            (tmp / f"{name}.nii").write_bytes(volumes[0])
        config, weights = self.honest_run(tmp)
        self.kinds = {
            **self.images(tmp, volumes),
            **self.descriptions(tmp),
            **self.runs(tmp, config, weights),
        }

    def images(self, tmp, volumes):
        "NIfTI files whose headers, packing or voxels are changed"
        packed = [gzip.compress(volume) for volume in volumes]
        body = tmp / "scan/b.nii.gz"
        return {
            "NIfTI header": Kind(0.35, volumes, tmp / "scan/h.nii", header_mutated, nifti),
            "NIfTI gzip": Kind(0.2, packed, tmp / "scan/g.nii.gz", mutate, nifti),
            "NIfTI body, packed": Kind(0.1, volumes, body, packed_header_mutated, nifti, True),
        }

    def descriptions(self, tmp):
        "dataset.json and cases.csv"
        files = {
            "Decathlon json": (tmp / "decathlon/dataset.json", json.dumps(DECATHLON).encode()),
            "nnU-Net json": (tmp / "nnunet/dataset.json", json.dumps(NNUNET).encode()),
            "cases.csv": (tmp / "table/cases.csv", TABLE),
        }
        found = {}
        for name, (path, text) in files.items():
            found[name] = Kind(0.08, [text], path, mutate_text, description)
        return found

    def honest_run(self, tmp):
        "config.json and weights of a run folder, as bytes"
        settings = Settings("d", "r", width=2, levels=2, patch_size=(8, 8, 8))
        weights = tmp / "run/model.safetensors"
        save_file(make_model(settings, KITS).state_dict(), weights)
        config = json.dumps(describe(settings, KITS, [], [])).encode()
        for folder in ("run", "weights"):
            (tmp / folder / "config.json").write_bytes(config)
        return config, weights.read_bytes()

    def runs(self, tmp, config, weights):
        "What a run folder holds"
        state = {
            "model": {"w": torch.arange(300.0)},
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
            "rows": [{"epoch": 0, "lr": 0.1}],
            "best": 0.5,
        }
        written = save_checkpoint(tmp, 1, state)
        self.whole = read_checkpoint(written)
        checkpoint = (tmp / "checkpoint-00000001.pt").read_bytes()
        spoilt = tmp / "c/checkpoint-00000001.pt"
        config_file, weights_file = tmp / "run/config.json", tmp / "weights/model.safetensors"
        return {
            "checkpoint": Kind(0.05, [checkpoint], spoilt, mutate, self.checkpoint),
            "config.json": Kind(0.03, [config], config_file, mutate_text, read_run),
            "model.safetensors": Kind(0.03, [weights], weights_file, mutate, read_run),
        }

    def checkpoint(self, path):
        "Read a checkpoint, and compare it with the one that it was made from"
        found = read_checkpoint(path)
        whole = self.whole
        ours = found["model"]["w"]
        theirs = whole["model"]["w"]
        assert torch.equal(ours, theirs), "other weights"
        assert found["rows"] == whole["rows"], "other rows"
        assert found["best"] == 0.5, "another state"


class Hang(BaseException):
    "An input took longer than 5 seconds"


def hang(*_):
    raise Hang


def one(kinds, kind, number, seed):
    "Try one input: 'read', 'refused', or a finding"
    tried = kinds[kind]
    path = tried.path
    rng = random.Random(f"{seed} {kind} {number}")
    honest = rng.choice(tried.honest)
    changed = tried.change(honest, rng)
    path.write_bytes(changed)
    signal.alarm(5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tried.read(path)
        return "read"
    except InputError:
        return "refused"
    except Hang:
        return "more than 5 seconds"
    except BaseException:
        return traceback.format_exc(limit=-6)
    finally:
        signal.alarm(0)


def limit_memory(more):
    "Let this process take so many bytes more than it has"
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmSize:\s+(\d+)", status)
    assert found
    kilobytes = int(found[1])
    limit = 1024 * kilobytes + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def read_honest(kinds):
    "Read every honest file"
    for kind in kinds.values():
        for data in kind.honest:
            path = kind.path
            content = gzip.compress(data) if kind.packed else data
            path.write_bytes(content)
            kind.read(path)


def fuzz(count, seed=0, show=None):
    "Findings, and a row for each kind: inputs, read, refused, seconds"
    signal.signal(signal.SIGALRM, hang)
    torch.set_num_threads(1)
    imageglobals.logger.setLevel(100)
    findings, rows = [], []
    with tempfile.TemporaryDirectory() as tmp:
        kinds = Inputs(Path(tmp)).kinds
        limit_memory(1 << 30)
        read_honest(kinds)
        if show:
            name, number = show
            end = one(kinds, name, int(number), seed)
            return [end], []
        for name, kind in kinds.items():
            start = time.time()
            inputs = round(kind.share * count)
            ends = [one(kinds, name, number, seed) for number in range(inputs)]
            for number, end in enumerate(ends):
                if end not in ("read", "refused"):
                    findings.append((name, number, end))
            seconds = time.time() - start
            read, refused = ends.count("read"), ends.count("refused")
            rows.append((name, inputs, read, refused, seconds))
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
    total = 0
    for name, inputs, read, refused, seconds in rows:
        print(f"| {name} | {inputs} | {read} | {refused} | {seconds:.0f} |")
        total += inputs
    seen = set()
    for name, number, finding in findings:
        alike = (name, finding[-150:])
        if alike not in seen and len(seen) < 30:
            print(f"\n{name} {number}: {finding}")
        seen.add(alike)
    print(f"\n{total:,} inputs, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
