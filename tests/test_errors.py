"""What ends with one line, and what is put back

Memory that is full, workers that die, file systems without locks, hosts without a name, users
without a home.
"""

import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import ENV, begun, children, command, dataset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
browser = importlib.import_module("browser")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A tiny data set"
    tmp = tmp_path_factory.mktemp("tiny")
    folder = tmp / "data"
    return dataset(folder, 6)


@pytest.fixture
def begin(data, tmp_path):
    "A function: the words of egcnn_train on it"

    def words(*more):
        cache = tmp_path / "cache"
        return command(data, tmp_path / "run", "--cache", cache, *more)

    return words


def last_line(error):
    "The last line that a command prints, without a progress bar before it"
    lines = error.strip().splitlines()
    *_, shown = lines[-1].split("\r")
    return shown


def expect_code(process, code, error):
    "A process ended with an exit code, and without a traceback"
    assert process.returncode == code, error
    assert "Traceback" not in error, error


def ends(words, code=2, limit=None, env=ENV):
    "The one line with which a command ends, within an address space of `limit` bytes"

    def limited():
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=200,
        env=env,
        preexec_fn=limited,
    )
    expect_code(done, code, done.stderr)
    return last_line(done.stderr)


# --- memory


def test_training_without_memory_ends_with_one_line(begin):
    large = "--patch_size 512 512 512 --batch_size 2".split()
    words = begin(*large)
    line = ends(words, limit=6 << 30)
    assert "There is not enough memory" in line
    assert "smaller --patch_size or --batch_size" in line
    assert "--accumulate" in line


# the patches of a worker need memory that is not there
NO_MEMORY = """
import sys
from egcnn_nb.data import patches
from egcnn_nb.commands.train import main


def get(self, i):
    raise MemoryError


patches.Patches.__getitem__ = get
sys.exit(main())
"""
WORKER_DIED = (
    "error: A data-loader worker died, probably out of memory. Try fewer --workers, then --resume."
)


WITH_A_WORKER = ("--epochs", 400, "--workers", 1)  # a long run


def by_script(script, words):
    "The same command, begun by a script of our own"
    return [sys.executable, "-c", script, *words[3:]]


def test_a_worker_without_memory_ends_with_one_sentence(begin):
    words = begin(*WITH_A_WORKER)
    script = by_script(NO_MEMORY, words)
    line = ends(script, code=1)
    assert line == WORKER_DIED


def test_a_worker_that_is_killed_ends_with_one_sentence(begin, tmp_path):
    words = begin(*WITH_A_WORKER)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ENV)
    begun(process, tmp_path / "run")
    worker = children(process.pid)[0]
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=100)
    expect_code(process, 1, error)
    lines = error.strip().splitlines()
    assert lines[-1] == WORKER_DIED


# --- locks

NO_FLOCK = """
import fcntl
import os

code = int(os.environ["FLOCK_ERRNO"])


def refuse(*words):
    raise OSError(code, os.strerror(code))


fcntl.flock = fcntl.lockf = refuse
"""


def without_locks(tmp, code):
    "An environment in which Python's locks fail with a code"
    patch = tmp / "off"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(NO_FLOCK)
    known = os.environ.get("PYTHONPATH", "")
    return {
        **ENV,
        "FLOCK_ERRNO": str(code),
        "PYTHONPATH": f"{patch}{os.pathsep}{known}",
    }


@pytest.mark.parametrize("code", [38, 37, 95])
def test_training_and_resuming_where_there_are_no_locks(begin, tmp_path, code):
    env = without_locks(tmp_path, code)
    soft = tmp_path / "run/run.soft.lock"
    words = begin("--epochs", 1)
    resume = [*words, "--resume"]
    for line in (words, resume):
        done = subprocess.run(line, capture_output=True, text=True, timeout=200, env=env)
        error = done.stderr
        assert done.returncode == 0, error
        assert error.count("file system without locks") == 1
        assert not soft.exists()
    soft.write_text("1\nanother-host\n")  # left behind by a run that was killed elsewhere
    line = ends(resume, env=env)
    assert "another egcnn_train" in line
    assert f"If it was killed, remove {soft}" in line


# --- signals


KINDS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def mine():
    "A handler of the test's own for Ctrl-C and SIGTERM"

    def handler(*_):
        pass

    before = {number: signal.signal(number, handler) for number in KINDS}
    yield handler
    for number, old in before.items():
        signal.signal(number, old)


def in_a_thread(function, argument):
    "What a function returns in a thread of its own, which may not set handlers"
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(function, argument)
        return future.result()


def test_handlers_of_signals_are_put_back(begin, mine):
    from egcnn_nb.commands.train import main

    def expect_mine():
        for number in KINDS:
            assert signal.getsignal(number) is mine

    words = begin("--epochs", 1)[3:]
    assert main(words) == 0
    expect_mine()
    assert main(words) == 2  # the folder exists
    expect_mine()
    assert in_a_thread(main, words) == 2
    expect_mine()


def test_the_handler_of_an_experiment_is_put_back(tmp_path):
    from egcnn_nb.commands.experiment import main

    nowhere, out = tmp_path / "nowhere", tmp_path / "out"
    before = signal.getsignal(signal.SIGTERM)
    assert main([str(nowhere), "--out", str(out)]) == 2
    assert signal.getsignal(signal.SIGTERM) is before


# --- names of machines and users


NO_NAME = """
import socket
import sys

socket.gethostname = lambda: "nowhere.invalid"
from egcnn_nb.commands.train import main

sys.exit(main())
"""


def first_of_two(address, port):
    "The environment that torchrun gives the first of two processes"
    return {
        **ENV,
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def test_a_machine_that_does_not_know_its_name(begin):
    env = first_of_two("nowhere.invalid", "29533")
    words = begin()
    script = by_script(NO_NAME, words)
    line = ends(script, env=env)
    assert "nowhere.invalid has no address" in line
    assert "--local_addr=127.0.0.1" in line
    assert "MASTER_ADDR" in line


def test_processes_that_do_not_meet(begin):
    words = begin("--timeout", 0.05)
    env = first_of_two("localhost", "29534")
    line = ends(words, code=1, env=env)
    assert "the 2 processes did not meet at localhost:29534" in line
    assert "--local_addr=127.0.0.1" in line


@pytest.mark.parametrize("module", ["train", "predict", "check", "experiment"])
def test_help_for_a_user_without_a_home(module):
    if not shutil.which("setpriv") or os.geteuid() != 0:
        pytest.skip("needs setpriv, and root")
    code = f"import sys; from egcnn_nb.commands.{module} import main; sys.exit(main())"
    no_home = f"env -i PATH=/usr/bin:/bin PYTHONPATH={ROOT}".split()
    other_user = "setpriv --reuid 12345 --regid 12345 --clear-groups".split()
    words = [*no_home, *other_user, sys.executable, "-c", code, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    error, printed = done.stderr, done.stdout
    if "Permission denied" in error:
        pytest.skip("another user may not read this environment")
    assert done.returncode == 0, error
    assert "usage:" in printed, error
    if module == "train":
        assert "None" not in printed
        in_one_line = " ".join(printed.split())
        assert "default off" in in_one_line


# --- a browser for the tests


def write_script(path, line):
    "Write a script that can be run"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def nothing():
    "What is found where there is nothing"
    return None


def test_a_browser_is_found_where_there_is_one(tmp_path, monkeypatch):
    stub = tmp_path / "chromium-browser"
    real = tmp_path / "google-chrome"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(browser, "NAMES", (stub.name, real.name))
    monkeypatch.setattr(browser, "playwrights_own", nothing)
    write_script(stub, "echo 'requires the chromium snap to be installed'; exit 1")
    assert browser.find() is None  # a script that only says how to install one
    write_script(real, "echo 'Google Chrome 140'")
    assert browser.find() == str(real)
    assert browser.main() == 0


def test_without_a_browser_to_be_had_there_is_one_sentence(monkeypatch, capfd):
    monkeypatch.setattr(browser, "find", nothing)
    monkeypatch.setenv("PLAYWRIGHT_DOWNLOAD_HOST", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setattr(browser, "is_root", nothing)
    code = browser.main()
    assert code == 1
    printed = capfd.readouterr()
    assert browser.SENTENCE in printed.err


def test_a_download_that_hangs_is_ended():
    words = ["sleep", "60"]
    code, text = browser.run(*words, seconds=0.5, quiet=True)
    assert code == 1
    assert "more than 0.5 s" in text
