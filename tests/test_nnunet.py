"""The real nnU-Net plans, trains and predicts with an edge stream.

EGCNN_HIPPOCAMPUS names the folder of the Decathlon's Task04_Hippocampus, of which six cases are used.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="pip install 'egcnn_nb[nnunet]'")

ROOT = Path(__file__).parents[1]
DATA = os.environ.get("EGCNN_HIPPOCAMPUS", "")
NAME = "Dataset004_Hippocampus"
PLAIN = "nnUNetTrainer"
SHORT = """
import torch
from {module} import {parent}


class {parent}Short({parent}):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = 2
        self.num_val_iterations_per_epoch = 1

    def perform_actual_validation(self, save_probabilities=False):
        "Left out: it sees eight mirror images, and a test predicts by the command"
"""
MODULES = {
    "nnUNetTrainerEGCNN": "egcnn_nb.adapters.nnunet",
    PLAIN: "nnunetv2.training.nnUNetTrainer.nnUNetTrainer",
}

pytestmark = pytest.mark.skipif(
    not DATA, reason="set EGCNN_HIPPOCAMPUS to the folder of Task04_Hippocampus"
)


def write_raw(raw):
    "Six cases as a folder of nnU-Net"
    folder = raw / NAME
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    cases = sorted(Path(DATA, "imagesTr").glob("hippocampus_*.nii.gz"))[:6]
    for path in cases:
        stem = path.name.removesuffix(".nii.gz")
        shutil.copy(path, folder / "imagesTr" / f"{stem}_0000.nii.gz")
        shutil.copy(Path(DATA, "labelsTr", path.name), folder / "labelsTr")
    info = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def make_small(path):
    "Make the planned network small, so that a step takes a second"
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = [40, 48, 40]
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 8, 8, 8]
    path.write_text(json.dumps(plans))


def printed(*words, env=None):
    "What a command prints"
    words = [str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def nnunet(command, *words, env):
    "Run a command of nnU-Net; what it prints"
    return printed(Path(sys.executable).parent / f"nnUNetv2_{command}", *words, env=env)


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    "Folders of nnU-Net with planned and preprocessed cases, and the folders of the trainers"
    root = tmp_path_factory.mktemp("nnunet")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    folders = {"raw": root / "raw", "preprocessed": root / "pre", "results": root / "res"}
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    env |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    for name, folder in folders.items():
        folder.mkdir()
        env[f"nnUNet_{name}"] = str(folder)
    own = root / "trainers"
    own.mkdir()
    for parent, module in MODULES.items():
        (own / f"{parent}_short.py").write_text(SHORT.format(module=module, parent=parent))
    ours = printed(sys.executable, "-m", "egcnn_nb.adapters", env=env).strip()
    env["nnUNet_extTrainer"] = os.pathsep.join([ours, str(own)])
    write_raw(folders["raw"])
    nnunet("plan_and_preprocess", "-d", "4", "-c", "3d_fullres", "-np", "1", "-npfp", "1", env=env)
    make_small(folders["preprocessed"] / NAME / "nnUNetPlans.json")
    return env


def train(env, trainer, fold, *words):
    "Two short epochs; the final checkpoint"
    command = ("4", "3d_fullres", fold, "-tr", trainer, "-device", "cpu", *words)
    printed_text = nnunet("train", *command, env=env)
    assert "val_loss" in printed_text
    folder = Path(env["nnUNet_results"]) / NAME / f"{trainer}__nnUNetPlans__3d_fullres"
    return folder / f"fold_{fold}/checkpoint_final.pth"


def weights(checkpoint):
    "Names and weights of a checkpoint of nnU-Net"
    return torch.load(checkpoint, weights_only=False)["network_weights"]


@pytest.fixture(scope="module")
def trained(env):
    "The checkpoint of a network with an edge stream"
    return train(env, "nnUNetTrainerEGCNNShort", 0)


def test_predictions_lie_on_the_grid_of_the_scans(env, trained, tmp_path):
    images = Path(env["nnUNet_raw"]) / NAME / "imagesTr"
    words = ("-i", images, "-o", tmp_path, "-d", "4", "-c", "3d_fullres", "-f", "0")
    fast = ("-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1")
    # nnU-Net compiles what it predicts with where this is set, also on a processor
    compiling = {**env, "nnUNet_compile": "t"}
    nnunet("predict", *words, "-tr", "nnUNetTrainerEGCNNShort", *fast, env=compiling)
    made = sorted(tmp_path.glob("*.nii.gz"))
    assert len(made) == 6
    for path in made:
        labels = nib.Nifti1Image.load(path)
        name = path.name.replace(".nii.gz", "_0000.nii.gz")
        scan = nib.Nifti1Image.load(images / name)
        assert labels.shape == scan.shape
        assert np.allclose(np.asarray(labels.affine), np.asarray(scan.affine))
        assert set(np.unique(np.asarray(labels.dataobj))) <= {0, 1, 2}


def test_weights_of_a_plain_nnunet_are_where_training_starts(env, trained):
    plain = train(env, f"{PLAIN}Short", 0)
    known, ours = weights(plain), weights(trained)
    assert set(known) <= set(ours)
    assert all(".seg_layers." in name for name in set(ours) - set(known))
    train(env, "nnUNetTrainerEGCNNShort", 1, "-pretrained_weights", plain)


LABELS = {
    "classes": {"background": 0, "anterior": 1, "posterior": 2},
    "ignore": {"background": 0, "anterior": 1, "posterior": 2, "ignore": 3},
    "regions": {"background": 0, "whole": [1, 2], "posterior": [2], "ignore": 3},
}


def trainer_for(env, labels, monkeypatch):
    "A trainer in this process, and its plans"
    for name, value in env.items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    from egcnn_nb.adapters.nnunet import nnUNetTrainerEGCNN

    folder = Path(env["nnUNet_preprocessed"]) / NAME
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    info = json.loads((folder / "dataset.json").read_text())
    info["labels"] = LABELS[labels]
    if labels == "regions":
        info["regions_class_order"] = [1, 2]
    plans["continue_training"] = False
    trainer = nnUNetTrainerEGCNN(plans, "3d_fullres", 0, info, torch.device("cpu"))
    trainer.initialize()
    return trainer


def batch_for(trainer, labels):
    "Noise, and targets at each scale of deep supervision"
    generator = torch.Generator().manual_seed(0)
    shape = trainer.configuration_manager.patch_size
    values = 3 if labels == "classes" else 4
    coarse = torch.randint(0, values, (2, 1, 5, 6, 5), generator=generator).float()
    finest = torch.nn.functional.interpolate(coarse, size=tuple(shape))
    if labels == "regions":
        masks = [(finest == 1) | (finest == 2), finest == 2, finest == 3]
        finest = torch.cat(masks, 1).float()
    scales = trainer._get_deep_supervision_scales()
    sizes = [[round(n * s) for n, s in zip(shape, scale, strict=True)] for scale in scales]
    targets = [torch.nn.functional.interpolate(finest, size=tuple(size)) for size in sizes]
    return {"data": torch.randn(2, 1, *shape, generator=generator), "target": targets}


@pytest.mark.parametrize("labels", list(LABELS))
def test_classes_regions_and_ignored_voxels(env, labels, monkeypatch):
    trainer = trainer_for(env, labels, monkeypatch)
    batch = batch_for(trainer, labels)
    trainer.network.train()
    out = trainer.network(batch["data"])
    logits, edge, main = out[0], out[-2], out[-1]
    assert logits.shape == main.shape == edge.shape
    before = trainer.network.beside["seg_layers"][0].head.weight.detach().clone()
    first = trainer.train_step(copy.deepcopy(batch))["loss"]
    assert np.isfinite(first)
    assert not torch.equal(before, trainer.network.beside["seg_layers"][0].head.weight)
    trainer.network.eval()
    scores = trainer.validation_step(copy.deepcopy(batch))
    assert np.isfinite(scores["loss"]) and len(scores["tp_hard"]) == 2
    if labels != "classes":
        check_ignored(trainer, out, batch["target"])


def check_ignored(trainer, out, targets):
    "What the network says in ignored voxels changes no loss"
    out = [part.detach() for part in out]
    finest = targets[0]
    ignored = finest[:, -1:] == (1 if trainer.label_manager.has_regions else 3)
    other = [part.clone() for part in out]
    for part in (0, -2, -1):
        other[part] = torch.where(ignored, torch.randn_like(out[part]), out[part])
    loss = trainer.loss.eval()
    assert float(loss(out, targets)) == pytest.approx(float(loss(other, targets)), abs=1e-5)


def test_without_deep_supervision_it_puts_out_logits_alone(env, monkeypatch):
    trainer = trainer_for(env, "classes", monkeypatch)
    trainer.set_deep_supervision_enabled(False)
    image = torch.randn(1, 1, 40, 48, 40)
    with torch.no_grad():
        logits = trainer.network.eval()(image)
    assert isinstance(logits, torch.Tensor) and logits.shape == (1, 3, 40, 48, 40)


def test_a_network_of_slices_and_one_that_is_compiled(env):
    handler: Any = pytest.importorskip("nnunetv2.utilities.plans_handling.plans_handler")
    from egcnn_nb.adapters.nnunet import nnUNetTrainerEGCNN

    plans = handler.PlansManager(str(Path(env["nnUNet_preprocessed"]) / NAME / "nnUNetPlans.json"))
    slices = plans.get_configuration("2d")
    net = nnUNetTrainerEGCNN.build_network_architecture(plans, slices, 1, 3, False).eval()
    image = torch.randn(1, 1, *slices.patch_size)
    with torch.no_grad():
        logits = net(image)
        assert torch.equal(torch.compile(net)(image), logits)
    assert isinstance(logits, torch.Tensor) and logits.shape == (1, 3, *slices.patch_size)
