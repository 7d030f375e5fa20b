"""Data sets as they are found in practice, one by one: what is there, what must be true, what happened.

    python tests/cases.py [NAME ...] # a Markdown table; pytest runs every row (tests/test_cases.py)

Each row is a function that writes a small data set, asserts what must be true, and returns what happened."""

import argparse
import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from egcnn_nb.commands.check import main as check_main
from egcnn_nb.commands.predict import main as predict_main
from egcnn_nb.commands.train import LAUNCH
from egcnn_nb.commands.train import main as train_main
from egcnn_nb.core import InputError, outer_first
from egcnn_nb.data.check import check_dataset, read_case
from egcnn_nb.data.layouts import find_dataset, is_run, name_of
from egcnn_nb.tensors import region_masks, regions_to_labels, to_labels

ROOT = Path(__file__).parents[1]
ROWS = {}
SHAPE = (14, 13, 12)
ISO = np.eye(4)


class Skip(Exception):
    "Cannot be tried on this machine"


def row(there, must):
    "Register a function under its name, with what is there and what must be true"

    def add(function):
        function.there = there
        function.must = must
        ROWS[function.__name__] = function
        return function

    return add


# --- what the data sets are made of


def scan(seed, shape=SHAPE, values=(1, 2)):
    "An image and a label map: a ball in noise, with a smaller ball in it"
    rng = np.random.default_rng(seed)
    centre = np.array(shape) / 2 + rng.uniform(-1, 1, 3)
    grid = np.moveaxis(np.indices(shape), 0, -1)
    radius = np.linalg.norm(grid - centre, axis=-1)
    labels = np.zeros(shape, np.int32)
    labels[radius < 5] = values[0]
    labels[radius < 3] = values[-1]
    image = 50 * (radius < 5) + 50 * (radius < 3) + rng.normal(100, 5, shape)
    return image.astype(np.float32), labels


def save(path, array, affine=ISO, dtype=None):
    "Write a NIfTI file, and the folders above it"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(array)
    if dtype is None:
        dtype = np.float32 if array.dtype.kind == "f" else np.int16
    image = nib.Nifti1Image(array.astype(dtype), affine)
    image.header.set_xyzt_units("mm")
    target = path.with_name(path.name.lower())  # nibabel writes lower-case endings only
    nib.save(image, target)
    if target != path:
        target.rename(path)
    return path


def poke(path, **fields):
    "Overwrite fields of a NIfTI header, whatever nibabel thinks of them"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)))


def table(root, cases=4, image=None, label=None, channel="t1", affine=ISO, shape=SHAPE):
    "A cases.csv folder; image(array) and label(array) change what is written"
    root = Path(root)
    lines = [["case", channel, "label"]]
    for i in range(cases):
        x, y = scan(i, shape)
        x = x if image is None else image(x)
        y = y if label is None else label(y)
        save(root / f"im{i}.nii.gz", x, affine)
        save(root / f"lab{i}.nii.gz", y, affine)
        lines.append([f"case{i}", f"im{i}.nii.gz", f"lab{i}.nii.gz"])
    with open(root / "cases.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(lines)
    return root


def describe(root, encoding="utf-8", **info):
    "Write dataset.json"
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(info, ensure_ascii=False), encoding=encoding)
    return root


NAMES = {"background": 0, "outer": 1, "inner": 2}


def nnunet(
    root, cases=4, channels=("T1",), labels=None, ending=".nii.gz", encoding="utf-8", **info
):
    "A folder of nnU-Net 2"
    root = Path(root)
    for i in range(cases):
        x, y = scan(i)
        for c in range(len(channels)):
            save(root / f"imagesTr/scan_{i:03d}_{c:04d}{ending}", x * (c + 1))
        save(root / f"labelsTr/scan_{i:03d}{ending}", y)
    named = {str(c): name for c, name in enumerate(channels)}
    whole = {
        "channel_names": named,
        "labels": labels or NAMES,
        "numTraining": cases,
        "file_ending": ending.lower(),
        **info,
    }
    return describe(root, encoding, **whole)


NUMBERS = {"0": "background", "1": "outer", "2": "inner"}


def decathlon(root, names, modality=None, labels=None, **info):
    "A folder of the Decathlon; `names` are the names of the images, relative to imagesTr"
    root = Path(root)
    listed = []
    for i, name in enumerate(names):
        x, y = scan(i)
        save(root / "imagesTr" / name, x)
        save(root / "labelsTr" / name, y)
        listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    return describe(
        root, modality=modality or {"0": "MRI"}, labels=labels or NUMBERS, training=listed, **info
    )


def brats(root, names, values=(1, 2), new=True):
    "Folders of BraTS, in the names of 2023 or in those before"
    ends = (
        ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")
        if new
        else ("_t1", "_t1ce", "_t2", "_flair", "_seg")
    )
    for i, name in enumerate(names):
        x, y = scan(i, values=values)
        for k, end in enumerate(ends[:4]):
            save(root / name / f"{name}{end}.nii.gz", x * (k + 1))
        save(root / name / f"{name}{ends[4]}.nii.gz", y)
    return root


def kits(root, cases=3, ending=".nii.gz", extra=None):
    "Folders of KiTS"
    for i in range(cases):
        x, y = scan(i)
        if extra is not None:
            y[0, 0, 0] = extra
        save(root / f"case_{i:05d}/imaging{ending}", x * 10 - 2000)
        save(root / f"case_{i:05d}/segmentation{ending}", y)
    return root


# --- how they are tried


def command(main, *words):
    "Exit code, stdout and last line of stderr of a command, in this process"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(w) for w in words])
    lines = [line.split("\r")[-1] for line in err.getvalue().strip().splitlines()]
    return code, out.getvalue(), lines[-1] if lines else ""


def checked(root, *words):
    "Exit code and text of egcnn_check"
    code, out, err = command(check_main, root, *words)
    assert "Traceback" not in out + err, out + err
    return code, out + err


def says(root, code, *texts, words=()):
    "egcnn_check leaves with a code and says these texts"
    found, text = checked(root, *words)
    assert found == code, (found, text)
    for wanted in texts:
        assert wanted.lower() in text.lower(), (wanted, text)
    lines = [line.strip() for line in text.strip().splitlines()]
    first = next((line for line in lines if texts and texts[0].lower() in line.lower()), lines[-1])
    return f"exit code {code}: {first[:160]}"


def refused(function, *texts):
    "A function raises an `InputError` with these texts"
    try:
        function()
    except InputError as e:
        for wanted in texts:
            assert wanted.lower() in str(e).lower(), (wanted, str(e))
        return f"refused: {str(e)[:160]}"
    raise AssertionError("nothing was refused")


def train(root, out, *words):
    "egcnn_train with the smallest network"
    small = (
        "--epochs 1 --width 4 --levels 2 --patch_size 8 8 8 --lr 1e-3 --precision fp32 "
        "--validation 1 --augment intensity"
    )
    code, _, err = command(
        train_main,
        root,
        "--out",
        out,
        "--cache",
        Path(out).parent / "cache",
        *small.split(),
        *words,
    )
    return code, err


def trains(root, out, *words):
    "Training ends well; the task of the run"
    code, err = train(root, out, *words)
    assert code == 0, err
    return json.loads((out / "config.json").read_text(encoding="utf-8"))["task"]


def not_trained(root, out, *texts):
    "Training is refused in one line with these texts, and leaves no folder"
    code, err = train(root, out)
    assert code == 2 and not out.exists(), (code, err)
    for wanted in texts:
        assert wanted.lower() in err.lower(), (wanted, err)
    return err[:160]


def predicted(run, out, *inputs):
    "name -> label map of egcnn_predict"
    code, _, err = command(predict_main, run, *inputs, "--out", out)
    assert code == 0, err
    return {name_of(p): nib.load(p) for p in out.glob("*.nii.gz")}


def values(image):
    "The values of a label map"
    return set(np.unique(np.asarray(image.dataobj)).tolist())


def python(code, **env):
    "Run Python code in a process of its own, with this package"
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    whole = {k: v for k, v in whole.items() if v is not None}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=whole
    )


# --- folders and kinds of files


@row("BIDS: sub-01/anat/sub-01_T1w.nii.gz, derivatives/", "refused, with a way to make cases.csv")
def bids_folder(tmp):
    for i in range(2):
        x, y = scan(i)
        save(tmp / f"sub-{i:02d}/anat/sub-{i:02d}_T1w.nii.gz", x)
        save(tmp / f"derivatives/labels/sub-{i:02d}/anat/sub-{i:02d}_T1w_seg.nii.gz", y)
    return says(tmp, 2, "BIDS", "cases.csv")


@row("a folder of DICOM slices", "refused with a word on DICOM and dcm2niix")
def dicom_folder(tmp):
    for i in range(3):
        (tmp / f"IM{i}.dcm").write_bytes(bytes(128) + b"DICM" + bytes(64))
    return says(tmp, 2, "DICOM", "dcm2niix")


@row(
    "DICOM slices without an ending, in folders of series",
    "refused with a word on DICOM and dcm2niix",
)
def dicom_without_ending(tmp):
    (tmp / "patient/series1").mkdir(parents=True)
    for i in range(3):
        (tmp / f"patient/series1/IM{i}").write_bytes(bytes(128) + b"DICM" + bytes(64))
    return says(tmp, 2, "DICOM", "dcm2niix")


@row("a folder of .nrrd files", "refused, and what is named can read them (SimpleITK)")
def nrrd_folder(tmp):
    (tmp / "a.nrrd").write_bytes(b"NRRD0004\n")
    return says(tmp, 2, "NRRD", "SimpleITK")


@row("a folder with a .zip", "refused: unpack it")
def zip_folder(tmp):
    (tmp / "Task01.zip").write_bytes(b"PK")
    return says(tmp, 2, "unpack")


@row("an empty folder", "refused in one line")
def empty_folder(tmp):
    return says(tmp, 2, "no known layout")


@row("NIfTI files in one folder, without a description", "refused, with the lines of a cases.csv")
def flat_folder(tmp):
    save(tmp / "scan1.nii.gz", scan(0)[0])
    return says(tmp, 2, "cases.csv", "scan1.nii.gz")


@row("imagesTr and labelsTr without dataset.json", "refused: dataset.json is named")
def images_without_json(tmp):
    nnunet(tmp)
    (tmp / "dataset.json").unlink()
    return says(tmp, 2, "dataset.json")


@row("ct.nii.gz and segmentations/CLASS.nii.gz", "refused: merge them into one map")
def one_file_per_class(tmp):
    x, y = scan(0)
    save(tmp / "s0/ct.nii.gz", x)
    for value, name in ((1, "liver"), (2, "spleen")):
        save(tmp / f"s0/segmentations/{name}.nii.gz", y == value, dtype=np.uint8)
    return says(tmp, 2, "merge", "label map")


@row("._NAME beside each file, and .DS_Store", "hidden files are no cases and no channels")
def macos_hidden_files(tmp):
    nnunet(tmp / "n")
    brats(tmp / "b", ["BraTS-GLI-00000-000"], values=(1, 3))
    kits(tmp / "k")
    for path in list(tmp.rglob("*.nii.gz")):
        path.with_name("._" + path.name).write_bytes(b"Mac OS X")
    for folder in ("b/._BraTS-GLI-00001-000", "k/._case_00009"):
        (tmp / folder).mkdir()
    counts = [len(find_dataset(tmp / name).cases) for name in "nbk"]
    assert counts == [4, 1, 3], counts
    for name in "nbk":
        code, text = checked(tmp / name)
        assert code == 0, text
    return f"{counts} cases"


@row("run folders called BraTS_run and case_run among the cases", "they are no cases")
def run_folder_inside(tmp):
    brats(tmp / "b", ["BraTS-GLI-00000-000"])
    kits(tmp / "k")
    for folder in (tmp / "b/BraTS_run", tmp / "k/case_run"):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"x")
        assert is_run(folder)
    counts = [len(find_dataset(tmp / name).cases) for name in "bk"]
    assert counts == [1, 3], counts
    return f"{counts} cases"


@row("a run folder is given as data", "refused: it is named a run folder")
def run_folder_as_data(tmp):
    (tmp / "config.json").write_text("{}")
    (tmp / "model.safetensors").write_bytes(b"x")
    return says(tmp, 2, "run folder")


@row("files that end in .NII.GZ", "read")
def upper_case_endings(tmp):
    nnunet(tmp, ending=".NII.GZ")
    data = find_dataset(tmp)
    assert [c.name for c in data.cases] == [f"scan_{i:03d}" for i in range(4)]
    return says(tmp, 0, "0 problems")


@row(
    "a cases.csv in a folder with folders case_0, case_1",
    "the table counts, it is not taken for KiTS",
)
def table_with_case_folders(tmp):
    table(tmp)
    for i in range(4):
        (tmp / f"case_{i}").mkdir()
        for kind in ("im", "lab"):
            shutil.move(tmp / f"{kind}{i}.nii.gz", tmp / f"case_{i}")
    text = (tmp / "cases.csv").read_text()
    for i in range(4):
        text = text.replace(f"im{i}", f"case_{i}/im{i}").replace(f"lab{i}", f"case_{i}/lab{i}")
    (tmp / "cases.csv").write_text(text)
    assert find_dataset(tmp).task.channels == ("t1",)
    return says(tmp, 0, "0 problems")


@row("a cases.csv in a folder that is KiTS too", "the table counts")
def table_in_kits(tmp):
    kits(tmp, cases=1)
    (tmp / "cases.csv").write_text(
        "case,CT,label\none,case_00000/imaging.nii.gz,case_00000/segmentation.nii.gz\n"
    )
    assert [c.name for c in find_dataset(tmp).cases] == ["one"]
    return "the table's case"


@row("folders case_1 with other files than KiTS's", "not taken for KiTS")
def case_folders_of_others(tmp):
    save(tmp / "case_1/scan.nii.gz", scan(0)[0])
    return says(tmp, 2, "no known layout")


# --- names


@row("case names are DICOM UIDs, full of dots", "each case has its own name and its own voxels")
def names_with_dots(tmp):
    uids = [f"1.3.6.1.4.1.9328.50.4.{i:04d}" for i in range(4)]
    decathlon(tmp, [f"{u}.nii.gz" for u in uids])
    data = find_dataset(tmp)
    assert [c.name for c in data.cases] == uids
    for i, case in enumerate(data.cases):
        images, label = read_case(case, data.task)
        assert np.array_equal(images[0].array, scan(i)[0]) and np.array_equal(
            label.array, scan(i)[1]
        )
    return says(tmp, 0, "0 problems")


@row(
    "dataset.json lists p1/img.nii.gz, p2/img.nii.gz",
    "names from the folders, each with its own voxels",
)
def one_folder_per_patient(tmp):
    decathlon(tmp, [f"p{i}/img.nii.gz" for i in range(4)])
    data = find_dataset(tmp)
    assert [c.name for c in data.cases] == [f"p{i}_img" for i in range(4)]
    for i, case in enumerate(data.cases):
        assert np.array_equal(read_case(case, data.task)[0][0].array, scan(i)[0])
    return str([c.name for c in data.cases])


@row("dataset.json lists a case twice", "refused: the name is told")
def a_case_listed_twice(tmp):
    decathlon(tmp, ["a.nii.gz", "a.nii.gz"])
    return refused(lambda: find_dataset(tmp), "several cases of one name", "a")


@row("a.nii.gz in a/x and b/x, whose folders have one name", "refused")
def folders_of_one_name(tmp):
    decathlon(tmp, ["a/x/img.nii.gz", "b/x/img.nii.gz"])
    return refused(lambda: find_dataset(tmp), "several cases of one name", "x_img")


@row("cases called A and a", "refused: outputs would be one file on some file systems")
def names_that_differ_in_case(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    path.write_text(path.read_text().replace("case0", "A").replace("case1", "a"))
    return refused(lambda: find_dataset(tmp), "several cases of one name", "upper and lower case")


@row("one case in HGG/ and in LGG/", "refused")
def brats_case_in_both_grades(tmp):
    for grade in ("HGG", "LGG"):
        brats(tmp / grade, ["BraTS19_A_1"], new=False)
    return refused(lambda: find_dataset(tmp), "BraTS19_A_1")


@row("a case called ../a", "refused: names are names of files")
def name_with_a_folder(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    path.write_text(path.read_text().replace("case0", "../a"))
    return refused(lambda: find_dataset(tmp), "../a", "Rename")


# --- cases.csv


@row("a line without a case name", "refused: the line is told")
def csv_empty_case(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    path.write_text(path.read_text().replace("case2,", ","))
    return says(tmp, 2, "line 4", "column case")


@row("cells separated by semicolons", "refused: the separator is told")
def csv_semicolons(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    path.write_text(path.read_text().replace(",", ";"))
    return says(tmp, 2, "semicolons")


@row("a first line alone", "a problem, and training is refused")
def csv_without_cases(tmp):
    (tmp / "cases.csv").write_text("case,t1,label\n")
    refused(lambda: find_dataset(tmp), "no cases")
    return says(tmp, 1, "no cases")


@row("a column twice", "refused")
def csv_column_twice(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    path.write_text(path.read_text().replace("case,t1,label", "t1,t1,label"))
    return says(tmp, 2, "columns")


@row("a name in Latin-1", "refused: UTF-8 is told")
def csv_latin_1(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    path.write_bytes(path.read_bytes().replace(b"case0", b"M\xfcller"))
    return says(tmp, 2, "UTF-8")


@row("spaces after commas, an empty line, a byte order mark", "read")
def csv_with_spaces(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    path.write_text("\ufeff" + path.read_text().replace(",", ", ") + ",,\n", encoding="utf-8")
    assert [c.name for c in find_dataset(tmp).cases] == [f"case{i}" for i in range(4)]
    return says(tmp, 0, "0 problems")


@row("a line with more cells than columns", "refused: the line is told")
def csv_too_many_cells(tmp):
    table(tmp)
    with open(tmp / "cases.csv", "a") as f:
        f.write("case9,im0.nii.gz,lab0.nii.gz,more\n")
    return says(tmp, 2, "line 6", "4 cells")


@row("sub\\im0.nii.gz in cases.csv and in dataset.json", "read")
def windows_backslashes(tmp):
    table(tmp / "t")
    (tmp / "t/sub").mkdir()
    for path in list((tmp / "t").glob("*.nii.gz")):
        shutil.move(path, tmp / "t/sub")
    path = tmp / "t/cases.csv"
    path.write_text(
        path.read_text()
        .replace("im", "sub\\im")
        .replace("lab0", ".\\sub\\lab0")
        .replace(",lab", ",sub\\lab")
        .replace("sub\\label", "label")
    )
    decathlon(tmp / "d", ["a.nii.gz", "b.nii.gz"])
    path = tmp / "d/dataset.json"
    path.write_text(path.read_text().replace("/", "\\\\"))
    says(tmp / "d", 0, "0 problems")
    return says(tmp / "t", 0, "0 problems")


# --- dataset.json


@row("dataset.json begins with a byte order mark", "read")
def json_with_bom(tmp):
    return says(nnunet(tmp, encoding="utf-8-sig"), 0, "0 problems")


@row("dataset.json in UTF-8, a locale of ASCII", "read, with its own letters")
def json_under_another_locale(tmp):
    nnunet(tmp, labels={"background": 0, "Ödem": 1, "Kern": 2})
    code = (
        "from egcnn_nb.data.layouts import find_dataset; "
        f"print(ascii(find_dataset({str(tmp)!r}).task.labels[1]))"
    )
    done = python(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0 and ascii("Ödem") in done.stdout, done.stderr
    return done.stdout.strip()


@row("a section `dataset` names the files (nnU-Net 2.3)", "read")
def nnunet_dataset_section(tmp):
    section = {}
    for i in range(3):
        x, y = scan(i)
        save(tmp / f"raw/p{i}/t1.nii.gz", x)
        save(tmp / f"raw/p{i}/seg.nii.gz", y)
        section[f"p{i}"] = {"images": [f"raw/p{i}/t1.nii.gz"], "label": f"raw/p{i}/seg.nii.gz"}
    describe(
        tmp,
        channel_names={"0": "T1"},
        labels=NAMES,
        numTraining=3,
        file_ending=".nii.gz",
        dataset=section,
    )
    assert [c.name for c in find_dataset(tmp).cases] == ["p0", "p1", "p2"]
    return says(tmp, 0, "0 problems")


@row("scan_3 in labelsTr, scan_003 in imagesTr", "a problem that names the pair")
def nnunet_label_missing(tmp):
    nnunet(tmp)
    (tmp / "labelsTr/scan_003.nii.gz").rename(tmp / "labelsTr/scan_3.nii.gz")
    return says(tmp, 1, "labelsTr/scan_3.nii.gz has no image", "scan_003")


@row("the same, trained", "refused: the pair is told, never just left out")
def nnunet_label_missing_trained(tmp):
    nnunet(tmp / "data")
    (tmp / "data/labelsTr/scan_003.nii.gz").rename(tmp / "data/labelsTr/scan_3.nii.gz")
    return not_trained(tmp / "data", tmp / "run", "scan_3.nii.gz has no image")


@row("labels called NAME_0000.nii.gz", "a problem that names the pair")
def nnunet_labels_with_channel(tmp):
    nnunet(tmp)
    for path in list((tmp / "labelsTr").iterdir()):
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    return says(tmp, 1, "scan_000_0000.nii.gz has no image", "imagesTr/scan_000")


@row("labels: numbers as strings", "read as numbers")
def nnunet_labels_strings(tmp):
    nnunet(tmp, labels={"background": "0", "outer": "1", "inner": "2"})
    assert find_dataset(tmp).task.labels == {0: "background", 1: "outer", 2: "inner"}
    return says(tmp, 0, "0 problems")


@row("labels: number -> name in a file of nnU-Net 2", "read either way round")
def nnunet_labels_v1_style(tmp):
    nnunet(tmp, labels=NUMBERS)
    assert find_dataset(tmp).task.labels == {0: "background", 1: "outer", 2: "inner"}
    return says(tmp, 0, "0 problems")


@row("labels: name -> number in a file of the Decathlon", "read either way round")
def decathlon_labels_v2_style(tmp):
    decathlon(tmp, ["a.nii.gz"], labels=NAMES)
    assert find_dataset(tmp).task.labels == {0: "background", 1: "outer", 2: "inner"}
    return "read"


@row("labels: numbers on both sides, crossed", "refused: nobody knows which is the name")
def labels_both_ways(tmp):
    nnunet(tmp, labels={"0": 0, "1": 2, "2": 1})
    return says(tmp, 2, "which numbers are the names")


@row(
    "a label without a value, one of 1.5, one below 0, one twice, none for the background",
    "each refused, dataset.json named",
)
def labels_without_sense(tmp):
    wrong = (
        {"background": 0, "a": None},
        {"background": 0, "a": 1.5},
        {"background": 0, "a": -1},
        {"background": 0, "a": 1, "b": 1},
        {"a": 1},
        {"background": 0},
        [],
        {"background": 0, "a": True},
    )
    for i, labels in enumerate(wrong):
        root = nnunet(tmp / str(i), cases=1)
        info = json.loads((root / "dataset.json").read_text())
        describe(root, **{**info, "labels": labels})
        told = refused(lambda root=root: find_dataset(root), "dataset.json", "label")
    decathlon(tmp / "names", ["a.nii.gz"], labels={"0": "background", "1": "a", "2": "a"})
    refused(lambda: find_dataset(tmp / "names"), "dataset.json", "several numbers")
    return told


@row("`ignore` is declared", "refused: ignore labels are not supported")
def ignore_label(tmp):
    return says(nnunet(tmp, labels={**NAMES, "ignore": 3}), 2, "ignore labels are not supported")


@row("file_ending .mha", "refused, and what is named can read them (SimpleITK)")
def nnunet_mha(tmp):
    nnunet(tmp)
    info = json.loads((tmp / "dataset.json").read_text())
    describe(tmp, **{**info, "file_ending": ".mha"})
    return says(tmp, 2, ".mha", "SimpleITK")


@row("imagesTr/NAME.nii.gz without _0000", "never '0 cases, 0 problems'; training is refused")
def nnunet_without_0000(tmp):
    nnunet(tmp)
    for path in list((tmp / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace("_0000", "")))
    refused(lambda: find_dataset(tmp), "no cases", "_0000")
    return says(tmp, 1, "_0000", "numTraining 4")


@row("the second channel of a case is missing", "a problem that names the file")
def second_channel_missing(tmp):
    nnunet(tmp, channels=("T1", "T2"))
    (tmp / "imagesTr/scan_002_0001.nii.gz").unlink()
    return says(tmp, 1, "scan_002_0001.nii.gz")


@row("the first channel of a case is missing", "still a case; a problem that names the file")
def first_channel_missing(tmp):
    nnunet(tmp, channels=("T1", "T2"))
    (tmp / "imagesTr/scan_002_0000.nii.gz").unlink()
    assert len(find_dataset(tmp).cases) == 4
    return says(tmp, 1, "scan_002_0000.nii.gz")


@row("a third channel that channel_names does not have", "a problem that names the file")
def channel_too_many(tmp):
    nnunet(tmp, channels=("T1", "T2"))
    save(tmp / "imagesTr/scan_000_0002.nii.gz", scan(0)[0])
    return says(tmp, 1, "scan_000_0002.nii.gz")


@row("channel_names as a list, and numbered from 1", "refused: how to number them")
def channel_names_wrong(tmp):
    for i, names in enumerate((["T1"], {"1": "T1"}, {"0": "T1", "2": "T2"}, {})):
        root = nnunet(tmp / str(i), cases=1)
        info = json.loads((root / "dataset.json").read_text())
        describe(root, **{**info, "channel_names": names})
        told = refused(lambda root=root: find_dataset(root), "channel_names", "from 0")
    return told


@row(
    "channels listed as 1, 0 (nnU-Net, and a 4D file of the Decathlon)",
    "in the order of their numbers",
)
def channels_out_of_order(tmp):
    nnunet(tmp / "n", channels=("T1", "T2"))
    info = json.loads((tmp / "n/dataset.json").read_text())
    describe(tmp / "n", **{**info, "channel_names": {"1": "T2", "0": "T1"}})
    data = find_dataset(tmp / "n")
    assert (
        data.task.channels == ("T1", "T2")
        and data.cases[0].images[1].name == "scan_000_0001.nii.gz"
    )
    decathlon(tmp / "d", ["a.nii.gz"], modality={"1": "T2", "0": "T1"})
    assert find_dataset(tmp / "d").task.channels == ("T1", "T2")
    return str(data.task.channels)


@row("one case as .nii beside .nii.gz", "a problem, since it would be skipped")
def other_ending(tmp):
    nnunet(tmp)
    path = tmp / "imagesTr/scan_003_0000.nii.gz"
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    return says(tmp, 1, "scan_003_0000.nii", ".nii.gz")


@row("x_t1.nii and x_t1.nii.gz in a BraTS folder", "a problem: which of both is meant")
def two_endings_of_one_name(tmp):
    brats(tmp, ["BraTS19_A_1"], new=False)
    path = tmp / "BraTS19_A_1/BraTS19_A_1_t1.nii.gz"
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    return says(tmp, 1, "one name with two endings", "BraTS19_A_1_t1.nii")


@row("numTraining 6, four cases", "a problem")
def numtraining_wrong(tmp):
    nnunet(tmp, numTraining=6)
    return says(tmp, 1, "numTraining 6", "4 cases")


@row("dataset.json lists a file that is not there", "a problem that names it")
def listed_and_gone(tmp):
    decathlon(tmp, ["a.nii.gz", "b.nii.gz"])
    (tmp / "imagesTr/b.nii.gz").unlink()
    return says(tmp, 1, "imagesTr/b.nii.gz")


@row("a file in imagesTr that dataset.json does not list", "a problem that names it")
def there_and_not_listed(tmp):
    decathlon(tmp, ["a.nii.gz", "b.nii.gz"])
    save(tmp / "imagesTr/c.nii.gz", scan(3)[0])
    return says(tmp, 1, "does not list", "c.nii.gz")


@row(
    "nnU-Net 1: training lists NAME.nii.gz, the files are NAME_0000.nii.gz",
    "read, a file a channel",
)
def nnunet_v1(tmp):
    decathlon(tmp, ["a.nii.gz", "b.nii.gz"], modality={"0": "T1", "1": "T2"})
    for name in "ab":
        path = tmp / f"imagesTr/{name}.nii.gz"
        shutil.copy(path, tmp / f"imagesTr/{name}_0001.nii.gz")
        path.rename(tmp / f"imagesTr/{name}_0000.nii.gz")
    data = find_dataset(tmp)
    assert [c.name for c in data.cases] == ["a", "b"] and len(data.cases[0].images) == 2
    return says(tmp, 0, "0 problems")


def monai_list(tmp, **info):
    "A list of MONAI: each image is a list of files"
    listed = []
    for i in range(3):
        x, y = scan(i)
        for k, name in enumerate(("flair", "t1")):
            save(tmp / f"p{i}/p{i}_{name}.nii.gz", x * (k + 1))
        save(tmp / f"p{i}/p{i}_seg.nii.gz", y)
        files = [f"p{i}/p{i}_flair.nii.gz", f"p{i}/p{i}_t1.nii.gz"]
        listed.append({"fold": i, "image": files, "label": f"p{i}/p{i}_seg.nii.gz"})
    return describe(tmp, training=listed, **info)


@row("a list of MONAI without modality", "refused: what is missing")
def monai_datalist(tmp):
    return says(monai_list(tmp), 2, "modality")


@row("a list of MONAI with modality and labels", "read, a file a channel")
def monai_datalist_complete(tmp):
    monai_list(tmp, modality={"0": "FLAIR", "1": "T1"}, labels=NUMBERS)
    data = find_dataset(tmp)
    assert [c.name for c in data.cases] == ["p0", "p1", "p2"] and data.cases[0].images[
        1
    ].name == "p0_t1.nii.gz"
    return says(tmp, 0, "0 problems")


# --- BraTS and KiTS


@row(
    "BraTS 2024 after treatment: label 4 in BraTS-GLI-00000-100",
    "recognised: 4 is the resection cavity, a region of its own",
)
def brats_2024_label_4(tmp):
    brats(tmp, ["BraTS-GLI-00000-100", "BraTS-GLI-00001-101"], values=(4, 3))
    task = find_dataset(tmp).task
    assert (
        task.labels[4] == "resection cavity"
        and task.regions["RC"] == (4,)
        and 4 not in task.regions["WT"]
    )
    return says(tmp, 0, "BraTS 2024")


@row("label 4 in BraTS-GLI-00000-000", "a problem that names BraTS 2024")
def brats_2023_label_4(tmp):
    brats(tmp, ["BraTS-GLI-00000-000"], values=(4, 3))
    return says(tmp, 1, "resection cavity", "BraTS 2024")


@row("BraTS 2025: before and after treatment in one folder", "the task that has all labels of both")
def brats_before_and_after(tmp):
    brats(tmp, ["BraTS-GLI-00000-000", "BraTS-GLI-00001-100"])
    assert 4 in find_dataset(tmp).task.labels
    return find_dataset(tmp).task.name


@row(
    "BraTS-PED: 1 enhancing, 2 non-enhancing, 3 cyst, 4 edema",
    "its own labels, never the regions of glioma",
)
def brats_ped(tmp):
    brats(tmp, ["BraTS-PED-00000-000"], values=(1, 3))
    task = find_dataset(tmp).task
    assert (
        task.regions["ET"] == (1,)
        and task.regions["TC"] == (1, 2, 3)
        and task.regions["WT"] == (1, 2, 3, 4)
    )
    return says(tmp, 0, "BraTS-PED")


@row("BraTS-MEN and BraTS-SSA", "the labels of 2023, under their own name")
def brats_men(tmp):
    names = []
    for kind in ("MEN", "SSA", "MET"):
        brats(tmp / kind, [f"BraTS-{kind}-00000-000"])
        task = find_dataset(tmp / kind).task
        assert task.regions["ET"] == (3,)
        names.append(task.name)
    return str(names)


@row("BraTS-MEN-RT and a challenge that nobody knows", "refused")
def brats_unknown(tmp):
    for kind in ("MEN-RT", "XYZ"):
        brats(tmp / kind, [f"BraTS-{kind}-0000-1"])
        told = refused(lambda kind=kind: find_dataset(tmp / kind), kind, "not known")
    return told


@row("BraTS-PED and BraTS-GLI in one folder", "refused: their labels differ in meaning")
def brats_mixed(tmp):
    brats(tmp, ["BraTS-PED-00000-000", "BraTS-GLI-00000-000"])
    return refused(lambda: find_dataset(tmp), "mixes", "PED", "GLI")


@row("Brats18_A_1, as 2018 writes it", "recognised, labels 1, 2 and 4")
def brats_2018(tmp):
    brats(tmp, ["Brats18_A_1"], values=(2, 4), new=False)
    assert find_dataset(tmp).task.regions["ET"] == (4,)
    return says(tmp, 0, "0 problems")


@row("a BraTS folder without its images among the others", "a problem, not left out without a word")
def brats_empty_folder(tmp):
    brats(tmp, ["BraTS-GLI-00000-000"])
    (tmp / "BraTS-GLI-00001-000").mkdir()
    return says(tmp, 1, "BraTS-GLI-00001-000")


@row("KiTS 2023 without instances/, label 3", "a problem that says how the years are told")
def kits23_without_instances(tmp):
    return says(kits(tmp, extra=3), 1, "instances/", "KiTS 2021 and 2023")


@row("KiTS with imaging.nii", "read")
def kits_unzipped(tmp):
    return says(kits(tmp, ending=".nii"), 0, "KiTS 2019", "0 problems")


# --- labels


@row("-1 for what is not annotated", "a problem with what to do; training is refused")
def labels_minus_1(tmp):
    def mark(y):
        y[:2] = -1
        return y

    table(tmp / "data", label=mark)
    assert min(find_dataset(tmp / "data").task.labels) == 0
    not_trained(tmp / "data", tmp / "run", "[-1]", "below 0")
    return says(tmp / "data", 1, "[-1]", "below 0", "not supported")


def renamed(y, names):
    "A label map with other values"
    out = np.zeros_like(y)
    for old, new in names.items():
        out[y == old] = new
    return out


@row("labels 256 and 600", "egcnn_check says what becomes of them; predictions have these values")
def labels_500_to_850(tmp):
    table(tmp / "data", label=lambda y: renamed(y, {1: 600, 2: 256}))
    told = says(tmp / "data", 0, "above 255", "256, 600")
    task = trains(tmp / "data", tmp / "run", "--epochs", 4, "--lr", "3e-2")
    assert list(task["labels"]) == ["0", "256", "600"]
    maps = predicted(tmp / "run", tmp / "out", tmp / "data/im0.nii.gz")
    assert values(maps["im0"]) <= {0, 256, 600} and values(maps["im0"]) != {0}, values(maps["im0"])
    return f"{told}; predicted {values(maps['im0'])}"


@row("labels 40000 and 70000, in int32", "read as they are, told by egcnn_check")
def labels_above_32767(tmp):
    table(tmp)
    for i in range(4):
        save(tmp / f"lab{i}.nii.gz", renamed(scan(i)[1], {1: 40000, 2: 70000}), dtype=np.int32)
    assert list(find_dataset(tmp).task.labels) == [0, 40000, 70000]
    return says(tmp, 0, "above 255", "40000, 70000")


@row("117 classes", "trained")
def classes_117(tmp):
    def lots(y):
        blocks = np.random.default_rng(int(y.sum())).integers(1, 118, (7, 7, 6))
        return np.kron(blocks, np.ones((2, 2, 2), int))[:14, :13, :12] * (y > 0)

    table(tmp / "data", label=lots)
    classes = trains(tmp / "data", tmp / "run")["labels"]
    assert len(classes) > 100
    return f"{len(classes)} labels"


@row("labels that a scale made 0.99999 and 2.00001", "read as 1 and 2, told by egcnn_check")
def label_0_99999(tmp):
    table(tmp)
    for i in range(4):
        image = nib.Nifti1Image(scan(i)[1].astype(np.float64), ISO)
        image.header.set_data_dtype(np.int16)
        nib.save(image, tmp / f"lab{i}.nii.gz")
    data = find_dataset(tmp)
    assert list(data.task.labels) == [0, 1, 2]
    assert np.array_equal(read_case(data.cases[0], data.task)[1].array, scan(0)[1])
    return says(tmp, 0, "rounded")


@row("no voxel of any label in any case", "a problem")
def empty_labels(tmp):
    return says(table(tmp, label=np.zeros_like), 1, "no label map of 4 cases has a voxel above 0")


@row("the same, trained", "refused: a Dice of 1 would mean nothing")
def empty_labels_trained(tmp):
    nnunet(tmp / "data")
    for path in (tmp / "data/labelsTr").iterdir():
        save(path, np.zeros(SHAPE, np.int16))
    return not_trained(tmp / "data", tmp / "run", "above 0")


@row("no label map at all", "a problem for egcnn_check, cases for prediction")
def no_labels(tmp):
    nnunet(tmp)
    shutil.rmtree(tmp / "labelsTr")
    assert len(find_dataset(tmp).cases) == 4
    return says(tmp, 1, "no case has a label map")


@row("a class that no case has", "a warning, exit code 0")
def class_without_voxels(tmp):
    return says(nnunet(tmp, labels={**NAMES, "cyst": 3}), 0, "cyst", "in no case")


# --- regions


def region_task(tmp, labels, **info):
    "The task of a folder with such labels"
    return find_dataset(nnunet(tmp, cases=1, labels=labels, **info)).task


@row(
    "whole [1,2], penumbra 1, core 2: the parts fill the whole",
    "trained and predicted; the whole alone gets its likeliest part",
)
def regions_disjoint_inside(tmp):
    labels = {"background": 0, "whole": [1, 2], "penumbra": 1, "core": 2}
    nnunet(tmp / "data", labels=labels, regions_class_order=[1, 1, 2])
    task = find_dataset(tmp / "data").task
    prob = torch.tensor([0.9, 0.1, 0.3]).view(1, 3, 1, 1, 1)
    assert to_labels(prob, task).item() == 2
    trains(tmp / "data", tmp / "run")
    maps = predicted(tmp / "run", tmp / "out", tmp / "data/imagesTr/scan_000_0000.nii.gz")
    found = set().union(*(values(m) for m in maps.values()))
    assert found <= {0, 1, 2}
    return f"predicted {found}"


@row("the inner region is listed first", "sorted outer first; labels come back")
def regions_inner_first(tmp):
    task = region_task(
        tmp, {"background": 0, "core": 2, "whole": [1, 2]}, regions_class_order=[2, 1]
    )
    assert list(task.regions) == ["whole", "core"]
    labels = torch.tensor([0, 1, 2]).view(1, 3, 1, 1)
    assert torch.equal(regions_to_labels(region_masks(labels, task.regions), task.regions), labels)
    return str(task.regions)


@row("whole [1,2,3], core 3, regions_class_order [2,3]", "the whole is painted with 2")
def regions_class_order_is_honoured(tmp):
    task = region_task(
        tmp, {"background": 0, "whole": [1, 2, 3], "core": 3}, regions_class_order=[2, 3]
    )
    only_whole = torch.tensor([1, 0]).view(1, 2, 1, 1)
    assert regions_to_labels(only_whole, task.regions).item() == 2
    return str(task.regions)


@row(
    "regions_class_order of another length, with a strange label, with an inner region's label",
    "each refused",
)
def regions_class_order_wrong(tmp):
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    for i, order in enumerate(([1], [9, 2], [2, 2], "12", [None, 2])):
        told = refused(
            lambda i=i, order=order: region_task(tmp / str(i), labels, regions_class_order=order),
            "regions_class_order",
        )
    return told


@row("a = [1,2], b = [2,3]: neither lies in the other", "refused before training")
def regions_that_overlap(tmp):
    return says(
        nnunet(tmp, labels={"background": 0, "a": [1, 2], "b": [2, 3]}), 2, "share the labels [2]"
    )


@row("two regions of the same labels, a region with 0", "refused")
def regions_without_sense(tmp):
    refused(
        lambda: region_task(tmp / "0", {"background": 0, "a": [1, 2], "b": [2, 1]}),
        "the same labels",
    )
    return refused(
        lambda: region_task(tmp / "1", {"background": 0, "a": [0, 1], "b": 1}), "background"
    )


def nested_regions(rng, labels):
    "Random regions that nest or are disjoint: parts of parts"
    regions = {}

    def split(values):
        regions[f"r{len(regions)}"] = tuple(values)
        if len(values) == 1:
            return
        inner = values[rng.integers(0, 2) :]  # with or without a label of its own
        if len(inner) == len(values):
            cut = int(rng.integers(1, len(values)))
            split(values[:cut])
            split(values[cut:])
        else:
            split(inner)

    split([int(v) for v in rng.permutation(labels)])
    names = rng.permutation(list(regions)).tolist()  # in any order
    return {name: regions[name] for name in names}


@row(
    "200 random definitions of nested regions, in any order",
    "labels come back from their regions; any of the 2^R combinations of masks gives a label",
)
def regions_there_and_back(tmp):
    rng = np.random.default_rng(0)
    largest = 0
    for _ in range(200):
        count = int(rng.integers(1, 7))
        regions = nested_regions(rng, rng.permutation(np.arange(1, 20))[:count])
        known = [0, *sorted({v for values in regions.values() for v in values})]
        labels = torch.tensor(known).view(1, -1, 1, 1)
        for order in (regions, outer_first(regions)):
            masks = region_masks(labels, order)
            assert torch.equal(regions_to_labels(masks, order), labels), order
            assert torch.equal(regions_to_labels(masks, order, masks), labels), order
        bits = torch.arange(2 ** len(regions))
        masks = torch.stack([(bits >> i) & 1 for i in range(len(regions))]).view(
            1, len(regions), -1, 1, 1
        )
        for prob in (None, masks * 0.8):
            assert set(regions_to_labels(masks, regions, prob).unique().tolist()) <= set(known)
        largest = max(largest, len(regions))
    return f"200 definitions of up to {largest} regions"


# --- grids and sizes


@row(
    "a voxel size of 500 where micrometres are meant: a field of view of 7 m",
    "a problem; training is refused before memory is taken",
)
def spacing_in_microns(tmp):
    table(tmp / "data", affine=np.diag([500.0, 500, 500, 1]))
    not_trained(tmp / "data", tmp / "run", "field of view of 7 m")
    return says(tmp / "data", 1, "field of view of 7 m")


@row(
    "voxels of 0.02 mm",
    "a problem that tells what becomes of it; training is refused; --spacing is the way out",
)
def micro_ct(tmp):
    table(tmp / "data", affine=np.diag([0.02, 0.02, 0.02, 1]))
    text = "1 mm is 50 voxels of this scan; 14x13x12 voxels become 1x1x1"
    not_trained(tmp / "data", tmp / "run", text)
    says(tmp / "data", 0, "0 problems", words=("--spacing", ".02"))
    return says(tmp / "data", 1, text, "--spacing")


@row("the same, trained with --spacing 0.02", "trained")
def micro_ct_trained(tmp):
    table(tmp / "data", affine=np.diag([0.02, 0.02, 0.02, 1]))
    trains(tmp / "data", tmp / "run", "--spacing", ".02")
    return "trained"


@row("a field of view of 2.8 m", "a warning, exit code 0")
def wide_field(tmp):
    return says(
        table(tmp, affine=np.diag([200.0, 1, 1, 1])), 0, "field of view is 2.8 m", "1 warning"
    )


@row("a scan of 3 m along each axis", "a problem; refused before memory is taken")
def too_many_voxels(tmp):
    table(tmp, affine=np.diag([210.0, 220, 240, 1]))
    data = find_dataset(tmp)
    refused(lambda: read_case(data.cases[0], data.task), "too large", "2940x2860x2880")
    return says(tmp, 1, "too large")


@row("voxels of 0.4 mm: 6 voxels at 1 mm", "a warning, none with --spacing 0.4")
def few_voxels(tmp):
    table(tmp, affine=np.diag([0.4, 0.4, 0.4, 1]))
    says(tmp, 0, "0 problems", words=("--spacing", ".4"))
    return says(tmp, 0, "1 mm is 2.5 voxels of this scan", "6x5x5")


@row("the label is in LPS, the image in RAS", "a problem that names both orientations")
def label_in_another_orientation(tmp):
    table(tmp)
    save(tmp / "lab0.nii.gz", scan(0)[1], np.diag([-1.0, -1, 1, 1]))
    return says(tmp, 1, "lies in orientation LPS", "in RAS", "Reorient")


@row("the label's axes are exchanged, another shape", "a problem that names the orientations")
def label_with_other_axes(tmp):
    table(tmp)
    turned = np.array([[0.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    save(tmp / "lab0.nii.gz", scan(0)[1].transpose(2, 1, 0), turned)
    return says(tmp, 1, "lies in orientation SAR", "in RAS")


@row("a label of a microscope, half a voxel (0.005 mm) away", "a problem: half a voxel")
def label_half_a_voxel_away(tmp):
    fine = np.diag([0.01, 0.01, 0.01, 1])
    table(tmp, affine=fine)
    moved = fine.copy()
    moved[0, 3] = 0.005
    save(tmp / "lab0.nii.gz", scan(0)[1], moved)
    return says(tmp, 1, "a corner is 0.5 voxels away", words=("--spacing", ".01"))


@row("the label's voxel size differs by 0.001 mm over 300 slices", "a problem: its far end is away")
def label_stretched(tmp):
    table(tmp, shape=(300, 10, 10))
    save(tmp / "lab0.nii.gz", scan(0, (300, 10, 10))[1], np.diag([1.001, 1, 1, 1]))
    return says(tmp, 1, "a corner is 0.3 voxels away")


@row("the label's affine differs by 0.02 mm at voxels of 1 mm", "read: a fiftieth of a voxel")
def label_almost_there(tmp):
    table(tmp)
    moved = ISO.copy()
    moved[:3, 3] = 0.02
    save(tmp / "lab0.nii.gz", scan(0)[1], moved)
    return says(tmp, 0, "0 problems")


# --- intensities


@row("CT without its intercept: 0 to 4095", "a warning that names it")
def ct_offset_1024(tmp):
    return says(
        table(tmp, channel="ct", image=lambda x: x * 10),
        0,
        "CT, but nothing below -500 HU",
        "intercept of -1024",
    )


@row("CT scaled to [0, 1]", "a warning: no Hounsfield units")
def ct_normalised(tmp):
    return says(table(tmp, channel="CT", image=lambda x: x / 300), 0, "not Hounsfield units")


@row("NaN outside the body", "refused by name")
def nan_background(tmp):
    def hole(x):
        x[:3] = np.nan
        return x

    return says(table(tmp, image=hole), 1, "im0.nii.gz", "NaN")


@row("an image with one value in every voxel", "a problem")
def constant_image(tmp):
    return says(table(tmp, image=np.zeros_like), 1, "the value 0 in every voxel")


@row("one scan under two names", "a problem that names both")
def one_scan_twice(tmp):
    table(tmp)
    shutil.copy(tmp / "im0.nii.gz", tmp / "im1.nii.gz")
    return says(tmp, 1, "case1 has the very voxels of case0")


# --- the NIfTI reader


@row("two channels as (D,H,W,1,2), as ITK writes them", "read like (D,H,W,2)")
def five_axes(tmp):
    decathlon(tmp, ["a.nii.gz"], modality={"0": "T1", "1": "T2"})
    x = scan(0)[0]
    save(tmp / "imagesTr/a.nii.gz", np.stack([x, x + 5], -1)[..., None, :])
    data = find_dataset(tmp)
    images = read_case(data.cases[0], data.task)[0]
    assert np.array_equal(images[1].array, x + 5)
    return says(tmp, 0, "0 problems")


@row("pixdim[0] is 0 in a file with a qform", "read as 1, as the standard says")
def qfac_0(tmp):
    table(tmp)
    for path in tmp.glob("*.nii.gz"):
        sizes = [0, 1, 1, 1, 0, 0, 0, 0]
        poke(path, sform_code=0, qform_code=1, pixdim=sizes)
    return says(tmp, 0, "RAS", "0 problems")


@row("images of two axes (H,W)", "read as (H,W,1), or refused in one line")
def slice_hw(tmp):
    table(tmp, image=lambda x: x[..., 6], label=lambda y: y[..., 6])
    code, text = checked(tmp)
    assert code in (0, 1) and (code == 0 or "axes" in text), text
    return f"exit code {code}"


@row(
    "cal_max 1500 and an intent in the scan's header", "the label map that is predicted has neither"
)
def cal_max_kept(tmp):
    table(tmp / "data")
    for path in (tmp / "data").glob("im*.nii.gz"):
        poke(path, cal_max=1500.0, cal_min=40.0, intent_code=3, intent_p1=7.0)
    trains(tmp / "data", tmp / "run")
    header = predicted(tmp / "run", tmp / "out", tmp / "data/im0.nii.gz")["im0"].header
    assert (
        float(header["cal_max"]) <= 2
        and float(header["cal_min"]) == 0
        and int(header["intent_code"]) in (0, 1002)
    )
    return f"cal_max {float(header['cal_max']):g}, intent_code {int(header['intent_code'])}"


@row("a 3D view of a volume of one slice", "a view, or one line of our own")
def view3d_one_slice(tmp):
    from egcnn_nb.show.scenes import view3d

    volume = np.random.default_rng(0).random((20, 18, 1)).astype(np.float32)
    try:
        view3d(volume, np.ones((20, 18, 1), np.int32)).static()
    except InputError as e:
        return f"refused: {e}"
    return "a view"


# --- prediction


def two_channels(tmp):
    "A trained run of two channels, and imagesTs"
    nnunet(tmp / "data", channels=("T1", "T2"))
    for i in (6, 7):
        for c in range(2):
            save(tmp / f"data/imagesTs/scan_{i:03d}_{c:04d}.nii.gz", scan(i)[0] * (c + 1))
    trains(tmp / "data", tmp / "run")


@row(
    "imagesTs with NAME_0000 and NAME_0001",
    "one case called NAME each, from the folder and from its files",
)
def predict_imagesTs(tmp):
    two_channels(tmp)
    maps = predicted(tmp / "run", tmp / "folder", tmp / "data/imagesTs")
    assert sorted(maps) == ["scan_006", "scan_007"], sorted(maps)
    files = sorted((tmp / "data/imagesTs").glob("scan_006_*"))
    one = predicted(tmp / "run", tmp / "files", *files)
    assert sorted(one) == ["scan_006"]
    assert np.array_equal(np.asarray(one["scan_006"].dataobj), np.asarray(maps["scan_006"].dataobj))
    return "two label maps"


@row(
    "a folder of scans with their label maps beside them, predicted",
    "the scans are predicted, each label map is left out by name",
)
def predict_label_maps_beside_scans(tmp):
    decathlon(tmp / "data", ["a.nii.gz", "b.nii.gz", "c.nii.gz"])
    trains(tmp / "data", tmp / "run")
    for folder, name in (("imagesTr", "a"), ("labelsTr", "a_seg")):
        (tmp / "mixed").mkdir(exist_ok=True)
        shutil.copy(tmp / "data" / folder / "a.nii.gz", tmp / "mixed" / f"{name}.nii.gz")
    code, _, err = command(predict_main, tmp / "run", tmp / "mixed", "--out", tmp / "out")
    assert code == 2 and "1 of 2 inputs" in err, err
    assert [p.name for p in (tmp / "out").glob("*.nii.gz")] == ["a.nii.gz"]
    return "a is predicted, a_seg is left out"


@row("six scans whose names are UIDs, predicted", "six label maps under their own names")
def predict_names_with_dots(tmp):
    uids = [f"1.2.{i}" for i in range(4)]
    decathlon(tmp / "data", [f"{u}.nii.gz" for u in uids])
    trains(tmp / "data", tmp / "run")
    maps = predicted(tmp / "run", tmp / "out", tmp / "data")
    assert sorted(maps) == uids, sorted(maps)
    return str(sorted(maps))


# --- the machine


@row("16 cases, one core of a machine of 96", "one case in memory at a time")
def cores_of_the_machine(tmp):
    if not hasattr(os, "sched_setaffinity"):
        raise Skip("no affinity here")
    table(tmp / "data")
    code = f"""
import os, threading, time
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
os.cpu_count = lambda: 96
import egcnn_nb.data.cache as cache
from egcnn_nb.data.layouts import find_dataset
data = find_dataset({str(tmp / "data")!r})
now, most, lock, real = [0], [0], threading.Lock(), cache.load_case
def counted(*words, **named):
    with lock:
        now[0] += 1
        most[0] = max(most[0], now[0])
    time.sleep(.02)
    loaded = real(*words, **named)
    with lock:
        now[0] -= 1
    return loaded
cache.load_case = counted
cache.prepared_cases(data.cases*4, data.task, None, quiet=True)
print("most", most[0])
"""
    done = python(code, EGCNN_WORKERS=None)
    assert done.returncode == 0 and "most 1\n" in done.stdout, done.stdout + done.stderr
    return done.stdout.strip()


NO_HOME = """
import pwd
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
import torch, warnings
torch.set_num_threads(1)
from egcnn_nb.commands.train import main
"""


@row(
    "a user without a home and without an entry in passwd",
    "--help works; trains with EGCNN_CACHE, and without it with at most one warning",
)
def home_unknown(tmp):
    table(tmp / "data")
    done = python(NO_HOME + "main(['--help'])", HOME=None, EGCNN_CACHE=None)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr[-500:]
    small = (
        "--epochs 1 --width 4 --levels 2 --patch_size 8 8 8 --validation 1 --precision fp32"
    ).split()
    for name, cache in (("with", str(tmp / "cache")), ("without", None)):
        words = [str(tmp / "data"), "--out", str(tmp / name), *small]
        done = python(
            NO_HOME + f"import sys; sys.exit(main({words}))", HOME=None, EGCNN_CACHE=cache
        )
        assert done.returncode == 0, done.stderr[-500:]
        assert done.stderr.lower().count("memory") <= 1, done.stderr[-1500:]
    return "trained both ways"


@row(
    "a host name that resolves to nothing",
    "the launch lines and the README name --local_addr or MASTER_ADDR",
)
def hostname_unknown(tmp):
    where = {"LAUNCH": LAUNCH, "README": (ROOT / "README.md").read_text(encoding="utf-8")}
    for name, text in where.items():
        assert "--local_addr" in text or "MASTER_ADDR" in text, name
    return "named"


@row(
    "--exclude with names that no case has, and with a byte order mark",
    "refused; never trained on a case that was to be left out",
)
def exclude_unknown_names(tmp):
    table(tmp / "data", cases=5)
    (tmp / "typo.txt").write_text("case1\ncase9\n")
    (tmp / "bom.txt").write_bytes(b"\xef\xbb\xbfcase1\r\ncase2\r\n")
    code, err = train(tmp / "data", tmp / "run", "--exclude", tmp / "typo.txt")
    assert code == 2 and "case9" in err, err
    trains(tmp / "data", tmp / "run", "--exclude", tmp / "bom.txt")
    split = json.loads((tmp / "run/config.json").read_text())["split"]
    assert sorted(split["train"] + split["validation"]) == ["case0", "case3", "case4"], split
    return err[:120]


@row(
    "flock answers ENOLCK, ENOSYS or EOPNOTSUPP, as on some clusters",
    "one line that names the folder and locks, or a run; no half run folder is left",
)
def no_flock(tmp):
    import fcntl

    table(tmp / "data")
    real = fcntl.flock, fcntl.lockf
    told = "trained"
    for number in (37, 38, 95):

        def no(*words, number=number):
            raise OSError(number, os.strerror(number))

        fcntl.flock = fcntl.lockf = no
        try:
            out = tmp / f"run{number}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code, err = train(tmp / "data", out)
        finally:
            fcntl.flock, fcntl.lockf = real
        if code:
            assert str(out) in err and "lock" in err and not out.exists(), err
            told = err[:120]
    return told


# --- the command


@row(
    "a name twice in one object of dataset.json", "refused: JSON would keep the last without a word"
)
def json_name_twice(tmp):
    nnunet(tmp)
    path = tmp / "dataset.json"
    path.write_text(path.read_text().replace('"0": "T1"', '"0": "T1", "0": "T2"'))
    return says(tmp, 2, "several times", "dataset.json")


@row("file_ending .NII.GZ, and nii.gz without its dot", "read, and refused: the dot is told")
def file_ending_spelled(tmp):
    nnunet(tmp)
    path = tmp / "dataset.json"
    text = path.read_text()
    path.write_text(text.replace('".nii.gz"', '".NII.GZ"'))
    says(tmp, 0, "0 problems")
    path.write_text(text.replace('".nii.gz"', '"nii.gz"'))
    return says(tmp, 2, "with its dot")


@row("a BraTS case is a link to a folder that is gone", "a problem, not left out without a word")
def brats_link_gone(tmp):
    brats(tmp, ["BraTS-GLI-00000-000"], values=(1, 3))
    (tmp / "BraTS-GLI-00009-000").symlink_to(tmp / "gone")
    return says(tmp, 1, "BraTS-GLI-00009-000")


@row("a quote in cases.csv that is not closed", "refused: the quote is told")
def csv_open_quote(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    path.write_text(path.read_text().replace("im1.nii.gz", '"im1.nii.gz'))
    return says(tmp, 2, "quote", "line")


@row("a column `age` in cases.csv", "refused: a column is a channel")
def csv_age(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    lines = path.read_text().split()
    path.write_text("\n".join([lines[0] + ",age", *(line + ",41" for line in lines[1:])]))
    return says(tmp, 2, "age", "Remove the column")


@row("a label map of 4 axes, a mask for each class", "refused: merge the masks")
def label_of_four_axes(tmp):
    table(tmp, label=lambda y: np.stack([y == 1, y == 2], -1))
    return says(tmp, 1, "merge the masks")


@row("a file of NIfTI that gzip did not pack, called .nii.gz", "refused: how to rename it")
def gz_not_packed(tmp):
    table(tmp)
    path = tmp / "im0.nii.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))
    return says(tmp, 1, "end in .nii.")


@row("intensities of 1e-30, by a small slope", "normalised like any others")
def tiny_intensities(tmp):
    from egcnn_nb.data.prepare import normalize

    x = scan(0)[0]
    same = np.allclose(
        normalize(x * np.float32(1e-30), "zscore"), normalize(x, "zscore"), atol=1e-3
    )
    assert same and not normalize(x * 0 + np.float32(0.1), "zscore").any()
    return "the same z-scores"


@row("predict scan.nii.gz and SCAN.nii.gz, and a link to a file that is gone", "refused; told")
def predict_one_name(tmp):
    from egcnn_nb.core import KITS
    from egcnn_nb.run.predict import find_inputs

    x = scan(0)[0]
    files = [save(tmp / "a/scan.nii.gz", x), save(tmp / "b/SCAN.nii.gz", x)]
    (tmp / "a/gone.nii.gz").symlink_to(tmp / "nowhere")
    assert len(find_inputs([tmp / "a"], KITS)) == 2
    return refused(lambda: find_inputs(files, KITS), "more than once")


@row(
    "images and label maps exchanged in cases.csv, both whole numbers",
    "a problem; training is refused",
)
def csv_exchanged(tmp):
    root = table(tmp / "data", image=lambda x: np.rint(x).astype(np.int16))
    text = (root / "cases.csv").read_text()
    (root / "cases.csv").write_text(text.replace("case,t1,label", "case,label,t1"))
    says(root, 1, "seems to name the images")
    return not_trained(root, tmp / "run", "seems to name the images")


@row("--spacing 0, --spacing 1 2, --readers 0", "refused in one line")
def check_with_wrong_words(tmp):
    table(tmp)
    says(tmp, 2, "--spacing", words=("--spacing", "0"))
    says(tmp, 2, "--spacing", words=("--spacing", "1", "2"))
    return says(tmp, 2, "--readers", words=("--readers", "0"))


@row("--json", "warnings and problems are lists in it")
def check_as_json(tmp):
    table(tmp, affine=np.diag([200.0, 1, 1, 1]))
    code, text = checked(tmp, "--json", "--readers", "1")
    found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert code == 0 and len(found["warnings"]) == 1 and found["problems"] == []
    same = check_dataset(tmp, (1.0, 1.0, 1.0), 1)
    assert same["warnings"] == found["warnings"]
    return found["warnings"][0]


def run_row(name):
    "What happened in a row: (ok, text); ok is None where it cannot be tried"
    torch.set_num_threads(1)
    tmp = Path(tempfile.mkdtemp(prefix="case")).resolve()
    try:
        return True, ROWS[name](tmp)
    except Skip as e:
        return None, str(e)
    except Exception:
        return False, traceback.format_exc()
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    names = parser.parse_args().names or list(ROWS)
    failed = 0
    print("| case | what is there | what must be true | what happened |\n|---|---|---|---|")
    for name in names:
        ok, text = run_row(name)
        failed += ok is False
        words = {True: "", None: "skipped: ", False: "FAILED: "}[ok]
        told = " ".join(str(text).split()).replace("|", "/").replace(tempfile.gettempdir(), "TMP")
        print(
            f"| {name.replace('_', ' ')} | {ROWS[name].there} | {ROWS[name].must} | "
            f"{words}{told[-300:]} |",
            flush=True,
        )
    print(f"\n{len(names)} cases, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
