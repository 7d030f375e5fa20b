"Processes of their own: caches that are filled at once, folders that are killed, the wheel elsewhere."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    return [sys.executable, "-c", FILL, str(BRAINS), str(cache)]


def filled(cache):
    "What such a process prints"
    done = subprocess.run(fill(cache), stdout=subprocess.PIPE, text=True, timeout=300)
    return done.stdout


def entries_in(cache):
    "The entries of a cache that are written to their end"
    return list(cache.glob("[!.]*.safetensors"))


def test_processes_that_fill_one_cache_do_not_meet(tmp_path):
    cache = tmp_path / "cache"
    processes = []
    for _ in range(3):
        processes.append(subprocess.Popen(fill(cache), stdout=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert printed[0].count("\n") == 12
    assert len(set(printed)) == 1
    entries = list(cache.iterdir())
    assert len(entries) == 12
    assert all(entry.suffix == ".safetensors" for entry in entries)


def test_a_process_killed_while_it_fills_a_cache_leaves_only_whole_entries(tmp_path):
    "The next one takes what is there and makes the rest"
    cache = tmp_path / "cache"
    whole = filled(tmp_path / "other")
    process = subprocess.Popen(fill(cache), stdout=subprocess.DEVNULL)
    while not entries_in(cache):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = {entry: entry.stat().st_ino for entry in entries_in(cache)}
    assert 1 <= len(kept) <= 12
    assert filled(cache) == whole
    for entry, inode in kept.items():
        assert entry.stat().st_ino == inode
    assert len(entries_in(cache)) == 12


PREDICT = [
    sys.executable,
    "-c",
    "import sys; from egcnn_nb.commands.predict import main; sys.exit(main())",
]


def run(words, **options):
    "Run a process to its end, and keep what it prints"
    return subprocess.run(words, capture_output=True, text=True, timeout=600, **options)


def label_maps(folder):
    "The label maps of a folder, without its edge maps"
    return [file for file in folder.glob("*.nii.gz") if "edges" not in file.name]


def kill_after(folder, words, count):
    "Run a process, and kill it once so many label maps are in a folder"
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while len(label_maps(folder)) < count:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def voxels(path):
    "The array of a NIfTI file"
    return np.asarray(nib.load(path).dataobj)


def test_a_folder_that_was_killed_goes_on_and_ends_like_one_left_alone(tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    words = [*PREDICT, str(EG), str(BRAINS), "--save", "edges", "--out"]
    done = run([*words, str(alone)])
    assert done.returncode == 0, done.stderr
    assert "predicting" in done.stderr, done.stderr  # both bars
    assert "window" in done.stderr, done.stderr
    kill_after(killed, [*words, str(killed)], 3)
    assert 3 <= len(label_maps(killed)) < 12
    again = run([*words, str(killed), "--resume"])
    assert again.returncode == 0, again.stderr
    assert "inputs are done already" in again.stderr, again.stderr
    names = sorted(file.name for file in alone.glob("*.nii.gz"))
    assert len(names) == 24
    there = {file.name for file in killed.iterdir()}
    assert there == {*names, "egcnn_predict.json", "run.lock"}
    for name in names:
        np.testing.assert_array_equal(voxels(alone / name), voxels(killed / name))


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
    shutil.copytree(
        ROOT, tmp / "clone", ignore=shutil.ignore_patterns(".venv", ".git", "nbs", "demo*")
    )

    def pip(*words):
        run([sys.executable, "-m", "pip", *words], check=True, cwd=tmp)

    pip("wheel", "--no-deps", "--wheel-dir", "dist", "./clone")
    built = next((tmp / "dist").glob("*.whl"))
    pip("install", "--no-deps", "--target", "site", str(built))
    return tmp / "site"


def test_ten_lines_of_a_stranger_with_the_wheel(wheel, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    code = "import egcnn_nb; print(egcnn_nb.__file__)"
    where = run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert where.stdout.startswith(str(wheel))  # the wheel's, not the clone's
    assert len(STRANGER.strip().splitlines()) <= 10
    done = run([sys.executable, "-c", STRANGER], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 40, 30, 20])" in done.stdout, done.stderr
    assert "gate 0" in done.stdout, done.stderr


def test_the_wheel_brings_what_the_package_reads(wheel, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    shipped = wheel / "egcnn_nb/pretrained/eg"
    config = json.loads((shipped / "config.json").read_text())
    assert config["task"]["name"] == "BraTS 2019"
    out = tmp_path / "out"
    scan = BRAINS / "HGG/BraTS19_PHANTOM_001_1"
    done = run([*PREDICT, str(shipped), str(scan), "--out", str(out)], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (out / "BraTS19_PHANTOM_001_1.nii.gz").is_file(), done.stderr


def test_files_in_memory_count_as_free(monkeypatch):
    "A container's memory.current holds the files that were read, which the kernel gives up at once"
    from egcnn_nb import core

    gib = 1 << 30
    counts = f"anon {gib} inactive_file {gib // 2} active_file {gib // 4}"
    told = {
        "memory.max": [str(2 * gib)],
        "memory.current": [str(2 * gib)],
        "memory.stat": counts.split(),
    }
    machine = core.free_memory()
    monkeypatch.setattr(core, "_cgroup", lambda name: told.get(name, []))
    assert core.free_memory() == min(3 * gib // 4, machine)
    told["memory.stat"] = []
    assert core.free_memory() == 0


def test_a_label_map_is_that_of_validation_where_regions_fill_a_region():
    "`label_map` takes one map at a time, `to_labels` all at once: both choose the likeliest part"
    import torch

    from egcnn_nb.core import Task
    from egcnn_nb.data.prepare import Loaded
    from egcnn_nb.data.volumes import Volume
    from egcnn_nb.run.predict import label_map
    from egcnn_nb.tensors import to_labels

    grid = Volume(np.zeros((0, 0, 0), np.float32), np.eye(4), nib.Nifti1Header(), "none.nii")
    box = (slice(0, 9), slice(0, 8), slice(0, 7))
    loaded = Loaded("case", torch.zeros(1, 9, 8, 7), None, None, grid, (9, 8, 7), box)
    labels = {0: "background", 1: "core", 2: "edema", 300: "rim"}
    for regions in (
        {"whole": (1, 2, 300), "inner": (1, 2), "core": (1,), "edema": (2,), "rim": (300,)},
        {"whole": (1, 2, 300), "inner": (1, 300), "rim": (300,)},
    ):
        task = Task("parts", ("t1",), labels, regions, "sigmoid")
        generator = torch.Generator().manual_seed(0)
        prob = torch.rand(len(regions), 9, 8, 7, generator=generator)
        one_by_one = label_map(prob, loaded, task)
        at_once = to_labels(prob[None], task)[0].numpy()
        assert np.array_equal(one_by_one, at_once)


def test_a_run_of_python_whose_files_are_paths_is_described_in_json():
    from egcnn_nb.core import BRATS
    from egcnn_nb.run.folders import describe, settings_of_config
    from egcnn_nb.run.settings import Settings

    names = Path("names.txt")
    settings = Settings(Path("data"), Path("out"), validation=names, patch_size=(16, 16, 16))
    text = json.dumps(describe(settings, BRATS, [], []))
    config = json.loads(text)
    assert config["settings"]["validation"] == "names.txt"
    read, *_ = settings_of_config(config)
    assert read.out == "out"
