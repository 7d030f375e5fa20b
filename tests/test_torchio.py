"The subjects of TorchIO go into `fit`, with their own names and their own transform."

import csv

import pytest
import torch
from tiny import dataset

from egcnn_nb import Settings, fit
from egcnn_nb.core import InputError

torchio = pytest.importorskip("torchio", reason="pip install 'egcnn_nb[torchio]'")
from egcnn_nb.adapters.torchio_ import subjects_folder, transform_of  # noqa: E402


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    "A SubjectsDataset of files, and one subject that is in memory alone"
    root = dataset(tmp_path_factory.mktemp("tio") / "files", cases=4)
    found = []
    for number in range(4):
        scan, label = root / f"scan{number:02}.nii.gz", root / f"label{number:02}.nii.gz"
        found.append(torchio.Subject(t1=torchio.ScalarImage(scan), seg=torchio.LabelMap(label)))
    scan = torchio.ScalarImage(tensor=found[0]["t1"].data)
    label = torchio.LabelMap(tensor=found[0]["seg"].data)
    found.append(torchio.Subject(t1=scan, seg=label, name="in_memory"))
    return torchio.SubjectsDataset(
        found, transform=torchio.RandomFlip(axes=(0,), flip_probability=1)
    )


def test_subjects_become_a_folder(subjects, tmp_path):
    folder = subjects_folder(subjects, tmp_path / "data", images=["t1"], label="seg")
    rows = list(csv.reader(open(folder / "cases.csv")))
    assert rows[0] == ["case", "t1", "label"]
    assert [row[0] for row in rows[1:]] == [f"subject_{n:03d}" for n in range(4)] + ["in_memory"]
    assert (folder / "in_memory_t1.nii.gz").exists()
    assert len(list(folder.glob("*.nii.gz"))) == 2


def test_the_transform_of_the_dataset_changes_image_and_label(subjects):
    flip = transform_of(subjects, images=["t1"], label="seg")
    x, labels = torch.randn(1, 4, 5, 6), torch.randint(0, 3, (4, 5, 6))
    assert flip is not None
    new, moved = flip(x, labels)
    assert torch.equal(new, x.flip(1))
    assert torch.equal(moved, labels.flip(0))
    assert transform_of(torchio.SubjectsDataset(subjects.dry_iter())) is None


def test_fit_trains_on_them(subjects, tmp_path):
    folder = subjects_folder(subjects, tmp_path / "data", images=["t1"], label="seg")
    config = Settings(
        str(folder),
        str(tmp_path / "run"),
        epochs=1,
        width=4,
        levels=2,
        patch_size=(16, 16, 16),
        validation=1,
        precision="fp32",
        cache="off",
    )
    [row] = fit(config, transforms=transform_of(subjects, ["t1"], "seg"), quiet=True)
    assert row["epoch"] == 0 and 0 < float(row["total"]) < 10
    assert (tmp_path / "run/model.safetensors").exists()


def test_a_subject_without_the_image_is_refused(subjects, tmp_path):
    with pytest.raises(InputError, match="Subject 0 has no t2"):
        subjects_folder(subjects, tmp_path / "data", images=["t2"], label="seg")
