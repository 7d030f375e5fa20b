"""Write README.md from nbs/index.ipynb.

python tools/make_readme.py            # write
python tools/make_readme.py --check    # exit 1 if README.md is not what would be written"""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]


def readme():
    """Markdown of the index notebook, without hidden cells and without the code of cells with
    `echo: false`; relative links start at the top of the repository"""
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    shown = [cell for cell in nb.cells if not cell.source.startswith("#| hide")]
    nb.cells = shown
    for cell in shown:
        if cell.source.startswith("#| echo: false"):
            cell.metadata["transient"] = {"remove_source": True}
    exporter = MarkdownExporter()
    text, _ = exporter.from_notebook_node(nb)
    text = re.sub(r"\]\((?!https?:|#)(?!\.\./)", "](nbs/", text)
    text = text.replace("](../", "](")
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip() + "\n"


def main():
    path = ROOT / "README.md"
    text = readme()
    if "--check" not in sys.argv:
        path.write_text(text)
    elif path.read_text() != text:
        sys.exit("README.md is not what nbs/index.ipynb says; run tools/make_readme.py")


if __name__ == "__main__":
    main()
