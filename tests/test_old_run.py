"A run of 0.1 stays what it was: it goes on with 0.1's numbers, predicts, and gives its weights to a new run."

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import dataset

import egcnn_nb.run.folders as folders
from egcnn_nb.core import InputError
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.run.predict import load_run, predict_case
from egcnn_nb.run.settings import Settings
from egcnn_nb.run.training import fit

OLD = Path(__file__).parent / "old_run_0_1"


def settings(tmp, out="run", **changes):
    "The settings that 0.1 was given"
    given = dict(
        epochs=4,
        batch_size=4,
        width=4,
        levels=2,
        patch_size=(16, 16, 16),
        lr=1e-3,
        validation=2,
        precision="fp32",
        cache="off",
    )
    return Settings(str(tmp / "data"), str(tmp / out), **{**given, **changes})


@pytest.fixture
def tmp(tmp_path):
    "The data set, and a copy of the run that was stopped"
    dataset(tmp_path / "data")
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path


def losses(rows):
    "The loss terms of each epoch"
    return np.array(
        [
            [
                float(row[term])
                for term in ("total", "semantic", "edge_dice", "edge_bce", "consistency")
            ]
            for row in rows
        ]
    )


def of_0_1():
    "The rows of the run that 0.1 did not stop"
    with open(OLD / "metrics_of_the_whole_run.csv", newline="") as f:
        return list(csv.DictReader(f))


def agree(rows):
    "Whether losses are those of 0.1, whatever the processor, and Dice nearly so"
    dice = [[float(row[name]) for name in ("dice_label 1", "dice_label 2")] for row in rows]
    expected = [[float(row[name]) for name in ("dice_label 1", "dice_label 2")] for row in of_0_1()]
    return np.allclose(losses(rows), losses(of_0_1()), rtol=1e-4) and np.allclose(
        dice, expected, atol=0.01
    )


@pytest.mark.parametrize("readings", [None, {"semantic": "dice"}])
def test_it_goes_on_with_the_numbers_of_0_1(tmp, readings):
    before = (tmp / "run/config.json").read_bytes()
    rows = fit(settings(tmp, readings=readings), resume=True, quiet=True)
    assert len(rows) == 4 and agree(rows)
    assert (tmp / "run/config.json").read_bytes() == before
    assert (
        "begun with egcnn_nb 0.1, whose readings it keeps: semantic=dice"
        in (tmp / "run/log.txt").read_text()
    )


def test_a_changed_default_would_be_seen(tmp, monkeypatch):
    monkeypatch.setattr(
        folders,
        "defaults_of_0_1",
        lambda readings: {**folders.READINGS_0_1, "semantic": "dice_ce", "w_cross_entropy": None},
    )
    rows = fit(settings(tmp), resume=True, quiet=True)
    assert agree(rows[:2] + of_0_1()[2:]) and not agree(rows)


@pytest.mark.parametrize("name, value", [("tau", 0.999), ("lambda2", 0.51), ("thickness", 3)])
def test_another_default_would_be_seen_too(tmp, monkeypatch, name, value):
    monkeypatch.setitem(folders.READINGS_0_1, name, value)
    assert not agree(fit(settings(tmp), resume=True, quiet=True))


@pytest.mark.parametrize(
    "change, told",
    [
        (
            {"readings": {"semantic": "dice_ce", "w_cross_entropy": 1.0}},
            "found semantic dice, w_cross_entropy 0.0, expected semantic dice_ce, w_cross_entropy 1.0;",
        ),
        ({"readings": {"tau": 0.5}}, "found tau 1.0, expected tau 0.5;"),
        ({"lr": 0.1}, "found lr 0.001, expected lr 0.1;"),
        (
            {"spacing": (2.0, 2.0, 2.0)},
            "found spacing [1.0, 1.0, 1.0], expected spacing [2.0, 2.0, 2.0];",
        ),
    ],
)
def test_other_settings_are_refused_and_nothing_else_is_listed(tmp, change, told):
    with pytest.raises(InputError) as refused:
        fit(settings(tmp, **change), resume=True, quiet=True)
    assert told in str(refused.value)


def test_it_predicts(tmp):
    model, found, task = load_run(tmp / "run")
    assert (
        found.readings["semantic"] == "dice"
        and found.patch_size == (16, 16, 16)
        and task.labels == {0: "background", 1: "label 1", 2: "label 2"}
    )
    labels, _ = predict_case(model, found, task, find_dataset(tmp / "data").cases[0])
    assert labels.shape == (18, 17, 16) and set(np.unique(labels)) <= {0, 1, 2}


def test_a_new_run_starts_from_it(tmp, monkeypatch):
    first = []
    fit(
        settings(tmp, "new", init=str(tmp / "run"), lr=1e-30, epochs=1),
        quiet=True,
        on_epoch=lambda row, net, val: first.append(
            {n: t.clone() for n, t in net.state_dict().items()}
        ),
    )
    trained = load_file(tmp / "run/model.safetensors")
    assert all(torch.equal(first[0][name], weight) for name, weight in trained.items())
    log = (tmp / "new/log.txt").read_text()
    assert f"{len(trained)} of {len(trained)} weights start from {tmp / 'run'}" in log
    config = json.loads((tmp / "new/config.json").read_text())
    assert (
        config["settings"]["init"] == str(tmp / "run")
        and config["settings"]["readings"]["semantic"] == "dice_ce"
    )


def test_the_checkpoint_wins_over_init(tmp):
    kept = dict(init=str(tmp / "run"), epochs=2)
    calls = []
    fit(settings(tmp, "new", **kept), quiet=True, stop=lambda: calls.append(1) or len(calls) > 8)
    rows = fit(settings(tmp, "new", **kept), resume=True, quiet=True)
    whole = fit(settings(tmp, "whole", **kept), quiet=True)
    assert rows == whole
    with pytest.raises(InputError, match="found init .*, expected init None"):
        fit(settings(tmp, "new", epochs=2), resume=True, quiet=True)


def test_the_fixture_names_no_folder_of_a_machine():
    config = json.loads((OLD / "config.json").read_text())
    assert (
        "egcnn_nb" not in config["versions"]
        and not Path(config["settings"]["data"]).is_absolute()
        and not Path(config["settings"]["out"]).is_absolute()
    )
    assert sum(f.stat().st_size for f in OLD.iterdir()) < 300_000
