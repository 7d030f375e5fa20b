"A backbone with an edge stream is saved and loaded by Hugging Face's client, in a local folder."

import json
from pathlib import Path

import pytest
import torch

from egcnn_nb.run.predict import load_run

pytest.importorskip("huggingface_hub", reason="pip install 'egcnn_nb[hub]'")
from egcnn_nb.adapters.hub import PretrainedEGCNN, pretrained_of  # noqa: E402

ROOT = Path(__file__).parents[1]
RUN = ROOT / "egcnn_nb/pretrained/eg_no_relu"


def logits(model, channels):
    "Logits of an image of noise"
    image = torch.randn(1, channels, 12, 16, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval().streams(image).logits


@pytest.mark.parametrize("backbone", ["segnet", "unet", "vnet"])
def test_a_network_comes_back_the_same(tmp_path, backbone):
    torch.manual_seed(0)
    model = PretrainedEGCNN(backbone, 2, 3, width=4, levels=2, readings={"gate_residual": "block"})
    torch.nn.init.normal_(model.fusion.weight)
    model.save_pretrained(tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())
    assert arguments["backbone"] == backbone and arguments["readings"] == {"gate_residual": "block"}
    again = PretrainedEGCNN.from_pretrained(tmp_path)
    assert torch.equal(logits(model, 2), logits(again, 2))


def test_a_run_goes_to_the_hub_and_back(tmp_path):
    trained, _, task = load_run(RUN)
    pretrained_of(RUN).save_pretrained(tmp_path)
    again = PretrainedEGCNN.from_pretrained(tmp_path)
    channels = len(task.channels)
    assert torch.equal(logits(trained, channels), logits(again, channels))
    assert again.activation == "sigmoid"
    assert not again.edge.gates[0].attention_relu
