"""The table of benchmarks/README.md as one picture, nbs/images/speed.png.

python benchmarks/plot.py"""

import re
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent


def rows():
    "What each row of the first table says: work, how many times as well as wanted"
    number = lambda text: float(re.search(r"\d+(\.\d+)?", text.replace("**", ""))[0])
    for line in (HERE / "README.md").read_text().splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if (
            len(cells) != 6
            or not re.search(r"[≤≥]", cells[5])
            or not re.search(r"\d", cells[4])
            or "ms" in cells[4]
        ):
            continue
        ratio = number(cells[4])
        wanted = number(cells[5])
        yield (
            f"{cells[0]}\nagainst {cells[2].split(' (')[0]}".replace("`", ""),
            ratio / wanted if "≥" in cells[5] else wanted / ratio,
        )


def main():
    found = list(rows())[::-1]
    fig = Figure(figsize=(8, 0.42 * len(found) + 0.9), layout="constrained")
    ax = fig.subplots()
    ax.barh(
        range(len(found)),
        [v - 1 for _, v in found],
        left=1,
        color=["#2a9d8f" if v >= 1 else "#c1121f" for _, v in found],
    )
    for i, (_, v) in enumerate(found):
        ax.annotate(
            f"{v:.2g}",
            (v, i),
            (4 if v >= 1 else -4, 0),
            textcoords="offset points",
            ha="left" if v >= 1 else "right",
            va="center",
            fontsize=7,
        )
    ax.set_xscale("log")
    ax.set_xlim(0.4, 16)
    ax.set_ylim(-0.7, len(found) - 0.3)
    ax.axvline(1, color="k", lw=0.8)
    ax.set_yticks(range(len(found)), [n for n, _ in found], fontsize=7)
    ax.set_xticks(
        [0.5, 1, 2, 4, 8], ["half", "as wanted", "twice", "four times", "eight"], fontsize=8
    )
    ax.minorticks_off()
    ax.set_title("how well each goal of speed is met (benchmarks/README.md)", fontsize=9)
    fig.savefig(HERE.parent / "nbs/images/speed.png", dpi=90)


if __name__ == "__main__":
    main()
