"""The table of benchmarks/README.md as one picture, nbs/images/speed.png.

python benchmarks/plot.py"""

import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
MET = "#2a9d8f"
MISSED = "#c1121f"
TICKS = {0.5: "half", 1: "as wanted", 2: "twice", 4: "four times", 8: "eight"}


@dataclass
class Row:
    "One row of the table"

    label: str  # the work, and the peer
    met: float  # how many times as well as wanted


def number(text):
    "The first number in a cell of the table"
    plain = text.replace("**", "")
    found = re.search(r"\d+(\.\d+)?", plain)
    return float(found[0])


def is_compared(ratio, goal):
    "Whether a row has a goal and a ratio, no time"
    if "ms" in ratio or not re.search(r"\d", ratio):
        return False
    return re.search(r"[≤≥]", goal) is not None


def row_of(line):
    "The row of a line of Markdown, or None where the line has no goal and no ratio"
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) != 6:
        return None
    work, _, peer, _, ratio, goal = cells
    if not is_compared(ratio, goal):
        return None
    peer, *_ = peer.split(" (")
    label = f"{work}\nagainst {peer}"
    met = number(ratio) / number(goal)
    if "≤" in goal:
        met = 1 / met
    return Row(label.replace("`", ""), met)


def rows():
    "The rows of the first table, the last one first"
    found = []
    for line in (HERE / "README.md").read_text().splitlines():
        row = row_of(line)
        if row is not None:
            found.insert(0, row)
    return found


def write_number(ax, place, met):
    "The number of a row at the end of its bar"
    left = met < 1
    ax.annotate(
        f"{met:.2g}",
        (met, place),
        (-4 if left else 4, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=7,
    )


def main():
    found = rows()
    count = len(found)
    height = 0.42 * count + 0.9
    fig = Figure(figsize=(8, height), layout="constrained")
    ax = fig.subplots()
    for place, row in enumerate(found):
        met = row.met
        colour = MET if met >= 1 else MISSED
        ax.barh(place, met - 1, left=1, color=colour)
        write_number(ax, place, met)
    ax.set_xscale("log")
    ax.set_xlim(0.4, 16)
    ax.set_ylim(-0.7, count - 0.3)
    ax.axvline(1, color="k", lw=0.8)
    labels = [row.label for row in found]
    ax.set_yticks(range(count), labels, fontsize=7)
    names = TICKS.values()
    ax.set_xticks(list(TICKS), list(names), fontsize=8)
    ax.minorticks_off()
    ax.set_title("how well each goal of speed is met (benchmarks/README.md)", fontsize=9)
    fig.savefig(HERE.parent / "nbs/images/speed.png", dpi=90)


if __name__ == "__main__":
    main()
