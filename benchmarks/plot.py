"""The table of benchmarks/README.md as one picture, nbs/images/speed.png.

python benchmarks/plot.py"""

import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
PNG = HERE.parent / "nbs/images/speed.png"
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
    assert found, text
    return float(found[0])


def is_ratio(text):
    "Whether a cell of the table holds a ratio, no time"
    if "ms" in text:
        return False
    digit = re.search(r"\d", text)
    return digit is not None


def is_goal(text):
    "Whether a cell of the table holds a bound"
    sign = re.search(r"[≤≥]", text)
    return sign is not None


def times_met(ratio, goal):
    "How many times as well as wanted"
    found = number(ratio)
    wanted = number(goal)
    if "≤" in goal:
        return wanted / found
    return found / wanted


def cells_of(line):
    "The cells of a line of a table in Markdown"
    inside = line.strip("|")
    cells = inside.split("|")
    return [cell.strip() for cell in cells]


def row_of(line):
    "The row of a line of Markdown, or None where the line has no goal and no ratio"
    cells = cells_of(line)
    if len(cells) != 6:
        return None
    work, _, peer, _, ratio, goal = cells
    if not is_ratio(ratio) or not is_goal(goal):
        return None
    peer, *_ = peer.split(" (")
    label = f"{work}\nagainst {peer}"
    plain = label.replace("`", "")
    met = times_met(ratio, goal)
    return Row(plain, met)


def rows():
    "The rows of the first table, the last one first"
    found = []
    text = PAGE.read_text()
    for line in text.splitlines():
        row = row_of(line)
        if row is not None:
            found.append(row)
    return found[::-1]


def write_number(ax, place, met):
    "The number of a row at the end of its bar"
    side = "left"
    distance = 4
    if met < 1:
        side = "right"
        distance = -4
    ax.annotate(
        f"{met:.2g}",
        (met, place),
        (distance, 0),
        textcoords="offset points",
        ha=side,
        va="center",
        fontsize=7,
    )


def draw_bar(ax, place, met):
    "The bar of a row, which begins at one, and its number"
    colour = MET if met >= 1 else MISSED
    length = met - 1
    ax.barh(place, length, left=1, color=colour)
    write_number(ax, place, met)


def finish(ax, found):
    "Scale, ticks and title"
    count = len(found)
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


def main():
    found = rows()
    count = len(found)
    height = 0.42 * count + 0.9
    fig = Figure(figsize=(8, height), layout="constrained")
    ax = fig.subplots()
    for place, row in enumerate(found):
        draw_bar(ax, place, row.met)
    finish(ax, found)
    fig.savefig(PNG, dpi=90)


if __name__ == "__main__":
    main()
