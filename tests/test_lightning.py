"Lightning trains an EG-CNN, and a checkpoint gives the same logits."

from typing import Any

import pytest
import torch

from egcnn_nb import EGCNN, EGLoss, SegNet

lightning = pytest.importorskip("lightning", reason="pip install 'egcnn_nb[lightning]'")
from torch.utils.data import DataLoader  # noqa: E402

from egcnn_nb.adapters.lightning_ import EGModule, pair_of  # noqa: E402
from egcnn_nb.core import InputError  # noqa: E402


def network(seed=0):
    "A small EG-CNN"
    torch.manual_seed(seed)
    return EGCNN(SegNet(1, 2, width=4, levels=2), gate_residual="block", edge_head="norm")


def loader(as_pairs=False):
    "Two batches of cubes"
    samples: Any = []
    for number in range(4):
        label = torch.zeros(1, 12, 12, 12, dtype=torch.long)
        label[:, 3 : 8 + number % 2, 3:8, 3:9] = 1
        image = label + 0.2 * torch.randn(label.shape)
        samples.append((image, label) if as_pairs else {"image": image, "label": label})
    return DataLoader(samples, batch_size=2)


def trainer(folder, epochs=3):
    "A trainer that writes into a folder and prints nothing"
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize("as_pairs", [False, True])
def test_it_trains_and_a_checkpoint_gives_the_same_logits(tmp_path, as_pairs):
    module = EGModule(network(), EGLoss(weight_negatives=False), lr=3e-3)
    torch.manual_seed(0)
    batches = loader(as_pairs)
    fitting = trainer(tmp_path)
    before = float(EGLoss()(module.model(next_image(batches)), next_label(batches)))
    fitting.fit(module, batches, batches)
    terms = {name: float(value) for name, value in fitting.callback_metrics.items()}
    assert {"train_total", "train_semantic", "val_total", "val_edge_dice"} <= set(terms)
    assert terms["train_total"] < before
    file = tmp_path / "net.ckpt"
    fitting.save_checkpoint(file)
    again = EGModule.load_from_checkpoint(file, model=network(seed=1), weights_only=False)
    image = torch.randn(1, 1, 12, 12, 12)
    with torch.no_grad():
        assert torch.equal(module.eval()(image), again.eval()(image))
    assert again.hparams.lr == 3e-3


def next_image(batches):
    "The image of the first batch"
    return pair_of(next(iter(batches)))[0]


def next_label(batches):
    "The label of the first batch"
    return pair_of(next(iter(batches)))[1]


def test_the_learning_rate_falls_as_in_the_paper(tmp_path):
    module = EGModule(network(), lr=1e-3)
    rates = []

    class Record(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fitting = trainer(tmp_path, epochs=3)
    fitting.callbacks.append(Record())
    fitting.fit(module, loader())
    wanted = [1e-3 * (1 - epoch / 3) ** 0.9 for epoch in range(3)]
    assert rates == pytest.approx(wanted, rel=1e-6)


def test_a_batch_of_other_keys_is_refused():
    with pytest.raises(InputError, match="Give EGModule those of your loader"):
        pair_of({"scan": 1, "seg": 2})
    subject = {"t1": {"data": 1}, "seg": {"data": 2}}
    assert pair_of(subject, "t1", "seg") == (1, 2)
