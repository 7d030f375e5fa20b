"MONAI trains an EG-CNN with its engine and its bundles, and its sliding window sees what ours sees."

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny import ball

import egcnn_nb
from egcnn_nb import EGCNN, EGLoss, SegNet, predict

monai = pytest.importorskip("monai", reason="pip install 'egcnn_nb[monai]'")
from monai.data import DataLoader, Dataset, MetaTensor  # noqa: E402
from monai.inferers import SlidingWindowInferer  # noqa: E402

from egcnn_nb.adapters.monai_ import EdgeTargetd, write_bundle  # noqa: E402


def small():
    "An EG-CNN whose fusion is not zero"
    torch.manual_seed(0)
    model = EGCNN(SegNet(1, 3, width=4, levels=2), gate_residual="block", edge_head="norm")
    torch.nn.init.normal_(model.fusion.weight, std=0.1)
    return model


def balls(count, side=16):
    "Images and label maps of balls, as MONAI's loader takes them"
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"))
    samples = []
    for _ in range(count):
        image, labels = ball(rng, grid)
        sample = {"image": torch.tensor(image[None]), "label": torch.tensor(labels[None]).long()}
        samples.append(sample)
    return samples


@pytest.mark.parametrize("size", [(16, 16, 16), (20, 16, 28)])
def test_the_sliding_window_of_monai_sees_what_predict_sees(size):
    model = small().eval()
    image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer((16, 16, 16), mode="gaussian", overlap=0.25)
    with torch.no_grad():
        logits: Any = inferer(image[None], model)
    wanted = predict(model, image, patch_size=(16, 16, 16))
    assert (logits.softmax(1)[0] - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("side", [16, 40])  # without and with the norm for large volumes
def test_a_meta_tensor_goes_through(side):
    model = small()
    image = MetaTensor(torch.randn(1, 1, side, side, side))
    label = MetaTensor(torch.randint(0, 3, (1, 1, side, side, side)))
    loss = EGLoss()(model(image), label)
    loss.backward()
    assert loss.dim() == 0 and bool(loss.isfinite())
    slope = model.edge.head.weight.grad
    assert slope is not None and slope.abs().sum() > 0


def test_edges_keep_their_place_in_space():
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0]))
    label = torch.zeros(1, 8, 8, 8)
    label[:, 2:6, 2:6, 2:6] = 1
    sample = EdgeTargetd("label", classes=2)({"label": MetaTensor(label, affine=affine)})
    edges = sample["label_edge"]
    assert isinstance(edges, MetaTensor) and torch.equal(edges.affine, affine.double())
    assert edges.shape == label.shape and 0 < edges.sum() < edges.numel()


def test_the_supervised_trainer_takes_egloss_as_it_is():
    events = pytest.importorskip("ignite.engine", reason="pip install 'egcnn_nb[bundle]'").Events
    from monai.engines import SupervisedTrainer

    model = small()
    before = model.edge.head.weight.detach().clone()
    losses = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=4,
        train_data_loader=DataLoader(Dataset(balls(4)), batch_size=2),
        network=model,
        optimizer=torch.optim.Adam(model.parameters(), 3e-3),
        loss_function=EGLoss(),
        decollate=False,
    )

    @trainer.on(events.ITERATION_COMPLETED)
    def keep(engine):
        losses.append(float(engine.state.output["loss"]))

    trainer.run()
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert not torch.equal(before, model.edge.head.weight)


def folder(root, side=24):
    "A folder with imagesTr and labelsTr"
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"))
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    for number in range(2):
        image, labels = ball(rng, grid)
        for name, array in (("imagesTr", image), ("labelsTr", labels)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), root / name / f"case{number}.nii.gz")
    return root


def bundle(root, config, *words):
    "Run a configuration of a bundle as its user does"
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", root]
    command += ["--config_file", root / f"configs/{config}.json", *words]
    path = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_bundle_trains_and_labels_scans(tmp_path):
    pytest.importorskip("ignite", reason="pip install 'egcnn_nb[bundle]'")
    pytest.importorskip("fire", reason="pip install 'egcnn_nb[bundle]'")
    data = folder(tmp_path / "data")
    root = write_bundle(tmp_path / "bundle", data, 1, 3)
    patch = "[16,16,16]"
    bundle(root, "train", "--epochs", "1", "--patch_size", patch)
    state = torch.load(root / "models/model.pt", weights_only=True)
    assert any(name.startswith("edge.") for name in state)
    scans = f"{data}/imagesTr/*.nii.gz"
    bundle(root, "inference", "--scans", scans, "--patch_size", patch)
    made = sorted((root / "labels").rglob("*.nii.gz"))
    assert len(made) == 2
    image = nib.Nifti1Image.load(made[0])
    assert image.shape == (24, 24, 24)
    assert set(np.unique(np.asarray(image.dataobj))) <= {0, 1, 2}
    about = json.loads((root / "configs/metadata.json").read_text())
    assert about["required_packages_version"] == {"egcnn_nb": egcnn_nb.__version__}
