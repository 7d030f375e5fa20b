"What somebody has who installed the package: hints that a checker accepts, no import that is not needed, a word where an extra is missing."

import configparser
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

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
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=timeout)


def test_the_hints_of_the_package_are_sound():
    done = python("-m", "pyright", "--project", str(ROOT), timeout=600)
    assert done.returncode == 0 and "0 errors, 0 warnings" in done.stdout, done.stdout
    assert (ROOT / "egcnn_nb/py.typed").exists()


def test_the_checker_sees_a_wrong_hint(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "from egcnn_nb.method.sobel import edge_target\nedge_target('a mask')\n"
    )
    assert (
        "reportArgumentType"
        in python("-m", "pyright", str(tmp_path / "wrong.py"), timeout=600).stdout
    )


def test_import_of_the_package_alone_loads_nothing():
    done = python(
        "-X",
        "importtime",
        "-c",
        "import sys, egcnn_nb; assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)",
    )
    assert done.returncode == 0, done.stderr
    assert (
        int(re.search(r"\|\s+(\d+) \| egcnn_nb$", done.stderr, re.M)[1]) < 300_000
    )  # microseconds, with all below it


def test_without_monai_everything_else_works(tmp_path):
    dataset(tmp_path / "data")
    run = lambda *flags: python(
        "-c",
        f"{WITHOUT_MONAI}\nfrom egcnn_nb.commands.train import main; sys.argv[1:] = {[str(tmp_path / 'data'), *flags]}; sys.exit(main())",
    )
    small = (
        "--epochs",
        "1",
        "--width",
        "4",
        "--levels",
        "2",
        "--patch_size",
        "16",
        "16",
        "16",
        "--validation",
        "1",
        "--cache",
        "off",
    )
    done = run("--out", str(tmp_path / "run"), *small)
    assert (
        done.returncode == 0
        and (tmp_path / "run/model.safetensors").exists()
        and '"monai"' not in (tmp_path / "run/config.json").read_text()
    ), done.stderr
    for flags, what in (
        (("--augment", "flip", "elastic"), "augment flip elastic"),
        (("--backbone", "segresnet"), "the backbone 'segresnet'"),
    ):
        done = run("--out", str(tmp_path / "none"), *small, *flags)
        assert (
            done.returncode == 2
            and done.stderr.strip().splitlines()[-1]
            == f"error: {what}: found no monai, expected it installed; pip install 'egcnn_nb[monai]'"
        ), done.stderr
        assert not (tmp_path / "none").exists()


def test_what_is_written_down_twice_agrees():
    cfg, cite = SETTINGS["DEFAULT"], yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cite["version"] == cfg["version"]
    release, _, is_coming = cfg["version"].partition(".dev")
    heading = f"## {release} (unreleased)" if is_coming else f"## {release}"
    assert heading in (ROOT / "CHANGELOG.md").read_text().splitlines()
    pinned = next(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if "torch==" in line
    ).split("torch==")[1]
    assert (
        f"torch=={pinned}" in (ROOT / "environment.yml").read_text()
        and f"torch=={pinned}" in (ROOT / "README.md").read_text()
    )
    assert (
        "--constraint constraints.txt"
        in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    )


def test_every_pin_admits_the_first_python_that_is_claimed():
    "Distributions ship the first releases of a Python for years: Debian 12 has 3.11.2"
    first = f"{SETTINGS['DEFAULT']['min_python']}.0"
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    wanted = {}
    for pin in pins:
        try:
            wanted[pin.name] = metadata(pin.name)["Requires-Python"]
        except PackageNotFoundError:
            pass
    assert len(wanted) > 150 and not {
        n: w for n, w in wanted.items() if w and first not in SpecifierSet(w)
    }
