"The commands as a user runs them: in processes of their own."

import json
import shutil
import signal
import subprocess
import sys
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
from egcnn_nb.run.steps import read_metrics
from egcnn_nb.run.training import Run, fit

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "data_samples"
KITS = SAMPLES / "kits2019"
SMALL = "--width 4 --levels 3 --patch_size 24 32 32 --batch_size 2 --precision fp32"
QUICK = ["--epochs", "10", *SMALL.split()]


def started(words, **kw):
    "A command that has ended"
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=600, **kw)


def command(module, *words, **kw):
    "A command of the package, by the name of its module"
    return started([sys.executable, "-m", f"egcnn_nb.{module}", *words], **kw)


def quick(out, *words, data=KITS):
    "The small run"
    return command("train", data, "--out", out, *QUICK, *words)


def succeed(done):
    "Raise unless a command has ended well"
    assert done.returncode == 0, done.stderr[-3000:]


def expect_words(text, *words):
    "Raise unless each of the words is in a text"
    for word in words:
        assert word in text, text[-3000:]


def predict(*words):
    code = "import sys; from egcnn_nb.commands.predict import main; sys.exit(main())"
    return started([sys.executable, "-c", code, *words])


def totals(run):
    "The total loss of each epoch"
    return [row["total"] for row in read_metrics(run)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A small run on the CT phantoms, 20 steps in one process"
    out = tmp_path_factory.mktemp("runs") / "one"
    succeed(quick(out))
    return out


def test_two_processes_give_the_losses_of_one(run, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = ["-m", "egcnn_nb.train", KITS, "--out", tmp_path / "two", *QUICK]
    succeed(started([sys.executable, *torchrun, *words], env=tiny.ENV))
    assert len(totals(run)) == 10  # 10 epochs of 2 steps
    np.testing.assert_allclose(totals(tmp_path / "two"), totals(run), rtol=1e-4)


def test_equal_runs_give_equal_files_whatever_the_workers(run, tmp_path):
    again = tmp_path / "again"
    succeed(quick(again, "--workers", 2))
    assert (again / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()


def interrupted(out, sig):
    "Start the small run and send `sig` once two epochs are in its log"
    words = [sys.executable, "-m", "egcnn_nb.train", str(KITS), "--out", str(out), *QUICK]

    def listen_to_ctrl_c():
        "A shell's background job ignores Ctrl-C, and so do its children"
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, preexec_fn=listen_to_ctrl_c
    )
    tiny.begun(process, out)
    process.send_signal(sig)
    return process.wait(60)


@pytest.mark.parametrize("sig, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_that_was_stopped_goes_on_exactly(run, tmp_path, sig, code):
    out = tmp_path / "run"
    assert interrupted(out, sig) == code
    assert 2 <= len(totals(out)) < 10
    succeed(quick(out, "--resume"))
    for name in ("metrics.csv", "model.safetensors"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


def test_prediction_keeps_grid_and_values(run, tmp_path):
    case = KITS / "case_00003"
    succeed(predict(run, case, case / "imaging.nii.gz", "--out", tmp_path))
    source = nib.load(case / "imaging.nii.gz")
    for name in ("case_00003", "imaging"):
        image = nib.load(tmp_path / f"{name}.nii.gz")
        assert image.shape == source.shape
        assert np.array_equal(image.affine, source.affine)
        assert set(np.unique(np.asarray(image.dataobj))) <= {0, 1, 2}
    assert predict(run, case, "--out", tmp_path).returncode == 2  # never overwritten


# --- bad input: one line, exit code 2, nothing written


def kits(tmp, change):
    "A copy of the CT phantoms, the first case changed"
    shutil.copytree(KITS, tmp / "data")
    change(tmp / "data/case_00000")
    return tmp / "data"


IMAGE, LABEL = "imaging.nii.gz", "segmentation.nii.gz"


def edit(name, new):
    "A change of one file of a case: `new` gives voxels and affine in place of the old ones"

    def change(folder):
        image = nib.load(folder / name)
        voxels, affine = new(np.asarray(image.dataobj).copy(), image.affine)
        nib.save(nib.Nifti1Image(voxels, affine), folder / name)

    return change


def poke(value):
    "One voxel gets another value"

    def new(voxels, affine):
        voxels = voxels.astype(np.float32)
        voxels[3, 3, 3] = value
        return voxels, affine

    return new


def one_plane_less(voxels, affine):
    return voxels[:-1], affine


def stretched(voxels, affine):
    return voxels, affine @ np.diag([1, 1, 2, 1])


def strange_label(voxels, affine):
    return np.where(voxels == 2, 9, voxels).astype(np.uint8), affine


def four_axes(voxels, affine):
    return np.stack([voxels, voxels], -1), affine


def missing(folder):
    (folder / IMAGE).unlink()


def empty(folder):
    (folder / IMAGE).write_bytes(b"")


def truncated(folder):
    content = (folder / IMAGE).read_bytes()
    (folder / IMAGE).write_bytes(content[:9000])


BAD_CASES = {
    "image missing": (missing, "no file for the channel ct"),
    "other shape": (
        edit(LABEL, one_plane_less),
        "found shape (27, 72, 80), expected (28, 72, 80)",
    ),
    "other affine": (edit(LABEL, stretched), "has another affine than imaging.nii.gz"),
    "strange label": (edit(LABEL, strange_label), "holds the labels [9]"),
    "NaN": (edit(IMAGE, poke(np.nan)), "1 voxels that are NaN or infinite"),
    "infinite": (edit(IMAGE, poke(np.inf)), "1 voxels that are NaN or infinite"),
    "empty file": (empty, "found an empty file"),
    "truncated": (truncated, "cannot be read"),
    "4D": (edit(IMAGE, four_axes), "found shape (28, 72, 80, 2)"),
}


def refused(done, text, out):
    "Raise unless a command ended with one line that has a text, and wrote nothing"
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1].split("\r")[-1]
    assert text in line, line
    assert "Traceback" not in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("name", BAD_CASES)
def test_a_bad_case_is_refused(name, tmp_path):
    change, text = BAD_CASES[name]
    out = tmp_path / "run"
    refused(quick(out, data=kits(tmp_path, change)), text, out)


def test_a_missing_modality_is_refused(tmp_path):
    shutil.copytree(SAMPLES / "brats2019/LGG", tmp_path / "data/LGG")
    (tmp_path / "data/LGG/BraTS19_PHANTOM_006_1/BraTS19_PHANTOM_006_1_t2.nii.gz").unlink()
    out = tmp_path / "run"
    text = "no file for the channel t2 of BraTS19_PHANTOM_006_1"
    refused(quick(out, data=tmp_path / "data"), text, out)


def test_bad_folders_and_splits_are_refused(tmp_path):
    out = tmp_path / "run"
    (tmp_path / "other").mkdir()
    bad = (
        (tmp_path / "none", [], "no such folder"),
        (tmp_path / "other", [], "no known layout"),
        (SAMPLES, [], "kits2019"),
        (KITS, ["--validation", 5], "so that some train"),
        (KITS, ["--exclude", tmp_path / "no.txt"], "no such file"),
    )
    for data, words, text in bad:
        refused(command("train", data, "--out", out, *words), text, out)


def test_bad_runs_are_refused(run, tmp_path):
    before = (run / "metrics.csv").read_bytes()
    done = quick(run)
    assert done.returncode == 2
    assert "a folder that exists" in done.stderr
    done = quick(run, "--backbone", "vnet", "--resume")
    assert done.returncode == 2
    assert "found backbone segnet, expected backbone vnet" in done.stderr
    assert (run / "metrics.csv").read_bytes() == before
    out = tmp_path / "x"
    refused(command("train", KITS, "--out", out, "--resume"), "no config.json", out)
    refused(predict(tmp_path, KITS, "--out", out), "no config.json", out)


def test_an_unknown_option_is_refused(tmp_path):
    out = tmp_path / "run"
    done = command("train", KITS, "--out", out, "--colour", "red")
    refused(done, "unrecognized arguments: --colour red", out)


def test_a_patch_larger_than_the_volume_pads_and_says_so(tmp_path):
    out = tmp_path / "run"
    words = ["--epochs", 1, "--width", 4, "--levels", 2, "--patch_size", 96, 64, 64]
    succeed(command("train", KITS, "--out", out, *words))
    line = "patch (96, 64, 64) is larger than 4 of 4 training volumes: their borders are repeated"
    assert line in (out / "log.txt").read_text()


@pytest.mark.parametrize("peer, edge", [("segresnet", "off"), ("dynunet", "on")])
def test_networks_of_monai_train_and_predict(peer, edge, tmp_path):
    """Volumes of 18×17×16, taken whole, which the strides of the networks do not divide

    DynUNet holds its weights under two names.
    """
    data, out = tiny.dataset(tmp_path / "data", 6), tmp_path / "run"
    words = ["--backbone", peer, "--levels", 3, "--cache", tmp_path / "cache"]
    train = tiny.command(data, out, *words, "--edge", edge, "--epochs", 2)
    succeed(started(train, env=tiny.ENV))
    succeed(predict(out, data / "scan00.nii.gz", "--out", tmp_path / "predicted"))
    (label,) = (tmp_path / "predicted").rglob("*.nii.gz")
    assert nib.load(label).shape == (18, 17, 16)
    odd = tiny.command(data, tmp_path / "other", *words, "--patch_size", 16, 16, 18)
    done = started(odd, env=tiny.ENV)
    assert done.returncode == 2
    assert "Choose multiples of 4" in done.stderr


def dead_lines(run):
    "Lines of a log that name a dead gate"
    lines = (run / "log.txt").read_text().splitlines()
    return [line for line in lines if "is dead" in line]


def kill_second_gate(run):
    "Change the weights of a run so that the ReLU of eq. 1 is off everywhere in its second gate"
    weights = load_file(run / "model.safetensors")
    weights["edge.gates.1.conv_e.bias"].fill_(-1e4)
    save_file(weights, run / "model.safetensors")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_dead_gate_is_named_once(tmp_path, processes):
    data = tiny.dataset(tmp_path / "data")
    small = ["--levels", 3, "--cache", tmp_path / "cache"]

    def train(name, *more, processes=1):
        out = tmp_path / name
        line = tiny.command(data, out, *small, *more, processes=processes)
        succeed(started(line, env=tiny.ENV))
        return dead_lines(out)

    assert train("alive", "--epochs", 1) == []
    kill_second_gate(tmp_path / "alive")
    from_dead = ["--init", tmp_path / "alive"]
    (told,) = train("dead", "--epochs", 3, *from_dead, processes=processes)
    assert told.startswith(
        "gate 2 of 2, counted from the deepest, is dead: its alpha is exactly 1/2 in 100.0%"
    )
    assert told.endswith("--reading attention_relu=False.")
    other = train("other", "--epochs", 1, *from_dead, "--reading", "attention_relu=False")
    assert other == []


def test_the_demo_runs_to_its_picture(tmp_path):
    out = tmp_path / "demo"
    done = started([sys.executable, ROOT / "tools/demo.py", "--epochs", 1, "--out", out])
    succeed(done)
    assert "bare   EG-CNN" in done.stdout
    assert (out / "demo.png").stat().st_size > 20_000


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
    assert found.readings == PAPER_READINGS
    assert found.preset == "paper"
    assert found == Settings.from_preset("paper", "DATA", "RUN")
    default = Settings("DATA", "RUN")
    others = vars(found).keys() - {*PAPER, "readings", "preset"}  # the paper names none of them
    for name in others:
        assert getattr(found, name) == getattr(default, name)
    assert flags("--preset default") == flags("") == default


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
    data, out = tiny.dataset(folder / "data"), folder / "run"
    small = "--epochs 1 --width 4 --levels 2 --patch_size 16 16 16 --precision fp32 --validation 2"
    words = [data, "--out", out, "--preset", "paper", *small.split(), "--cache", folder / "cache"]
    done = command("train", *words)
    succeed(done)
    return out, words, done


def config_of(run):
    "The settings in a run's config.json"
    return json.loads((run / "config.json").read_text())["settings"]


def test_a_run_by_the_preset_records_its_values(paper):
    run, _, done = paper
    config = config_of(run)
    expected = {**PAPER, "preset": "paper", "spacing": [1, 1, 1], "augment": []}
    assert {name: config[name] for name in expected} == expected
    assert {name: config["readings"][name] for name in PAPER_READINGS} == PAPER_READINGS
    log = (run / "log.txt").read_text()
    assert log.startswith("preset paper\n")
    assert "epoch 1/1" in log
    assert "preset paper\n" in done.stdout


def test_a_value_other_than_the_presets_is_printed_and_recorded(paper, tmp_path):
    first, words, _ = paper
    out = tmp_path / "run"
    words = [out if word == first else word for word in words]
    given = "--batch_size 2 --augment flip intensity --reading semantic=dice_ce".split()
    done = command("train", *words, *given, "--init", first)
    succeed(done)
    line = (
        "preset paper, but batch_size 2 in place of 8, augment flip intensity in place of none, "
        "semantic dice_ce in place of dice"
    )
    assert line in done.stdout
    assert line in (out / "log.txt").read_text()
    config = config_of(out)
    expected = {"preset": "paper", "batch_size": 2, "augment": ["flip", "intensity"]}
    assert {name: config[name] for name in expected} == expected
    assert config["readings"]["semantic"] == "dice_ce"
    assert config["readings"]["lambda2"] == 0.5


def test_a_run_is_resumed_with_its_own_preset(paper):
    _, words, _ = paper
    succeed(command("train", *words, "--resume"))
    at = words.index("--preset")
    without = words[:at] + words[at + 2 :]
    done = command("train", *without, "--resume")
    assert done.returncode == 2
    expect_words(done.stderr, "preset paper", "expected batch_size 2")


def test_an_unknown_preset_is_refused(tmp_path):
    out = tmp_path / "run"
    done = command("train", KITS, "--out", out, "--preset", "papers")
    refused(done, "argument --preset: invalid choice: 'papers'", out)
    sentence = "The preset 'papers' is not known. Choose one of default, paper."
    with pytest.raises(InputError, match=sentence):
        Settings.from_preset("papers", "DATA", str(out))
    with pytest.raises(InputError, match="The preset 'papers' is not known"):
        fit(Settings(str(KITS), str(out), preset="papers"))
    assert not out.exists()


def adam(weights, gradients, rates):
    "Adam by hand (Kingma and Ba, algorithm 1), without weight decay"
    first = np.zeros_like(weights)
    second = np.zeros_like(weights)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean = first / (1 - 0.9**step)
        square = second / (1 - 0.999**step)
        weights = weights - rate * mean / (np.sqrt(square) + 1e-8)
    return weights


def flat(tensors):
    "Numbers of all tensors in one array"
    parts = [tensor.detach().flatten() for tensor in tensors]
    return torch.cat(parts).numpy().copy()


def begin_by_the_preset(folder):
    "A run of three epochs by the preset on the tiny data set"
    small = {
        "epochs": 3,
        "width": 4,
        "levels": 2,
        "patch_size": (16, 16, 16),
        "precision": "fp64",
        "validation": 2.0,
        "cache": "off",
    }
    data = str(tiny.dataset(folder / "data"))
    settings = Settings.from_preset("paper", data, str(folder / "run"), **small)
    cases = prepare(settings, quiet=True)
    assert cases.train[0].x.shape[1:] == (18, 17, 16)
    return Run(settings, cases.task, cases.train, cases.val, torch.device("cpu"))


def test_the_preset_steps_as_adam_with_polynomial_decay(tmp_path):
    run = begin_by_the_preset(tmp_path)
    assert type(run.optimizer) is torch.optim.Adam
    parameters = list(run.model.parameters())
    gradients = []

    def note(*_):
        gradients.append(flat([parameter.grad for parameter in parameters]))

    run.optimizer.register_step_pre_hook(note)
    begun = flat(parameters)
    for _ in range(3):
        finished, _ = run.train_epoch()
        assert finished
        run.rows.append({})
        run.begin_epoch()
    assert len(gradients) == 6  # 10 cases in batches of 8 and 2
    rates = [1e-4 * (1 - epoch / 3) ** 0.9 for epoch in (0, 0, 1, 1, 2, 2)]  # eq. 9
    ended = flat(parameters)
    np.testing.assert_allclose(ended, adam(begun, gradients, rates), rtol=0, atol=1e-12)
    assert np.abs(ended - begun).max() > 1e-4
    constant = adam(begun, gradients, [1e-4] * 6)
    assert np.abs(ended - constant).max() > 1e-6  # another schedule would be seen
