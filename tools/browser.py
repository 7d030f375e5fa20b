"""Find a Chromium for the tests, or get one: Playwright's download, else Debian's package where this runs as root.

python tools/browser.py     # says what it does; exit code 1 and one sentence where there is none to be had
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PLACES = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
MINUTES = 10  # for a download
APT = (
    "apt-get",
    "-q",
    "-o",
    "Acquire::Retries=1",
    "-o",
    "Acquire::http::Timeout=20",
    "-o",
    "Acquire::https::Timeout=20",
    "-o",
    "DPkg::Lock::Timeout=120",
)
SENTENCE = (
    "There is no Chromium on this machine, and it could not be downloaded. Install one (on Debian, "
    "as root: apt-get install chromium), then run this again."
)


# prints where Playwright keeps its Chromium
WHERE = """
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    print(playwright.chromium.executable_path)
"""


def start(words, quiet):
    "Start a command that asks nothing, in a session of its own"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    environment.setdefault("PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT", "15000")  # ms
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def run(*words, seconds=60 * MINUTES, quiet=False):
    """Run a command, and end it with all that it started after so many seconds: exit code (1 if
    ended), output"""
    if not quiet:
        print("+", " ".join(words), flush=True)
    try:
        process = start(words, quiet)
    except OSError as error:
        return 1, str(error)
    try:
        text, _ = process.communicate(timeout=seconds)
        return process.returncode, text or ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return 1, f"it took more than {seconds} s"


def works(path):
    "Whether a browser starts; on some systems a script of that name only says how to install one"
    failed, text = run(str(path), "--version", seconds=30, quiet=True)
    if failed:
        return False
    return "Chrom" in text


def playwrights_own():
    "Where Playwright keeps the Chromium that it downloads, there or not; None without Playwright"
    failed, text = run(sys.executable, "-c", WHERE, seconds=60, quiet=True)
    if failed:
        return None
    lines = text.strip().splitlines()
    return Path(lines[-1])


def find():
    "Path of a Chromium or Chrome that starts, or None"
    for name in (*NAMES, *PLACES):
        path = shutil.which(name)
        if path and works(path):
            return path
    own = playwrights_own()
    if own and own.is_file() and works(own):
        return str(own)
    return None


def is_root():
    "Whether this may install packages"
    if not hasattr(os, "geteuid"):
        return False
    return os.geteuid() == 0


def from_playwright():
    "Playwright's Chromium, and as root the system libraries that it needs: path, or None"
    failed, _ = run(sys.executable, "-m", "playwright", "install", "chromium")
    if failed:
        return None
    path = find()
    if path is None and is_root():
        run(sys.executable, "-m", "playwright", "install-deps", "chromium")
        path = find()
    return path


def from_debian():
    "Debian's Chromium, where this runs as root: path, or None"
    if not is_root() or not shutil.which("apt-get"):
        return None
    run(*APT, "update", seconds=180)
    run(*APT, "install", "-y", "chromium")
    return find()


def main():
    "Say where the browser is; exit code 1 where there is none to be had"
    path = find() or from_playwright() or from_debian()
    if path is None:
        print(SENTENCE, file=sys.stderr)
        return 1
    print(f"browser: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
