"""What each arm of a folder adds to one of them, from scores on validation cases.

    python results/ablation/compare.py lgg --to bare

Each folder holds validation_scores.csv and costs.json, as `egcnn_experiment` wrote them. The script prints two tables
for each folder: the means of each arm, and its mean differences to one arm with their standard errors. Only arms of one
seed and one case are compared, since the seed draws the validation cases."""

import argparse

import pandas as pd
from choose import FOLDERS, HERE, costs_of, decided, read_scores, table_of

CHOSEN = "eg+edge_head=norm+gate_residual=layer+weight_negatives=False"


def differences(rows: pd.DataFrame, score: str, base: str) -> pd.DataFrame:
    """arm -> mean difference of a score to the arm `base`, and its standard error

    The sample are the pairs of seed and case that both arms have."""
    table = rows.pivot(index=["seed", "case"], columns="arm", values=score)
    difference = table.sub(table[base], axis=0).drop(columns=base)
    return pd.DataFrame({"mean": difference.mean(), "error": difference.sem()})


def to_sobel(rows: pd.DataFrame) -> pd.DataFrame:
    "arm -> how much better the stream's edges are than those that Sobel finds in the network's own mask"
    gain = (rows.edge_f1 - rows.mask_edge_f1).groupby(rows.arm)
    return pd.DataFrame({"mean": gain.mean(), "error": gain.sem()})


def written(found: pd.DataFrame) -> pd.Series:
    "Each difference as +0.006 ± 0.001, empty where there is none"
    texts = {}
    for arm, row in found.iterrows():
        known = pd.notna(row["mean"])
        texts[arm] = f"{row['mean']:+.3f} ± {row['error']:.3f}" if known else ""
    return pd.Series(texts, dtype=str)


def table_to(rows: pd.DataFrame, base: str) -> pd.DataFrame:
    "What each arm adds to the arm `base` in edge F1 and in the scores of its masks"
    rows = decided(rows)
    columns = {
        score: written(differences(rows, score, base))
        for score in ("edge_f1", "dice", "surface_dice")
    }
    columns["edge_f1 minus mask_edge_f1"] = written(to_sobel(rows))
    return pd.DataFrame(columns).fillna("")


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
