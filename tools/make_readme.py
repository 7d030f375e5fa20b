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
    "Markdown of the index notebook; hidden cells go, and the code of those with `echo: false`; relative links start at the top of the repository"
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    for c in nb.cells:
        if c.source.startswith("#| echo: false"):
            c.metadata["transient"] = {"remove_source": True}
    text = MarkdownExporter().from_notebook_node(nb)[0]
    text = re.sub(r"\]\((?!https?:|#)(?!\.\./)", "](nbs/", text).replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    path, text = ROOT / "README.md", readme()
    if "--check" not in sys.argv:
        path.write_text(text)
    elif path.read_text() != text:
        sys.exit("README.md is not what nbs/index.ipynb says; run tools/make_readme.py")
