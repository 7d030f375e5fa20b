"""Data sets as they are found in practice, one by one: what is there, what must be true, what happened.

    python tests/cases.py [NAME ...] # a Markdown table; pytest runs every row (tests/test_cases.py)

Each row is a function that writes a small data set, asserts what must be true, and returns what
happened. `check_says`, `reading_refused` and `training_refused` are written below a row where a
command must say something of the data set that the function writes."""

import argparse
import contextlib
import csv
import functools
import gzip
import io
import json
import os
import re
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
TOLD = 160  # characters of a message that the table shows

# exit codes of egcnn_check
SOUND = 0
PROBLEM = 1
REFUSED = 2


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


def ball(shape, rng):
    "Distance of each voxel from a place near the middle"
    middle = np.array(shape) / 2
    centre = middle + rng.uniform(-1, 1, 3)
    indices = np.indices(shape)
    grid = np.moveaxis(indices, 0, -1)
    return np.linalg.norm(grid - centre, axis=-1)


def scan(seed, shape=SHAPE, values=(1, 2)):
    "An image and a label map: a ball in noise, with a smaller ball in it"
    rng = np.random.default_rng(seed)
    radius = ball(shape, rng)
    outer = radius < 5
    inner = radius < 3
    labels = np.zeros(shape, np.int32)
    labels[outer] = values[0]
    labels[inner] = values[-1]
    noise = rng.normal(100, 5, shape)
    image = 50 * outer + 50 * inner + noise
    return image.astype(np.float32), labels


def scan_image(seed):
    "The image of a scan"
    image, _ = scan(seed)
    return image


def scan_labels(seed):
    "The label map of a scan"
    _, labels = scan(seed)
    return labels


def save(root, name, array, affine=ISO, dtype=None):
    "Write a NIfTI file, and the folders above it"
    path = Path(root) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.asarray(array)
    if dtype is None:
        is_real = array.dtype.kind == "f"
        dtype = np.float32 if is_real else np.int16
    array = array.astype(dtype)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    lower = path.name.lower()  # nibabel writes lower-case endings only
    target = path.with_name(lower)
    nib.save(image, target)
    if target != path:
        target.rename(path)
    return path


def save_image(root, name, seed=0):
    "Write the image of a scan"
    image = scan_image(seed)
    save(root, name, image)


def save_labels(root, name, affine=ISO):
    "Write the label map of the first scan, on some grid"
    labels = scan_labels(0)
    save(root, name, labels, affine)


def save_pair(root, image_name, label_name, seed):
    "Write the image of a scan and its label map"
    image, labels = scan(seed)
    save(root, image_name, image)
    save(root, label_name, labels)


def poke(path, **fields):
    "Overwrite fields of a NIfTI header, whatever nibabel thinks of them"
    packed = path.read_bytes()
    raw = bytearray(gzip.decompress(packed))
    front = bytes(raw[:348])
    header = nib.Nifti1Header(front, check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    packed = gzip.compress(bytes(raw))
    path.write_bytes(packed)


def replace(root, name, *changes):
    "Change a text file: pairs of an old text and its new text"
    path = root / name
    text = path.read_text()
    for old, new in changes:
        assert old in text, (name, old)
        text = text.replace(old, new)
    path.write_text(text)


def change_table(root, old, new):
    "Change a text in cases.csv"
    replace(root, "cases.csv", (old, new))


def change_description(root, old, new):
    "Change a text in dataset.json"
    replace(root, "dataset.json", (old, new))


def rename(root, old, new):
    "Rename a file"
    source = root / old
    target = root / new
    source.rename(target)


def remove(root, name):
    "Remove a file"
    path = root / name
    path.unlink()


def unpack(root, name):
    "Write a .nii.gz file without its compression, as .nii beside it"
    path = root / name
    packed = path.read_bytes()
    content = gzip.decompress(packed)
    plain = path.with_suffix("")
    plain.write_bytes(content)


def changed(array, change):
    "An array, changed by a function if there is one"
    if change is None:
        return array
    return change(array)


def table(root, cases=4, image=None, label=None, channel="t1", affine=ISO, shape=SHAPE):
    "A cases.csv folder; image(array) and label(array) change what is written"
    root = Path(root)
    lines = [["case", channel, "label"]]
    for i in range(cases):
        x, y = scan(i, shape)
        x = changed(x, image)
        y = changed(y, label)
        files = [f"im{i}.nii.gz", f"lab{i}.nii.gz"]
        for file, array in zip(files, (x, y), strict=True):
            save(root, file, array, affine)
        line = [f"case{i}", *files]
        lines.append(line)
    path = root / "cases.csv"
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerows(lines)
    return root


def cube(size):
    "An affine of voxels of this size in each direction"
    return np.diag([size, size, size, 1])


def describe(root, encoding="utf-8", **info):
    "Write dataset.json"
    root.mkdir(parents=True, exist_ok=True)
    text = json.dumps(info, ensure_ascii=False)
    path = root / "dataset.json"
    path.write_text(text, encoding=encoding)
    return root


def redescribe(root, **info):
    "Change fields of dataset.json"
    path = root / "dataset.json"
    text = path.read_text()
    known = json.loads(text)
    known.update(info)
    describe(root, **known)


NAMES = {"background": 0, "outer": 1, "inner": 2}


def numbered(names):
    "number -> name, the numbers as JSON has them"
    found = {}
    for i, name in enumerate(names):
        number = str(i)
        found[number] = name
    return found


def nnunet(
    root, cases=4, channels=("T1",), labels=None, ending=".nii.gz", encoding="utf-8", **info
):
    "A folder of nnU-Net 2"
    root = Path(root)
    images = root / "imagesTr"
    labelled = root / "labelsTr"
    for i in range(cases):
        x, y = scan(i)
        name = f"scan_{i:03d}"
        for c, _ in enumerate(channels):
            brighter = x * (c + 1)
            save(images, f"{name}_{c:04d}{ending}", brighter)
        save(labelled, f"{name}{ending}", y)
    whole = {
        "channel_names": numbered(channels),
        "labels": labels or NAMES,
        "numTraining": cases,
        "file_ending": ending.lower(),
        **info,
    }
    return describe(root, encoding, **whole)


NUMBERS = {"0": "background", "1": "outer", "2": "inner"}
CHANNELS = ("T1", "T2")
TWO_CHANNELS = {"0": "T1", "1": "T2"}


def decathlon(root, *names, modality=None, labels=None):
    "A folder of the Decathlon; `names` are the names of the images, relative to imagesTr"
    root = Path(root)
    listed = []
    for i, name in enumerate(names):
        image, label = f"imagesTr/{name}", f"labelsTr/{name}"
        save_pair(root, image, label, seed=i)
        listed.append({"image": f"./{image}", "label": f"./{label}"})
    return describe(
        root,
        modality=modality or {"0": "MRI"},
        labels=labels or NUMBERS,
        training=listed,
    )


ENDS_SINCE_2023 = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")
ENDS_BEFORE = ("_t1", "_t1ce", "_t2", "_flair", "_seg")


def brats(root, *names, values=(1, 2), new=True):
    "Folders of BraTS, in the names of 2023 or in those before"
    *channels, label = ENDS_SINCE_2023 if new else ENDS_BEFORE
    for i, name in enumerate(names):
        x, y = scan(i, values=values)
        start = f"{name}/{name}"
        for k, end in enumerate(channels, 1):
            brighter = x * k
            save(root, f"{start}{end}.nii.gz", brighter)
        save(root, f"{start}{label}.nii.gz", y)
    return root


def kits(root, cases=3, ending=".nii.gz", extra=None):
    "Folders of KiTS"
    image_name = f"imaging{ending}"
    label_name = f"segmentation{ending}"
    for i in range(cases):
        x, y = scan(i)
        hounsfield = 10 * x - 2000
        if extra is not None:
            y[0, 0, 0] = extra
        folder = root / f"case_{i:05d}"
        save(folder, image_name, hounsfield)
        save(folder, label_name, y)
    return root


# --- how they are tried


def expect_texts(text, wanted):
    "A text has all of these in it, in upper or lower case"
    lower = text.lower()
    for part in wanted:
        assert part.lower() in lower, (part, text)


def last_line(text):
    "The last line of an output, as a terminal shows it"
    lines = text.strip().splitlines()
    if not lines:
        return ""
    shown = lines[-1].split("\r")
    return shown[-1]


def command(main, *words):
    "Exit code, stdout and last line of stderr of a command, in this process"
    words = [str(word) for word in words]
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    printed = out.getvalue()
    error = err.getvalue()
    last = last_line(error)
    return code, printed, last


def checked(root, *words):
    "Exit code and text of egcnn_check"
    code, out, err = command(check_main, root, *words)
    text = out + err
    assert "Traceback" not in text, text
    return code, text


def line_with(text, part):
    "The first line of a text that has a part in it, or the last line"
    wanted = part.lower()
    lines = text.strip().splitlines()
    for line in lines:
        if wanted in line.lower():
            return line.strip()
    return lines[-1].strip()


def says(root, code, *texts, words=()):
    "egcnn_check leaves with a code and says these texts"
    found, text = checked(root, *words)
    assert found == code, (found, text)
    expect_texts(text, texts)
    first = line_with(text, texts[0])
    return f"exit code {code}: {first[:TOLD]}"


def is_sound(root):
    "egcnn_check finds no problem"
    return says(root, SOUND, "0 problems")


def check_says(code, *texts, words=(), folder="."):
    "Add to a row: egcnn_check says these texts of what the row wrote"

    def add(function):
        @functools.wraps(function)
        def write_and_check(tmp):
            function(tmp)
            root = tmp / folder
            return says(root, code, *texts, words=words)

        return write_and_check

    return add


def refused(function, *texts):
    "A function raises an `InputError` with these texts"
    try:
        function()
    except InputError as e:
        message = str(e)
        expect_texts(message, texts)
        return f"refused: {message[:TOLD]}"
    raise AssertionError("nothing was refused")


def unreadable(root, *texts):
    "find_dataset refuses a folder with these texts"

    def find():
        find_dataset(root)

    return refused(find, *texts)


def reading_refused(*texts):
    "Add to a row: find_dataset refuses what the row wrote, with these texts"

    def add(function):
        @functools.wraps(function)
        def write_and_read(tmp):
            function(tmp)
            return unreadable(tmp, *texts)

        return write_and_read

    return add


def case_names(root):
    "Names of the cases of a data set"
    data = find_dataset(root)
    return [case.name for case in data.cases]


def expect_cases(root, *names):
    "A data set has the cases of these names"
    found = case_names(root)
    assert found == list(names), found


def expect_count(root, count):
    "A data set has so many cases"
    found = case_names(root)
    assert len(found) == count, found


def expect_second_channel(root, name):
    "The first case has two channels, and the file of the second has this name"
    data = find_dataset(root)
    first = data.cases[0]
    _, second = first.images
    assert second.name == name


def read_first(root):
    "The images and the label map of the first case of a data set"
    data = find_dataset(root)
    first = data.cases[0]
    return read_case(first, data.task)


def task_of(root):
    "The task of a data set"
    return find_dataset(root).task


def expect_labels(root, labels):
    "A data set has these labels"
    task = task_of(root)
    assert task.labels == labels


SMALL_RUN = (
    "--epochs 1 --width 4 --levels 2 --patch_size 8 8 8 --lr 1e-3 --precision fp32 "
    "--validation 1 --augment intensity"
).split()


def train(tmp, *words, run="run"):
    "Exit code and last line of egcnn_train with the smallest network, on the folder `data`"
    data = tmp / "data"
    out = tmp / run
    cache = tmp / "cache"
    folders = [data, "--out", out, "--cache", cache]
    code, _, err = command(train_main, *folders, *SMALL_RUN, *words)
    return code, err


def trained(tmp, *words):
    "Training on the folder `data` ends well; the task of the run"
    code, err = train(tmp, *words)
    assert code == 0, err
    config = config_of(tmp)
    return config["task"]


def config_of(tmp):
    "The settings of a run, as it keeps them"
    path = tmp / "run/config.json"
    text = path.read_text(encoding="utf-8")
    return json.loads(text)


def not_trained(tmp, *texts):
    "Training on the folder `data` is refused in one line with these texts, and leaves no folder"
    code, err = train(tmp)
    assert code == 2, err
    run = tmp / "run"
    assert not run.exists(), err
    expect_texts(err, texts)
    return err[:TOLD]


def training_refused(*texts):
    "Add to a row: training on what the row wrote below `data` is refused with these texts"

    def add(function):
        @functools.wraps(function)
        def write_and_train(tmp):
            function(tmp)
            return not_trained(tmp, *texts)

        return write_and_train

    return add


def predicted(tmp, *inputs, out="out"):
    "name -> label map of egcnn_predict, for files and folders below the folder `data`"
    run = tmp / "run"
    data = tmp / "data"
    folder = tmp / out
    paths = [data / name for name in inputs]
    code, _, err = command(predict_main, run, *paths, "--out", folder)
    assert code == 0, err
    maps = {}
    written = folder.glob("*.nii.gz")
    for path in written:
        name = name_of(path)
        maps[name] = nib.Nifti1Image.load(path)
    return maps


def voxels(image):
    "The voxels of a label map"
    return np.asarray(image.dataobj)


def values(image):
    "The values of a label map"
    array = voxels(image)
    found = np.unique(array).tolist()
    return set(found)


def python(code, **env):
    "Run Python code in a process of its own, with this package; a variable of None is taken away"
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    kept = {}
    for name, value in whole.items():
        if value is not None:
            kept[name] = value
    words = [sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=kept)


# --- folders and kinds of files


@row("BIDS: sub-01/anat/sub-01_T1w.nii.gz, derivatives/", "refused, with a way to make cases.csv")
@check_says(REFUSED, "BIDS", "cases.csv")
def bids_folder(tmp):
    for i in range(2):
        name = f"sub-{i:02d}/anat/sub-{i:02d}_T1w"
        label = f"derivatives/labels/{name}_seg.nii.gz"
        save_pair(tmp, f"{name}.nii.gz", label, seed=i)


def dicom_series(folder, ending):
    "Three files that begin as DICOM files do"
    folder.mkdir(parents=True, exist_ok=True)
    before = bytes(128)
    behind = bytes(64)
    content = before + b"DICM" + behind
    for i in range(3):
        path = folder / f"IM{i}{ending}"
        path.write_bytes(content)


@row("a folder of DICOM slices", "refused with a word on DICOM and dcm2niix")
@check_says(REFUSED, "DICOM", "dcm2niix")
def dicom_folder(tmp):
    dicom_series(tmp, ".dcm")


@row(
    "DICOM slices without an ending, in folders of series",
    "refused with a word on DICOM and dcm2niix",
)
@check_says(REFUSED, "DICOM", "dcm2niix")
def dicom_without_ending(tmp):
    folder = tmp / "patient/series1"
    dicom_series(folder, "")


@row("a folder of .nrrd files", "refused, and what is named can read them (SimpleITK)")
@check_says(REFUSED, "NRRD", "SimpleITK")
def nrrd_folder(tmp):
    path = tmp / "a.nrrd"
    path.write_bytes(b"NRRD0004\n")


@row("a folder with a .zip", "refused: unpack it")
@check_says(REFUSED, "unpack")
def zip_folder(tmp):
    path = tmp / "Task01.zip"
    path.write_bytes(b"PK")


@row("an empty folder", "refused in one line")
def empty_folder(tmp):
    return says(tmp, REFUSED, "no known layout")


@row("NIfTI files in one folder, without a description", "refused, with the lines of a cases.csv")
@check_says(REFUSED, "cases.csv", "scan1.nii.gz")
def flat_folder(tmp):
    save_image(tmp, "scan1.nii.gz")


@row("imagesTr and labelsTr without dataset.json", "refused: dataset.json is named")
@check_says(REFUSED, "dataset.json")
def images_without_json(tmp):
    nnunet(tmp)
    remove(tmp, "dataset.json")


@row("ct.nii.gz and segmentations/CLASS.nii.gz", "refused: merge them into one map")
@check_says(REFUSED, "merge", "label map")
def one_file_per_class(tmp):
    x, y = scan(0)
    folder = tmp / "s0"
    save(folder, "ct.nii.gz", x)
    liver = y == 1
    save(folder, "segmentations/liver.nii.gz", liver, dtype=np.uint8)
    spleen = y == 2
    save(folder, "segmentations/spleen.nii.gz", spleen, dtype=np.uint8)


def hide_a_file_beside_each(root):
    "What macOS leaves beside each file on a foreign disk"
    paths = list(root.rglob("*.nii.gz"))
    for path in paths:
        name = f"._{path.name}"
        hidden = path.with_name(name)
        hidden.write_bytes(b"Mac OS X")


@row("._NAME beside each file, and .DS_Store", "hidden files are no cases and no channels")
def macos_hidden_files(tmp):
    nnunet(tmp / "n")
    brats(tmp / "b", "BraTS-GLI-00000-000", values=(1, 3))
    kits(tmp / "k")
    hide_a_file_beside_each(tmp)
    (tmp / "b/._BraTS-GLI-00001-000").mkdir()
    (tmp / "k/._case_00009").mkdir()
    expect_count(tmp / "n", 4)
    expect_count(tmp / "b", 1)
    expect_count(tmp / "k", 3)
    for name in "nbk":
        code, text = checked(tmp / name)
        assert code == SOUND, text
    return "[4, 1, 3] cases"


def pretend_run(folder):
    "A folder that looks like one of a run"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    assert is_run(folder)


@row("run folders called BraTS_run and case_run among the cases", "they are no cases")
def run_folder_inside(tmp):
    brats(tmp / "b", "BraTS-GLI-00000-000")
    kits(tmp / "k")
    pretend_run(tmp / "b/BraTS_run")
    pretend_run(tmp / "k/case_run")
    expect_count(tmp / "b", 1)
    expect_count(tmp / "k", 3)
    return "[1, 3] cases"


@row("a run folder is given as data", "refused: it is named a run folder")
@check_says(REFUSED, "run folder")
def run_folder_as_data(tmp):
    pretend_run(tmp)


@row("files that end in .NII.GZ", "read")
@check_says(SOUND, "0 problems")
def upper_case_endings(tmp):
    nnunet(tmp, ending=".NII.GZ")
    expect_cases(tmp, "scan_000", "scan_001", "scan_002", "scan_003")


@row(
    "a cases.csv in a folder with folders case_0, case_1",
    "the table counts, it is not taken for KiTS",
)
@check_says(SOUND, "0 problems")
def table_with_case_folders(tmp):
    table(tmp)
    for i in range(4):
        folder = tmp / f"case_{i}"
        folder.mkdir()
        for name in (f"im{i}", f"lab{i}"):
            file = tmp / f"{name}.nii.gz"
            shutil.move(file, folder)
            change_table(tmp, name, f"{folder.name}/{name}")
    task = task_of(tmp)
    assert task.channels == ("t1",)


@row("a cases.csv in a folder that is KiTS too", "the table counts")
def table_in_kits(tmp):
    kits(tmp, cases=1)
    path = tmp / "cases.csv"
    path.write_text("case,CT,label\none,case_00000/imaging.nii.gz,case_00000/segmentation.nii.gz\n")
    expect_cases(tmp, "one")
    return "the table's case"


@row("folders case_1 with other files than KiTS's", "not taken for KiTS")
@check_says(REFUSED, "no known layout")
def case_folders_of_others(tmp):
    save_image(tmp, "case_1/scan.nii.gz")


# --- names


def expect_own_voxels(root, whole=True):
    "Each case has the voxels that were written under its name; `whole`: labels too"
    data = find_dataset(root)
    for i, case in enumerate(data.cases):
        images, label = read_case(case, data.task)
        image = images[0].array
        x, y = scan(i)
        assert np.array_equal(image, x)
        if whole:
            assert np.array_equal(label.array, y)


@row("case names are DICOM UIDs, full of dots", "each case has its own name and its own voxels")
@check_says(SOUND, "0 problems")
def names_with_dots(tmp):
    uids = [f"1.3.6.1.4.1.9328.50.4.{i:04d}" for i in range(4)]
    files = [f"{uid}.nii.gz" for uid in uids]
    decathlon(tmp, *files)
    expect_cases(tmp, *uids)
    expect_own_voxels(tmp)


@row(
    "dataset.json lists p1/img.nii.gz, p2/img.nii.gz",
    "names from the folders, each with its own voxels",
)
def one_folder_per_patient(tmp):
    files = [f"p{i}/img.nii.gz" for i in range(4)]
    decathlon(tmp, *files)
    expect_cases(tmp, "p0_img", "p1_img", "p2_img", "p3_img")
    expect_own_voxels(tmp, whole=False)
    names = case_names(tmp)
    return str(names)


@row("dataset.json lists a case twice", "refused: the name is told")
@reading_refused("several cases of one name", "a")
def a_case_listed_twice(tmp):
    decathlon(tmp, "a.nii.gz", "a.nii.gz")


@row("a.nii.gz in a/x and b/x, whose folders have one name", "refused")
@reading_refused("several cases of one name", "x_img")
def folders_of_one_name(tmp):
    decathlon(tmp, "a/x/img.nii.gz", "b/x/img.nii.gz")


@row("cases called A and a", "refused: outputs would be one file on some file systems")
@reading_refused("several cases of one name", "upper and lower case")
def names_that_differ_in_case(tmp):
    table(tmp)
    change_table(tmp, "case0", "A")
    change_table(tmp, "case1", "a")


@row("one case in HGG/ and in LGG/", "refused")
@reading_refused("BraTS19_A_1")
def brats_case_in_both_grades(tmp):
    for grade in ("HGG", "LGG"):
        folder = tmp / grade
        brats(folder, "BraTS19_A_1", new=False)


@row("a case called ../a", "refused: names are names of files")
@reading_refused("../a", "Rename")
def name_with_a_folder(tmp):
    table(tmp)
    change_table(tmp, "case0", "../a")


# --- cases.csv


@row("a line without a case name", "refused: the line is told")
@check_says(REFUSED, "line 4", "column case")
def csv_empty_case(tmp):
    table(tmp)
    change_table(tmp, "case2,", ",")


@row("cells separated by semicolons", "refused: the separator is told")
@check_says(REFUSED, "semicolons")
def csv_semicolons(tmp):
    table(tmp)
    change_table(tmp, ",", ";")


@row("a first line alone", "a problem, and training is refused")
@check_says(PROBLEM, "no cases")
def csv_without_cases(tmp):
    path = tmp / "cases.csv"
    path.write_text("case,t1,label\n")
    unreadable(tmp, "no cases")


@row("a column twice", "refused")
@check_says(REFUSED, "columns")
def csv_column_twice(tmp):
    table(tmp)
    change_table(tmp, "case,t1,label", "t1,t1,label")


@row("a name in Latin-1", "refused: UTF-8 is told")
@check_says(REFUSED, "UTF-8")
def csv_latin_1(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    content = path.read_bytes()
    content = content.replace(b"case0", b"M\xfcller")
    path.write_bytes(content)


@row("spaces after commas, an empty line, a byte order mark", "read")
@check_says(SOUND, "0 problems")
def csv_with_spaces(tmp):
    table(tmp)
    change_table(tmp, ",", ", ")
    path = tmp / "cases.csv"
    text = path.read_text()
    path.write_text(f"\ufeff{text},,\n", encoding="utf-8")
    expect_cases(tmp, "case0", "case1", "case2", "case3")


@row("a line with more cells than columns", "refused: the line is told")
@check_says(REFUSED, "line 6", "4 cells")
def csv_too_many_cells(tmp):
    table(tmp)
    with open(tmp / "cases.csv", "a") as f:
        f.write("case9,im0.nii.gz,lab0.nii.gz,more\n")


@row("sub\\im0.nii.gz in cases.csv and in dataset.json", "read")
@check_says(SOUND, "0 problems", folder="t")
def windows_backslashes(tmp):
    root = table(tmp / "t")
    folder = root / "sub"
    folder.mkdir()
    for path in list(root.glob("*.nii.gz")):
        shutil.move(path, folder)
    replace(
        root,
        "cases.csv",
        ("im", "sub\\im"),
        ("lab0", ".\\sub\\lab0"),
        (",lab", ",sub\\lab"),
        ("sub\\label", "label"),
    )
    decathlon(tmp / "d", "a.nii.gz", "b.nii.gz")
    replace(tmp / "d", "dataset.json", ("/", "\\\\"))
    is_sound(tmp / "d")


# --- dataset.json


@row("dataset.json begins with a byte order mark", "read")
@check_says(SOUND, "0 problems")
def json_with_bom(tmp):
    nnunet(tmp, encoding="utf-8-sig")


FIRST_LABEL = """
from egcnn_nb.data.layouts import find_dataset
task = find_dataset({folder!r}).task
print(ascii(task.labels[1]))
"""


@row("dataset.json in UTF-8, a locale of ASCII", "read, with its own letters")
def json_under_another_locale(tmp):
    nnunet(tmp, labels={"background": 0, "Ödem": 1, "Kern": 2})
    code = FIRST_LABEL.format(folder=str(tmp))
    done = python(code, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert ascii("Ödem") in done.stdout, done.stderr
    return done.stdout.strip()


@row("a section `dataset` names the files (nnU-Net 2.3)", "read")
@check_says(SOUND, "0 problems")
def nnunet_dataset_section(tmp):
    section = {}
    for name in ("p0", "p1", "p2"):
        image = f"raw/{name}/t1.nii.gz"
        label = f"raw/{name}/seg.nii.gz"
        save_pair(tmp, image, label, seed=len(section))
        section[name] = {"images": [image], "label": label}
    describe(
        tmp,
        channel_names={"0": "T1"},
        labels=NAMES,
        numTraining=3,
        file_ending=".nii.gz",
        dataset=section,
    )
    expect_cases(tmp, "p0", "p1", "p2")


@row("scan_3 in labelsTr, scan_003 in imagesTr", "a problem that names the pair")
@check_says(PROBLEM, "labelsTr/scan_3.nii.gz has no image", "scan_003")
def nnunet_label_missing(tmp):
    nnunet(tmp)
    rename(tmp, "labelsTr/scan_003.nii.gz", "labelsTr/scan_3.nii.gz")


@row("the same, trained", "refused: the pair is told, never just left out")
@training_refused("scan_3.nii.gz has no image")
def nnunet_label_missing_trained(tmp):
    root = tmp / "data"
    nnunet(root)
    rename(root, "labelsTr/scan_003.nii.gz", "labelsTr/scan_3.nii.gz")


def rename_all(folder, old, new):
    "Change a part of the name of every file in a folder"
    paths = list(folder.iterdir())
    for path in paths:
        name = path.name.replace(old, new)
        target = folder / name
        path.rename(target)


@row("labels called NAME_0000.nii.gz", "a problem that names the pair")
@check_says(PROBLEM, "scan_000_0000.nii.gz has no image", "imagesTr/scan_000")
def nnunet_labels_with_channel(tmp):
    nnunet(tmp)
    rename_all(tmp / "labelsTr", ".nii.gz", "_0000.nii.gz")


LABELS = {0: "background", 1: "outer", 2: "inner"}


@row("labels: numbers as strings", "read as numbers")
@check_says(SOUND, "0 problems")
def nnunet_labels_strings(tmp):
    nnunet(tmp, labels={"background": "0", "outer": "1", "inner": "2"})
    expect_labels(tmp, LABELS)


@row("labels: number -> name in a file of nnU-Net 2", "read either way round")
@check_says(SOUND, "0 problems")
def nnunet_labels_v1_style(tmp):
    nnunet(tmp, labels=NUMBERS)
    expect_labels(tmp, LABELS)


@row("labels: name -> number in a file of the Decathlon", "read either way round")
def decathlon_labels_v2_style(tmp):
    decathlon(tmp, "a.nii.gz", labels=NAMES)
    expect_labels(tmp, LABELS)
    return "read"


@row("labels: numbers on both sides, crossed", "refused: nobody knows which is the name")
@check_says(REFUSED, "which numbers are the names")
def labels_both_ways(tmp):
    crossed = {"0": 0, "1": 2, "2": 1}
    nnunet(tmp, labels=crossed)


SENSELESS_LABELS = (
    {"background": 0, "a": None},
    {"background": 0, "a": 1.5},
    {"background": 0, "a": -1},
    {"background": 0, "a": 1, "b": 1},
    {"a": 1},
    {"background": 0},
    [],
    {"background": 0, "a": True},
)


@row(
    "a label without a value, one of 1.5, one below 0, one twice, none for the background",
    "each refused, dataset.json named",
)
def labels_without_sense(tmp):
    told = ""
    for i, labels in enumerate(SENSELESS_LABELS):
        root = tmp / str(i)
        nnunet(root, cases=1)
        redescribe(root, labels=labels)
        told = unreadable(root, "dataset.json", "label")
    one_name_twice = {"0": "background", "1": "a", "2": "a"}
    root = decathlon(tmp / "names", "a.nii.gz", labels=one_name_twice)
    unreadable(root, "dataset.json", "several numbers")
    return told


@row("`ignore` is declared", "refused: ignore labels are not supported")
@check_says(REFUSED, "ignore labels are not supported")
def ignore_label(tmp):
    labels = {**NAMES, "ignore": 3}
    nnunet(tmp, labels=labels)


@row("file_ending .mha", "refused, and what is named can read them (SimpleITK)")
@check_says(REFUSED, ".mha", "SimpleITK")
def nnunet_mha(tmp):
    nnunet(tmp)
    redescribe(tmp, file_ending=".mha")


@row("imagesTr/NAME.nii.gz without _0000", "never '0 cases, 0 problems'; training is refused")
@check_says(PROBLEM, "_0000", "numTraining 4")
def nnunet_without_0000(tmp):
    nnunet(tmp)
    rename_all(tmp / "imagesTr", "_0000", "")
    unreadable(tmp, "no cases", "_0000")


@row("the second channel of a case is missing", "a problem that names the file")
@check_says(PROBLEM, "scan_002_0001.nii.gz")
def second_channel_missing(tmp):
    nnunet(tmp, channels=CHANNELS)
    remove(tmp, "imagesTr/scan_002_0001.nii.gz")


@row("the first channel of a case is missing", "still a case; a problem that names the file")
@check_says(PROBLEM, "scan_002_0000.nii.gz")
def first_channel_missing(tmp):
    nnunet(tmp, channels=CHANNELS)
    remove(tmp, "imagesTr/scan_002_0000.nii.gz")
    expect_count(tmp, 4)


@row("a third channel that channel_names does not have", "a problem that names the file")
@check_says(PROBLEM, "scan_000_0002.nii.gz")
def channel_too_many(tmp):
    nnunet(tmp, channels=CHANNELS)
    save_image(tmp, "imagesTr/scan_000_0002.nii.gz")


@row("channel_names as a list, and numbered from 1", "refused: how to number them")
def channel_names_wrong(tmp):
    wrong = (["T1"], {"1": "T1"}, {"0": "T1", "2": "T2"}, {})
    told = ""
    for i, names in enumerate(wrong):
        root = tmp / str(i)
        nnunet(root, cases=1)
        redescribe(root, channel_names=names)
        told = unreadable(root, "channel_names", "from 0")
    return told


@row(
    "channels listed as 1, 0 (nnU-Net, and a 4D file of the Decathlon)",
    "in the order of their numbers",
)
def channels_out_of_order(tmp):
    listed = {"1": "T2", "0": "T1"}
    root = nnunet(tmp / "n", channels=CHANNELS)
    redescribe(root, channel_names=listed)
    channels = task_of(root).channels
    assert channels == CHANNELS
    expect_second_channel(root, "scan_000_0001.nii.gz")
    root = decathlon(tmp / "d", "a.nii.gz", modality=listed)
    assert task_of(root).channels == channels
    return str(channels)


@row("one case as .nii beside .nii.gz", "a problem, since it would be skipped")
@check_says(PROBLEM, "scan_003_0000.nii", ".nii.gz")
def other_ending(tmp):
    nnunet(tmp)
    unpack(tmp, "imagesTr/scan_003_0000.nii.gz")
    remove(tmp, "imagesTr/scan_003_0000.nii.gz")


@row("x_t1.nii and x_t1.nii.gz in a BraTS folder", "a problem: which of both is meant")
@check_says(PROBLEM, "one name with two endings", "BraTS19_A_1_t1.nii")
def two_endings_of_one_name(tmp):
    brats(tmp, "BraTS19_A_1", new=False)
    unpack(tmp, "BraTS19_A_1/BraTS19_A_1_t1.nii.gz")


@row("numTraining 6, four cases", "a problem")
@check_says(PROBLEM, "numTraining 6", "4 cases")
def numtraining_wrong(tmp):
    nnunet(tmp, numTraining=6)


@row("dataset.json lists a file that is not there", "a problem that names it")
@check_says(PROBLEM, "imagesTr/b.nii.gz")
def listed_and_gone(tmp):
    decathlon(tmp, "a.nii.gz", "b.nii.gz")
    remove(tmp, "imagesTr/b.nii.gz")


@row("a file in imagesTr that dataset.json does not list", "a problem that names it")
@check_says(PROBLEM, "does not list", "c.nii.gz")
def there_and_not_listed(tmp):
    decathlon(tmp, "a.nii.gz", "b.nii.gz")
    save_image(tmp, "imagesTr/c.nii.gz", seed=3)


@row(
    "nnU-Net 1: training lists NAME.nii.gz, the files are NAME_0000.nii.gz",
    "read, a file a channel",
)
@check_says(SOUND, "0 problems")
def nnunet_v1(tmp):
    decathlon(tmp, "a.nii.gz", "b.nii.gz", modality=TWO_CHANNELS)
    for name in "ab":
        start = tmp / f"imagesTr/{name}"
        path = start.with_suffix(".nii.gz")
        shutil.copy(path, f"{start}_0001.nii.gz")
        path.rename(f"{start}_0000.nii.gz")
    expect_cases(tmp, "a", "b")
    expect_second_channel(tmp, "a_0001.nii.gz")


def monai_list(tmp, **info):
    "A list of MONAI: each image is a list of files"
    listed = []
    for i in range(3):
        x, y = scan(i)
        start = f"p{i}/p{i}"
        files = [f"{start}_flair.nii.gz", f"{start}_t1.nii.gz"]
        for k, name in enumerate(files, 1):
            brighter = x * k
            save(tmp, name, brighter)
        label = f"{start}_seg.nii.gz"
        save(tmp, label, y)
        entry = {"fold": i, "image": files, "label": label}
        listed.append(entry)
    return describe(tmp, training=listed, **info)


@row("a list of MONAI without modality", "refused: what is missing")
@check_says(REFUSED, "modality")
def monai_datalist(tmp):
    monai_list(tmp)


@row("a list of MONAI with modality and labels", "read, a file a channel")
@check_says(SOUND, "0 problems")
def monai_datalist_complete(tmp):
    monai_list(tmp, modality={"0": "FLAIR", "1": "T1"}, labels=NUMBERS)
    expect_cases(tmp, "p0", "p1", "p2")
    expect_second_channel(tmp, "p0_t1.nii.gz")


# --- BraTS and KiTS


@row(
    "BraTS 2024 after treatment: label 4 in BraTS-GLI-00000-100",
    "recognised: 4 is the resection cavity, a region of its own",
)
@check_says(SOUND, "BraTS 2024")
def brats_2024_label_4(tmp):
    brats(tmp, "BraTS-GLI-00000-100", "BraTS-GLI-00001-101", values=(4, 3))
    task = task_of(tmp)
    assert task.labels[4] == "resection cavity"
    assert task.regions["RC"] == (4,)
    assert 4 not in task.regions["WT"]


@row("label 4 in BraTS-GLI-00000-000", "a problem that names BraTS 2024")
@check_says(PROBLEM, "resection cavity", "BraTS 2024")
def brats_2023_label_4(tmp):
    labels = (4, 3)
    brats(tmp, "BraTS-GLI-00000-000", values=labels)


@row("BraTS 2025: before and after treatment in one folder", "the task that has all labels of both")
def brats_before_and_after(tmp):
    brats(tmp, "BraTS-GLI-00000-000", "BraTS-GLI-00001-100")
    task = task_of(tmp)
    assert 4 in task.labels
    return task.name


@row(
    "BraTS-PED: 1 enhancing, 2 non-enhancing, 3 cyst, 4 edema",
    "its own labels, never the regions of glioma",
)
@check_says(SOUND, "BraTS-PED")
def brats_ped(tmp):
    brats(tmp, "BraTS-PED-00000-000", values=(1, 3))
    regions = task_of(tmp).regions
    assert regions["ET"] == (1,)
    assert regions["TC"] == (1, 2, 3)
    assert regions["WT"] == (1, 2, 3, 4)


@row("BraTS-MEN and BraTS-SSA", "the labels of 2023, under their own name")
def brats_men(tmp):
    names = []
    for kind in ("MEN", "SSA", "MET"):
        root = tmp / kind
        brats(root, f"BraTS-{kind}-00000-000")
        task = task_of(root)
        assert task.regions["ET"] == (3,)
        names.append(task.name)
    return str(names)


@row("BraTS-MEN-RT and a challenge that nobody knows", "refused")
def brats_unknown(tmp):
    for kind in ("MEN-RT", "XYZ"):
        root = tmp / kind
        brats(root, f"BraTS-{kind}-0000-1")
        told = unreadable(root, kind, "not known")
    return told


@row("BraTS-PED and BraTS-GLI in one folder", "refused: their labels differ in meaning")
@reading_refused("mixes", "PED", "GLI")
def brats_mixed(tmp):
    brats(tmp, "BraTS-PED-00000-000", "BraTS-GLI-00000-000")


@row("Brats18_A_1, as 2018 writes it", "recognised, labels 1, 2 and 4")
@check_says(SOUND, "0 problems")
def brats_2018(tmp):
    brats(tmp, "Brats18_A_1", values=(2, 4), new=False)
    task = task_of(tmp)
    assert task.regions["ET"] == (4,)


@row("a BraTS folder without its images among the others", "a problem, not left out without a word")
@check_says(PROBLEM, "BraTS-GLI-00001-000")
def brats_empty_folder(tmp):
    brats(tmp, "BraTS-GLI-00000-000")
    empty = tmp / "BraTS-GLI-00001-000"
    empty.mkdir()


@row("KiTS 2023 without instances/, label 3", "a problem that says how the years are told")
@check_says(PROBLEM, "instances/", "KiTS 2021 and 2023")
def kits23_without_instances(tmp):
    kits(tmp, extra=3)


@row("KiTS with imaging.nii", "read")
@check_says(SOUND, "KiTS 2019", "0 problems")
def kits_unzipped(tmp):
    kits(tmp, ending=".nii")


# --- labels


def not_annotated(y):
    "A label map whose first slices are not annotated"
    y[:2] = -1
    return y


@row("-1 for what is not annotated", "a problem with what to do; training is refused")
@check_says(PROBLEM, "[-1]", "below 0", "not supported", folder="data")
def labels_minus_1(tmp):
    root = tmp / "data"
    table(root, label=not_annotated)
    task = task_of(root)
    assert min(task.labels) == 0
    not_trained(tmp, "[-1]", "below 0")


def renamed(y, names):
    "A label map with other values"
    out = np.zeros_like(y)
    for old, new in names.items():
        out[y == old] = new
    return out


@row("labels 256 and 600", "egcnn_check says what becomes of them; predictions have these values")
def labels_500_to_850(tmp):
    large = functools.partial(renamed, names={1: 600, 2: 256})
    root = table(tmp / "data", label=large)
    told = says(root, SOUND, "above 255", "256, 600")
    task = trained(tmp, "--epochs", 4, "--lr", "3e-2")
    assert list(task["labels"]) == ["0", "256", "600"]
    maps = predicted(tmp, "im0.nii.gz")
    found = values(maps["im0"])
    assert found <= {0, 256, 600}, found
    assert found != {0}
    return f"{told}; predicted {found}"


@row("labels 40000 and 70000, in int32", "read as they are, told by egcnn_check")
@check_says(SOUND, "above 255", "40000, 70000")
def labels_above_32767(tmp):
    table(tmp)
    for i in range(4):
        labels = renamed(scan_labels(i), {1: 40000, 2: 70000})
        save(tmp, f"lab{i}.nii.gz", labels, dtype=np.int32)
    task = task_of(tmp)
    assert list(task.labels) == [0, 40000, 70000]


def lots(y):
    "A label map of 117 classes in blocks of 2 voxels, where a label map is above 0"
    seed = int(y.sum())
    rng = np.random.default_rng(seed)
    blocks = rng.integers(1, 118, (7, 7, 6))
    classes = blocks
    for axis in range(3):
        classes = classes.repeat(2, axis)
    depth, height, width = y.shape
    inside = y > 0
    return classes[:depth, :height, :width] * inside


@row("117 classes", "trained")
def classes_117(tmp):
    table(tmp / "data", label=lots)
    task = trained(tmp)
    count = len(task["labels"])
    assert count > 100
    return f"{count} labels"


@row("labels that a scale made 0.99999 and 2.00001", "read as 1 and 2, told by egcnn_check")
@check_says(SOUND, "rounded")
def label_0_99999(tmp):
    table(tmp)
    for i in range(4):
        labels = scan_labels(i).astype(np.float64)
        image = nib.Nifti1Image(labels, ISO)
        image.header.set_data_dtype(np.int16)
        path = tmp / f"lab{i}.nii.gz"
        nib.save(image, path)
    task = task_of(tmp)
    assert list(task.labels) == [0, 1, 2]
    _, label = read_first(tmp)
    expected = scan_labels(0)
    assert np.array_equal(label.array, expected)


@row("no voxel of any label in any case", "a problem")
@check_says(PROBLEM, "no label map of 4 cases has a voxel above 0")
def empty_labels(tmp):
    table(tmp, label=np.zeros_like)


@row("the same, trained", "refused: a Dice of 1 would mean nothing")
@training_refused("above 0")
def empty_labels_trained(tmp):
    root = nnunet(tmp / "data")
    labels = root / "labelsTr"
    empty = np.zeros(SHAPE, np.int16)
    for path in labels.iterdir():
        save(labels, path.name, empty)


@row("no label map at all", "a problem for egcnn_check, cases for prediction")
@check_says(PROBLEM, "no case has a label map")
def no_labels(tmp):
    nnunet(tmp)
    shutil.rmtree(tmp / "labelsTr")
    expect_count(tmp, 4)


@row("a class that no case has", "a warning, exit code 0")
@check_says(SOUND, "cyst", "in no case")
def class_without_voxels(tmp):
    labels = {**NAMES, "cyst": 3}
    nnunet(tmp, labels=labels)


# --- regions


def region_task(tmp, labels, **info):
    "The task of a folder with such labels"
    nnunet(tmp, cases=1, labels=labels, **info)
    return task_of(tmp)


@row(
    "whole [1,2], penumbra 1, core 2: the parts fill the whole",
    "trained and predicted; the whole alone gets its likeliest part",
)
def regions_disjoint_inside(tmp):
    labels = {"background": 0, "whole": [1, 2], "penumbra": 1, "core": 2}
    root = tmp / "data"
    nnunet(root, labels=labels, regions_class_order=[1, 1, 2])
    task = task_of(root)
    prob = torch.tensor([0.9, 0.1, 0.3])
    label = to_labels(prob.view(1, 3, 1, 1, 1), task)
    assert label.item() == 2
    trained(tmp)
    maps = predicted(tmp, "imagesTr/scan_000_0000.nii.gz")
    found = set()
    for image in maps.values():
        found |= values(image)
    assert found <= {0, 1, 2}
    return f"predicted {found}"


@row("the inner region is listed first", "sorted outer first; labels come back")
def regions_inner_first(tmp):
    inner_first = {"background": 0, "core": 2, "whole": [1, 2]}
    task = region_task(tmp, inner_first, regions_class_order=[2, 1])
    assert list(task.regions) == ["whole", "core"]
    labels = torch.tensor([0, 1, 2]).view(1, 3, 1, 1)
    masks = region_masks(labels, task.regions)
    again = regions_to_labels(masks, task.regions)
    assert torch.equal(again, labels)
    return str(task.regions)


@row("whole [1,2,3], core 3, regions_class_order [2,3]", "the whole is painted with 2")
def regions_class_order_is_honoured(tmp):
    labels = {"background": 0, "whole": [1, 2, 3], "core": 3}
    task = region_task(tmp, labels, regions_class_order=[2, 3])
    only_whole = torch.tensor([1, 0]).view(1, 2, 1, 1)
    painted = regions_to_labels(only_whole, task.regions)
    assert painted.item() == 2
    return str(task.regions)


def regions_refused(tmp, labels, *texts, **info):
    "A folder with such labels is refused with these texts"
    read = functools.partial(region_task, tmp, labels, **info)
    return refused(read, *texts)


@row(
    "regions_class_order of another length, with a strange label, with an inner region's label",
    "each refused",
)
def regions_class_order_wrong(tmp):
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    wrong = ([1], [9, 2], [2, 2], "12", [None, 2])
    told = ""
    for i, order in enumerate(wrong):
        number = str(i)
        folder = tmp / number
        told = regions_refused(folder, labels, "regions_class_order", regions_class_order=order)
    return told


@row("a = [1,2], b = [2,3]: neither lies in the other", "refused before training")
@check_says(REFUSED, "share the labels [2]")
def regions_that_overlap(tmp):
    labels = {
        "background": 0,
        "a": [1, 2],
        "b": [2, 3],
    }
    nnunet(tmp, labels=labels)


@row("two regions of the same labels, a region with 0", "refused")
def regions_without_sense(tmp):
    same = {"background": 0, "a": [1, 2], "b": [2, 1]}
    regions_refused(tmp / "0", same, "the same labels")
    with_background = {"background": 0, "a": [0, 1], "b": 1}
    return regions_refused(tmp / "1", with_background, "background")


def parts_of(values, rng):
    "What to split next: two halves, or all labels but the first"
    first = rng.integers(0, 2)  # with or without a label of its own
    if first == 1:
        return [values[1:]]
    cut = int(rng.integers(1, len(values)))
    return [values[:cut], values[cut:]]


def nested_regions(rng, labels):
    "Random regions that nest or are disjoint: parts of parts"
    regions = {}

    def split(values):
        name = f"r{len(regions)}"
        regions[name] = tuple(values)
        if len(values) > 1:
            parts = parts_of(values, rng)
            for part in parts:
                split(part)

    whole = rng.permutation(labels)
    split(whole.tolist())
    names = rng.permutation(list(regions)).tolist()  # in any order
    return {name: regions[name] for name in names}


def labels_in(regions):
    "The background and every label of some regions"
    known = {0}
    for labels in regions.values():
        known.update(labels)
    return sorted(known)


def expect_labels_again(labels, regions):
    "Labels come back from the masks of their regions"
    masks = region_masks(labels, regions)
    for prob in (None, masks):
        again = regions_to_labels(masks, regions, prob)
        same = torch.equal(again, labels)
        assert same, regions


def all_masks(count):
    "Every combination of masks of so many regions, (1,R,2^R,1,1)"
    combinations = 2**count
    numbers = torch.arange(combinations)
    masks = []
    for i in range(count):
        shifted = numbers >> i
        last_bit = shifted & 1
        masks.append(last_bit)
    whole = torch.stack(masks)
    return whole.view(1, count, -1, 1, 1)


def expect_known_labels(masks, regions, known):
    "Any masks give labels that are known"
    allowed = set(known)
    unsure = masks * 0.8
    for prob in (None, unsure):
        labels = regions_to_labels(masks, regions, prob)
        found = labels.unique().tolist()
        assert allowed.issuperset(found)


@row(
    "200 random definitions of nested regions, in any order",
    "labels come back from their regions; any of the 2^R combinations of masks gives a label",
)
def regions_there_and_back(tmp):
    rng = np.random.default_rng(0)
    largest = 0
    for _ in range(200):
        count = int(rng.integers(1, 7))
        drawn = rng.permutation(np.arange(1, 20))
        regions = nested_regions(rng, drawn[:count])
        known = labels_in(regions)
        labels = torch.tensor(known).view(1, -1, 1, 1)
        expect_labels_again(labels, regions)
        in_order = outer_first(regions)
        expect_labels_again(labels, in_order)
        number = len(regions)
        masks = all_masks(number)
        expect_known_labels(masks, regions, known)
        largest = max(largest, number)
    return f"200 definitions of up to {largest} regions"


# --- grids and sizes


@row(
    "a voxel size of 500 where micrometres are meant: a field of view of 7 m",
    "a problem; training is refused before memory is taken",
)
@check_says(PROBLEM, "field of view of 7 m", folder="data")
def spacing_in_microns(tmp):
    root = tmp / "data"
    affine = cube(500.0)
    table(root, affine=affine)
    not_trained(tmp, "field of view of 7 m")


MICRO = "1 mm is 50 voxels of this scan; 14x13x12 voxels become 1x1x1"


@row(
    "voxels of 0.02 mm",
    "a problem that tells what becomes of it; training is refused; --spacing is the way out",
)
@check_says(PROBLEM, MICRO, "--spacing", folder="data")
def micro_ct(tmp):
    root = tmp / "data"
    affine = cube(0.02)
    table(root, affine=affine)
    not_trained(tmp, MICRO)
    fine = ("--spacing", ".02")
    says(root, SOUND, "0 problems", words=fine)


@row("the same, trained with --spacing 0.02", "trained")
def micro_ct_trained(tmp):
    table(tmp / "data", affine=cube(0.02))
    trained(tmp, "--spacing", ".02")
    return "trained"


FAR_APART = np.diag([200.0, 1, 1, 1])  # slices


@row("a field of view of 2.8 m", "a warning, exit code 0")
@check_says(SOUND, "field of view is 2.8 m", "1 warning")
def wide_field(tmp):
    table(tmp, affine=FAR_APART)


@row("a scan of 3 m along each axis", "a problem; refused before memory is taken")
@check_says(PROBLEM, "too large")
def too_many_voxels(tmp):
    affine = np.diag([210.0, 220, 240, 1])
    table(tmp, affine=affine)
    read = functools.partial(read_first, tmp)
    refused(read, "too large", "2940x2860x2880")


@row("voxels of 0.4 mm: 6 voxels at 1 mm", "a warning, none with --spacing 0.4")
@check_says(SOUND, "1 mm is 2.5 voxels of this scan", "6x5x5")
def few_voxels(tmp):
    affine = cube(0.4)
    table(tmp, affine=affine)
    fine = ("--spacing", ".4")
    says(tmp, SOUND, "0 problems", words=fine)


LPS = np.diag([-1.0, -1, 1, 1])


@row("the label is in LPS, the image in RAS", "a problem that names both orientations")
@check_says(PROBLEM, "lies in orientation LPS", "in RAS", "Reorient")
def label_in_another_orientation(tmp):
    table(tmp)
    save_labels(tmp, "lab0.nii.gz", affine=LPS)


SAR = ISO[[2, 1, 0, 3]]  # first and last axis exchanged


@row("the label's axes are exchanged, another shape", "a problem that names the orientations")
@check_says(PROBLEM, "lies in orientation SAR", "in RAS")
def label_with_other_axes(tmp):
    table(tmp)
    labels = scan_labels(0)
    turned = labels.T
    save(tmp, "lab0.nii.gz", turned, SAR)


@row("a label of a microscope, half a voxel (0.005 mm) away", "a problem: half a voxel")
@check_says(PROBLEM, "a corner is 0.5 voxels away", words=("--spacing", ".01"))
def label_half_a_voxel_away(tmp):
    fine = cube(0.01)
    table(tmp, affine=fine)
    moved = fine.copy()
    moved[0, 3] = 0.005
    save_labels(tmp, "lab0.nii.gz", affine=moved)


@row("the label's voxel size differs by 0.001 mm over 300 slices", "a problem: its far end is away")
@check_says(PROBLEM, "a corner is 0.3 voxels away")
def label_stretched(tmp):
    shape = (300, 10, 10)
    table(tmp, shape=shape)
    _, labels = scan(0, shape)
    stretched = np.diag([1.001, 1, 1, 1])
    save(tmp, "lab0.nii.gz", labels, stretched)


@row("the label's affine differs by 0.02 mm at voxels of 1 mm", "read: a fiftieth of a voxel")
@check_says(SOUND, "0 problems")
def label_almost_there(tmp):
    table(tmp)
    moved = ISO.copy()
    moved[:3, 3] = 0.02
    save_labels(tmp, "lab0.nii.gz", affine=moved)


# --- intensities


def times_10(x):
    "An image, ten times as bright"
    return x * 10


@row("CT without its intercept: 0 to 4095", "a warning that names it")
@check_says(SOUND, "CT, but nothing below -500 HU", "intercept of -1024")
def ct_offset_1024(tmp):
    table(tmp, channel="ct", image=times_10)


def to_unit(x):
    "An image, scaled to values between 0 and 1"
    return x / 300


@row("CT scaled to [0, 1]", "a warning: no Hounsfield units")
@check_says(SOUND, "not Hounsfield units")
def ct_normalised(tmp):
    table(tmp, channel="CT", image=to_unit)


def with_hole(x):
    "An image that is not a number in its first slices"
    x[:3] = np.nan
    return x


@row("NaN outside the body", "refused by name")
@check_says(PROBLEM, "im0.nii.gz", "NaN")
def nan_background(tmp):
    table(tmp, image=with_hole)


@row("an image with one value in every voxel", "a problem")
@check_says(PROBLEM, "the value 0 in every voxel")
def constant_image(tmp):
    table(tmp, image=np.zeros_like)


@row("one scan under two names", "a problem that names both")
@check_says(PROBLEM, "case1 has the very voxels of case0")
def one_scan_twice(tmp):
    table(tmp)
    first = tmp / "im0.nii.gz"
    second = tmp / "im1.nii.gz"
    shutil.copy(first, second)


# --- the NIfTI reader


@row("two channels as (D,H,W,1,2), as ITK writes them", "read like (D,H,W,2)")
@check_says(SOUND, "0 problems")
def five_axes(tmp):
    decathlon(tmp, "a.nii.gz", modality=TWO_CHANNELS)
    first = scan_image(0)
    second = first + 5
    channels = np.stack([first, second], -1)
    with_axis = np.expand_dims(channels, 3)
    save(tmp, "imagesTr/a.nii.gz", with_axis)
    images, _ = read_first(tmp)
    found = images[1].array
    assert np.array_equal(found, second)


@row("pixdim[0] is 0 in a file with a qform", "read as 1, as the standard says")
@check_says(SOUND, "RAS", "0 problems")
def qfac_0(tmp):
    table(tmp)
    sizes = [0, 1, 1, 1, 0, 0, 0, 0]
    for path in tmp.glob("*.nii.gz"):
        poke(path, sform_code=0, qform_code=1, pixdim=sizes)


def one_slice(x):
    "A slice of a volume"
    return x[..., 6]


@row("images of two axes (H,W)", "read as (H,W,1), or refused in one line")
def slice_hw(tmp):
    table(tmp, image=one_slice, label=one_slice)
    code, text = checked(tmp)
    if code != SOUND:
        assert code == PROBLEM, text
        assert "axes" in text, text
    return f"exit code {code}"


@row(
    "cal_max 1500 and an intent in the scan's header", "the label map that is predicted has neither"
)
def cal_max_kept(tmp):
    root = table(tmp / "data")
    for path in root.glob("im*.nii.gz"):
        poke(path, cal_max=1500.0, cal_min=40.0, intent_code=3, intent_p1=7.0)
    trained(tmp)
    header = predicted(tmp, "im0.nii.gz")["im0"].header
    largest = float(header["cal_max"])
    smallest = float(header["cal_min"])
    intent = int(header["intent_code"])
    assert largest <= 2
    assert smallest == 0
    assert intent in (0, 1002)
    return f"cal_max {largest:g}, intent_code {intent}"


@row("a 3D view of a volume of one slice", "a view, or one line of our own")
def view3d_one_slice(tmp):
    from egcnn_nb.show.scenes import view3d

    shape = (20, 18, 1)
    rng = np.random.default_rng(0)
    volume = rng.random(shape).astype(np.float32)
    labels = np.ones(shape, np.int32)
    try:
        view3d(volume, labels).static()
    except InputError as e:
        return f"refused: {e}"
    return "a view"


# --- prediction


def two_channels(tmp):
    "A trained run of two channels, and imagesTs"
    data = tmp / "data"
    nnunet(data, channels=CHANNELS)
    images = data / "imagesTs"
    for i in (6, 7):
        name = f"scan_{i:03d}"
        first = scan_image(i)
        save(images, f"{name}_0000.nii.gz", first)
        second = 2 * first
        save(images, f"{name}_0001.nii.gz", second)
    trained(tmp)


@row(
    "imagesTs with NAME_0000 and NAME_0001",
    "one case called NAME each, from the folder and from its files",
)
def predict_imagesTs(tmp):
    two_channels(tmp)
    maps = predicted(tmp, "imagesTs", out="folder")
    assert sorted(maps) == ["scan_006", "scan_007"], sorted(maps)
    files = ("imagesTs/scan_006_0000.nii.gz", "imagesTs/scan_006_0001.nii.gz")
    one = predicted(tmp, *files, out="files")
    assert sorted(one) == ["scan_006"]
    name = "scan_006"
    of_folder = voxels(maps[name])
    of_files = voxels(one[name])
    assert np.array_equal(of_files, of_folder)
    return "two label maps"


@row(
    "a folder of scans with their label maps beside them, predicted",
    "the scans are predicted, each label map is left out by name",
)
def predict_label_maps_beside_scans(tmp):
    root = tmp / "data"
    decathlon(root, "a.nii.gz", "b.nii.gz", "c.nii.gz")
    trained(tmp)
    run = tmp / "run"
    mixed = tmp / "mixed"
    out = tmp / "out"
    mixed.mkdir()
    image = root / "imagesTr/a.nii.gz"
    labels = root / "labelsTr/a.nii.gz"
    shutil.copy(image, mixed)
    shutil.copy(labels, mixed / "a_seg.nii.gz")
    code, _, err = command(predict_main, run, mixed, "--out", out)
    assert code == 2, err
    assert "1 of 2 inputs" in err, err
    written = [path.name for path in out.glob("*.nii.gz")]
    assert written == ["a.nii.gz"]
    return "a is predicted, a_seg is left out"


@row("six scans whose names are UIDs, predicted", "six label maps under their own names")
def predict_names_with_dots(tmp):
    uids = ["1.2.0", "1.2.1", "1.2.2", "1.2.3"]
    files = [f"{uid}.nii.gz" for uid in uids]
    decathlon(tmp / "data", *files)
    trained(tmp)
    maps = predicted(tmp, ".")
    names = sorted(maps)
    assert names == uids, names
    return str(names)


# --- the machine

COUNT_READERS = """
import os, threading, time
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
os.cpu_count = lambda: 96
import egcnn_nb.data.cache as cache
from egcnn_nb.data.layouts import find_dataset
data = find_dataset({folder!r})
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


@row("16 cases, one core of a machine of 96", "one case in memory at a time")
def cores_of_the_machine(tmp):
    if not hasattr(os, "sched_setaffinity"):
        raise Skip("no affinity here")
    root = table(tmp / "data")
    code = COUNT_READERS.format(folder=str(root))
    done = python(code, EGCNN_WORKERS=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "most 1\n" in done.stdout, done.stdout
    return done.stdout.strip()


NO_HOME = """
import pwd
def nobody(uid): raise KeyError(uid)
pwd.getpwuid = nobody
import sys, torch, warnings
torch.set_num_threads(1)
from egcnn_nb.commands.train import main
sys.exit(main({words}))
"""


def train_without_home(words, cache):
    "Run egcnn_train as a user without a home"
    code = NO_HOME.format(words=words)
    done = python(code, HOME=None, EGCNN_CACHE=cache)
    error = done.stderr
    assert done.returncode == 0, error
    return done


@row(
    "a user without a home and without an entry in passwd",
    "--help works; trains with EGCNN_CACHE, and without it with at most one warning",
)
def home_unknown(tmp):
    root = table(tmp / "data")
    done = train_without_home(["--help"], cache=None)
    assert "usage" in done.stdout
    small = (
        "--epochs 1 --width 4 --levels 2 --patch_size 8 8 8 --validation 1 --precision fp32"
    ).split()
    for name, cache in (("with", str(tmp / "cache")), ("without", None)):
        words = [str(root), "--out", str(tmp / name), *small]
        done = train_without_home(words, cache)
        warned = done.stderr.lower().count("memory")
        assert warned <= 1, done.stderr[-1500:]
    return "trained both ways"


@row(
    "a host name that resolves to nothing",
    "the launch lines and the README name --local_addr or MASTER_ADDR",
)
def hostname_unknown(tmp):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in (LAUNCH, readme):
        assert "--local_addr" in text or "MASTER_ADDR" in text, text[:40]
    return "named"


@row(
    "--exclude with names that no case has, and with a byte order mark",
    "refused; never trained on a case that was to be left out",
)
def exclude_unknown_names(tmp):
    table(tmp / "data", cases=5)
    typo, bom = tmp / "typo.txt", tmp / "bom.txt"
    typo.write_text("case1\ncase9\n")
    bom.write_bytes(b"\xef\xbb\xbfcase1\r\ncase2\r\n")
    code, err = train(tmp, "--exclude", typo)
    assert code == 2, err
    assert "case9" in err, err
    trained(tmp, "--exclude", bom)
    split = config_of(tmp)["split"]
    used = split["train"] + split["validation"]
    assert sorted(used) == ["case0", "case3", "case4"], split
    return err[:120]


@contextlib.contextmanager
def locks_fail(number):
    "While it holds, the kernel refuses every lock with this error"
    import fcntl

    def fail(*words):
        raise OSError(number, os.strerror(number))

    flock, lockf = fcntl.flock, fcntl.lockf
    fcntl.flock = fcntl.lockf = fail
    try:
        yield
    finally:
        fcntl.flock, fcntl.lockf = flock, lockf


@row(
    "flock answers ENOLCK, ENOSYS or EOPNOTSUPP, as on some clusters",
    "one line that names the folder and locks, or a run; no half run folder is left",
)
def no_flock(tmp):
    table(tmp / "data")
    told = "trained"
    for number in (37, 38, 95):
        out = tmp / f"run{number}"
        with locks_fail(number), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code, err = train(tmp, run=out.name)
        if code:
            assert str(out) in err, err
            assert "lock" in err, err
            assert not out.exists(), err
            told = err[:120]
    return told


# --- the command


@row(
    "a name twice in one object of dataset.json", "refused: JSON would keep the last without a word"
)
@check_says(REFUSED, "several times", "dataset.json")
def json_name_twice(tmp):
    nnunet(tmp)
    change_description(tmp, '"0": "T1"', '"0": "T1", "0": "T2"')


@row("file_ending .NII.GZ, and nii.gz without its dot", "read, and refused: the dot is told")
@check_says(REFUSED, "with its dot")
def file_ending_spelled(tmp):
    nnunet(tmp)
    change_description(tmp, '".nii.gz"', '".NII.GZ"')
    is_sound(tmp)
    change_description(tmp, '".NII.GZ"', '"nii.gz"')


@row("a BraTS case is a link to a folder that is gone", "a problem, not left out without a word")
@check_says(PROBLEM, "BraTS-GLI-00009-000")
def brats_link_gone(tmp):
    brats(tmp, "BraTS-GLI-00000-000", values=(1, 3))
    link = tmp / "BraTS-GLI-00009-000"
    target = tmp / "gone"
    link.symlink_to(target)


@row("a quote in cases.csv that is not closed", "refused: the quote is told")
@check_says(REFUSED, "quote", "line")
def csv_open_quote(tmp):
    table(tmp)
    change_table(tmp, "im1.nii.gz", '"im1.nii.gz')


@row("a column `age` in cases.csv", "refused: a column is a channel")
@check_says(REFUSED, "age", "Remove the column")
def csv_age(tmp):
    table(tmp)
    path = tmp / "cases.csv"
    header, *cases = path.read_text().split()
    lines = [header + ",age"]
    for case in cases:
        lines.append(case + ",41")
    text = "\n".join(lines)
    path.write_text(text)


def mask_each(y):
    "A mask for each class, along a last axis"
    masks = [y == 1, y == 2]
    return np.stack(masks, -1)


@row("a label map of 4 axes, a mask for each class", "refused: merge the masks")
@check_says(PROBLEM, "merge the masks")
def label_of_four_axes(tmp):
    table(tmp, label=mask_each)


@row("a file of NIfTI that gzip did not pack, called .nii.gz", "refused: how to rename it")
@check_says(PROBLEM, "end in .nii.")
def gz_not_packed(tmp):
    table(tmp)
    unpack(tmp, "im0.nii.gz")
    rename(tmp, "im0.nii", "im0.nii.gz")


@row("intensities of 1e-30, by a small slope", "normalised like any others")
def tiny_intensities(tmp):
    from egcnn_nb.data.prepare import normalize

    x = scan_image(0)
    tiny = x * np.float32(1e-30)
    constant = x * 0 + np.float32(0.1)
    scores = normalize(x, "zscore")
    scores_of_tiny = normalize(tiny, "zscore")
    scores_of_constant = normalize(constant, "zscore")
    assert np.allclose(scores_of_tiny, scores, atol=1e-3)
    assert not scores_of_constant.any()
    return "the same z-scores"


@row("predict scan.nii.gz and SCAN.nii.gz, and a link to a file that is gone", "refused; told")
def predict_one_name(tmp):
    from egcnn_nb.core import KITS
    from egcnn_nb.run.predict import find_inputs

    x = scan_image(0)
    lower = save(tmp, "a/scan.nii.gz", x)
    upper = save(tmp, "b/SCAN.nii.gz", x)
    link = tmp / "a/gone.nii.gz"
    link.symlink_to(tmp / "nowhere")
    found = find_inputs([tmp / "a"], KITS)
    assert len(found) == 2
    find_both = functools.partial(find_inputs, [lower, upper], KITS)
    return refused(find_both, "more than once")


def to_whole_numbers(x):
    "An image, rounded"
    rounded = np.rint(x)
    return rounded.astype(np.int16)


@row(
    "images and label maps exchanged in cases.csv, both whole numbers",
    "a problem; training is refused",
)
@training_refused("seems to name the images")
def csv_exchanged(tmp):
    root = tmp / "data"
    table(root, image=to_whole_numbers)
    change_table(root, "case,t1,label", "case,label,t1")
    says(root, PROBLEM, "seems to name the images")


@row("--spacing 0, --spacing 1 2, --readers 0", "refused in one line")
@check_says(REFUSED, "--readers", words=("--readers", "0"))
def check_with_wrong_words(tmp):
    table(tmp)
    for spacing in ("--spacing 0", "--spacing 1 2"):
        words = spacing.split()
        says(tmp, REFUSED, "--spacing", words=words)


@row("--json", "warnings and problems are lists in it")
def check_as_json(tmp):
    table(tmp, affine=FAR_APART)
    code, text = checked(tmp, "--json", "--readers", "1")
    found = re.search(r"\{.*\}", text, re.S)
    assert found, text
    report = json.loads(found[0])
    (warning,) = report["warnings"]
    assert code == SOUND
    assert report["problems"] == []
    same = check_dataset(tmp, (1.0, 1.0, 1.0), 1)
    assert same["warnings"] == [warning]
    return warning


def run_row(name):
    "What happened in a row: (ok, text); ok is None where it cannot be tried"
    torch.set_num_threads(1)
    folder = tempfile.mkdtemp(prefix="row")
    tmp = Path(folder).resolve()
    try:
        return True, ROWS[name](tmp)
    except Skip as e:
        return None, str(e)
    except Exception:
        return False, traceback.format_exc()
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


VERDICTS = {True: "", None: "skipped: ", False: "FAILED: "}


def print_row(name, ok, text):
    "Print a row of the table"
    row = ROWS[name]
    title = name.replace("_", " ")
    told = " ".join(str(text).split())
    told = told.replace("|", "/")
    told = told.replace(tempfile.gettempdir(), "TMP")
    happened = VERDICTS[ok] + told[-300:]
    print(f"| {title} | {row.there} | {row.must} | {happened} |", flush=True)


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
        print_row(name, ok, text)
    print(f"\n{len(names)} cases, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
