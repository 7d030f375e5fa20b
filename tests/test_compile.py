"--compile: the training step's forward pass goes through torch.compile, and nothing else does."

import json
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from tiny import ENV, after, command, dataset, settings

import egcnn_nb.run.steps as steps
from egcnn_nb.core import InputError
from egcnn_nb.run.predict import load_run
from egcnn_nb.run.steps import read_metrics
from egcnn_nb.run.training import fit

SECONDS = r"took \d+\.\d s, of which compiling took \d+\.\d s"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A data set whose batches are of 4, 4 and 2 cases"
    folder = tmp_path_factory.mktemp("compile")
    return dataset(folder / "data")


@pytest.fixture
def traced(monkeypatch):
    "torch.compile traces the network, and leaves the translation out, which takes long"
    monkeypatch.setattr(steps, "_BACKEND", "eager")


def config(data, tmp_path, name, **changes):
    "Settings of a quick run in a folder of this name"
    out = tmp_path / name
    return settings(data, out, tmp_path / "cache", **changes)


def train(*args, **more):
    "The rows of a quick run"
    return fit(*args, quiet=True, **more)


def losses(rows):
    "The total loss of each epoch"
    return [row["total"] for row in rows]


def totals(run):
    "The total loss of each epoch, as metrics.csv has it"
    return losses(read_metrics(run))


def log_of(run):
    "The log of a run"
    path = run / "log.txt"
    return path.read_text()


def weights_of(run):
    "The trained weights of a run, by name"
    return load_file(run / "model.safetensors")


def begun_with(run):
    "The settings that a run's config.json has"
    text = (run / "config.json").read_text()
    return json.loads(text)["settings"]


def names(run):
    "Names and shapes of the trained weights of a run"
    shapes = {}
    for name, weight in weights_of(run).items():
        shapes[name] = weight.shape
    return shapes


def test_it_trains_to_the_same_numbers_under_the_same_names(data, tmp_path, traced):
    plain = train(config(data, tmp_path, "plain"))
    compiled = train(config(data, tmp_path, "compiled", compile=True))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    assert names(tmp_path / "compiled") == names(tmp_path / "plain")
    load_run(tmp_path / "compiled")


def test_the_log_names_each_step_that_compiled(data, tmp_path, traced):
    torch.compiler.reset()  # what earlier tests compiled
    train(config(data, tmp_path, "run", compile=True))
    lines = log_of(tmp_path / "run").splitlines()
    told = [line.split(" took ")[0] for line in lines if "of which compiling took" in line]
    assert told == ["step 1", "step 3"]  # of batches of 4, and of 2
    assert "the network is compiled in the first step, which may take minutes" in lines


def test_only_training_steps_are_compiled(data, tmp_path, traced):
    seen = []

    def on_epoch(row, network, cases):
        seen.append(type(network).__name__)
        before = steps.seconds_of_compiling()
        with torch.no_grad():
            network.eval()(torch.zeros(1, 1, 16, 16, 16))
        assert steps.seconds_of_compiling() == before

    train(config(data, tmp_path, "run", compile=True), on_epoch=on_epoch)
    assert seen == ["EGCNN", "EGCNN"]


@pytest.mark.parametrize("first", [True, False])
def test_a_run_resumes_with_it_or_without(data, tmp_path, traced, first):
    whole = train(config(data, tmp_path, "whole", compile=first))
    begun = config(data, tmp_path, "run", compile=first)
    other = config(data, tmp_path, "run", compile=not first)
    train(begun, stop=after(3))
    rows = train(other, resume=True)
    assert losses(rows) == pytest.approx(losses(whole), rel=1e-3)
    assert begun_with(tmp_path / "run").get("compile", False) is first


def test_a_run_without_it_does_not_name_it(data, tmp_path):
    "So versions before it resume the run"
    train(config(data, tmp_path, "run", epochs=1))
    assert "compile" not in begun_with(tmp_path / "run")


@pytest.mark.parametrize("value, told", [("yes", "compile is 'yes'. Give True or False.")])
def test_a_value_that_is_no_switch_is_refused(data, tmp_path, value, told):
    with pytest.raises(InputError, match=told):
        train(config(data, tmp_path, "run", compile=value))


def test_without_a_compiler_nothing_is_begun(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no_such_compiler")
    with pytest.raises(InputError, match="needs a C.. compiler, and no_such_compiler is not there"):
        train(config(data, tmp_path, "run", compile=True))
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_is_told_of(data, tmp_path, monkeypatch):
    def fails(function, **options):
        raise RuntimeError("Python.h is missing\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(InputError, match=r"does not work here \(Python.h is missing\)"):
        train(config(data, tmp_path, "run", compile=True))
    assert not (tmp_path / "run").exists()


# ---- the real compiler, through the command

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile translates with g++"
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    "The environment of commands that share what was compiled"
    folder = tmp_path_factory.mktemp("kernels")
    return {**ENV, "TORCHINDUCTOR_CACHE_DIR": str(folder)}


def run(kernels, data, out, *words, processes=1):
    "Train by the command; each process has five cases in each step"
    size = 5 * processes
    cache = out.parent / "cache"
    line = command(data, out, "--epochs", 2, "--cache", cache, processes=processes)
    line += ["--batch_size", str(size), *words]
    done = subprocess.run(line, env=kernels, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_the_command_gives_the_same_weights_twice(data, tmp_path, kernels):
    one, two, plain = (tmp_path / name for name in ("one", "two", "plain"))
    run(kernels, data, one, "--compile")
    run(kernels, data, two, "--compile")
    run(kernels, data, plain)
    again = weights_of(two)
    for name, weight in weights_of(one).items():
        assert torch.equal(weight, again[name])
    assert names(one) == names(plain)
    assert totals(one) == pytest.approx(totals(plain), rel=1e-3)
    assert re.search(rf"^step 1 {SECONDS}$", log_of(one), re.MULTILINE)


@needs_compiler
def test_two_processes_compile_too(data, tmp_path, kernels):
    compiled, plain = tmp_path / "compiled", tmp_path / "plain"
    run(kernels, data, compiled, "--compile", processes=2)
    run(kernels, data, plain, processes=2)
    assert names(compiled) == names(plain)
    assert totals(compiled) == pytest.approx(totals(plain), rel=1e-3)


def test_sharded_weights_are_refused_before_anything_is_read(data, tmp_path, monkeypatch):
    monkeypatch.setattr("egcnn_nb.run.training.ranks", lambda: (0, 2))
    with pytest.raises(InputError, match="--compile does not work with --shard"):
        train(config(data, tmp_path, "run", compile=True, shard=True))
    assert not (tmp_path / "run").exists()
