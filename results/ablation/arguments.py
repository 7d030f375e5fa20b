"""The arguments of the scripts that look into trained runs."""

import argparse
from pathlib import Path


def read_arguments(description: str) -> argparse.Namespace:
    "data, runs and csv from the command line"
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("data", metavar="DATA", help="dataset folder")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    parser.add_argument("--csv", metavar="FILE", required=True, help="where the rows go")
    return parser.parse_args()
