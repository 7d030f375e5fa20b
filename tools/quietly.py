"""Run cells of a notebook in this process without a word, as the tools beside this file do in processes of their own."""

import os
import sys

from execnb.nbio import dict2nb


def as_notebook(cells):
    "execnb's notebook of cells (dicts)"
    return dict2nb(
        {"cells": [dict(c) for c in cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    )


def run_cells(nb, folder):
    "Exit code 0 if every cell of a notebook that lies in `folder` runs, else 1"
    log = open(os.devnull, "w")
    sys.stdout = sys.stderr = log
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ["MPLBACKEND"] = "agg"
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    from execnb.shell import CaptureShell

    try:
        CaptureShell().run_all(nb, exc_stop=True)
    except BaseException:
        return 1
    return 0
