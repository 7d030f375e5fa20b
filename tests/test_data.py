"Processes of their own: caches that are filled at once, folders that are killed, the wheel elsewhere."

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BRAINS = ROOT / "data_samples/brats2019"
EG = ROOT / "egcnn_nb/pretrained/eg"

FILL = """
import sys; from pathlib import Path
from egcnn_nb.data.cache import prepared_cases
from egcnn_nb.data.layouts import find_dataset
data = find_dataset(sys.argv[1])
for case in prepared_cases(data.cases, data.task, Path(sys.argv[2]), quiet=True):
    print(case.name, case.x.double().sum().item(), case.labels.sum().item())
"""


def fill(cache):
    "Words of a process that prepares the brains, keeps them in a cache, and prints what they are"
    script = [sys.executable, "-c", FILL]
    return [*script, str(BRAINS), str(cache)]


def begin_to_fill(cache):
    "Such a process"
    return subprocess.Popen(
        fill(cache),
        stdout=subprocess.PIPE,
        text=True,
    )


def filled(cache):
    "What such a process prints"
    line = fill(cache)
    done = run(line)
    return done.stdout


def entries_in(cache):
    "The entries of a cache that are written to their end"
    found = cache.glob("[!.]*.safetensors")
    return list(found)


def inodes_of(entries):
    "entry -> number of its file, another one where it is written anew"
    return {entry: entry.stat().st_ino for entry in entries}


def test_processes_that_fill_one_cache_do_not_meet(tmp_path):
    cache = tmp_path / "cache"
    processes = [begin_to_fill(cache) for _ in range(3)]
    printed = []
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        printed.append(out)
    first = printed[0]
    assert first.count("\n") == 12
    assert set(printed) == {first}
    entries = list(cache.iterdir())
    assert len(entries) == 12
    for entry in entries:
        assert entry.suffix == ".safetensors"


def test_a_process_killed_while_it_fills_a_cache_leaves_only_whole_entries(tmp_path):
    "The next one takes what is there and makes the rest"
    cache = tmp_path / "cache"
    whole = filled(tmp_path / "other")
    process = begin_to_fill(cache)
    while not entries_in(cache):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = entries_in(cache)
    before = inodes_of(kept)
    assert 1 <= len(kept) <= 12
    assert filled(cache) == whole
    assert inodes_of(kept) == before
    assert len(entries_in(cache)) == 12


PREDICT = [
    sys.executable,
    "-c",
    "import sys; from egcnn_nb.commands.predict import main; sys.exit(main())",
]


def run(words, **options):
    "Run a process to its end, and keep what it prints"
    captured = dict(capture_output=True, text=True, timeout=600)
    return subprocess.run(words, **captured, **options)


def expect_end(done, *texts):
    "A process ended well, and wrote these texts to stderr"
    error = done.stderr
    assert done.returncode == 0, error
    for text in texts:
        assert text in error, error


def label_maps(folder):
    "The label maps of a folder, without its edge maps"
    files = folder.glob("*.nii.gz")
    return [file for file in files if "edges" not in file.name]


def kill_after(folder, words, count):
    "Run a process, and kill it once so many label maps are in a folder"
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while len(label_maps(folder)) < count:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()


def voxels(path):
    "The array of a NIfTI file"
    image = nib.Nifti1Image.load(path)
    return np.asarray(image.dataobj)


def names_in(folder):
    "The names of the files in a folder"
    return {file.name for file in folder.iterdir()}


def test_a_folder_that_was_killed_goes_on_and_ends_like_one_left_alone(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    words = [*PREDICT, str(EG), str(BRAINS), "--save", "edges", "--out"]
    done = run([*words, str(alone)])
    expect_end(done, "predicting", "window")  # both bars
    line = [*words, str(killed)]
    kill_after(killed, line, 3)
    written = len(label_maps(killed))
    assert 3 <= written < 12
    again = run([*line, "--resume"])
    expect_end(again, "inputs are done already")
    names = {name for name in names_in(alone) if name.endswith(".nii.gz")}
    assert len(names) == 24
    others = names_in(killed) - names
    assert others == {"egcnn_predict.json", "run.lock"}
    for name in names:
        expected = voxels(alone / name)
        found = voxels(killed / name)
        np.testing.assert_array_equal(found, expected)


STRANGER = """
import numpy as np, torch
from monai.networks.nets import UNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.run.predict import predict
from egcnn_nb.method.losses import EGLoss
x, labels = torch.randn(2, 1, 32, 32, 32), torch.randint(0, 2, (2, 32, 32, 32))
model, loss = EGCNN(UNet(3, 1, 2, (8, 16, 32), (2, 2)), x), EGLoss("softmax")
loss(model(x), labels).backward()
print(predict(model, np.zeros((1, 40, 30, 20)), (32, 32, 32), spacing=(.8, .8, 2)).shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, unpacked by pip into a folder of its own, away from the clone"
    tmp = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".venv", ".git", "nbs", "demo*")
    shutil.copytree(ROOT, tmp / "clone", ignore=left_out)
    pip = [sys.executable, "-m", "pip"]
    build = "wheel --no-deps --wheel-dir dist ./clone".split()
    run([*pip, *build], check=True, cwd=tmp)
    dist = tmp / "dist"
    (built,) = dist.glob("*.whl")
    install = "install --no-deps --target site".split()
    run([*pip, *install, str(built)], check=True, cwd=tmp)
    return tmp / "site"


@pytest.fixture
def elsewhere(wheel, tmp_path):
    "A function: run a process that has the package from the wheel alone"
    env = {**os.environ, "PYTHONPATH": str(wheel)}

    def run_there(*words):
        return run(words, cwd=tmp_path, env=env)

    return run_there


def test_ten_lines_of_a_stranger_with_the_wheel(wheel, elsewhere):
    code = "import egcnn_nb; print(egcnn_nb.__file__)"
    where = elsewhere(sys.executable, "-c", code)
    path = where.stdout
    assert path.startswith(str(wheel))  # the wheel's, not the clone's
    lines = STRANGER.strip().splitlines()
    assert len(lines) <= 10
    done = elsewhere(sys.executable, "-c", STRANGER)
    printed = done.stdout
    expect_end(done)
    assert "torch.Size([2, 40, 30, 20])" in printed
    assert "gate 0" in printed


def test_the_wheel_brings_what_the_package_reads(wheel, elsewhere, tmp_path):
    shipped = wheel / "egcnn_nb/pretrained/eg"
    text = (shipped / "config.json").read_text()
    config = json.loads(text)
    assert config["task"]["name"] == "BraTS 2019"
    out = tmp_path / "out"
    scan = BRAINS / "HGG/BraTS19_PHANTOM_001_1"
    line = [*PREDICT, str(shipped), str(scan), "--out", str(out)]
    done = elsewhere(*line)
    expect_end(done)
    label_map = out / "BraTS19_PHANTOM_001_1.nii.gz"
    assert label_map.is_file(), done.stderr


def test_files_in_memory_count_as_free(monkeypatch):
    "A container's memory.current holds the files that were read, which the kernel gives up at once"
    from egcnn_nb import core

    gib = 1 << 30
    half, quarter = gib // 2, gib // 4
    counts = f"anon {gib} inactive_file {half} active_file {quarter}"
    whole = str(2 * gib)
    told = {
        "memory.max": [whole],
        "memory.current": [whole],
        "memory.stat": counts.split(),
    }

    def cgroup(name):
        return told.get(name, [])

    machine = core.free_memory()
    monkeypatch.setattr(core, "_cgroup", cgroup)
    of_files = half + quarter
    assert core.free_memory() == min(of_files, machine)
    told["memory.stat"] = []
    assert core.free_memory() == 0


PARTS = {0: "background", 1: "core", 2: "edema", 300: "rim"}


def whole_case(shape):
    "A case of which nothing was cropped"
    import torch

    from egcnn_nb.data.prepare import Loaded
    from egcnn_nb.data.volumes import Volume

    nothing = np.zeros((0, 0, 0), np.float32)
    grid = Volume(nothing, np.eye(4), nib.Nifti1Header(), Path("none.nii"))
    box = tuple(slice(0, n) for n in shape)
    x = torch.zeros(1, *shape)
    return Loaded("case", x, None, None, grid, shape, box)


@pytest.mark.parametrize(
    "regions",
    [
        {"whole": (1, 2, 300), "inner": (1, 2), "core": (1,), "edema": (2,), "rim": (300,)},
        {"whole": (1, 2, 300), "inner": (1, 300), "rim": (300,)},
    ],
    ids=["parts", "inner"],
)
def test_a_label_map_is_that_of_validation_where_regions_fill_a_region(regions):
    "`label_map` takes one map at a time, `to_labels` all at once: both choose the likeliest part"
    import torch

    from egcnn_nb.core import Task
    from egcnn_nb.run.predict import label_map
    from egcnn_nb.tensors import to_labels

    shape = (9, 8, 7)
    task = Task("parts", ("t1",), PARTS, regions, "sigmoid")
    generator = torch.Generator()
    generator.manual_seed(0)
    prob = torch.rand(len(regions), *shape, generator=generator)
    case = whole_case(shape)
    one_by_one = label_map(prob, case, task)
    at_once = to_labels(prob[None], task)
    assert np.array_equal(one_by_one, at_once[0])


def test_a_run_of_python_whose_files_are_paths_is_described_in_json():
    from egcnn_nb.core import BRATS
    from egcnn_nb.run.folders import describe, settings_of_config
    from egcnn_nb.run.settings import Settings

    data, out = Path("data"), Path("out")
    names = Path("names.txt")
    paths: dict[str, Any] = {"data": data, "out": out, "validation": names}
    settings = Settings(**paths)
    about = describe(settings, BRATS, [], [])
    text = json.dumps(about)
    config = json.loads(text)
    assert config["settings"]["validation"] == "names.txt"
    read, *_ = settings_of_config(config)
    assert read.out == "out"
