"The commands as a user runs them: in processes of their own."

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
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
    line = [str(word) for word in words]
    options = dict(capture_output=True, text=True, timeout=600)
    return subprocess.run(line, **options, **kw)


def train(data, out, *words):
    "egcnn_train, ended"
    line = [sys.executable, "-m", "egcnn_nb.train"]
    line += [data, "--out", out]
    line += words
    return started(line)


def quick(out, *words, data=KITS):
    "The small run"
    return train(data, out, *QUICK, *words)


def tiny_run(data, out, *words, processes=1):
    "A run on the tiny data set, ended"
    line = tiny.command(data, out, *words, processes=processes)
    return started(line, env=tiny.ENV)


def succeed(done):
    "Raise unless a command has ended well"
    error = done.stderr
    assert done.returncode == 0, error


def fail(done, *texts):
    "Raise unless a command was refused with these texts"
    assert done.returncode == 2
    expect_words(done.stderr, *texts)


def expect_words(text, *words):
    "Raise unless each of the words is in a text"
    for word in words:
        assert word in text, text[-3000:]


def predict(*words):
    "egcnn_predict, ended"
    code = "import sys; from egcnn_nb.commands.predict import main; sys.exit(main())"
    script = [sys.executable, "-c", code]
    return started([*script, *words])


def totals(run):
    "The total loss of each epoch"
    rows = read_metrics(run)
    return [row["total"] for row in rows]


def expect_same_file(name, run, other):
    "Raise unless two runs have the same file, byte for byte"
    ours, theirs = run / name, other / name
    found = ours.read_bytes()
    expected = theirs.read_bytes()
    assert found == expected, name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A small run on the CT phantoms, 20 steps in one process"
    folder = tmp_path_factory.mktemp("runs")
    out = folder / "one"
    done = quick(out)
    succeed(done)
    return out


TWO_PROCESSES = "torch.distributed.run --standalone --nproc_per_node=2".split()


def test_two_processes_give_the_losses_of_one(run, tmp_path):
    two = tmp_path / "two"
    line = [sys.executable, "-m", *TWO_PROCESSES]
    line += ["-m", "egcnn_nb.train", KITS]
    line += ["--out", two, *QUICK]
    done = started(line, env=tiny.ENV)
    succeed(done)
    of_one = totals(run)
    of_two = totals(two)
    epochs = len(of_one)
    assert epochs == 10  # of 2 steps
    np.testing.assert_allclose(of_two, of_one, rtol=1e-4)


def test_equal_runs_give_equal_files_whatever_the_workers(run, tmp_path):
    again = tmp_path / "again"
    done = quick(again, "--workers", 2)
    succeed(done)
    expect_same_file("metrics.csv", again, run)


def listen_to_ctrl_c():
    "A shell's background job ignores Ctrl-C, and so do its children"
    handler = signal.default_int_handler
    signal.signal(signal.SIGINT, handler)


def interrupted(out, sig):
    "Start the small run and send `sig` once two epochs are in its log"
    script = [sys.executable, "-m", "egcnn_nb.train"]
    words = [*script, str(KITS), "--out", str(out), *QUICK]
    process = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_ctrl_c,
    )
    tiny.begun(process, out)
    process.send_signal(sig)
    return process.wait(60)


@pytest.mark.parametrize("sig, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_that_was_stopped_goes_on_exactly(run, tmp_path, sig, code):
    out = tmp_path / "run"
    assert interrupted(out, sig) == code
    epochs = len(totals(out))
    assert 2 <= epochs < 10
    done = quick(out, "--resume")
    succeed(done)
    expect_same_file("metrics.csv", out, run)
    expect_same_file("model.safetensors", out, run)


def test_prediction_keeps_grid_and_values(run, tmp_path):
    case = KITS / "case_00003"
    scan = case / "imaging.nii.gz"
    done = predict(run, case, scan, "--out", tmp_path)
    succeed(done)
    source = nib.Nifti1Image.load(scan)
    for name in ("case_00003", "imaging"):
        path = tmp_path / f"{name}.nii.gz"
        image = nib.Nifti1Image.load(path)
        assert image.shape == source.shape
        found, expected = np.asarray(image.affine), np.asarray(source.affine)
        assert np.array_equal(found, expected)
        values = set(np.unique(image.dataobj))
        assert values <= {0, 1, 2}
    again = predict(run, case, "--out", tmp_path)
    assert again.returncode == 2  # never overwritten


# --- bad input: one line, exit code 2, nothing written


def kits(tmp, change):
    "A copy of the CT phantoms, the first case changed"
    data = tmp / "data"
    shutil.copytree(KITS, data)
    change(data / "case_00000")
    return data


IMAGE, LABEL = "imaging.nii.gz", "segmentation.nii.gz"


def edit(name, new):
    "A change of one file of a case: `new` gives voxels and affine in place of the old ones"

    def change(folder):
        path = folder / name
        image = nib.Nifti1Image.load(path)
        old = np.array(image.dataobj)
        voxels, affine = new(old, image.affine)
        changed = nib.Nifti1Image(voxels, affine)
        nib.save(changed, path)

    return change


def poke(value):
    "One voxel gets another value"

    def new(voxels, affine):
        changed = voxels.astype(np.float32)
        place = (3, 3, 3)
        changed[place] = value
        return changed, affine

    return new


def one_plane_less(voxels, affine):
    fewer = voxels[:-1]
    return fewer, affine


def stretched(voxels, affine):
    longer = affine.copy()
    longer[:, 2] *= 2
    return voxels, longer


def strange_label(voxels, affine):
    is_two = voxels == 2
    changed = np.where(is_two, 9, voxels)
    return changed.astype(np.uint8), affine


def four_axes(voxels, affine):
    twice = [voxels, voxels]
    return np.stack(twice, -1), affine


def missing(folder):
    path = folder / IMAGE
    path.unlink()


def empty(folder):
    path = folder / IMAGE
    path.write_bytes(b"")


def truncated(folder):
    path = folder / IMAGE
    content = path.read_bytes()
    path.write_bytes(content[:9000])


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
    error = done.stderr
    assert done.returncode == 2, error
    lines = error.strip().splitlines()
    last = lines[-1]
    *_, shown = last.split("\r")
    assert text in shown, shown
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize("name", BAD_CASES)
def test_a_bad_case_is_refused(name, tmp_path):
    change, text = BAD_CASES[name]
    out = tmp_path / "run"
    data = kits(tmp_path, change)
    done = quick(out, data=data)
    refused(done, text, out)


def test_a_missing_modality_is_refused(tmp_path):
    case = "BraTS19_PHANTOM_006_1"
    data = tmp_path / "data"
    out = tmp_path / "run"
    low_grade = data / "LGG"
    shutil.copytree(SAMPLES / "brats2019/LGG", low_grade)
    scan = low_grade / case / f"{case}_t2.nii.gz"
    scan.unlink()
    done = quick(out, data=data)
    text = f"no file for the channel t2 of {case}"
    refused(done, text, out)


def test_bad_folders_and_splits_are_refused(tmp_path):
    out = tmp_path / "run"
    none, other = tmp_path / "none", tmp_path / "other"
    other.mkdir()
    bad = (
        (none, [], "no such folder"),
        (other, [], "no known layout"),
        (SAMPLES, [], "kits2019"),
        (KITS, ["--validation", 5], "so that some train"),
        (KITS, ["--exclude", none], "no such file"),
    )
    for data, words, text in bad:
        done = train(data, out, *words)
        refused(done, text, out)


def test_bad_runs_are_refused(run, tmp_path):
    metrics = run / "metrics.csv"
    before = metrics.read_bytes()
    done = quick(run)
    fail(done, "a folder that exists")
    done = quick(run, "--backbone", "vnet", "--resume")
    fail(done, "found backbone segnet, expected backbone vnet")
    assert metrics.read_bytes() == before
    out = tmp_path / "x"
    done = train(KITS, out, "--resume")
    refused(done, "no config.json", out)
    done = predict(tmp_path, KITS, "--out", out)
    refused(done, "no config.json", out)


def test_an_unknown_option_is_refused(tmp_path):
    out = tmp_path / "run"
    done = train(KITS, out, "--colour", "red")
    text = "unrecognized arguments: --colour red"
    refused(done, text, out)


def text_of_log(run):
    "The log of a run"
    path = run / "log.txt"
    return path.read_text()


def test_a_patch_larger_than_the_volume_pads_and_says_so(tmp_path):
    out = tmp_path / "run"
    words = "--epochs 1 --width 4 --levels 2 --patch_size 96 64 64".split()
    done = train(KITS, out, *words)
    succeed(done)
    line = "patch (96, 64, 64) is larger than 4 of 4 training volumes: their borders are repeated"
    assert line in text_of_log(out)


@pytest.mark.parametrize("peer, edge", [("segresnet", "off"), ("dynunet", "on")])
def test_networks_of_monai_train_and_predict(peer, edge, tmp_path):
    """Volumes of 18×17×16, taken whole, which the strides of the networks do not divide

    DynUNet holds its weights under two names.
    """
    data = tiny.dataset(tmp_path / "data", 6)
    out = tmp_path / "run"
    predicted = tmp_path / "predicted"
    cache = tmp_path / "cache"
    words = ["--backbone", peer, "--levels", 3, "--cache", cache]
    done = tiny_run(data, out, *words, "--edge", edge, "--epochs", 2)
    succeed(done)
    scan = data / "scan00.nii.gz"
    done = predict(out, scan, "--out", predicted)
    succeed(done)
    (path,) = predicted.rglob("*.nii.gz")
    label_map = nib.Nifti1Image.load(path)
    assert label_map.shape == (18, 17, 16)
    other = tmp_path / "other"
    done = tiny_run(data, other, *words, "--patch_size", 16, 16, 18)
    fail(done, "Choose multiples of 4")


def dead_lines(run):
    "Lines of a log that name a dead gate"
    lines = text_of_log(run).splitlines()
    return [line for line in lines if "is dead" in line]


def kill_second_gate(run):
    "Change the weights of a run so that the ReLU of eq. 1 is off everywhere in its second gate"
    path = run / "model.safetensors"
    weights = load_file(path)
    bias = weights["edge.gates.1.conv_e.bias"]
    bias.fill_(-1e4)
    save_file(weights, path)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_dead_gate_is_named_once(tmp_path, processes):
    data = tiny.dataset(tmp_path / "data")
    small = ["--levels", 3, "--cache", tmp_path / "cache"]

    def told_of(name, *more, processes=1):
        out = tmp_path / name
        done = tiny_run(data, out, *small, *more, processes=processes)
        succeed(done)
        return dead_lines(out)

    assert told_of("alive", "--epochs", 1) == []
    alive = tmp_path / "alive"
    kill_second_gate(alive)
    (told,) = told_of("dead", "--epochs", 3, "--init", alive, processes=processes)
    assert told.startswith(
        "gate 2 of 2, counted from the deepest, is dead: its alpha is exactly 1/2 in 100.0%"
    )
    remedy = "--reading attention_relu=False"
    assert told.endswith(f"{remedy}.")
    other = told_of("other", "--epochs", 1, "--init", alive, *remedy.split())
    assert other == []


def test_the_demo_runs_to_its_picture(tmp_path):
    out = tmp_path / "demo"
    script = ROOT / "tools/demo.py"
    line = [sys.executable, script, "--epochs", 1, "--out", out]
    done = started(line)
    succeed(done)
    assert "surface Dice" in done.stdout
    assert "F1 of Sobel on its mask" in done.stdout
    picture = out / "demo.png"
    assert picture.stat().st_size > 20_000


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
    parser = arguments()
    line = f"DATA --out RUN {words}"
    given = parser.parse_args(line.split())
    return settings_from(given)


def part(values, names):
    "Some of the values of a dict"
    return {name: values[name] for name in names}


def test_the_preset_has_the_values_of_the_paper():
    found = flags("--preset paper")
    values = vars(found)
    assert part(values, PAPER) == PAPER
    assert found.readings == PAPER_READINGS
    assert found.preset == "paper"
    assert found == Settings.from_preset("paper", "DATA", "RUN")
    default = Settings("DATA", "RUN")
    others = values.keys() - {*PAPER, "readings", "preset"}  # the paper names none of them
    assert part(values, others) == part(vars(default), others)
    assert flags("--preset default") == default
    assert flags("") == default


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
    given = {name: value}
    expected = Settings.from_preset("paper", "DATA", "RUN", **given)
    assert getattr(expected, name) == value
    for line in (f"--preset paper {words}", f"{words} --preset=paper"):
        found = flags(line)
        assert found == expected


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
    data = folder / "data"
    tiny.dataset(data)
    run = PaperRun(data, folder / "run", folder / "cache")
    run.done = run.train("--preset", "paper")
    succeed(run.done)
    return run


SMALL_PAPER = (
    "--epochs 1 --width 4 --levels 2 --patch_size 16 16 16 --precision fp32 --validation 2"
)


@dataclass
class PaperRun:
    "A run of one epoch on the tiny data set"

    data: Path
    out: Path
    cache: Path
    done: subprocess.CompletedProcess | None = None  # the command that made it

    def train(self, *words, out=None):
        "Train it, or another run on its data"
        small = SMALL_PAPER.split()
        small += ["--cache", self.cache]
        out = out or self.out
        return train(self.data, out, *small, *words)


def config_of(run):
    "The settings in a run's config.json"
    text = (run / "config.json").read_text()
    config = json.loads(text)
    return config["settings"]


def test_a_run_by_the_preset_records_its_values(paper):
    config = config_of(paper.out)
    expected = {**PAPER, "preset": "paper", "spacing": [1, 1, 1], "augment": []}
    assert part(config, expected) == expected
    readings = config["readings"]
    assert part(readings, PAPER_READINGS) == PAPER_READINGS
    log = text_of_log(paper.out)
    assert log.startswith("preset paper\n")
    assert "epoch 1/1" in log
    assert "preset paper\n" in paper.done.stdout


def test_a_value_other_than_the_presets_is_printed_and_recorded(paper, tmp_path):
    out = tmp_path / "run"
    given = (
        "--preset paper --batch_size 2 --augment flip intensity --reading semantic=dice_ce".split()
    )
    done = paper.train(*given, "--init", paper.out, out=out)
    succeed(done)
    line = (
        "preset paper, but batch_size 2 in place of 8, augment flip intensity in place of none, "
        "semantic dice_ce in place of dice"
    )
    assert line in done.stdout
    assert line in text_of_log(out)
    config = config_of(out)
    expected = {"preset": "paper", "batch_size": 2, "augment": ["flip", "intensity"]}
    assert part(config, expected) == expected
    readings = config["readings"]
    assert readings["semantic"] == "dice_ce"
    assert readings["lambda2"] == 0.5


def test_a_run_is_resumed_with_its_own_preset(paper):
    done = paper.train("--preset", "paper", "--resume")
    succeed(done)
    without = paper.train("--resume")
    fail(without, "preset paper", "expected batch_size 2")


def test_an_unknown_preset_is_refused(tmp_path):
    out = tmp_path / "run"
    done = train(KITS, out, "--preset", "papers")
    text = "argument --preset: invalid choice: 'papers'"
    refused(done, text, out)
    sentence = "The preset 'papers' is not known. Choose one of default, paper."
    with pytest.raises(InputError, match=sentence):
        Settings.from_preset("papers", "DATA", str(out))
    settings = Settings(str(KITS), str(out), preset="papers")
    with pytest.raises(InputError, match="The preset 'papers' is not known"):
        fit(settings)
    assert not out.exists()


def adam(weights, gradients, rates):
    "Adam by hand (Kingma and Ba, algorithm 1), without weight decay"
    first = np.zeros_like(weights)
    second = np.zeros_like(weights)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        first_bias = 1 - 0.9**step
        second_bias = 1 - 0.999**step
        mean = first / first_bias
        deviation = np.sqrt(second / second_bias)
        change = mean / (deviation + 1e-8)
        weights = weights - rate * change
    return weights


def flat(tensors):
    "Numbers of all tensors in one array"
    parts = []
    for tensor in tensors:
        numbers = tensor.detach()
        parts.append(numbers.flatten())
    whole = torch.cat(parts)
    return whole.numpy()


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
    data = tiny.dataset(folder / "data")
    out = folder / "run"
    settings = Settings.from_preset("paper", str(data), str(out), **small)
    cases = prepare(settings, quiet=True)
    first = cases.train[0]
    assert first.x.shape[1:] == (18, 17, 16)
    device = torch.device("cpu")
    return Run(settings, cases.task, cases.train, cases.val, device)


def polynomial_rates(epochs, steps):
    "The learning rate of each step by eq. 9"
    rates = []
    for epoch in range(epochs):
        left = 1 - epoch / epochs
        rate = 1e-4 * left**0.9
        rates += steps * [rate]
    return rates


def differ(weights, others):
    "Largest difference of two arrays"
    gap = np.abs(weights - others)
    return gap.max()


def test_the_preset_steps_as_adam_with_polynomial_decay(tmp_path):
    run = begin_by_the_preset(tmp_path)
    assert type(run.optimizer) is torch.optim.Adam
    parameters = list(run.model.parameters())
    gradients = []

    def note(*_):
        own = [parameter.grad for parameter in parameters]
        whole = flat(own)
        gradients.append(whole)

    run.optimizer.register_step_pre_hook(note)
    begun = flat(parameters)
    for _ in range(3):
        finished, _ = run.train_epoch()
        assert finished
        run.rows.append({})
        run.begin_epoch()
    assert len(gradients) == 6  # 10 cases in batches of 8 and 2
    rates = polynomial_rates(epochs=3, steps=2)
    ended = flat(parameters)
    expected = adam(begun, gradients, rates)
    np.testing.assert_allclose(ended, expected, rtol=0, atol=1e-12)
    assert differ(ended, begun) > 1e-4
    constant = adam(begun, gradients, [1e-4] * 6)
    assert differ(ended, constant) > 1e-6  # another schedule would be seen
