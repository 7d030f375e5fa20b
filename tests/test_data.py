"Preparing and predicting from processes of their own: caches that are filled at once, folders that are killed, a stranger with the wheel."

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
for case in prepared_cases(data.cases, data.task, Path(sys.argv[2]), quiet=True): print(case.name, case.x.double().sum().item(), case.labels.sum().item())
"""


def test_processes_that_fill_one_cache_do_not_meet(tmp_path):
    fill = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, str(BRAINS), str(tmp_path / "cache")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [p.communicate(timeout=300)[0] for p in fill]
    assert (
        all(p.returncode == 0 for p in fill) and said[0].count("\n") == 12 and len(set(said)) == 1
    )
    entries = list((tmp_path / "cache").iterdir())
    assert len(entries) == 12 and all(e.suffix == ".safetensors" for e in entries)


def test_a_process_killed_while_it_fills_a_cache_leaves_only_whole_entries(tmp_path):
    "The next one takes what is there and makes the rest"
    cache, whole = (
        tmp_path / "cache",
        subprocess.run(
            [sys.executable, "-c", FILL, str(BRAINS), str(tmp_path / "other")],
            stdout=subprocess.PIPE,
            text=True,
            timeout=300,
        ).stdout,
    )
    process = subprocess.Popen(
        [sys.executable, "-c", FILL, str(BRAINS), str(cache)], stdout=subprocess.DEVNULL
    )
    while not (cache.is_dir() and any(cache.glob("[!.]*.safetensors"))):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = {e: e.stat().st_ino for e in cache.glob("[!.]*.safetensors")}
    assert 1 <= len(kept) <= 12
    assert (
        subprocess.run(
            [sys.executable, "-c", FILL, str(BRAINS), str(cache)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=300,
        ).stdout
        == whole
    )
    assert (
        all(e.stat().st_ino == i for e, i in kept.items())
        and len(list(cache.glob("[!.]*.safetensors"))) == 12
    )


PREDICT = [
    sys.executable,
    "-c",
    "import sys; from egcnn_nb.commands.predict import main; sys.exit(main())",
]


def test_a_folder_that_was_killed_goes_on_and_ends_like_one_left_alone(tmp_path):
    words = [str(EG), str(BRAINS), "--save", "edges", "--out"]
    alone = subprocess.run(
        [*PREDICT, *words, str(tmp_path / "alone")], capture_output=True, text=True, timeout=600
    )
    assert alone.returncode == 0 and "predicting" in alone.stderr and "window" in alone.stderr, (
        alone.stderr
    )  # both bars
    process = subprocess.Popen(
        [*PREDICT, *words, str(tmp_path / "killed")], stderr=subprocess.DEVNULL
    )
    labels = lambda d: [f for f in (tmp_path / d).glob("*.nii.gz") if "edges" not in f.name]
    while len(labels("killed")) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(labels("killed")) < 12
    again = subprocess.run(
        [*PREDICT, *words, str(tmp_path / "killed"), "--resume"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert again.returncode == 0 and "inputs are done already" in again.stderr, again.stderr
    names = sorted(f.name for f in (tmp_path / "alone").glob("*.nii.gz"))
    assert {f.name for f in (tmp_path / "killed").iterdir()} == {
        *names,
        "egcnn_predict.json",
        "run.lock",
    } and len(names) == 24
    for name in names:
        np.testing.assert_array_equal(
            *[np.asarray(nib.load(tmp_path / d / name).dataobj) for d in ("alone", "killed")]
        )


STRANGER = """
import numpy as np, torch
from monai.networks.nets import UNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.run.predict import predict
from egcnn_nb.method.losses import EGLoss
x, labels = torch.randn(2, 1, 32, 32, 32), torch.randint(0, 2, (2, 32, 32, 32))
model, loss = EGCNN(UNet(3, 1, 2, (8, 16, 32), (2, 2)), x), EGLoss("softmax")
logits, edge_logits, main_logits = model(x, return_main=True)
loss(logits, edge_logits, torch.nn.functional.one_hot(labels).movedim(-1, 1).float(), main_logits)["total"].backward()
print(predict(model, np.zeros((1, 40, 30, 20)), (32, 32, 32), spacing=(.8, .8, 2)).shape)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, unpacked by pip into a folder of its own, away from the clone"
    tmp = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT, tmp / "clone", ignore=shutil.ignore_patterns(".venv", ".git", "nbs", "demo*")
    )
    pip = lambda *words: subprocess.run(
        [sys.executable, "-m", "pip", *words], check=True, capture_output=True, cwd=tmp
    )
    pip("wheel", "--no-deps", "--wheel-dir", "dist", "./clone")
    pip("install", "--no-deps", "--target", "site", str(next((tmp / "dist").glob("*.whl"))))
    return tmp / "site"


def test_ten_lines_of_a_stranger_with_the_wheel(wheel, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    where = subprocess.run(
        [sys.executable, "-c", "import egcnn_nb; print(egcnn_nb.__file__)"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(wheel))  # the wheel's, not the clone's
    assert len(STRANGER.strip().splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, "-c", STRANGER],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode == 0
        and "torch.Size([2, 40, 30, 20])" in done.stdout
        and "gate 0" in done.stdout
    ), done.stderr


def test_the_wheel_brings_what_the_package_reads(wheel, tmp_path):
    env, shipped = {**os.environ, "PYTHONPATH": str(wheel)}, wheel / "egcnn_nb/pretrained/eg"
    assert json.loads((shipped / "config.json").read_text())["task"]["name"] == "BraTS 2019"
    done = subprocess.run(
        [
            *PREDICT,
            str(shipped),
            str(BRAINS / "HGG/BraTS19_PHANTOM_001_1"),
            "--out",
            str(tmp_path / "out"),
        ],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and (tmp_path / "out/BraTS19_PHANTOM_001_1.nii.gz").is_file(), (
        done.stderr
    )


def test_files_in_memory_count_as_free(monkeypatch):
    "A container's memory.current holds the files that were read, which the kernel gives up at once"
    from egcnn_nb import core

    gib = 1 << 30
    told = {
        "memory.max": [str(2 * gib)],
        "memory.current": [str(2 * gib)],
        "memory.stat": [
            "anon",
            str(gib),
            "inactive_file",
            str(gib // 2),
            "active_file",
            str(gib // 4),
        ],
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
    loaded = Loaded(
        "case",
        torch.zeros(1, 9, 8, 7),
        None,
        None,
        grid,
        (9, 8, 7),
        (slice(0, 9), slice(0, 8), slice(0, 7)),
    )
    labels = {0: "background", 1: "core", 2: "edema", 300: "rim"}
    for regions in (
        {"whole": (1, 2, 300), "inner": (1, 2), "core": (1,), "edema": (2,), "rim": (300,)},
        {"whole": (1, 2, 300), "inner": (1, 300), "rim": (300,)},
    ):
        task = Task("parts", ("t1",), labels, regions, "sigmoid")
        prob = torch.rand(len(regions), 9, 8, 7, generator=torch.Generator().manual_seed(0))
        assert np.array_equal(label_map(prob, loaded, task), to_labels(prob[None], task)[0].numpy())


def test_a_run_of_python_whose_files_are_paths_is_described_in_json():
    from egcnn_nb.core import BRATS
    from egcnn_nb.run.folders import describe, settings_of_config
    from egcnn_nb.run.settings import Settings

    settings = Settings(
        Path("data"), Path("out"), validation=Path("names.txt"), patch_size=(16, 16, 16)
    )
    config = json.loads(json.dumps(describe(settings, BRATS, [], [])))
    assert (
        config["settings"]["validation"] == "names.txt"
        and settings_of_config(config)[0].out == "out"
    )
