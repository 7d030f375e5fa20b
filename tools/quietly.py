"""Run cells of a notebook in this process without a word, as the tools beside this file do in processes of their own."""
import os, sys
from pathlib import Path

from execnb.nbio import dict2nb

ROOT = Path(__file__).parents[1]

def as_notebook(cells):
    "execnb's notebook of cells (dicts)"
    return dict2nb({"cells": [dict(c) for c in cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})

def run_cells(nb):
    "Exit code 0 if every cell of a notebook runs, else 1"
    log = open(os.devnull, "w"); sys.stdout = sys.stderr = log; os.dup2(log.fileno(), 1); os.dup2(log.fileno(), 2)
    os.environ["MPLBACKEND"] = "agg"; os.chdir(ROOT/"nbs"); sys.path.insert(0, str(ROOT/"nbs"))
    from execnb.shell import CaptureShell
    try: CaptureShell().run_all(nb, exc_stop=True)
    except BaseException: return 1
    return 0
