"""The installed package: sound type hints, no import without need, a clear error where an extra is missing."""

import configparser
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from tiny import dataset

ROOT = Path(__file__).parents[1]
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")

WITHOUT_MONAI = """
import importlib.machinery as m, sys
find = m.PathFinder.find_spec
m.PathFinder.find_spec = lambda name, *args: None if name.split(".")[0] == "monai" else find(name, *args)
"""


def python(*words, timeout=300):
    "Run Python; the process, with what it printed"
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=timeout)


def pyright(*words):
    "Run the type checker"
    return python("-m", "pyright", *words, timeout=600)


def test_the_hints_of_the_package_are_sound():
    done = pyright("--project", str(ROOT))
    assert done.returncode == 0, done.stdout
    assert "0 errors, 0 warnings" in done.stdout, done.stdout
    assert (ROOT / "egcnn_nb/py.typed").exists()


def test_the_checker_sees_a_wrong_hint(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from egcnn_nb.method.sobel import edge_target\nedge_target('a mask')\n")
    assert "reportArgumentType" in pyright(str(wrong)).stdout


IMPORT_ALONE = """
import sys, egcnn_nb
assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)
"""


def test_import_of_the_package_alone_loads_nothing():
    done = python("-X", "importtime", "-c", IMPORT_ALONE)
    assert done.returncode == 0, done.stderr
    found = re.search(r"\|\s+(\d+) \| egcnn_nb$", done.stderr, re.M)
    microseconds = int(found[1])  # with all that it imports
    assert microseconds < 300_000


SMALL = "--epochs 1 --width 4 --levels 2 --patch_size 16 16 16 --validation 1 --cache off".split()


def train_without_monai(*flags):
    "Run `egcnn_train` where MONAI is not installed"
    code = f"""{WITHOUT_MONAI}
from egcnn_nb.commands.train import main
sys.argv[1:] = {[*flags, *SMALL]}
sys.exit(main())
"""
    return python("-c", code)


@pytest.fixture
def data(tmp_path):
    "A small dataset"
    dataset(tmp_path / "data")
    return str(tmp_path / "data")


def test_a_run_needs_no_monai(data, tmp_path):
    run = tmp_path / "run"
    done = train_without_monai(data, "--out", str(run))
    assert done.returncode == 0, done.stderr
    assert (run / "model.safetensors").exists()
    assert '"monai"' not in (run / "config.json").read_text()


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--augment", "flip", "elastic"), "augment flip elastic"),
        (("--backbone", "segresnet"), "the backbone 'segresnet'"),
    ],
)
def test_without_monai_its_parts_are_refused_in_one_line(flags, what, data, tmp_path):
    done = train_without_monai(data, "--out", str(tmp_path / "none"), *flags)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    fix = "pip install 'egcnn_nb[monai]'"
    assert last == f"error: {what}: found no monai, expected it installed; {fix}"
    assert not (tmp_path / "none").exists()


def text_of(name):
    "A file of the repository"
    return (ROOT / name).read_text()


def test_the_version_is_the_same_everywhere():
    version = SETTINGS["DEFAULT"]["version"]
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == version
    release, _, is_coming = version.partition(".dev")
    heading = f"## {release} (unreleased)" if is_coming else f"## {release}"
    assert heading in text_of("CHANGELOG.md").splitlines()


def test_torch_is_pinned_alike_everywhere():
    lines = [line for line in text_of("Dockerfile").splitlines() if "torch==" in line]
    version = lines[0].split("torch==")[1]
    pin = f"torch=={version}"
    assert pin in text_of("environment.yml")
    assert pin in text_of("README.md")
    environment = yaml.safe_load(text_of("environment.yml"))
    assert "--constraint constraints.txt" in environment["dependencies"][-1]["pip"]


def pins():
    "The names of the packages that constraints.txt pins"
    lines = text_of("constraints.txt").splitlines()
    return [Requirement(line).name for line in lines if line and not line.startswith("#")]


def python_wanted(package):
    "The versions of Python for which an installed package is made"
    return metadata(package)["Requires-Python"]


def test_every_pin_admits_the_first_python_that_is_claimed():
    "Distributions ship the first releases of a Python for years: Debian 12 has 3.11.2"
    first = f"{SETTINGS['DEFAULT']['min_python']}.0"
    wanted = {}
    for name in pins():
        try:
            wanted[name] = python_wanted(name)
        except PackageNotFoundError:
            pass
    assert len(wanted) > 150
    refused = {n: w for n, w in wanted.items() if w and first not in SpecifierSet(w)}
    assert not refused
