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
import threading
from pathlib import Path

import pytest
from tiny import ENV, begun, children, command, dataset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
browser = importlib.import_module("browser")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("tiny") / "data", 6)


def last_line(error):
    "The last line that a command prints, without a progress bar before it"
    return error.strip().splitlines()[-1].split("\r")[-1]


def ends(words, code=2, limit=None, env=ENV):
    "The one line with which a command ends, within an address space of `limit` bytes"

    def limited():
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    done = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        timeout=200,
        env=env,
        preexec_fn=limited,
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr[-3000:]
    return last_line(done.stderr)


# --- memory


def test_training_without_memory_ends_with_one_line(data, tmp_path):
    large = ["--patch_size", 512, 512, 512, "--batch_size", 2, "--cache", tmp_path / "cache"]
    line = ends(command(data, tmp_path / "run", *large), limit=6 << 30)
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


def with_a_worker(data, tmp):
    "A long run with one worker"
    return command(data, tmp / "run", "--epochs", 400, "--workers", 1, "--cache", tmp / "cache")


def test_a_worker_without_memory_ends_with_one_sentence(data, tmp_path):
    words = with_a_worker(data, tmp_path)
    line = ends([sys.executable, "-c", NO_MEMORY, *words[3:]], code=1)
    assert line == WORKER_DIED


def test_a_worker_that_is_killed_ends_with_one_sentence(data, tmp_path):
    words = with_a_worker(data, tmp_path)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ENV)
    begun(process, tmp_path / "run")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and "Traceback" not in error, error[-3000:]
    assert error.strip().splitlines()[-1] == WORKER_DIED


# --- locks

NO_FLOCK = """
import fcntl
import os

code = int(os.environ["FLOCK_ERRNO"])


def refuse(*words):
    raise OSError(code, os.strerror(code))


fcntl.flock = fcntl.lockf = refuse
"""


@pytest.mark.parametrize("code", [38, 37, 95])
def test_training_and_resuming_where_there_are_no_locks(data, tmp_path, code):
    patch = tmp_path / "off"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(NO_FLOCK)
    path = os.pathsep.join([str(patch), os.environ.get("PYTHONPATH", "")])
    env = {**ENV, "FLOCK_ERRNO": str(code), "PYTHONPATH": path}
    soft = tmp_path / "run/run.soft.lock"
    words = command(data, tmp_path / "run", "--epochs", 1, "--cache", tmp_path / "cache")
    for more in ([], ["--resume"]):
        done = subprocess.run([*words, *more], capture_output=True, text=True, timeout=200, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("file system without locks") == 1
        assert not soft.exists()
    soft.write_text("1\nanother-host\n")  # left behind by a run that was killed elsewhere
    line = ends([*words, "--resume"], env=env)
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


def test_handlers_of_signals_are_put_back(data, tmp_path, mine):
    from egcnn_nb.commands.train import main

    def expect_mine():
        for number in KINDS:
            assert signal.getsignal(number) is mine

    words = command(data, tmp_path / "run", "--epochs", 1, "--cache", tmp_path / "cache")[3:]
    assert main(words) == 0
    expect_mine()
    assert main(words) == 2  # the folder exists
    expect_mine()
    codes = []
    # only the main thread may set handlers
    thread = threading.Thread(target=lambda: codes.append(main(words)))
    thread.start()
    thread.join()
    assert codes == [2]
    expect_mine()


def test_the_handler_of_an_experiment_is_put_back(data, tmp_path):
    from egcnn_nb.commands.experiment import main

    before = signal.getsignal(signal.SIGTERM)
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
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
    own = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    return {**ENV, **own, "MASTER_ADDR": address, "MASTER_PORT": port}


def test_a_machine_that_does_not_know_its_name(data, tmp_path):
    words = command(data, tmp_path / "run")[3:]
    env = first_of_two("nowhere.invalid", "29533")
    line = ends([sys.executable, "-c", NO_NAME, *words], env=env)
    for word in ("nowhere.invalid has no address", "--local_addr=127.0.0.1", "MASTER_ADDR"):
        assert word in line


def test_processes_that_do_not_meet(data, tmp_path):
    words = command(data, tmp_path / "run", "--timeout", 0.05)
    line = ends(words, code=1, env=first_of_two("localhost", "29534"))
    assert "the 2 processes did not meet at localhost:29534" in line
    assert "--local_addr=127.0.0.1" in line


@pytest.mark.parametrize("module", ["train", "predict", "check", "experiment"])
def test_help_for_a_user_without_a_home(module):
    if not shutil.which("setpriv") or os.geteuid() != 0:
        pytest.skip("needs setpriv, and root")
    code = f"import sys; from egcnn_nb.commands.{module} import main; sys.exit(main())"
    no_home = ["env", "-i", "PATH=/usr/bin:/bin", f"PYTHONPATH={ROOT}"]
    other_user = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    words = [*no_home, *other_user, sys.executable, "-c", code, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    if "Permission denied" in done.stderr:
        pytest.skip("another user may not read this environment")
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]
    if module == "train":
        assert "None" not in done.stdout
        assert "default off" in " ".join(done.stdout.split())


# --- a browser for the tests


def test_a_browser_is_found_where_there_is_one(tmp_path, monkeypatch):
    stub, real = tmp_path / "chromium-browser", tmp_path / "google-chrome"
    stub.write_text("#!/bin/sh\necho 'requires the chromium snap to be installed'; exit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(browser, "NAMES", ("chromium-browser", "google-chrome"))
    monkeypatch.setattr(browser, "playwrights_own", lambda: None)
    assert browser.find() is None  # a script that only says how to install one
    real.write_text("#!/bin/sh\necho 'Google Chrome 140'\n")
    real.chmod(0o755)
    assert browser.find() == str(real)
    assert browser.main() == 0


def test_without_a_browser_to_be_had_there_is_one_sentence(monkeypatch, capfd):
    monkeypatch.setattr(browser, "find", lambda: None)
    monkeypatch.setenv("PLAYWRIGHT_DOWNLOAD_HOST", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setattr(browser, "is_root", lambda: False)
    assert browser.main() == 1
    assert browser.SENTENCE in capfd.readouterr().err


def test_a_download_that_hangs_is_ended():
    code, text = browser.run("sleep", "60", seconds=0.5, quiet=True)
    assert code == 1
    assert "more than 0.5 s" in text
