"""Install the lowest versions that settings.ini claims, and run notebooks with them.

    python tools/lowest.py FOLDER [03_sobel_edges train ...] [--torch 2.13.0]      # default: all but those of the study and of the training command

FOLDER becomes a virtual environment. `--torch`: another version than the lowest, for machines that have no index with that one."""

import argparse
import configparser
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

from books import ROOT, module_of, notebook, notebooks

TESTING = (
    "nbdev",
    "execnb",
    "fastcore",
    "ghapi",
    "einops",
    "ipykernel",
)  # newest within the bounds: they only run the tests


def lowest(requirements, torch):
    "name>=x,<y becomes name==x"
    pinned = [re.sub(r">=([\w.]+).*", r"==\1", r) for r in requirements.split()]
    return [f"torch=={torch}" if torch and r.startswith("torch==") else r for r in pinned]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path)
    p.add_argument("notebooks", nargs="*")
    p.add_argument("--torch")
    args = p.parse_args()
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    cfg = config["DEFAULT"]
    wanted = lowest(cfg["requirements"] + " " + cfg["monai_requirements"], args.torch)
    bounds = {re.match(r"[\w-]+", r)[0]: r for r in cfg["dev_requirements"].split()}
    if not (args.folder / "bin").exists():
        venv.create(args.folder, with_pip=True)
    pip = lambda *words: subprocess.run(
        [args.folder / "bin/python", "-m", "pip", "install", "-q", *words], check=True
    )
    pip(*wanted, *(bounds.get(n, n) for n in TESTING))
    pip("--no-deps", "-e", str(ROOT))
    print("installed:", *wanted)
    paths = [notebook(n) for n in args.notebooks] or [
        p for p in notebooks() if not (module_of(p) or "study.").startswith(("study.", "commands."))
    ]
    env, failed = (
        {
            **os.environ,
            "PATH": f"{args.folder.resolve() / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        },
        [],
    )
    for path in paths:
        name, done = (
            path.stem,
            subprocess.run(
                ["nbdev_test", "--path", str(path.relative_to(ROOT)), "--n_workers", "0"],
                cwd=ROOT,
                env=env,
                capture_output=True,
                text=True,
            ),
        )
        said = [
            line
            for line in (done.stdout + done.stderr).splitlines()
            if "Error" in line and "close_widget" not in line
        ]
        print(
            f"{name}: {'passed' if done.returncode == 0 else 'failed: ' + '; '.join(said[:3])}",
            flush=True,
        )
        failed += [name] * (done.returncode != 0)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
