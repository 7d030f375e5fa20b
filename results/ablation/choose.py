"""Which form of the edge stream the rule in README.md chooses, from scores on validation cases.

    python results/ablation/choose.py phantoms hippocampus

Each folder holds validation_scores.csv and costs.json, as `egcnn_experiment` wrote them. The script prints a table
for each folder, then the arms that are good enough and safe on all of them, the cheapest first."""

import argparse
import json
import re
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
FOLDERS = sorted(path.parent.name for path in HERE.glob("*/validation_scores.csv"))
SHOWN = ["edge_f1", "mask_edge_f1", "edge_width", "filled", "ods", "dice", "surface_dice"]


def arm_of(run: str) -> str:
    "The arm in the name of a run, such as segnet-eg+thickness=1-all-0-lr0.002"
    found = re.fullmatch(r"[a-z0-9_]+-(.+)-\w+-\d+-lr[\d.e-]+", run)
    assert found, run
    return found[1]


KEYS = ["arm", "seed", "case", "output"]
EDGE = ["edge_f1", "mask_edge_f1", "edge_width", "filled", "ods"]


def read_scores(folder: Path) -> pd.DataFrame:
    """Mean scores of each arm, seed, case and output.

    The edge scores are means over the classes that the case has. Dice is the mean over all classes, as in every
    other table: it is 0 where a network predicts a class that the case lacks."""
    rows = pd.read_csv(folder / "validation_scores.csv")
    rows["arm"] = rows.run.map(arm_of)
    has_class = (rows.region != "mean") & rows.deep_share.notna()
    edges = rows[has_class].groupby(KEYS)[EDGE].mean()
    means = rows[rows.region == "mean"].drop(columns=EDGE)
    return means.merge(edges.reset_index(), on=KEYS, how="left")


def is_of_first_part(arm: str) -> bool:
    "Whether an arm has no reading but those that the first part compares"
    _, *readings = arm.split("+")
    names = {reading.split("=")[0] for reading in readings}
    return names == {"edge_head", "gate_residual", "weight_negatives"}


def decided(rows: pd.DataFrame) -> pd.DataFrame:
    "The rows of the output that decides: the fused one, and of a network without edge stream its only one"
    has_stream = rows.arm.str.startswith("eg")
    return rows[(rows.output == "fused") | ~has_stream]


def by_pair(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    "A score with a row for each pair of seed and case, and a column for each arm"
    return rows.pivot(index=["seed", "case"], columns="arm", values=score)


def to_best(rows: pd.DataFrame, score: str, best: str) -> pd.DataFrame:
    "Each arm's mean difference to the best arm and its standard error, with pairs of seed and case as the sample"
    table = by_pair(rows, score)
    complete = table.dropna()
    difference = complete.sub(complete[best], axis=0)
    return pd.DataFrame(
        {"difference": difference.mean(), "error": difference.sem(), "pairs": len(difference)}
    )


def judge(rows: pd.DataFrame) -> pd.DataFrame:
    "arm -> whether it is good enough in edge F1, and safe in Dice (README.md, section Rule)"
    streams = decided(rows)
    streams = streams[streams.arm != "bare"]
    best = streams.groupby("arm").edge_f1.mean().idxmax()
    edge, dice = to_best(streams, "edge_f1", best), to_best(streams, "dice", best)
    found = pd.DataFrame(
        {
            "edge F1 to best": edge.difference,
            "± edge": edge.error,
            "Dice to best": dice.difference,
            "± Dice": dice.error,
            "pairs": edge.pairs,
        }
    )
    found["good enough"] = edge.difference >= -edge.error
    found["safe"] = dice.difference >= -dice.error
    found.loc[best, ["good enough", "safe"]] = True
    return found


def costs_of(folder: Path) -> dict:
    "arm -> multiply-adds of a patch"
    costs = json.loads((folder / "costs.json").read_text())["costs"]
    return {name.split(" ", 1)[1]: own["multiply-adds"] for name, own in costs.items()}


def chosen(judged: list, costs: dict) -> list:
    "Arms that are good enough and safe everywhere, the cheapest first; with equal cost unweighted negatives come first"
    fit = set.intersection(
        *(set(table.index[table["good enough"] & table["safe"]]) for table in judged)
    )
    return sorted(fit, key=lambda arm: (costs[arm], "weight_negatives=False" not in arm))


def least_loss(judged: list) -> list:
    """Arms that are safe everywhere, the one that loses least where it loses most comes first.

    README.md, section What came out, says why this second rule was needed."""
    safe = set.intersection(*(set(table.index[table.safe]) for table in judged))
    worst = {arm: min(table["edge F1 to best"][arm] for table in judged) for arm in safe}
    return sorted(worst, key=lambda arm: -worst[arm])


def table_of(rows: pd.DataFrame, costs: dict) -> pd.DataFrame:
    "Means over seeds and cases of each arm"
    rows = decided(rows)
    means = rows.groupby("arm")[SHOWN].mean()
    main = rows.groupby("arm").seed.nunique()
    means.insert(0, "seeds", main)
    means["10⁹ multiply-adds"] = means.index.map(lambda arm: costs[arm] / 1e9)
    return means.sort_values("edge_f1", ascending=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Which form of the edge stream the rule chooses.")
    parser.add_argument("folders", nargs="+", choices=FOLDERS, help="of results/ablation")
    judged, costs = [], {}
    for name in parser.parse_args().folders:
        folder = HERE / name
        rows = read_scores(folder)
        costs = costs_of(folder)
        first = rows[rows.arm.map(is_of_first_part)]
        judged.append(judge(first))
        print(f"\n## {name}\n")
        print(table_of(rows, costs).to_markdown(floatfmt=".3f"))
        print()
        print(judged[-1].to_markdown(floatfmt=".4f"))
    found = chosen(judged, costs)
    if found:
        print("\nGood enough and safe on all of them, the cheapest first:")
    else:
        print("\nNo arm is good enough and safe on all of them. Safe, the least loss first:")
        found = least_loss(judged)
    for arm in found:
        print(f"    {arm}")


if __name__ == "__main__":
    main()
