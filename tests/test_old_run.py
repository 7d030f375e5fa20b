"A run of 0.1 stays what it was: it goes on with 0.1's numbers, predicts, and gives its weights to a new run."

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import after, dataset

import egcnn_nb.run.folders as folders
from egcnn_nb.core import InputError
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.run.predict import load_run, predict_case
from egcnn_nb.run.settings import Settings
from egcnn_nb.run.steps import TERMS
from egcnn_nb.run.training import fit

OLD = Path(__file__).parent / "old_run_0_1"
GIVEN = {
    "epochs": 4,
    "batch_size": 4,
    "width": 4,
    "levels": 2,
    "patch_size": (16, 16, 16),
    "lr": 1e-3,
    "validation": 2,
    "precision": "fp32",
    "cache": "off",
}


def settings(tmp, out="run", **changes):
    "The settings that 0.1 was given"
    data, run = tmp / "data", tmp / out
    given = GIVEN | changes
    return Settings(
        str(data),
        str(run),
        **given,
    )


@pytest.fixture
def tmp(tmp_path):
    "The data set, and a copy of the run that was stopped"
    dataset(tmp_path / "data")
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path


def columns(rows, names):
    "Columns of a table as numbers (epochs, names)"
    values = []
    for row in rows:
        values.append([float(row[name]) for name in names])
    return np.array(values)


def losses(rows):
    "The loss terms of each epoch"
    return columns(rows, TERMS)


def dice(rows):
    "The Dice of both labels in each epoch"
    return columns(rows, ("dice_label 1", "dice_label 2"))


def of_0_1():
    "The rows of the run that 0.1 did not stop"
    path = OLD / "metrics_of_the_whole_run.csv"
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return list(reader)


def agree(rows):
    "Whether losses are those of 0.1, whatever the processor, and Dice nearly so"
    expected = of_0_1()
    same_losses = np.allclose(losses(rows), losses(expected), rtol=1e-4)
    same_dice = np.allclose(dice(rows), dice(expected), atol=0.01)
    return same_losses and same_dice


def resumed(tmp, **changes):
    "The rows of the run, which goes on to its end"
    config = settings(tmp, **changes)
    return fit(config, resume=True, quiet=True)


@pytest.mark.parametrize("readings", [None, {"semantic": "dice"}])
def test_it_goes_on_with_the_numbers_of_0_1(tmp, readings):
    config = tmp / "run/config.json"
    before = config.read_bytes()
    rows = resumed(tmp, readings=readings)
    assert len(rows) == 4
    assert agree(rows)
    assert config.read_bytes() == before
    log = (tmp / "run/log.txt").read_text()
    assert "begun with egcnn_nb 0.1, whose readings it keeps: semantic=dice" in log


def test_a_changed_default_would_be_seen(tmp, monkeypatch):
    def changed(readings):
        return {**folders.READINGS_0_1, "semantic": "dice_ce", "w_cross_entropy": None}

    monkeypatch.setattr(folders, "defaults_of_0_1", changed)
    rows = resumed(tmp)
    old = of_0_1()
    assert agree(rows[:2] + old[2:])
    assert not agree(rows)


@pytest.mark.parametrize("name, value", [("tau", 0.999), ("lambda2", 0.51), ("thickness", 3)])
def test_another_default_would_be_seen_too(tmp, monkeypatch, name, value):
    monkeypatch.setitem(folders.READINGS_0_1, name, value)
    rows = resumed(tmp)
    assert not agree(rows)


WEIGHTED = {"semantic": "dice_ce", "w_cross_entropy": 1.0}
REFUSED = [
    (
        {"readings": WEIGHTED},
        "found semantic dice, w_cross_entropy 0.0, expected semantic dice_ce, w_cross_entropy 1.0;",
    ),
    ({"readings": {"tau": 0.5}}, "found tau 1.0, expected tau 0.5;"),
    ({"lr": 0.1}, "found lr 0.001, expected lr 0.1;"),
    (
        {"spacing": (2.0, 2.0, 2.0)},
        "found spacing [1.0, 1.0, 1.0], expected spacing [2.0, 2.0, 2.0];",
    ),
]


@pytest.mark.parametrize("change, told", REFUSED)
def test_other_settings_are_refused_and_nothing_else_is_listed(tmp, change, told):
    with pytest.raises(InputError) as refused:
        resumed(tmp, **change)
    message = str(refused.value)
    assert told in message


def test_it_predicts(tmp):
    model, found, task = load_run(tmp / "run")
    assert found.readings
    assert found.readings["semantic"] == "dice"
    assert found.patch_size == (16, 16, 16)
    assert task.labels == {0: "background", 1: "label 1", 2: "label 2"}
    dataset = find_dataset(tmp / "data")
    case = dataset.cases[0]
    labels, _ = predict_case(model, found, task, case)
    assert labels.shape == (18, 17, 16)
    values = np.unique(labels)
    assert set(values) <= {0, 1, 2}


def config_of(run):
    "What a run keeps of itself"
    text = (run / "config.json").read_text()
    return json.loads(text)


def test_a_new_run_starts_from_it(tmp, monkeypatch):
    first = {}

    def keep(row, net, val):
        for name, weight in net.state_dict().items():
            first[name] = weight.clone()

    old, new = str(tmp / "run"), tmp / "new"
    config = settings(tmp, "new", init=old, lr=1e-30, epochs=1)
    fit(config, quiet=True, on_epoch=keep)
    trained = load_file(tmp / "run/model.safetensors")
    for name, weight in trained.items():
        assert torch.equal(first[name], weight)
    log = (new / "log.txt").read_text()
    # 0.1 had no residual layer in its gates, and no norm before the edge head
    later = set(first) - set(trained)
    assert all(".residual." in name or name.startswith("edge.read.") for name in later)
    assert f"{len(trained)} of {len(first)} weights start from {old}" in log
    kept = config_of(new)["settings"]
    assert kept["init"] == old
    assert kept["readings"]["semantic"] == "dice_ce"


def test_the_checkpoint_wins_over_init(tmp):
    old = str(tmp / "run")
    new = settings(tmp, "new", init=old, epochs=2)
    whole = settings(tmp, "whole", init=old, epochs=2)
    fit(new, quiet=True, stop=after(8))
    rows = fit(new, resume=True, quiet=True)
    assert rows == fit(whole, quiet=True)
    without = settings(tmp, "new", epochs=2)
    with pytest.raises(InputError, match="found init .*, expected init None"):
        fit(without, resume=True, quiet=True)


def test_the_fixture_names_no_folder_of_a_machine():
    config = config_of(OLD)
    assert "egcnn_nb" not in config["versions"]
    kept = config["settings"]
    for name in ("data", "out"):
        path = Path(kept[name])
        assert not path.is_absolute()
    sizes = [file.stat().st_size for file in OLD.iterdir()]
    assert sum(sizes) < 300_000
