"""Where the notebooks and the modules lie.

Every tool and test that goes through them takes the lists from here, so that none goes through an empty list.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
FEWEST_NOTEBOOKS, FEWEST_MODULES = 61, 57


def notebooks():
    "Paths of all notebooks but the index, room by room; there are at least as many as there have been"
    found = sorted(NBS.glob("[0-9]_*/*.ipynb"))
    found = [path for path in found if ".ipynb_checkpoints" not in path.parts]
    assert len(found) >= FEWEST_NOTEBOOKS, (
        f"{NBS} has {len(found)} notebooks, and {FEWEST_NOTEBOOKS} were expected"
    )
    assert len({path.stem for path in found}) == len(found), "two notebooks have one name"
    return found


def notebook(name):
    "The path of a notebook by its name, such as 03_sobel_edges"
    found = [path for path in notebooks() if path.stem == name]
    assert found, f"there is no notebook {name} in {NBS}"
    return found[0]


def module_of(path):
    "The module that a notebook exports, such as method.sobel; None where it exports none"
    found = re.search(r"#\| default_exp ([\w.]+)", path.read_text())
    return found[1] if found else None


def modules():
    "Paths of all modules of the package that notebooks export"
    found = [
        path for path in sorted((ROOT / "egcnn_nb").rglob("*.py")) if not path.name.startswith("_")
    ]
    assert len(found) >= FEWEST_MODULES, (
        f"egcnn_nb has {len(found)} modules, and {FEWEST_MODULES} were expected"
    )
    return found


def source_of(module):
    "The path of a module by its name, such as method.sobel"
    return ROOT / "egcnn_nb" / f"{module.replace('.', '/')}.py"
