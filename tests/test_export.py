"A run as an ONNX and a TorchScript file: the same numbers at other sizes, and labels without this package."

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from cases import command, save, scan
from tiny import dataset

from egcnn_nb.commands.export import main as export_main
from egcnn_nb.commands.predict import main as predict_main
from egcnn_nb.commands.train import main as train_main
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.run.predict import load_run

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'egcnn_nb[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'egcnn_nb[onnx]'")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import run_onnx

SMALL = (
    "--epochs 2 --width 4 --levels 3 --patch_size 16 16 16 --lr 3e-3 --validation 1 "
    "--precision fp32 --cache off"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run on balls of two labels"
    folder = tmp_path_factory.mktemp("export")
    data = dataset(folder / "data", cases=4)
    code, _, error = command(train_main, data, "--out", folder / "run", *SMALL)
    assert code == 0, error
    return folder / "run"


@pytest.fixture(scope="module")
def files(run):
    "Its ONNX file and its TorchScript file, with edges"
    net, script = run.parent / "net.onnx", run.parent / "net.pt"
    words = (run, "--onnx", net, "--torchscript", script, "--edges")
    code, out, error = command(export_main, *words)
    assert code == 0, error
    assert out.count("checked on 2x1x16x20x24 and 1x1x24x18x22") == 2, out
    return net, script


def expected(run, image):
    "Logits and edge logits of the run itself"
    model, _, _ = load_run(run)
    assert isinstance(model, EGCNN)
    with torch.no_grad():
        found = model.streams(image)
    return found.logits, found.edge


def filled_up(image, multiple):
    "An image whose last voxels are repeated up to sides that are multiples of a number"
    padding = []
    for side in reversed(image.shape[2:]):
        padding += [0, -side % multiple]
    return torch.nn.functional.pad(image, padding, mode="replicate")


@pytest.mark.parametrize("shape", [(1, 1, 16, 16, 16), (3, 1, 8, 28, 12), (2, 1, 9, 14, 19)])
def test_both_files_compute_what_the_run_computes(run, files, shape):
    "Also for sides that are no multiples of 4, which the run has to be given filled up"
    net, script = files
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(net, providers=["CPUExecutionProvider"])
    by_onnx = session.run(["logits", "edge_logits"], {"image": image.numpy()})
    by_script = torch.jit.load(script)(image)
    depth, height, width = shape[2:]
    filled = expected(run, filled_up(image, 4))
    wanted = [logits[:, :, :depth, :height, :width] for logits in filled]
    for of_onnx, of_script, of_run in zip(by_onnx, by_script, wanted, strict=True):
        assert np.abs(of_onnx - of_run.numpy()).max() < 1e-4
        assert (of_script - of_run).abs().max() < 1e-4


def test_the_files_say_how_to_use_them(files):
    net, script = files
    extra = {"egcnn.json": ""}
    torch.jit.load(script, _extra_files=extra)
    session = onnxruntime.InferenceSession(net, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    for found in (facts, json.loads(extra["egcnn.json"])):
        about = {name: json.loads(found[name]) for name in ("outputs", "spacing", "patch_size")}
        assert about == {
            "outputs": ["background", "label 1", "label 2"],
            "spacing": [1.0, 1.0, 1.0],
            "patch_size": [16, 16, 16],
        }
        assert json.loads(found["normalize"]) == "zscore"
        assert json.loads(found["multiple"]) == 4


def scanned(folder):
    "A scan that is turned, larger than a window, and has voxels of other sizes"
    image, _ = scan(3, shape=(40, 18, 30))
    image[:3] = 0
    affine = np.array([[0, -1.2, 0, 5], [0.8, 0, 0, 1], [0, 0, 1.5, 2], [0, 0, 0, 1.0]])
    return save(folder, "scan.nii.gz", image, affine)


def test_numpy_and_onnxruntime_label_a_scan_as_egcnn_predict_does(run, files, tmp_path):
    net, _ = files
    path = scanned(tmp_path)
    code, _, error = command(predict_main, run, path, "--out", tmp_path / "labels")
    assert code == 0, error
    alone = tmp_path / "alone.nii.gz"
    script = ROOT / "tools/run_onnx.py"
    subprocess.run([sys.executable, script, net, alone, path], check=True)
    wanted = nib.Nifti1Image.load(tmp_path / "labels/scan.nii.gz")
    found = nib.Nifti1Image.load(alone)
    affine, expected = np.asarray(found.affine), np.asarray(wanted.affine)
    assert np.allclose(expected, affine, atol=1e-4)
    wanted, found = np.asarray(wanted.dataobj), np.asarray(found.dataobj)
    assert wanted.shape == found.shape and len(np.unique(wanted)) > 1
    assert (wanted == found).mean() > 0.999


def test_the_script_needs_nothing_of_this_package():
    code = (
        "import sys; sys.path.insert(0, 'tools'); import run_onnx; "
        "print([n for n in ('torch', 'egcnn_nb') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_script_paints_regions_from_outside_in_whatever_their_order():
    about = {"activation": "sigmoid", "outputs": ["core", "whole"]}
    about["regions"] = {"core": [1], "whole": [1, 2]}
    prob = np.array([[0.1, 0.1, 0.9], [0.1, 0.9, 0.9]])[:, :, None, None]
    assert run_onnx.labelled(prob, about).ravel().tolist() == [0, 2, 1]


@pytest.mark.parametrize("value", [0, 0.1])
@pytest.mark.parametrize("how", ["zscore", "zscore_nonzero"])
def test_the_script_takes_a_channel_without_contrast(value, how):
    scan = np.full((2, 3, 4), value, np.float32)
    assert not run_onnx.normalized(scan, how).any()


def test_a_file_that_is_there_is_kept(run, files, tmp_path):
    net, _ = files
    before = net.read_bytes()
    code, _, error = command(export_main, run, "--onnx", net)
    assert code == 2 and "already there" in error
    assert net.read_bytes() == before
    code, _, error = command(export_main, run, "--onnx", tmp_path / "no" / "net.onnx")
    assert code == 2 and "does not exist. Make it first." in error
    code, _, error = command(export_main, run)
    assert code == 2 and "Give --onnx FILE or --torchscript FILE" in error
