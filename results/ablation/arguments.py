"""What the scripts that look into trained runs share: their arguments, and the way from run to run."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd


def read_arguments(description: str) -> argparse.Namespace:
    "data, runs and csv from the command line"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", metavar="DATA", help="dataset folder")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    parser.add_argument("--csv", metavar="FILE", required=True, help="where the rows go")
    return parser.parse_args()


def table_of_runs(args: argparse.Namespace, score: Callable) -> pd.DataFrame:
    "The rows that `score`, a function of (run folder, data), returns for each run of the arguments"
    rows = []
    for folder in args.runs:
        rows += score(folder, args.data)
    return pd.DataFrame(rows)
