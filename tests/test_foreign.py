"""What is found in networks of other packages, against what was written down by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import networks

LARGE = ("MedNeXt-B", "MedNeXt-M", "MedNeXt-L", "HoVerNet")  # these take seconds each


def wrong(rows):
    "A line for each network that did not come out as it should"
    return [f"{row.network}: {row.verdict}" for row in rows if row.verdict != row.should]


def test_monais_networks():
    pytest.importorskip("monai.networks.nets")
    quick = [network for network in networks.monai_2d() if not network.name.startswith(LARGE)]
    rows = [networks.look(network) for network in quick]
    assert wrong(rows) == []


def test_nnunets_networks():
    pytest.importorskip(
        "dynamic_network_architectures", reason="pip install dynamic-network-architectures"
    )
    rows = [networks.look(network) for network in networks.dynamic_all()]
    assert wrong(rows) == []


def test_names_of_one_map_are_alike():
    assert networks.matches("a > b", "a > x|b")
    assert not networks.matches("a", "a > b")
    assert not networks.matches("a > c", "a > b")
