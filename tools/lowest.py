"""Install the lowest versions that settings.ini claims, and run notebooks with them.

    python tools/lowest.py FOLDER [03_sobel_edges train ...] [--torch 2.13.0]

Default: all notebooks but those of the study and of the commands. FOLDER becomes a virtual
environment. `--torch`: another version than the lowest, for machines that have no index with it."""

import argparse
import configparser
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

from books import ROOT, module_of, notebook, notebooks

# they only run the tests, so they are the newest within the bounds
TESTING = ("nbdev", "execnb", "fastcore", "ghapi", "einops", "ipykernel")


def lowest(requirements, torch):
    "Requirements at their lowest version: name>=x,<y becomes name==x"
    pinned = []
    for requirement in requirements.split():
        if torch and requirement.startswith("torch>="):
            pinned.append(f"torch=={torch}")
        else:
            pin = re.sub(r">=([\w.]+).*", r"==\1", requirement)
            pinned.append(pin)
    return pinned


def settings():
    "What settings.ini says"
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def bounded_testers(requirements):
    "The packages that run the tests, with the bounds of the requirements"
    bounds = {}
    for requirement in requirements.split():
        found = re.match(r"[\w-]+", requirement)
        assert found, requirement
        name = found[0]
        bounds[name] = requirement
    return [bounds.get(name, name) for name in TESTING]


def install(folder, wanted, testers):
    "A virtual environment with this project, the versions that are wanted, and the testers"
    if not (folder / "bin").exists():
        venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "install", "-q"]
    packages = [*pip, *wanted, *testers]
    own = [*pip, "--no-deps", "-e", str(ROOT)]
    subprocess.run(packages, check=True)
    subprocess.run(own, check=True)


def is_quick(path):
    "Whether a notebook exports a module that belongs neither to the study nor to a command"
    module = module_of(path)
    if module is None:
        return False
    return not module.startswith(("study.", "commands."))


def told_errors(output):
    "Lines of an output that name an error"
    lines = output.splitlines()
    errors = [line for line in lines if "Error" in line]
    return [line for line in errors if "close_widget" not in line]


def passes(path, folder):
    "Run a notebook with the versions in a folder, and print how it went"
    binaries = folder.resolve() / "bin"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{binaries}:{env['PATH']}"
    name = path.relative_to(ROOT)
    words = ["nbdev_test", "--path", str(name), "--n_workers", "0"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode == 0:
        print(f"{path.stem}: passed", flush=True)
        return True
    errors = told_errors(done.stdout + done.stderr)
    first = "; ".join(errors[:3])
    print(f"{path.stem}: failed: {first}", flush=True)
    return False


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("notebooks", nargs="*")
    parser.add_argument("--torch")
    args = parser.parse_args()
    config = settings()
    requirements = " ".join([config["requirements"], config["monai_requirements"]])
    wanted = lowest(requirements, args.torch)
    testers = bounded_testers(config["dev_requirements"])
    install(args.folder, wanted, testers)
    print("installed:", *wanted)
    if args.notebooks:
        paths = [notebook(name) for name in args.notebooks]
    else:
        paths = [path for path in notebooks() if is_quick(path)]
    passed = [passes(path, args.folder) for path in paths]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
