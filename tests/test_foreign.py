"""What is found in networks of other packages, against what was written down by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import networks

LARGE = (
    "MedNeXt-B",
    "MedNeXt-M",
    "MedNeXt-L",
    "HoVerNet",
    "DiNTS, every",
)  # these take seconds each


def wrong(rows):
    "A line for each network that did not come out as it should"
    found = []
    for row in rows:
        verdict = row.verdict
        if verdict != row.should:
            found.append(f"{row.network}: {verdict}")
    return found


def test_monais_networks():
    pytest.importorskip("monai.networks.nets")
    quick = [network for network in networks.monai_2d() if not network.name.startswith(LARGE)]
    rows = [networks.look(network) for network in quick]
    assert wrong(rows) == []


def need_nnunets_package():
    "Skip a test where the package with nnU-Net's networks is missing"
    package = "dynamic-network-architectures"
    module = package.replace("-", "_")
    advice = f"pip install {package}"
    pytest.importorskip(module, reason=advice)


@pytest.mark.parametrize("dims", [2, 3])
def test_nnunets_networks(dims):
    need_nnunets_package()
    rows = [networks.look(network) for network in networks.dynamic(dims)]
    assert wrong(rows) == []


def test_nnunets_transformers():
    need_nnunets_package()
    pytest.importorskip("timm", reason="pip install timm")
    rows = [networks.look(network) for network in networks.primus_networks()]
    assert wrong(rows) == []


def test_names_of_one_map_are_alike():
    assert networks.matches("a > b", "a > x|b")
    assert not networks.matches("a", "a > b")
    assert not networks.matches("a > c", "a > b")
