"Everything this needs to know stands in settings.ini; requirements are named there and nowhere else."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=find_packages(include=["egcnn_nb", "egcnn_nb.*"]),
    package_data={"egcnn_nb": ["py.typed", "*.pyi", "pretrained/*/*"]},
    python_requires=f">={cfg['min_python']}",
    zip_safe=False,
    install_requires=cfg["requirements"].split(),
    extras_require={
        name.removesuffix("_requirements"): cfg[name].split()
        for name in cfg
        if name.endswith("_requirements")
    },
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
