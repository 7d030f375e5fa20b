"""Where the notebooks and the modules lie.

Every tool and test that goes through them takes the lists from here, so that none goes through an empty list.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
FEWEST_NOTEBOOKS, FEWEST_MODULES = 64, 60


def notebooks():
    "Paths of all notebooks but the index, room by room; there are at least as many as there have been"
    found = sorted(NBS.glob("[0-9]_*/*.ipynb"))
    count = len(found)
    assert count >= FEWEST_NOTEBOOKS, (
        f"{NBS} has {count} notebooks, and {FEWEST_NOTEBOOKS} were expected"
    )
    names = {path.stem for path in found}
    assert len(names) == count, "two notebooks have one name"
    return found


def notebook(name):
    "The path of a notebook by its name, such as 03_sobel_edges"
    found = [path for path in notebooks() if path.stem == name]
    assert found, f"there is no notebook {name} in {NBS}"
    return found[0]


def module_of(path):
    "The module that a notebook exports, such as method.sobel; None where it exports none"
    text = path.read_text()
    found = re.search(r"#\| default_exp ([\w.]+)", text)
    if found is None:
        return None
    return found[1]


def modules():
    "Paths of all modules of the package that notebooks export"
    paths = (ROOT / "egcnn_nb").rglob("*.py")
    found = [path for path in sorted(paths) if not path.name.startswith("_")]
    count = len(found)
    assert count >= FEWEST_MODULES, (
        f"egcnn_nb has {count} modules, and {FEWEST_MODULES} were expected"
    )
    return found


def source_of(module):
    "The path of a module by its name, such as method.sobel"
    *rooms, name = module.split(".")
    folder = ROOT.joinpath("egcnn_nb", *rooms)
    return folder / f"{name}.py"
