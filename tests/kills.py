"""Kill a training run by SIGKILL at random moments and let it go on, until it ends.
Its files must be those of a run left alone, byte for byte.

    python tests/kills.py [--kills 50] [--seed 0]

A checkpoint is written after each step, and every second kill waits until a temporary file is
there: it falls into the writing of one. Each attempt is a fork of this process, which has torch
loaded already; it dies as any process does."""

import argparse
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny import SMALL, dataset

from egcnn_nb.commands.train import main as train

RECIPE = [*SMALL, *"--epochs 24 --save_minutes 0 --resume if_there".split()]


def train_quietly(data, out):
    "Train, or go on, without a word; returns the exit code"
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    cache = data / "cache"
    words = [data, "--out", out, "--cache", cache, *RECIPE]
    words = [str(word) for word in words]
    return train(words)


def is_writing(out):
    "Whether a temporary file is in the run folder"
    if not out.is_dir():
        return False
    names = os.listdir(out)
    return any(name.startswith(".part-") for name in names)


def has_ended(pid):
    "Whether a process has ended; it stays to be waited for"
    at_once = os.WEXITED | os.WNOHANG | os.WNOWAIT
    found = os.waitid(os.P_PID, pid, at_once)
    return found is not None


def attempt(data, out, seconds=None, hunt=False):
    """Train, or go on, in a process of its own, which is killed after that time, with `hunt` at
    the next temporary file then. Returns its exit code, or None if it was killed."""
    pid = os.fork()
    if pid == 0:
        os._exit(train_quietly(data, out))
    if seconds is not None:
        time.sleep(seconds)
        while hunt and not is_writing(out) and not has_ended(pid):
            pass
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return None
    return os.WEXITSTATUS(status)


def expect_same_files(run, alone, kills):
    "The files of a run are those of the run left alone"
    for name in ("metrics.csv", "model.safetensors"):
        ours, theirs = run / name, alone / name
        found = ours.read_bytes()
        expected = theirs.read_bytes()
        assert found == expected, f"{name} differs after {kills} kills"


@dataclass
class Count:
    "What has happened so far"

    kills: int = 0
    writing: int = 0  # kills while a file was being written
    ended: int = 0  # runs that ended


def run_to_its_end(data, out, count, most, moment):
    "Train and be killed after `moment()` seconds, again and again, until it ends"
    while True:
        seconds = moment() if count.kills < most else None
        every_second = count.kills % 2 == 1
        code = attempt(data, out, seconds, hunt=every_second)
        if code is not None:
            break
        count.kills += 1
        count.writing += any(out.glob(".part-*"))
    assert code == 0, code
    count.ended += 1


def kills(n, seed=0):
    "Kill runs n times; AssertionError where one ends in other files than the run left alone"
    rng = random.Random(seed)
    count = Count()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        alone = tmp / "alone"
        data = dataset(tmp / "data")
        attempt(data, tmp / "warm")
        start = time.time()
        assert attempt(data, alone) == 0
        latest = (time.time() - start) / 3

        def moment():
            return rng.uniform(0, latest)

        while count.kills < n or count.ended == 0:
            out = tmp / f"run{count.ended}"
            run_to_its_end(data, out, count, n, moment)
            expect_same_files(out, alone, count.kills)
    return count


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = kills(args.kills, args.seed)
    print(
        f"{count.kills} kills, {count.writing} of them while a file was being written; "
        f"{count.ended} runs ended, each with the files of the run left alone"
    )


if __name__ == "__main__":
    main()
