"The lines of CONTRIBUTING.md are run as they stand, on phantoms that are cut small, so that the page cannot rot."

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch

from egcnn_nb import Settings, data_samples, fit
from egcnn_nb.commands import experiment
from egcnn_nb.commands import train as training
from egcnn_nb.commands.check import main as check
from egcnn_nb.commands.predict import main as predict
from egcnn_nb.commands.train import main as train
from egcnn_nb.core import REGISTRY
from egcnn_nb.run.steps import read_metrics

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
COMMANDS = {"egcnn_train": train, "egcnn_check": check}
SIZE = "--width 4 --levels 2".split()
TINY = "--epochs 1 --patch_size 16 16 16 --validation 1 --precision fp32 --cache off".split()
MODULE = "# my_module.py\n"


def sections():
    "number -> text of each of the ten things"
    parts = re.split(r"^### (\d+)\. ", PAGE.split("\n## How to change")[0], flags=re.M)
    return dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))


def blocks(number):
    "(language, lines) of the code blocks of one thing"
    return re.findall(r"^```(\w+)\n(.*?)^```$", sections()[number], flags=re.M | re.S)


def small(source, target):
    "Copy a phantom, cut to the box around its kidneys"
    labels = nib.load(source / "segmentation.nii.gz")
    where = np.argwhere(np.asarray(labels.dataobj) == 2).mean(0).astype(int)
    box = tuple(slice(max(c - 10, 0), max(c - 10, 0) + 20) for c in where)
    target.mkdir(parents=True)
    for name in ("imaging.nii.gz", "segmentation.nii.gz"):
        nib.load(source / name).slicer[box].to_filename(target / name)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    for case in sorted(data_samples("kits2019").iterdir())[:3]:
        small(case, folder / case.name)
    return folder


@pytest.fixture
def place(phantoms, tmp_path, monkeypatch):
    "A folder with DATA, in which a newcomer works; what she registers is forgotten afterwards"
    (tmp_path / "DATA").symlink_to(phantoms)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = {kind: dict(entries) for kind, entries in REGISTRY.items()}
    yield tmp_path
    for kind, entries in before.items():
        REGISTRY[kind].clear()
        REGISTRY[kind].update(entries)
    sys.modules.pop("my_module", None)
    importlib.invalidate_caches()


def config(**changes):
    "The settings of the page, made small"
    given = {"epochs": 1, "patch_size": (16, 16, 16), "validation": 1, "precision": "fp32"}
    return Settings("DATA", "RUN", **{**given, "cache": "off", "width": 4, "levels": 2, **changes})


def follow(number, settings=None, size=SIZE):
    "Do what the page says: write my_module.py, run the commands and the Python lines; names of the Python lines"

    def fit_here(config, **parts):
        "`fit`, each time into the next folder: RUN0, or RUN1 where there is a run"
        folder = f"RUN{len(list(Path().glob('RUN*')))}"
        return fit(replace(config, out=folder), quiet=True, **parts)

    names = {"torch": torch, "config": settings or config(), "fit": fit_here}
    for language, lines in blocks(number):
        if lines.startswith(MODULE):
            Path("my_module.py").write_text(lines)
        elif language == "sh":
            run(lines, size)
        else:
            sys.path.insert(0, str(Path.cwd()))  # as where Python is started in this folder
            exec(compile(lines, "CONTRIBUTING.md", "exec"), names)
    return names


def run(lines, size):
    "Run the commands of a block, a line each, small and in this process"
    for line in lines.splitlines():
        command, *words = line.split()
        more = [*TINY, *size] if command == "egcnn_train" else []
        sys.modules.pop("my_module", None)
        assert COMMANDS[command]([*words, *more]) == 0, line


def test_the_page_has_ten_things_and_each_says_where_it_belongs():
    assert list(sections()) == list(range(1, 11))
    for number, text in sections().items():
        assert "**Test it:**" in text and "**In the package:**" in text, number
        assert blocks(number), number


def test_every_notebook_and_file_that_the_page_names_is_there():
    root = Path(__file__).parents[1]
    named = re.findall(r"`((?:nbs|tests|tools)/[\w/.]+\.\w+)`", PAGE)
    assert len(named) > 10
    for name in named:
        assert (root / name).is_file() or "ROOM" in name, name


def test_the_first_lines_give_the_names_of_the_others():
    lines = re.search(r"begin like this:\n\n```python\n(.*?)```", PAGE, re.S)[1]
    names = {}
    exec(lines, names)
    assert names["config"] == Settings("DATA", "RUN") and names["fit"] is fit


def test_the_help_names_every_backbone_of_the_package():
    own = [n for n, e in REGISTRY["backbone"].items() if e.made.__module__.startswith("egcnn_nb.")]
    assert len(own) == 5
    for command in (training, experiment):
        assert all(name in command.arguments().format_help() for name in own)


def test_1_a_loss(place):
    follow(1)
    settings = json.loads(Path("RUN/config.json").read_text())["settings"]
    assert settings["readings"]["semantic"] == "tversky" and settings["imports"] == ["my_module"]
    assert settings["readings"]["w_cross_entropy"] == 0
    assert 0 < read_metrics("RUN")[0]["semantic"] < 1
    assert 0 < read_metrics("RUN1")[0]["total"] < 1


def test_2_a_backbone(place, capsys):
    follow(2)
    begun = [*TINY, *SIZE, "--out", "RUN2", "--backbone", "plain"]
    REGISTRY["backbone"].pop("plain")
    assert train(["DATA", *begun]) == 2  # without --import
    told = capsys.readouterr().err
    assert "The backbone 'plain' is not known. Choose one of unet, vnet, segnet" in told
    assert not Path("RUN2").exists()
    sys.modules.pop("my_module")
    scan = "DATA/case_00000/imaging.nii.gz"
    assert predict(["RUN", scan, "--out", "OUT"]) == 0  # the run knows its module
    assert REGISTRY["backbone"]["plain"].title == "Plain Seg-Net"


def test_2_an_experiment_takes_the_backbone(place, capsys):
    Path("my_module.py").write_text(blocks(2)[0][1])
    words = "DATA --out EXPERIMENT --backbones segnet plain --arms bare --cache off --plan --quick"
    more = "--test_cases 1 --validation 1 --patch_size 16 16 16".split()
    assert experiment.main([*words.split(), *more]) == 2
    assert "The backbone 'plain' is not known" in capsys.readouterr().err
    assert experiment.main([*words.split(), *more, "--import", "my_module"]) == 0
    assert "plain bare" in capsys.readouterr().out


def test_3_a_metric(place, capsys):
    fit(config(edge=False), quiet=True)
    rows = follow(3)["rows"]
    assert all(0 <= row["precision"] <= 1 for row in rows)
    ones, none = torch.ones(1, 2, 3, 3, 3), torch.zeros(1, 2, 3, 3, 3)
    precision = REGISTRY["metric"]["precision"].made
    assert precision(ones, ones).tolist() == [[1, 1]] and precision(ones, none).tolist() == [[0, 0]]
    assert precision(none, ones).tolist() == [[1, 1]]


def test_4_a_layout(place, capsys):
    Path("FLAT").mkdir()
    for case in sorted(Path("DATA").iterdir()):
        for old, new in (("imaging", "image"), ("segmentation", "mask")):
            file = Path("FLAT") / f"{case.name}_{new}.nii.gz"
            file.write_bytes((case / f"{old}.nii.gz").read_bytes())
    assert check(["FLAT"]) == 2
    follow(4)
    assert "FLAT: flat, 3 cases, 3 with labels" in capsys.readouterr().out


def test_5_patch_sampling(place):
    around = follow(5)["around_tumor"]
    assert json.loads(Path("RUN0/config.json").read_text())["parts"] == {"sampling": "around_tumor"}
    labels = torch.zeros(5, 6, 7)
    assert around(labels, torch.Generator()) == [2, 3, 3]
    labels[1, 2, 3] = 2
    assert around(labels, torch.Generator()) == [1, 2, 3]


def test_6_the_optimizer(place):
    follow(6)
    assert "optimizer SGD of sgd, with the learning rates 0.01" in Path("RUN0/log.txt").read_text()


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
    if importlib.util.find_spec("torchio"):
        return
    stub = ModuleType("torchio")
    monkeypatch.setattr(Flip, "__module__", "torchio.transforms")
    stub.Compose = stub.RandomFlip = stub.RandomNoise = Flip
    stub.ScalarImage = stub.LabelMap = Image
    stub.Subject = dict
    monkeypatch.setitem(sys.modules, "torchio", stub)


def test_7_the_augmentation(place, torchio):
    follow(7)
    for run in ("RUN0", "RUN1"):
        written = json.loads(Path(run, "config.json").read_text())
        assert written["settings"]["augment"] == []
        assert list(written["parts"]) == ["transforms"]


@pytest.fixture
def tensorboard(monkeypatch):
    "What stands for TensorBoard; the list of what is written"
    written = []

    class Writer:
        def __init__(self, path, purge_step):
            written.append(Path(path))

        def add_scalar(self, name, value, step):
            written.append(name)

        def flush(self):
            pass

        def close(self):
            pass

    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return written


def test_8_tensorboard(place, tensorboard):
    follow(8)
    assert Path("RUN/tensorboard") in tensorboard and Path("RUN1/tensorboard") in tensorboard
    assert "step/total" in tensorboard and "epoch/dice_mean" in tensorboard


def test_9_early_stopping(place):
    names = follow(9)
    assert len(read_metrics("RUN0")) == len(read_metrics("RUN1")) == 1
    assert names["on_epoch"](None, 0, {"dice_mean": 0.96}) == "stop"


def test_10_a_network(place):
    follow(10, config(width=Settings.width, levels=Settings.levels), size=[])
    written = json.loads(Path("RUN/config.json").read_text())
    assert written["settings"]["network"] == "my_module:build"
    parts = [json.loads(Path(f"RUN{i}/config.json").read_text())["parts"] for i in (1, 2)]
    assert parts == [{"model": "build"}, {"model": "EGCNN"}]
