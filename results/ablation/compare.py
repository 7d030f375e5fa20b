"""What each arm of a folder adds to one of them, from scores on validation cases.

    python results/ablation/compare.py lgg --to bare

Each folder holds validation_scores.csv and costs.json, as `egcnn_experiment` wrote them. The script prints two tables
for each folder: the means of each arm, and its mean differences to one arm, followed by the mean of each seed. Only
scores of one seed and one case are compared, since the seed draws the validation cases. ± is the standard error over
these pairs. It says how the cases differ and not how another training would, for which you look at the seeds."""

import argparse

import pandas as pd
from choose import FOLDERS, HERE, by_pair, costs_of, decided, read_scores, table_of

CHOSEN = "eg+edge_head=norm+gate_residual=layer+weight_negatives=False"


def written(difference: pd.DataFrame) -> dict:
    "arm -> its differences (seed and case, arm) as +0.006 ± 0.001 (+0.008, +0.004), empty where there is none"
    texts = {}
    for arm, pairs in difference.items():
        known = pairs.dropna()
        if known.empty:
            continue
        seeds = ", ".join(f"{mean:+.3f}" for mean in known.groupby("seed").mean())
        texts[arm] = f"{known.mean():+.3f} ± {known.sem():.3f} ({seeds})"
    return texts


def table_to(rows: pd.DataFrame, base: str) -> pd.DataFrame:
    "What each arm adds to the arm `base`, and what its edges add to those that Sobel finds in its own mask"
    rows = decided(rows)
    columns = {}
    for score in ("edge_f1", "dice", "surface_dice"):
        table = by_pair(rows, score)
        columns[score] = written(table.drop(columns=base).sub(table[base], axis=0))
    to_sobel = by_pair(rows, "edge_f1") - by_pair(rows, "mask_edge_f1")
    columns["edge_f1 minus mask_edge_f1"] = written(to_sobel)
    return pd.DataFrame(columns, dtype=object).fillna("")


def main() -> None:
    parser = argparse.ArgumentParser(description="What each arm of a folder adds to one of them.")
    parser.add_argument("folders", nargs="+", choices=FOLDERS, help="of results/ablation")
    parser.add_argument("--to", metavar="ARM", default=CHOSEN, help="default: the chosen arm")
    args = parser.parse_args()
    for name in args.folders:
        rows = read_scores(HERE / name)
        arms = sorted(rows.arm.unique())
        if args.to not in arms:
            parser.error(f"{name} has no arm {args.to}. Give one of {', '.join(arms)}.")
        print(f"\n## {name}\n")
        print(table_of(rows, costs_of(HERE / name)).to_markdown(floatfmt=".3f"))
        print(f"\nminus {args.to}:\n")
        print(table_to(rows, args.to).to_markdown())


if __name__ == "__main__":
    main()
