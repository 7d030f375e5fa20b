"""Fixtures that several files share: one Chromium, a copy of the notebooks, a folder for screenshots.

Playwright starts once a process."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import browser  # noqa: E402

FLAGS = [
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
def shots(tmp_path_factory):
    "The folder for screenshots"
    named = os.environ.get("EGCNN_SCREENSHOTS")
    if named is None:
        return tmp_path_factory.mktemp("screenshots")
    folder = Path(named)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    "A copy of the notebooks and their data, since the front end saves into it"
    folder = tmp_path_factory.mktemp("work")
    for name in ("nbs", "data_samples", "egcnn_nb"):
        source = ROOT / name
        shutil.copytree(source, folder / name)
    shutil.copy(ROOT / "settings.ini", folder)  # the last cell of each notebook exports
    return folder


@pytest.fixture(scope="session")
def chromium():
    "A browser without a window"
    # here, so that an adapter's test needs its own framework alone
    from playwright.sync_api import sync_playwright

    path = browser.find()
    assert path, "There is no Chromium on this machine. Get one by python tools/browser.py."
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()
