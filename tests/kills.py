"""Kill a training run by SIGKILL at random moments and let it go on, until it ends: its files must be those of a run left alone, byte for byte.

    python tests/kills.py [--kills 50] [--seed 0]

A checkpoint is written after each step, and every second kill waits until a temporary file is there: it falls into the writing of one. Each attempt is a fork of this process, which has torch
loaded already; it dies as any process does."""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from tiny import dataset

from egcnn_nb.commands.train import main as train


def attempt(data, out, seconds=None, hunt=False):
    "Train, or go on, in a process of its own, which is killed after that time, or at the next temporary file then; returns its exit code, or None if it was killed"
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = train(
            [
                str(w)
                for w in (
                    data,
                    "--out",
                    out,
                    "--cache",
                    data / "cache",
                    *"--epochs 24 --width 4 --levels 2 --patch_size 16 16 16 --batch_size 4 --lr 1e-3 --validation 2 --precision fp32 --save_minutes 0 --resume if_there".split(),
                )
            ]
        )
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        while (
            hunt
            and not (out.is_dir() and any(n.startswith(".part-") for n in os.listdir(out)))
            and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            pass
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def kills(n, seed=0):
    "Kills, and runs that ended: raises AssertionError where one ends in other files than the run left alone"
    rng, done, ended, writing = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        data = dataset(tmp / "data")
        attempt(data, tmp / "warm")
        start = time.time()
        assert attempt(data, tmp / "alone") == 0
        whole = time.time() - start
        while done < n or ended == 0:
            out = tmp / f"run{ended}"
            while (
                code := attempt(
                    data, out, rng.uniform(0, whole / 3) if done < n else None, hunt=done % 2 == 1
                )
            ) is None:
                done += 1
                writing += any(out.glob(".part-*"))
            assert code == 0, code
            for name in ("metrics.csv", "model.safetensors"):
                assert (out / name).read_bytes() == (tmp / "alone" / name).read_bytes(), (
                    f"{name} differs after {done} kills"
                )
            ended += 1
    return done, ended, writing


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    done, ended, writing = kills(args.kills, args.seed)
    print(
        f"{done} kills, {writing} of them while a file was being written; {ended} runs ended, each with the files of the run left alone"
    )


if __name__ == "__main__":
    main()
