"""Run cells of a notebook in this process without a word, for the tools beside this file, which do
so in processes of their own."""

import os
import sys
from typing import Any

from execnb.nbio import dict2nb


def as_notebook(cells):
    "execnb's notebook of cells (dicts)"
    notebook = {
        "cells": [dict(cell) for cell in cells],
        "metadata": {},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return dict2nb(notebook)


def silence():
    "Send all output of this process, also of libraries in C, to nowhere"
    nowhere = open(os.devnull, "w")
    sys.stdout = nowhere
    sys.stderr = nowhere
    for stream in (1, 2):
        os.dup2(nowhere.fileno(), stream)


def run_cells(nb, folder):
    "Exit code 0 if every cell of a notebook that lies in `folder` runs, else 1"
    silence()
    os.environ["MPLBACKEND"] = "agg"
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    from execnb.shell import CaptureShell

    try:
        shell: Any = CaptureShell()
        shell.run_all(nb, exc_stop=True)
    except BaseException:
        return 1
    return 0
