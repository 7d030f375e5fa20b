"The commands as a user runs them: in processes of their own."

import csv
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
import tiny
import torch
from safetensors.torch import load_file, save_file

from egcnn_nb.commands.train import arguments, settings_from
from egcnn_nb.core import InputError
from egcnn_nb.run.folders import check_settings, prepare
from egcnn_nb.run.settings import Settings
from egcnn_nb.run.training import Run, fit

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "data_samples"
QUICK = (
    "--epochs 10 --width 4 --levels 3 --patch_size 24 32 32 --batch_size 2 --precision fp32".split()
)


def command(module, *words, **kw):
    return subprocess.run(
        [sys.executable, "-m", f"egcnn_nb.{module}", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        **kw,
    )


def predict(*words):
    code = "import sys; from egcnn_nb.commands.predict import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=600
    )


def totals(run):
    return [float(r["total"]) for r in csv.DictReader(open(run / "metrics.csv"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A small run on the CT phantoms, 20 steps in one process"
    out = tmp_path_factory.mktemp("runs") / "one"
    done = command("train", SAMPLES / "kits2019", "--out", out, *QUICK)
    assert done.returncode == 0, done.stderr
    return out


def test_two_processes_give_the_losses_of_one(run, tmp_path):
    words = [
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "egcnn_nb.train",
        str(SAMPLES / "kits2019"),
        "--out",
        str(tmp_path / "two"),
        *QUICK,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(totals(run)) == 10  # 10 epochs of 2 steps
    np.testing.assert_allclose(totals(tmp_path / "two"), totals(run), rtol=1e-4)


def test_equal_runs_give_equal_files_whatever_the_workers(run, tmp_path):
    done = command(
        "train", SAMPLES / "kits2019", "--out", tmp_path / "again", *QUICK, "--workers", 2
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again/metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()


def interrupted(out, sig):
    "Start the small run and send `sig` once two epochs are in its log"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "egcnn_nb.train",
            str(SAMPLES / "kits2019"),
            "--out",
            str(out),
            *QUICK,
        ],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # a shell's background job ignores Ctrl-C, and so do its children
    deadline = time.time() + 300
    while not ((out / "log.txt").exists() and (out / "log.txt").read_text().count("epoch ") >= 2):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(sig)
    return process.wait(60)


@pytest.mark.parametrize("sig, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_that_was_stopped_goes_on_exactly(run, tmp_path, sig, code):
    assert interrupted(tmp_path / "run", sig) == code
    assert 2 <= len(totals(tmp_path / "run")) < 10
    done = command("train", SAMPLES / "kits2019", "--out", tmp_path / "run", *QUICK, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("metrics.csv", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()


def test_prediction_keeps_grid_and_values(run, tmp_path):
    case = SAMPLES / "kits2019/case_00003"
    done = predict(run, case, case / "imaging.nii.gz", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    source = nib.load(case / "imaging.nii.gz")
    for name in ("case_00003", "imaging"):
        image = nib.load(tmp_path / f"{name}.nii.gz")
        assert image.shape == source.shape and np.array_equal(image.affine, source.affine)
        assert set(np.unique(np.asarray(image.dataobj))) <= {0, 1, 2}
    assert predict(run, case, "--out", tmp_path).returncode == 2  # never overwritten


# --- bad input: one line, exit code 2, nothing written


def kits(tmp, change=None):
    "A copy of the CT phantoms, the first case changed"
    shutil.copytree(SAMPLES / "kits2019", tmp / "data")
    if change:
        change(tmp / "data/case_00000")
    return tmp / "data"


def save(path, array, affine):
    nib.save(nib.Nifti1Image(array, affine), path)


def edit(name, f):
    def change(folder):
        image = nib.load(folder / name)
        save(folder / name, *f(np.asarray(image.dataobj).copy(), image.affine))

    return change


def poke(value):
    def f(a, m):
        a = a.astype(np.float32)
        a[3, 3, 3] = value
        return a, m

    return f


BAD_CASES = {
    "image missing": (lambda d: (d / "imaging.nii.gz").unlink(), "no file for the channel ct"),
    "other shape": (
        edit("segmentation.nii.gz", lambda a, m: (a[:-1], m)),
        "found shape (27, 72, 80), expected (28, 72, 80)",
    ),
    "other affine": (
        edit("segmentation.nii.gz", lambda a, m: (a, m @ np.diag([1, 1, 2, 1]))),
        "has another affine than imaging.nii.gz",
    ),
    "strange label": (
        edit("segmentation.nii.gz", lambda a, m: (np.where(a == 2, 9, a).astype(np.uint8), m)),
        "holds the labels [9]",
    ),
    "NaN": (edit("imaging.nii.gz", poke(np.nan)), "1 voxels that are NaN or infinite"),
    "infinite": (edit("imaging.nii.gz", poke(np.inf)), "1 voxels that are NaN or infinite"),
    "empty file": (lambda d: (d / "imaging.nii.gz").write_bytes(b""), "found an empty file"),
    "truncated": (
        lambda d: (d / "imaging.nii.gz").write_bytes((d / "imaging.nii.gz").read_bytes()[:9000]),
        "cannot be read",
    ),
    "4D": (
        edit("imaging.nii.gz", lambda a, m: (np.stack([a, a], -1), m)),
        "found shape (28, 72, 80, 2)",
    ),
}


def refused(done, text, out):
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1].split("\r")[-1]
    assert text in line, line
    assert "Traceback" not in done.stderr and not out.exists()


@pytest.mark.parametrize("name", BAD_CASES)
def test_a_bad_case_is_refused(name, tmp_path):
    change, text = BAD_CASES[name]
    refused(
        command("train", kits(tmp_path, change), "--out", tmp_path / "run", *QUICK),
        text,
        tmp_path / "run",
    )


def test_a_missing_modality_is_refused(tmp_path):
    shutil.copytree(SAMPLES / "brats2019/LGG", tmp_path / "data/LGG")
    (tmp_path / "data/LGG/BraTS19_PHANTOM_006_1/BraTS19_PHANTOM_006_1_t2.nii.gz").unlink()
    refused(
        command("train", tmp_path / "data", "--out", tmp_path / "run", *QUICK),
        "no file for the channel t2 of BraTS19_PHANTOM_006_1",
        tmp_path / "run",
    )


def test_bad_folders_and_splits_are_refused(tmp_path):
    out = tmp_path / "run"
    refused(command("train", tmp_path / "none", "--out", out), "no such folder", out)
    (tmp_path / "other").mkdir()
    refused(command("train", tmp_path / "other", "--out", out), "no known layout", out)
    refused(command("train", SAMPLES, "--out", out), "kits2019", out)
    refused(
        command("train", SAMPLES / "kits2019", "--out", out, "--validation", 5),
        "so that some train",
        out,
    )
    refused(
        command("train", SAMPLES / "kits2019", "--out", out, "--exclude", tmp_path / "no.txt"),
        "no such file",
        out,
    )


def test_bad_runs_are_refused(run, tmp_path):
    before = (run / "metrics.csv").read_bytes()
    done = command("train", SAMPLES / "kits2019", "--out", run, *QUICK)
    assert done.returncode == 2 and "a folder that exists" in done.stderr
    done = command(
        "train", SAMPLES / "kits2019", "--out", run, *QUICK, "--backbone", "vnet", "--resume"
    )
    assert done.returncode == 2 and "found backbone segnet, expected backbone vnet" in done.stderr
    assert (run / "metrics.csv").read_bytes() == before
    refused(
        command("train", SAMPLES / "kits2019", "--out", tmp_path / "x", "--resume"),
        "no config.json",
        tmp_path / "x",
    )
    refused(
        predict(tmp_path, SAMPLES / "kits2019", "--out", tmp_path / "x"),
        "no config.json",
        tmp_path / "x",
    )


def test_an_unknown_option_is_refused(tmp_path):
    done = command("train", SAMPLES / "kits2019", "--out", tmp_path / "run", "--colour", "red")
    assert (
        done.returncode == 2
        and "unrecognized arguments: --colour red" in done.stderr
        and not (tmp_path / "run").exists()
    )


def test_a_patch_larger_than_the_volume_pads_and_says_so(tmp_path):
    words = ["--epochs", 1, "--width", 4, "--levels", 2, "--patch_size", 96, 64, 64]
    done = command("train", SAMPLES / "kits2019", "--out", tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert (
        "patch (96, 64, 64) is larger than 4 of 4 training volumes: their borders are repeated"
        in (tmp_path / "run/log.txt").read_text()
    )


@pytest.mark.parametrize("peer, edge", [("segresnet", "off"), ("dynunet", "on")])
def test_networks_of_monai_train_and_predict(peer, edge, tmp_path):
    "Volumes of 18×17×16, taken whole, which their strides do not divide; DynUNet holds its weights under two names"
    data, out = tiny.dataset(tmp_path / "data", 6), tmp_path / "run"
    done = subprocess.run(
        tiny.command(
            data,
            out,
            "--backbone",
            peer,
            "--edge",
            edge,
            "--levels",
            3,
            "--epochs",
            2,
            "--cache",
            tmp_path / "cache",
        ),
        capture_output=True,
        text=True,
        timeout=600,
        env=tiny.ENV,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    done = predict(out, data / "scan00.nii.gz", "--out", tmp_path / "predicted")
    assert done.returncode == 0, done.stderr[-3000:]
    (label,) = (tmp_path / "predicted").rglob("*.nii.gz")
    assert nib.load(label).shape == (18, 17, 16)
    done = subprocess.run(
        tiny.command(
            data,
            tmp_path / "other",
            "--backbone",
            peer,
            "--levels",
            3,
            "--patch_size",
            16,
            16,
            18,
            "--cache",
            tmp_path / "cache",
        ),
        capture_output=True,
        text=True,
        timeout=600,
        env=tiny.ENV,
    )
    assert done.returncode == 2 and "Choose multiples of 4" in done.stderr


def dead_lines(run):
    "Lines of a log that name a dead gate"
    return [line for line in (run / "log.txt").read_text().splitlines() if "is dead" in line]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_dead_gate_is_named_once(tmp_path, processes):
    data = tiny.dataset(tmp_path / "data")
    words = ["--levels", 3, "--cache", tmp_path / "cache"]

    def train(out, *more, processes=1):
        line = tiny.command(data, out, *words, *more, processes=processes)
        done = subprocess.run(line, capture_output=True, text=True, env=tiny.ENV, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return dead_lines(out)

    assert train(tmp_path / "alive", "--epochs", 1) == []
    weights = load_file(tmp_path / "alive/model.safetensors")
    weights["edge.gates.1.conv_e.bias"].fill_(-1e4)  # the ReLU of eq. 1 is off everywhere
    save_file(weights, tmp_path / "alive/model.safetensors")
    told = train(
        tmp_path / "dead", "--epochs", 3, "--init", tmp_path / "alive", processes=processes
    )
    assert len(told) == 1 and told[0].startswith(
        "gate 2 of 2, counted from the deepest, is dead: its alpha is exactly 1/2 in 100.0%"
    )
    assert told[0].endswith("--reading attention_relu=False.")
    assert (
        train(
            tmp_path / "other",
            "--epochs",
            1,
            "--init",
            tmp_path / "alive",
            "--reading",
            "attention_relu=False",
        )
        == []
    )


def test_the_demo_runs_to_its_picture(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools/demo.py", "--epochs", "1", "--out", tmp_path / "demo"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "bare   EG-CNN" in done.stdout and (tmp_path / "demo/demo.png").stat().st_size > 20_000


# --- the preset `paper`

PAPER = {  # section 3.2 of the paper, and eq. 4 to 6
    "batch_size": 8,  # "We used a batch size of 8"
    "lr": 0.0001,  # "initial learning rate of 0.0001"
    "spacing": (1, 1, 1),  # "resampled to 1 x 1 x 1 mm isotropic resolution"
    "augment": (),  # no word about augmentation
}
PAPER_READINGS = {
    "semantic": "dice",  # "we use the Dice loss", eq. 4
    "lambda1": 1,  # "lambda_1 = 1, lambda_2 = 0.5"
    "lambda2": 0.5,
    "weight_negatives": True,  # (1-beta) in eq. 6
}


def flags(words):
    "Settings from the flags of egcnn_train"
    return settings_from(arguments().parse_args(["DATA", "--out", "RUN", *words.split()]))


def test_the_preset_has_the_values_of_the_paper():
    found = flags("--preset paper")
    assert {name: getattr(found, name) for name in PAPER} == PAPER
    assert found.readings == PAPER_READINGS and found.preset == "paper"
    others = {
        name: value
        for name, value in vars(found).items()
        if name not in {*PAPER, "readings", "preset"}
    }
    assert others == {
        name: getattr(Settings("DATA", "RUN"), name) for name in others
    }  # the paper names none of them
    assert found == Settings.from_preset("paper", "DATA", "RUN")
    assert flags("--preset default") == flags("") == Settings("DATA", "RUN")


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--batch_size 2", "batch_size", 2),  # a default, but given
        ("--lr 1e-3", "lr", 1e-3),
        ("--augment flip intensity", "augment", ("flip", "intensity")),
        ("--spacing median", "spacing", "median"),
        ("--spacing 1 1 3", "spacing", (1, 1, 3)),
        ("--epochs 7", "epochs", 7),
    ],
)
def test_a_flag_that_is_given_wins_over_the_preset(words, name, value):
    expected = Settings.from_preset("paper", "DATA", "RUN", **{name: value})
    assert getattr(expected, name) == value
    assert flags(f"--preset paper {words}") == flags(f"{words} --preset=paper") == expected


@pytest.mark.parametrize(
    "words, readings",
    [
        ("--reading semantic=dice_ce", {**PAPER_READINGS, "semantic": "dice_ce"}),
        ("--reading lambda2=1 --reading tau=0.5", {**PAPER_READINGS, "lambda2": 1, "tau": 0.5}),
        ("--reading weight_negatives=False", {**PAPER_READINGS, "weight_negatives": False}),
        (
            "--reading w_cross_entropy=0.5",
            {**PAPER_READINGS, "semantic": "dice_ce", "w_cross_entropy": 0.5},
        ),
        ("--edge off", {"semantic": "dice"}),  # a bare backbone has no edge loss
    ],
)
def test_a_reading_that_is_given_wins_over_the_preset(words, readings):
    found = flags(f"--preset paper {words}")
    assert found.readings == readings
    check_settings(found)


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    "An epoch by the preset on the tiny data set, and the words that began it"
    folder = tmp_path_factory.mktemp("paper")
    small = "--preset paper --epochs 1 --width 4 --levels 2 --patch_size 16 16 16 --precision fp32 --validation 2".split()
    words = [
        tiny.dataset(folder / "data"),
        "--out",
        folder / "run",
        *small,
        "--cache",
        folder / "cache",
    ]
    done = command("train", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", words, done


def test_a_run_by_the_preset_records_its_values(paper):
    run, _, done = paper
    config = json.loads((run / "config.json").read_text())["settings"]
    assert config["preset"] == "paper"
    assert {name: config[name] for name in PAPER} == {**PAPER, "spacing": [1, 1, 1], "augment": []}
    assert {name: config["readings"][name] for name in PAPER_READINGS} == PAPER_READINGS
    log = (run / "log.txt").read_text()
    assert (
        log.startswith("preset paper\n") and "preset paper\n" in done.stdout and "epoch 1/1" in log
    )


def test_a_value_other_than_the_presets_is_printed_and_recorded(paper, tmp_path):
    words = [tmp_path / "run" if word == paper[0] else word for word in paper[1]]
    given = "--batch_size 2 --augment flip intensity --reading semantic=dice_ce".split()
    done = command("train", *words, *given, "--init", paper[0])
    assert done.returncode == 0, done.stderr[-3000:]
    line = "preset paper, but batch_size 2 in place of 8, augment flip intensity in place of none, semantic dice_ce in place of dice"
    assert line in done.stdout and line in (tmp_path / "run/log.txt").read_text()
    config = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert (config["preset"], config["batch_size"], config["augment"]) == (
        "paper",
        2,
        ["flip", "intensity"],
    )
    assert config["readings"]["semantic"] == "dice_ce" and config["readings"]["lambda2"] == 0.5


def test_a_run_is_resumed_with_its_own_preset(paper):
    run, words, _ = paper
    assert command("train", *words, "--resume").returncode == 0
    at = words.index("--preset")
    done = command("train", *words[:at], *words[at + 2 :], "--resume")
    assert (
        done.returncode == 2
        and "preset paper" in done.stderr
        and "expected batch_size 2" in done.stderr
    )


def test_an_unknown_preset_is_refused(tmp_path):
    done = command("train", SAMPLES / "kits2019", "--out", tmp_path / "run", "--preset", "papers")
    assert done.returncode == 2 and "argument --preset: invalid choice: 'papers'" in done.stderr
    with pytest.raises(
        InputError, match="The preset 'papers' is not known. Choose one of default, paper."
    ):
        Settings.from_preset("papers", "DATA", str(tmp_path / "run"))
    with pytest.raises(InputError, match="The preset 'papers' is not known"):
        fit(Settings(str(SAMPLES / "kits2019"), str(tmp_path / "run"), preset="papers"))
    assert not (tmp_path / "run").exists()


def adam(weights, gradients, rates):
    "Adam by hand (Kingma and Ba, algorithm 1), without weight decay"
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step, (gradient, rate) in enumerate(zip(gradients, rates), 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9**step), second / (1 - 0.999**step)
        weights = weights - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    return weights


def test_the_preset_steps_as_adam_with_polynomial_decay(tmp_path):
    small = dict(
        epochs=3,
        width=4,
        levels=2,
        patch_size=(16, 16, 16),
        precision="fp64",
        validation=2.0,
        cache="off",
    )
    settings = Settings.from_preset(
        "paper", str(tiny.dataset(tmp_path / "data")), str(tmp_path / "run"), **small
    )
    task, train, val, _ = prepare(settings, quiet=True)
    run = Run(settings, task, train, val, torch.device("cpu"))

    def flat(tensors):
        return torch.cat([t.detach().flatten() for t in tensors]).numpy().copy()

    parameters = list(run.model.parameters())
    gradients = []
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(flat([p.grad for p in parameters]))
    )
    begun = flat(parameters)
    for _ in range(3):
        assert run.train_epoch()[0]
        run.rows.append({})
        run.begin_epoch()
    assert len(gradients) == 6 and train[0].x.shape[1:] == (
        18,
        17,
        16,
    )  # 10 cases in batches of 8 and 2
    rates = [1e-4 * (1 - epoch / 3) ** 0.9 for epoch in (0, 0, 1, 1, 2, 2)]  # eq. 9
    np.testing.assert_allclose(flat(parameters), adam(begun, gradients, rates), rtol=0, atol=1e-12)
    assert type(run.optimizer) is torch.optim.Adam and np.abs(flat(parameters) - begun).max() > 1e-4
    constant = adam(begun, gradients, [1e-4] * 6)
    assert np.abs(flat(parameters) - constant).max() > 1e-6  # another schedule would be seen
