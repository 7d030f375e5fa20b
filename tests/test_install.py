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
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def pyright(*words):
    "Run the type checker"
    return python("-m", "pyright", *words, timeout=600)


def test_the_hints_of_the_package_are_sound():
    done = pyright("--project", str(ROOT))
    printed = done.stdout
    assert done.returncode == 0, printed
    assert "0 errors, 0 warnings" in printed, printed
    mark = ROOT / "egcnn_nb/py.typed"
    assert mark.exists()


def test_the_checker_sees_a_wrong_hint(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from egcnn_nb.method.sobel import edge_target\nedge_target('a mask')\n")
    done = pyright(str(wrong))
    assert "reportArgumentType" in done.stdout


IMPORT_ALONE = """
import sys, egcnn_nb
assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)
"""


def test_import_of_the_package_alone_loads_nothing():
    done = python("-X", "importtime", "-c", IMPORT_ALONE)
    told = done.stderr
    assert done.returncode == 0, told
    found = re.search(r"\|\s+(\d+) \| egcnn_nb$", told, re.M)
    assert found, told
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
    folder = tmp_path / "data"
    dataset(folder)
    return str(folder)


def test_a_run_needs_no_monai(data, tmp_path):
    run = tmp_path / "run"
    done = train_without_monai(data, "--out", str(run))
    error = done.stderr
    assert done.returncode == 0, error
    weights = run / "model.safetensors"
    assert weights.exists()
    config = (run / "config.json").read_text()
    assert '"monai"' not in config


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--augment", "flip", "elastic"), "augment flip elastic"),
        (("--backbone", "segresnet"), "the backbone 'segresnet'"),
    ],
)
def test_without_monai_its_parts_are_refused_in_one_line(flags, what, data, tmp_path):
    out = tmp_path / "none"
    done = train_without_monai(data, "--out", str(out), *flags)
    error = done.stderr
    assert done.returncode == 2, error
    *_, last = error.strip().splitlines()
    fix = "pip install 'egcnn_nb[monai]'"
    assert last == f"error: {what} needs monai, which is not installed. Run: {fix}"
    assert not out.exists()


def text_of(name):
    "A file of the repository"
    path = ROOT / name
    return path.read_text()


def yaml_of(name):
    "A YAML file of the repository"
    text = text_of(name)
    return yaml.safe_load(text)


def test_the_version_is_the_same_everywhere():
    version = SETTINGS["DEFAULT"]["version"]
    citation = yaml_of("CITATION.cff")
    assert citation["version"] == version
    release, _, is_coming = version.partition(".dev")
    heading = f"## {release}"
    if is_coming:
        heading += " (unreleased)"
    changes = text_of("CHANGELOG.md")
    assert heading in changes.splitlines()


def test_torch_is_pinned_alike_everywhere():
    found = re.search(r"torch==.+", text_of("Dockerfile"))
    assert found
    pin = found[0]
    assert pin in text_of("environment.yml")
    assert pin in text_of("README.md")
    environment = yaml_of("environment.yml")
    *_, last = environment["dependencies"]
    assert "--constraint constraints.txt" in last["pip"]


def pins():
    "The names of the packages that constraints.txt pins"
    found = []
    for line in text_of("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            found.append(requirement.name)
    return found


def python_wanted(package):
    "The versions of Python for which an installed package is made, None where it is not there"
    try:
        about = metadata(package)
    except PackageNotFoundError:
        return None
    return SpecifierSet(about["Requires-Python"] or "")


def test_every_pin_admits_the_first_python_that_is_claimed():
    "Distributions ship the first releases of a Python for years: Debian 12 has 3.11.2"
    claimed = SETTINGS["DEFAULT"]["min_python"]
    first = f"{claimed}.0"
    installed = 0
    for name in pins():
        wanted = python_wanted(name)
        if wanted is not None:
            installed += 1
            assert first in wanted, name
    assert installed > 150
