"The lines of CONTRIBUTING.md are run as they stand, on phantoms that are cut small, so that the page cannot rot."

import importlib
import json
import re
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tiny
import torch
from monai.transforms import RandFlipd

from egcnn_nb import Settings, data_samples, fit
from egcnn_nb.commands import experiment
from egcnn_nb.commands import train as training
from egcnn_nb.commands.check import main as check
from egcnn_nb.commands.predict import main as predict
from egcnn_nb.commands.train import main as train
from egcnn_nb.core import REGISTRY, InputError
from egcnn_nb.run.callbacks import EarlyStopping
from egcnn_nb.run.steps import read_metrics

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
COMMANDS = {"egcnn_train": train, "egcnn_check": check}
SIZE = "--width 4 --levels 2".split()
TINY = "--epochs 1 --patch_size 16 16 16 --validation 1 --precision fp32 --cache off".split()
MODULE = "# my_module.py\n"


def sections():
    "number -> text of each of the ten things"
    things, _, _ = PAGE.partition("\n## How to change")
    _, *parts = re.split(r"^### (\d+)\. ", things, flags=re.M)
    numbers = [int(number) for number in parts[::2]]
    texts = parts[1::2]
    return dict(zip(numbers, texts, strict=True))


BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(number):
    "(language, lines) of the code blocks of one thing"
    text = sections()[number]
    return BLOCK.findall(text)


def around(voxel):
    "A box of 20 voxels around a voxel"
    box = []
    for centre in voxel:
        first = max(int(centre) - 10, 0)
        box.append(slice(first, first + 20))
    return tuple(box)


def small(source, target):
    "Copy a phantom, cut to the box around its kidneys"
    path = source / "segmentation.nii.gz"
    labels = np.asarray(nib.Nifti1Image.load(path).dataobj)
    kidneys = np.argwhere(labels == 2)
    box = around(kidneys.mean(0))
    target.mkdir(parents=True)
    for name in ("imaging.nii.gz", "segmentation.nii.gz"):
        whole = nib.Nifti1Image.load(source / name)
        cut = whole.slicer[box]
        cut.to_filename(target / name)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    "Three small phantoms"
    folder = tmp_path_factory.mktemp("phantoms")
    samples = data_samples("kits2019")
    cases = sorted(samples.iterdir())
    for case in cases[:3]:
        small(case, folder / case.name)
    return folder


def restore(registry):
    "Let the registry have these entries"
    for kind, entries in registry.items():
        REGISTRY[kind].clear()
        REGISTRY[kind].update(entries)


@pytest.fixture
def place(phantoms, tmp_path, monkeypatch):
    "A folder with DATA, in which a newcomer works; what she registers is forgotten afterwards"
    data = tmp_path / "DATA"
    data.symlink_to(phantoms)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    monkeypatch.setattr(sys, "path", path)
    before = {kind: dict(entries) for kind, entries in REGISTRY.items()}
    yield tmp_path
    restore(before)
    sys.modules.pop("my_module", None)
    importlib.invalidate_caches()


def config(**changes):
    "The settings of the page, made small"
    given: dict[str, Any] = dict(
        epochs=1,
        patch_size=(16, 16, 16),
        validation=1,
        precision="fp32",
        cache="off",
        width=4,
        levels=2,
    )
    given.update(changes)
    return Settings("DATA", "RUN", **given)


def fit_here(config, **parts):
    "`fit`, each time into the next folder: RUN0, or RUN1 where there is a run"
    there = list(Path().glob("RUN*"))
    folder = f"RUN{len(there)}"
    settings = replace(config, out=folder)
    return fit(settings, quiet=True, **parts)


def follow(number, settings=None, size=SIZE):
    "Do what the page says: write my_module.py, run the commands and the Python lines; names of the Python lines"
    names = {
        "torch": torch,
        "config": settings or config(),
        "fit": fit_here,
    }
    for language, lines in blocks(number):
        if lines.startswith(MODULE):
            Path("my_module.py").write_text(lines)
        elif language == "sh":
            run(lines, size)
        else:
            run_python(lines, names)
    return names


def run_python(lines, names):
    "Run the lines of a block of Python, as where Python is started in this folder"
    here = Path.cwd()
    sys.path.insert(0, str(here))
    code = compile(lines, "CONTRIBUTING.md", "exec")
    exec(code, names)


def run(lines, size):
    "Run the commands of a block, a line each, small and in this process"
    for line in lines.splitlines():
        command, *words = line.split()
        if command == "egcnn_train":
            words += [*TINY, *size]
        sys.modules.pop("my_module", None)
        main = COMMANDS[command]
        code = main(words)
        assert code == 0, line


def config_of(run):
    "What a run keeps of itself"
    path = Path(run, "config.json")
    text = path.read_text()
    return json.loads(text)


def test_the_page_has_ten_things_and_each_says_where_it_belongs():
    found = sections()
    numbers = list(found)
    assert numbers == list(range(1, 11))
    for number, text in found.items():
        assert "**Test it:**" in text, number
        assert "**In the package:**" in text, number
        assert blocks(number), number


def test_every_notebook_and_file_that_the_page_names_is_there():
    root = Path(__file__).parents[1]
    named = re.findall(r"`((?:nbs|tests|tools)/[\w/.]+\.\w+)`", PAGE)
    assert len(named) > 10
    for name in named:
        path = root / name
        there = path.is_file() or "ROOM" in name
        assert there, name


def row_of(number, text):
    "The row of the table about one thing, from its first example"
    title = text.splitlines()[0]
    examples = [lines for language, lines in blocks(number) if language == "python"]
    first = examples[0].removeprefix(MODULE)
    file = "your script" if first == examples[0] else "`my_module.py`"
    filled = [line for line in first.splitlines() if line]
    return f"| {number}. {title} | {file} | {len(filled)} |"


def test_the_table_of_the_ten_things_counts_their_lines():
    for number, text in sections().items():
        row = row_of(number, text)
        assert row in PAGE


def test_the_first_lines_give_the_names_of_the_others():
    begin = re.search(r"begin like this:\n\n```python\n(.*?)```", PAGE, re.S)
    assert begin
    names = {}
    exec(begin[1], names)
    assert names["config"] == Settings("DATA", "RUN")
    assert names["fit"] is fit


def own_backbones():
    "Names of the backbones that the package registers"
    found = []
    for name, entry in REGISTRY["backbone"].items():
        module = entry.made.__module__
        if module.startswith("egcnn_nb."):
            found.append(name)
    return found


def test_the_help_names_every_backbone_of_the_package():
    own = own_backbones()
    assert len(own) == 5
    for command in (training, experiment):
        parser = command.arguments()
        text = parser.format_help()
        for name in own:
            assert name in text


def first_epoch(run):
    "The numbers of a run's first epoch"
    rows = read_metrics(run)
    return rows[0]


def test_1_a_loss(place):
    follow(1)
    settings = config_of("RUN")["settings"]
    readings = settings["readings"]
    assert readings["semantic"] == "tversky"
    assert readings["w_cross_entropy"] == 0
    assert settings["imports"] == ["my_module"]
    by_name = first_epoch("RUN")
    by_hand = first_epoch("RUN1")
    assert 0 < by_name["semantic"] < 1
    assert 0 < by_hand["total"] < 1


def test_2_a_backbone(place, capsys):
    follow(2)
    backbones = REGISTRY["backbone"]
    backbones.pop("plain")
    words = ["DATA", *TINY, *SIZE, "--out", "RUN2", "--backbone", "plain"]
    assert train(words) == 2  # without --import
    told = capsys.readouterr().err
    assert "The backbone 'plain' is not known. Choose one of unet, vnet, segnet" in told
    assert not Path("RUN2").exists()
    sys.modules.pop("my_module")
    scan = "DATA/case_00000/imaging.nii.gz"
    assert predict(["RUN", scan, "--out", "OUT"]) == 0  # the run knows its module
    plain = backbones["plain"]
    assert plain.title == "Plain Seg-Net"


def test_2_an_experiment_takes_the_backbone(place, capsys):
    (_, lines), *_ = blocks(2)
    Path("my_module.py").write_text(lines)
    words = (
        "DATA --out EXPERIMENT --backbones segnet plain --arms bare --cache off --plan --quick "
        "--test_cases 1 --validation 1 --patch_size 16 16 16"
    ).split()
    assert experiment.main(words) == 2
    printed = capsys.readouterr()
    assert "The backbone 'plain' is not known" in printed.err
    assert experiment.main([*words, "--import", "my_module"]) == 0
    printed = capsys.readouterr()
    assert "plain bare" in printed.out


def test_3_a_metric(place, capsys):
    without_edge = config(edge=False)
    fit(without_edge, quiet=True)
    names = follow(3)
    for row in names["rows"]:
        assert 0 <= row["precision"] <= 1
    check_precision()


def check_precision():
    "The precision of full and empty masks"
    ones = torch.ones(1, 2, 3, 3, 3)
    none = torch.zeros(1, 2, 3, 3, 3)
    precision = REGISTRY["metric"]["precision"].made
    assert precision(ones, ones).tolist() == [[1, 1]]
    assert precision(ones, none).tolist() == [[0, 0]]
    assert precision(none, ones).tolist() == [[1, 1]]


def test_4_a_layout(place, capsys):
    flat = Path("FLAT")
    flat.mkdir()
    for case in Path("DATA").iterdir():
        name = case.name
        shutil.copy(case / "imaging.nii.gz", flat / f"{name}_image.nii.gz")
        shutil.copy(case / "segmentation.nii.gz", flat / f"{name}_mask.nii.gz")
    assert check(["FLAT"]) == 2
    follow(4)
    printed = capsys.readouterr()
    assert "FLAT: flat, 3 cases, 3 with labels" in printed.out


def test_5_patch_sampling(place):
    names = follow(5)
    around_tumor = names["around_tumor"]
    kept = config_of("RUN0")
    assert kept["parts"] == {"sampling": "around_tumor"}
    labels = torch.zeros(5, 6, 7)
    generator = torch.Generator()
    assert around_tumor(labels, generator) == [2, 3, 3]
    labels[1, 2, 3] = 2
    assert around_tumor(labels, generator) == [1, 2, 3]


def test_6_the_optimizer(place):
    follow(6)
    log = Path("RUN0/log.txt").read_text()
    assert "optimizer SGD of sgd, with the learning rates 0.01" in log


class Flip:
    "Stands for a transform of TorchIO, where that is not installed"

    def __init__(self, *args, **kw):
        self.steps = args[0] if args else []

    def __call__(self, subject):
        for step in self.steps:
            subject = step(subject)
        return subject


class Image:
    def __init__(self, tensor, affine):
        self.data = tensor


@pytest.fixture
def torchio(monkeypatch):
    "TorchIO, or what stands for it"
    if find_spec("torchio"):
        return
    stub: Any = ModuleType("torchio")
    monkeypatch.setattr(Flip, "__module__", "torchio.transforms")
    stub.Compose = stub.RandomFlip = stub.RandomNoise = Flip
    stub.ScalarImage = stub.LabelMap = Image
    stub.Subject = dict
    monkeypatch.setitem(sys.modules, "torchio", stub)


def test_7_the_augmentation(place, torchio):
    follow(7)
    for run in ("RUN0", "RUN1"):
        written = config_of(run)
        settings = written["settings"]
        assert settings["augment"] == []
        assert list(written["parts"]) == ["transforms"]


def test_8_tensorboard(place, monkeypatch):
    writers = tiny.replace_tensorboard(monkeypatch)
    follow(8)
    folders = [writer.folder for writer in writers]
    assert Path("RUN/tensorboard") in folders
    assert Path("RUN1/tensorboard") in folders
    for writer in writers:
        names = writer.names()
        assert "step/total" in names
        assert "epoch/dice_mean" in names


def test_9_early_stopping(place):
    names = follow(9)
    for run in ("RUN0", "RUN1"):
        rows = read_metrics(run)
        assert len(rows) == 1
    on_epoch = names["on_epoch"]
    good = {"dice_mean": 0.96}
    assert on_epoch(None, 0, good) == "stop"


def test_10_a_network(place):
    default = config(width=Settings.width, levels=Settings.levels)
    follow(10, default, size=[])
    settings = config_of("RUN")["settings"]
    assert settings["network"] == "my_module:build"
    first, second = config_of("RUN1"), config_of("RUN2")
    assert first["parts"] == {"model": "build"}
    assert second["parts"] == {"model": "EGCNN"}


REGISTER = """import torch
from torch import nn

from egcnn_nb import SegNet, Task, register
from egcnn_nb.data.layouts import Case, Dataset

TASK = Task("own", ("ct",), {0: "background", 1: "kidney"}, {"kidneys": (1,)}, normalize="hu")


@register("KIND", "own")
"""
IMPORT = "--import my_module".split()
SEMANTIC = [*IMPORT, *"--batch_size 1 --reading semantic=own".split()]
BACKBONE = [*IMPORT, *"--batch_size 1 --backbone own".split()]
LOSSES = {  # what is said -> what is registered
    "The loss 'own' of the module my_module returns Tensor of the shape (1, 3). Register a": """
def own(logits, target, loss):
    return (logits - target).square().mean((2, 3, 4))
""",
    "The loss 'own' fails (TypeError: own() takes 2 positional arguments but 3 were given)": """
def own(logits, target):
    return (logits - target).square().mean()
""",
    "its term total is nan for the first patches": """
def own(logits, target, loss):
    return (logits.softmax(1) - 1).log().mean()
""",
    "has gradients that are not finite": """
def own(logits, target, loss):
    return (0 * logits).sum().sqrt()
""",
    "does not depend on the weights of the network. Compute it from the output": """
def own(logits, target, loss):
    return (logits.argmax(1) != 0).float().mean()
""",
}
BACKBONES = {
    "The backbone 'own' of the module my_module fails (TypeError: own() takes 2 positional": """
def own(in_channels, out_channels):
    return nn.Conv3d(in_channels, out_channels, 1)
""",
    "must return logits (B, 3, D, H, W)": """
def own(in_channels, out_channels, width, levels):
    return nn.Conv3d(in_channels, width, 1)
""",
    "The backbone 'own' of the module my_module returns NoneType. Register a class": """
def own(in_channels, out_channels, width, levels):
    nn.Conv3d(in_channels, out_channels, 1)
""",
    "leave out the edge stream by --edge off": """
def own(in_channels, out_channels, width, levels):
    return nn.Conv3d(in_channels, out_channels, 1)
""",
    "It gets images (1, 1, 16, 16, 16) and returns logits (1, 3, 16, 16, 16)": """
class Own(SegNet):
    def join(self, channels):
        return nn.Conv3d(channels, 2 * channels, 1)
""",
}
LAYOUTS = {
    "The layout 'own' of the module my_module returns list for": """
def own(root):
    return [Case("a", (root / "a.nii",))]
""",
    "among its cases, which is no Case(name, (Path, ...), Path or None)": """
def own(root):
    return Dataset(root, TASK, [Case("a", ("a.nii",), "b.nii")])
""",
    "has a label map, so nothing can be learned from them. A layout of yours gives it as the": """
def own(root):
    return Dataset(root, TASK, [Case("a", (root / "a.nii",))])
""",
    "The layout 'own' of the module my_module fails (TypeError": """
def own(root, task):
    return None
""",
}
METRICS = {
    "returns Tensor of the shape () for masks (1, 2, 6, 6, 6)": """
def own(pred, truth):
    return (pred * truth).sum()
""",
    "changes the masks that it is given. Register a": """
def own(pred, truth):
    return pred.zero_().sum((2, 3, 4))
""",
    "The metric 'own' of the module my_module fails (TypeError": """
def own(pred, truth, spacing):
    return (pred * truth).sum((2, 3, 4))
""",
}


def write_own(kind, lines):
    "my_module.py, which registers these lines under the name own"
    begin = REGISTER.replace("KIND", kind)
    text = begin + lines.strip()
    Path("my_module.py").write_text(text)


def expect_error(capsys, told):
    "Assert that this was said, and that nothing was written"
    printed = capsys.readouterr()
    assert told in printed.err
    assert not Path("RUN").exists()
    assert not Path("EXPERIMENT").exists()


def train_here(*flags):
    "Train a small run with more flags, into RUN"
    words = ["DATA", "--out", "RUN", *TINY, *flags]
    return train(words)


OWN = {"semantic": LOSSES, "backbone": BACKBONES, "layout": LAYOUTS, "metric": METRICS}
FLAGS = {"semantic": [*SEMANTIC, *SIZE], "backbone": [*BACKBONE, *SIZE], "layout": IMPORT}
WRONG = [(kind, told) for kind, wrong in OWN.items() for told in wrong]


def use(kind):
    "Start a command that uses what is registered under the name own; its exit status"
    if kind == "metric":
        return experiment.main(["DATA", "--out", "EXPERIMENT", "--quick", *IMPORT])
    return train_here(*FLAGS[kind])


@pytest.mark.parametrize(("kind", "told"), WRONG)
def test_a_wrong_thing_of_yours_is_told_first(place, capsys, kind, told):
    lines = OWN[kind][told]
    write_own(kind, lines)
    assert use(kind) == 2
    expect_error(capsys, told)


NETWORK = """from torch import nn


def build(in_channels, out_channels):
    return nn.Sequential(nn.Conv3d(in_channels, out_channels, 3, padding=1), nn.Softmax(1))
"""


WRONG_NAMES = {  # flags -> the file of the module, and what is said
    "--import my_module.py": ("my_module", "--import my_module.py names a file. Write my_module"),
    "--network my_module.py:build": ("my_module", "names a file. Write my_module in place"),
    "--network my_module:build --edge off": ("my_module", "returns probabilities. Return logits"),
    "--network colorsys:build": ("colorsys", "Python has another module colorsys ("),
    "--import colorsys": ("colorsys", "Python has another module colorsys ("),
}


@pytest.mark.parametrize("flags", WRONG_NAMES)
def test_a_wrong_module_is_told_first(place, capsys, flags):
    importlib.import_module("colorsys")  # of Python, imported before
    name, told = WRONG_NAMES[flags]
    Path(f"{name}.py").write_text(NETWORK)
    words = flags.split()
    assert train_here(*words) == 2
    expect_error(capsys, told)


def inside_one_case():
    "A function that returns a voxel outside of each case but the first that it gets"
    sums = []

    def chosen(labels, generator):
        sums.append(labels.sum())
        return [0 if sums[0] == sums[-1] else 99, 0, 0]

    return chosen


def some_weights(model):
    first = next(model.parameters())
    return torch.optim.SGD([first], lr=0.1)


class Misspelled:
    def on_epoch_ends(self, run, epoch, row):
        return "stop"

    def on_start(self, run):
        pass


class WithoutRun:
    def on_step(self, step, terms):
        pass


WRONG_PARTS = {  # what is said -> the part
    "sampling=chosen returns .99, 0, 0. for labels of": {"sampling": inside_one_case()},
    "sampling=<lambda> fails .TypeError": {"sampling": lambda labels: [0, 0, 0]},
    "optimizer=some_weights leaves out .* requires_grad_": {"optimizer": some_weights},
    "optimizer is 'sgd'. Give a function of .parameters.": {"optimizer": "sgd"},
    "moves the image, and the label stays where it is": {"transforms": RandFlipd("image")},
    "transforms=RandFlipd is a class. Give an object of it": {"transforms": RandFlipd},
    "loss=MSELoss is a class. Give an object of it": {"loss": torch.nn.MSELoss},
    "has a method on_epoch_ends, which no event calls": {"callbacks": [Misspelled()]},
    "on_step of the callback WithoutRun takes the arguments": {"callbacks": [WithoutRun()]},
    "The callback EarlyStopping is a class": {"callbacks": [EarlyStopping]},
    "callbacks is EarlyStopping. Give a list": {"callbacks": EarlyStopping(1)},
    "watches 'dice', which is no column": {"callbacks": [EarlyStopping(1, "dice")]},
}


@pytest.mark.parametrize("told", WRONG_PARTS)
def test_a_wrong_part_is_told_first(place, told):
    parts = WRONG_PARTS[told]
    settings = config(batch_size=1)
    with pytest.raises(InputError, match=told):
        fit(settings, quiet=True, **parts)
    assert not Path("RUN").exists()


def test_an_experiment_tries_a_loss_before_it_measures_costs(place, capsys):
    told = "its term total is nan for the first patches"
    write_own("semantic", LOSSES[told])
    flags = "--quick --test_cases 1 --validation 1 --patch_size 16 16 16 --cache off"
    words = ["DATA", "--out", "EXPERIMENT", *flags.split()]
    assert experiment.main([*words, "--import", "my_module", "--reading", "semantic=own"]) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert not Path("EXPERIMENT/costs.json").exists()


COPY = """
class Copy(SegNet):
    "Seg-Net by another name"
"""


def test_a_trial_leaves_no_trace_in_the_run(place):
    assert train_here("--batch_size", "1", *SIZE) == 0
    plain = Path("RUN").rename("PLAIN")
    write_own("backbone", COPY)
    assert train_here(*BACKBONE, *SIZE) == 0
    for name in ("metrics.csv", "model.safetensors"):
        before = Path(plain, name)
        after = Path("RUN", name)
        assert before.read_bytes() == after.read_bytes(), name
