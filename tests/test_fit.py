"Parts of your own and callbacks: each is used, and a run with them is resumed exactly."

import csv
import importlib
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # torchrun starts this file too
import tiny
from tiny import ENV, after, dataset

from egcnn_nb.commands.predict import main as predict_main
from egcnn_nb.commands.train import main as train_main
from egcnn_nb.core import InputError
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.data.patches import EpochBatches, Patches
from egcnn_nb.method.backbones import make_backbone
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss
from egcnn_nb.run.callbacks import EarlyStopping, TensorBoardLogger
from egcnn_nb.run.folders import prepare
from egcnn_nb.run.models import infer, make_model
from egcnn_nb.run.predict import load_run, predict_case
from egcnn_nb.run.settings import Settings
from egcnn_nb.run.steps import train_step
from egcnn_nb.run.training import fit
from egcnn_nb.tensors import seed_everything, to_target

PATCH = (16, 16, 16)


def monai_flip(prob, axis=0):
    "A mirror of MONAI, imported where it is used: processes that torchrun starts do without"
    from monai.transforms import RandFlipd

    return RandFlipd(["image", "label"], prob=prob, spatial_axis=axis)


def monai_chain(*more):
    "A mirror by chance, and more"
    from monai.transforms import Compose

    return Compose([monai_flip(0.5), *more])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("tiny") / "data")


def settings(data, out, ours=True, **changes):
    "Ten training cases in batches of 4, 4 and 2; `ours`: with the size of our network"
    given: dict[str, Any] = dict(
        epochs=2,
        batch_size=4,
        patch_size=PATCH,
        lr=1e-3,
        validation=2,
        precision="fp32",
        cache="off",
    )
    if ours:
        given |= dict(width=4, levels=2)
    given |= changes
    return Settings(str(data), str(out), **given)


class Foreign(nn.Module):
    "A network with buffers, and with draws of its own while it trains; it halves a volume once"

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.down = nn.Conv3d(in_channels, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.drop = nn.Dropout(0.3)
        self.up = nn.ConvTranspose3d(4, 4, 2, stride=2)
        self.head = nn.Conv3d(4, out_channels, 1)

    def forward(self, x):
        x = self.norm(self.down(x))
        x = self.up(self.drop(torch.relu(x)))
        return self.head(torch.relu(x))


def quick(data, out, **changes):
    "Settings for a bare network of ours, where the edge stream plays no part"
    return settings(data, out, edge=False, **changes)


def weights(run):
    path = Path(run) / "model.safetensors"
    return load_file(path)


def written(run, *path):
    "What config.json of a run says under these keys"
    found = json.loads((Path(run) / "config.json").read_text())
    for key in path:
        found = found[key]
    return found


def same(a, b):
    "Whether two runs have the same table and the same weights, to the bit"
    for name in ("metrics.csv", "model.safetensors"):
        if (Path(a) / name).read_bytes() != (Path(b) / name).read_bytes():
            return False
    return True


class Heard:
    "Notes every event of a run"

    def __init__(self):
        self.events = []

    def on_start(self, run):
        self.events.append(("start", run.steps))

    def on_step(self, run, step, terms):
        rates = [group["lr"] for group in run.optimizer.param_groups]
        self.events.append(("step", step, sorted(terms), rates))

    def on_epoch(self, run, epoch, row):
        event = ("epoch", epoch, row["epoch"])
        self.events.append(event)

    def on_end(self, run):
        epochs = len(run.rows)
        self.events.append(("end", epochs))

    def names(self):
        "Each event with its number alone"
        return [event[:2] for event in self.events]


# --- the default


def by_hand(config):
    "Weights after the three steps of one epoch, without `fit` and `Run`"
    task, train, _, _ = prepare(config, quiet=True)
    model = make_model(config, task)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, fused=True)
    loss = EGLoss(task.activation)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    patches = Patches(train, config.patch_size, config.seed, config.augment)
    batches = EpochBatches(len(train), config.batch_size, config.seed)
    for step, keys in enumerate(batches):
        batch = [patches[key] for key in keys]
        x, labels, samples = torch.utils.data.default_collate(batch)
        target = to_target(labels, task)
        noise = [(config.seed, 3, step, int(sample)) for sample in samples]
        train_step(model, loss, optimizer, scaler, x, target, noise, config)
    return model.state_dict()


def test_without_parts_a_run_is_what_it_was(data, tmp_path):
    config = settings(data, tmp_path / "run", epochs=1)
    before = json.dumps(vars(config))
    fit(config, quiet=True)
    assert json.dumps(vars(config)) == before
    expected = by_hand(settings(data, "", epochs=1))
    found = weights(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name])
    assert list(written(tmp_path / "run")) == ["settings", "task", "split", "versions"]
    kept = written(tmp_path / "run", "settings")
    assert "network" not in kept
    assert kept["augment"] == ["flip", "intensity"]


def test_fit_does_not_change_what_it_is_given(data, tmp_path):
    config = settings(
        data, tmp_path / "run", patch_size=None, precision="auto", epochs=1, readings={"tau": 0.5}
    )
    before = repr(config)
    fit(config, quiet=True, transforms=lambda x, labels: (x, labels))
    assert repr(config) == before
    with pytest.raises(InputError, match="resume is Foreign. Give True or False"):
        resume: Any = Foreign(1, 3)
        fit(config, resume)


def test_parts_that_equal_ours_give_the_same_run(data, tmp_path):
    fit(settings(data, tmp_path / "ours", augment=()), quiet=True)

    def build(in_channels, out_channels):
        backbone = make_backbone("segnet", in_channels, out_channels, width=4, levels=2)
        return EGCNN(backbone)

    def adam(parameters):
        return torch.optim.Adam(parameters, 1e-3, fused=True)

    rows = fit(
        settings(data, tmp_path / "yours", ours=False),
        quiet=True,
        model=build,
        loss=EGLoss(),
        optimizer=adam,
        transforms=lambda x, labels: (x, labels),
        callbacks=[Heard()],
    )
    assert len(rows) == 2
    assert same(tmp_path / "ours", tmp_path / "yours")
    assert written(tmp_path / "yours", "parts") == {
        "model": "build",
        "loss": "EGLoss",
        "optimizer": "adam",
        "transforms": "<lambda>",
    }


# --- each part


def test_groups_keep_their_own_learning_rates(data, tmp_path):
    heard = Heard()

    def groups(model):
        return torch.optim.SGD(
            [
                {"params": model.main.parameters(), "lr": 0.0},
                {"params": model.edge.parameters(), "lr": 0.3},
                {"params": model.fusion.parameters()},
            ],
            lr=0.02,
        )

    rows = fit(
        settings(data, tmp_path / "run", epochs=3), quiet=True, optimizer=groups, callbacks=[heard]
    )
    rates = [event[3] for event in heard.events if event[0] == "step"]
    for step, found in enumerate(rates):
        left = (1 - (step // 3) / 3) ** 0.9  # eq. 9, by hand
        assert found == pytest.approx([0.0, 0.3 * left, 0.02 * left], rel=1e-12)
    assert len(rates) == 9
    assert [row["lr"] for row in rows] == [0.0, 0.0, 0.0]
    config = settings(data, "")
    task = prepare(config, quiet=True).task
    fresh = make_model(config, task).state_dict()
    moved = set()
    for name, weight in weights(tmp_path / "run").items():
        if not torch.equal(weight, fresh[name]):
            moved.add(name.split(".")[0])
    assert moved == {"edge", "fusion"}  # a rate of 0 moves nothing


def test_sgd_steps_as_by_hand(data, tmp_path):
    gradients = []
    seen = []

    def sgd(parameters):
        def keep_gradients(*_):
            of_step = [p.grad.clone() for p in parameters]
            gradients.append(of_step)

        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.register_step_pre_hook(keep_gradients)
        seen.append((parameters, [p.detach().clone() for p in parameters]))
        return optimizer

    fit(quick(data, tmp_path / "run"), quiet=True, optimizer=sgd)
    parameters, expected = seen[-1]
    for step, of_step in enumerate(gradients):
        rate = 0.1 * (1 - (step // 3) / 2) ** 0.9
        expected = [p - rate * g for p, g in zip(expected, of_step, strict=True)]
    assert len(gradients) == 6
    for found, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("edge", [True, False])
def test_a_loss_gets_what_is_documented(data, tmp_path, edge):
    calls = []

    def own(output, target, keys=None):
        calls.append((output, target, keys))
        logits = output.logits if edge else output
        distance = (logits - target).square().mean()
        return {"total": 2 * distance, "distance": distance}

    rows = fit(settings(data, tmp_path / "run", edge=edge), quiet=True, loss=own)
    assert len(calls) == 1 + 6
    output, target, keys = calls[1]  # the first call is the trial
    expect_documented(output, target, keys, edge)
    with open(tmp_path / "run/metrics.csv", newline="") as f:
        columns = next(csv.reader(f))
    assert columns[:5] == ["epoch", "lr", "total", "distance", "skipped"]
    assert rows[0]["total"] == pytest.approx(2 * rows[0]["distance"])
    assert rows[1]["total"] < rows[0]["total"]


def expect_documented(output, target, keys, edge):
    "A loss got the fields of an EGOutput, or logits alone; masks; a name for each case"
    logits_shape = (4, 3, *PATCH)
    if edge:
        assert output.logits.shape == output.main.shape == logits_shape
        assert output.edge.shape == (4, 2, *PATCH)
        (alpha,) = output.attention
        assert alpha.shape == (4, 1, *PATCH)
    else:
        assert output.shape == logits_shape
    assert torch.equal(target.sum(1), torch.ones(4, *PATCH))
    assert [len(key) for key in keys] == [4] * 4
    assert keys[0][:3] == (0, 3, 0)


def test_a_loss_of_two_arguments(data, tmp_path):
    from monai.losses import DiceCELoss

    config = settings(data, tmp_path / "run", edge=False, epochs=3, lr=1e-2)
    rows = fit(config, quiet=True, loss=DiceCELoss(softmax=True))
    assert list(rows[0])[2:4] == ["total", "skipped"]
    assert rows[2]["total"] < rows[0]["total"]
    fails = "loss=DiceCELoss fails .*It gets what the network returns .EGOutput"
    with pytest.raises(InputError, match=fails):
        fit(settings(data, tmp_path / "none"), quiet=True, loss=DiceCELoss(softmax=True))
    assert not (tmp_path / "none").exists()


class Sees(Foreign):
    "Notes the images that it is trained with"

    def __init__(self):
        super().__init__(1, 3)
        self.seen = []

    def forward(self, x):
        if self.training and x.device.type == "cpu":
            self.seen.append(x.detach().clone())
        return super().forward(x)


def brighter(x, labels):
    return x + 1, labels


@pytest.mark.parametrize("kind", ["function", "monai"])
def test_transforms_change_the_patches(data, tmp_path, kind):
    transforms = brighter if kind == "function" else monai_flip(1.0, axis=2)

    def expected(x):
        if kind == "function":
            return x + 1
        return x.flip(-1)

    network = Sees()
    targets = []

    def own(output, target):
        targets.append(target)
        return (output - target).square().mean()

    config = settings(data, tmp_path / "run", ours=False, epochs=1)
    fit(config, quiet=True, model=network, transforms=transforms, loss=own)
    _, train, _, _ = prepare(config, quiet=True)
    plain = Patches(train, PATCH, 0, ())  # in place of augment, not after it
    batches = list(EpochBatches(10, 4))
    for x, keys in zip(network.seen[-3:], batches, strict=True):
        images = [expected(plain[key][0]) for key in keys]
        assert torch.equal(x, torch.stack(images))
    labels = torch.stack([plain[key][1] for key in batches[0]])
    moved = labels if kind == "function" else expected(labels)
    assert torch.equal(targets[1].argmax(1), moved.long())  # of the first step, after the trial
    assert written(tmp_path / "run", "settings", "augment") == []


def test_a_transform_of_torchio(data, tmp_path):
    torchio = pytest.importorskip("torchio")
    network = Sees()
    config = settings(data, tmp_path / "run", ours=False, epochs=1)
    flip = torchio.RandomFlip(axes=0, flip_probability=1.0)
    chain = torchio.Compose([flip, torchio.RandomNoise(std=(0.1, 0.1))])
    fit(config, quiet=True, model=network, transforms=chain)
    _, train, _, _ = prepare(config, quiet=True)
    plain = Patches(train, PATCH, 0, ())
    first = next(iter(EpochBatches(10, 4)))
    images = torch.stack([plain[key][0] for key in first])
    noise = network.seen[-3] - images.flip(2)
    assert abs(float(noise.std()) - 0.1) < 0.01
    assert abs(float(noise.mean())) < 0.01


# --- resume


def noise():
    "A chain of MONAI with draws of its own"
    from monai.transforms import RandGaussianNoised

    return monai_chain(RandGaussianNoised("image", prob=0.5, std=0.2))


def drawn(x, labels):
    "Draws from every generator that is seeded"
    by_torch = 0.1 * torch.rand(())
    by_numpy = 0.1 * np.random.rand()
    return x + by_torch + by_numpy, labels


def whole(data, out, resume=False, stop=lambda: False, workers=0, transforms=drawn):
    "A run of three epochs with a network, an optimizer and transforms of one's own"
    config = settings(data, out, ours=False, epochs=3, workers=workers)
    seed_everything(1)
    return fit(
        config,
        resume,
        quiet=True,
        stop=stop,
        model=Foreign(1, 3),
        optimizer=sgd(0.05),
        transforms=transforms,
    )


@pytest.mark.parametrize("kind, workers", [("monai", 0), ("function", 1)])
def test_a_run_with_parts_is_resumed_to_the_bit(data, tmp_path, kind, workers):
    transforms = drawn if kind == "function" else noise()
    one = tmp_path / "one"
    two = tmp_path / "two"
    whole(data, one, transforms=transforms)
    for stop in (after(2), after(4)):  # within an epoch, twice
        whole(data, two, two.exists(), stop, workers, transforms)
    torch.rand(7)  # what is drawn elsewhere does not count
    rows = whole(data, two, True, workers=workers, transforms=transforms)
    assert len(rows) == 3
    assert same(one, two)
    log = (two / "log.txt").read_text()
    assert log.count("resumed after") == 2


def sgd(lr):
    return partial(torch.optim.SGD, lr=lr, momentum=0.9)


def one_layer(in_channels, out_channels):
    layer = nn.Conv3d(in_channels, out_channels, 1)
    return nn.Sequential(layer)


# what is given in place of the parts that the run began with -> what is told
OTHER_PARTS = [
    (
        dict(model=None),
        "begun with model=Foreign, which config.json cannot build. Give fit the same model again",
    ),
    (dict(optimizer=None), "begun with optimizer=SGD, which"),
    (
        dict(optimizer=torch.optim.Adam),
        "begun with optimizer=SGD, and is resumed with optimizer=Adam",
    ),
    (dict(loss=EGLoss()), "begun without loss, and is resumed with loss=EGLoss"),
    (dict(optimizer=sgd(0.5)), "learning rates .0.05., and is resumed with .0.5."),
    (
        dict(model=one_layer),
        "does not have the weights of the run .*0.bias is missing there",
    ),
]


def test_what_cannot_be_rebuilt_is_told(data, tmp_path):
    whole(data, tmp_path / "run", stop=after(2))
    config = settings(data, tmp_path / "run", ours=False, epochs=3)
    begun_with: dict[str, Any] = dict(model=Foreign, optimizer=sgd(0.05), transforms=drawn)
    for other, told in OTHER_PARTS:
        with pytest.raises(InputError, match=told):
            fit(config, True, quiet=True, **(begun_with | other))
    rows = fit(config, True, quiet=True, **begun_with)
    assert len(rows) == 3


class Wider(Foreign):
    "Has a head of another shape"

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels)
        self.head = nn.Conv3d(4, out_channels, 3, padding=1)


def test_a_foreign_network_is_loaded_and_predicts(data, tmp_path):
    whole(data, tmp_path / "run")
    model, config, task = load_run(tmp_path / "run", model=Foreign)
    assert not model.training
    assert config.edge is False
    assert model.multiple == 2
    case = find_dataset(data).cases[0]
    labels, loaded = predict_case(model, config, task, case)
    logits = infer(model, loaded.x, PATCH)  # 18 x 17 x 16, filled up to a multiple of 2
    assert labels.shape == (18, 17, 16)
    assert logits.shape == (3, 18, 17, 16)
    assert np.array_equal(labels, logits.argmax(0).numpy())


def test_a_foreign_network_is_given_again(data, tmp_path, capsys):
    whole(data, tmp_path / "run", stop=after(6))  # in the second epoch
    given = "trained the network that fit was given as model=Foreign"
    with pytest.raises(InputError, match=f"{given}.*Give the same one: load_run.*model="):
        load_run(tmp_path / "run")
    other_shape = "does not have the weights of .*head.weight has the shape"
    with pytest.raises(InputError, match=other_shape):
        load_run(tmp_path / "run", model=Wider)
    words = [tmp_path / "run", data, "--out", tmp_path / "out"]
    assert predict_main([str(word) for word in words]) == 2
    told = capsys.readouterr().err
    assert "load_run(" in told
    assert len(told.strip().splitlines()) == 1
    fit(settings(data, tmp_path / "ours", epochs=1), quiet=True)
    with pytest.raises(InputError, match="builds its own network. Leave out model"):
        load_run(tmp_path / "ours", model=Foreign)


class Around(nn.Module):
    "A network that holds an EG-CNN and returns its logits alone; it keeps a map of its last pass"

    def __init__(self, in_channels, out_channels):
        super().__init__()
        backbone = make_backbone("segnet", in_channels, out_channels, width=4, levels=2)
        self.inner = EGCNN(backbone)
        self.kept = None

    def forward(self, x):
        self.kept = self.inner(x, full=True).logits
        return self.kept


def test_a_network_around_ours_trains_with_its_self_check(data, tmp_path):
    config = settings(data, tmp_path / "run", ours=False, epochs=1, precision="bf16")
    rows = fit(config, quiet=True, model=Around)
    assert len(rows) == 1
    assert np.isfinite(rows[0]["total"])
    assert "is dead" not in (tmp_path / "run/log.txt").read_text()


def test_a_loss_that_does_not_fit_is_refused(data, tmp_path):
    out = tmp_path / "run"
    nested = EGLoss("sigmoid")
    with pytest.raises(InputError, match="activation='sigmoid', but the task has 'softmax'"):
        fit(settings(data, out), quiet=True, loss=nested)
    over_batch = EGLoss(reduce="batch")
    in_parts = settings(data, out, accumulate=2)
    with pytest.raises(InputError, match="sums over the batch, which accumulate=2 cuts"):
        fit(in_parts, quiet=True, loss=over_batch)
    assert not out.exists()


# --- callbacks


def test_events_come_in_order(data, tmp_path):
    heard = Heard()
    config = quick(data, tmp_path / "run")
    fit(config, quiet=True, callbacks=[heard], stop=after(5))  # in the validation of epoch 1
    assert heard.names() == [
        ("start", 0),
        ("step", 0),
        ("step", 1),
        ("step", 2),
        ("epoch", 0),
        ("step", 3),
        ("end", 1),
    ]
    assert heard.events[1][2] == ["consistency", "edge_bce", "edge_dice", "semantic", "total"]
    again = Heard()
    fit(config, True, quiet=True, callbacks=[again])
    assert again.names() == [
        ("start", 4),
        ("step", 4),
        ("step", 5),
        ("epoch", 1),
        ("end", 2),
    ]


class Broken(Heard):
    def on_step(self, run, step, terms):
        raise ZeroDivisionError


def test_the_end_is_told_after_an_error_too(data, tmp_path):
    broken = Broken()
    with pytest.raises(ZeroDivisionError):
        fit(quick(data, tmp_path / "run"), quiet=True, callbacks=[broken])
    assert [event[0] for event in broken.events] == ["start", "end"]


def on_epoch(run, epoch, row):
    return "stop" if epoch == 1 else None


def test_early_stopping_stops_and_the_run_can_go_on(data, tmp_path):
    def config(out):
        return quick(data, tmp_path / out, epochs=4)

    whole_run = fit(config("whole"), quiet=True)
    rows = fit(config("run"), quiet=True, callbacks=[on_epoch])
    assert len(rows) == 2
    log = (tmp_path / "run/log.txt").read_text()
    assert "stopped after epoch 2 by on_epoch; all of it is safe" in log
    assert fit(config("run"), True, quiet=True) == whole_run
    assert same(tmp_path / "run", tmp_path / "whole")
    hopeless = EarlyStopping(1, monitor="dice_mean", min_delta=2.0)  # no Dice improves by 2
    rows = fit(config("early"), quiet=True, callbacks=[hopeless])
    assert len(rows) == 2
    rows = fit(config("early"), True, quiet=True, callbacks=[hopeless])
    assert len(rows) == 2  # it had enough
    patient = EarlyStopping(9)
    assert fit(config("early"), True, quiet=True, callbacks=[patient]) == whole_run


def on_step(run, step, terms):
    return "stop" if step == 3 else None


def test_a_step_may_stop_too(data, tmp_path):
    run = tmp_path / "run"
    config = quick(data, run)
    rows = fit(config, quiet=True, callbacks=[on_step])
    assert len(rows) == 1
    log = (run / "log.txt").read_text()
    assert "stopped in epoch 2 after step 2" in log
    fit(config, True, quiet=True)
    fit(quick(data, tmp_path / "whole"), quiet=True)
    assert same(run, tmp_path / "whole")


def test_wrong_callbacks_are_told_at_once(data, tmp_path):
    told = {print: "has none of on_start", Heard: "Heard is a class", 3: "has none of on_start"}
    for odd, problem in told.items():
        with pytest.raises(InputError, match=problem):
            fit(settings(data, tmp_path / "run"), quiet=True, callbacks=[odd])
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_numbers_of_the_run(data, tmp_path):
    folder = "tensorboard.backend.event_processing"
    reader = pytest.importorskip(f"{folder}.event_accumulator")
    config = settings(data, tmp_path / "run")
    fit(config, quiet=True, callbacks=[TensorBoardLogger()], stop=after(2))
    rows = fit(config, True, quiet=True, callbacks=[TensorBoardLogger()])
    events = reader.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    dice = events.Scalars("epoch/dice_mean")
    assert [event.step for event in dice] == [2, 5]
    assert [event.value for event in dice] == pytest.approx([row["dice_mean"] for row in rows])
    totals = events.Scalars("step/total")
    assert [event.step for event in totals] == list(range(6))


# --- two processes


def two_at_once(data, out):
    "Started by torchrun: a run that its first process stops; each process notes its events"
    heard = Heard()
    # each process has other weights, those of the first count
    seed_everything(torch.distributed.get_rank())
    config = settings(data, out, ours=False, epochs=4)
    callbacks = [heard, on_epoch]
    rows = fit(config, quiet=True, model=Foreign(1, 3), loss=plain_loss, callbacks=callbacks)
    return {"events": heard.names(), "rows": rows}


def plain_loss(output, target):
    return (output - target).square().mean()


def test_two_processes_stop_together_and_the_first_one_tells(data, tmp_path):
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        str(data),
        str(tmp_path),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    steps = [["step", i] for i in range(6)]
    assert first["events"] == [
        ["start", 0],
        *steps[:3],
        ["epoch", 0],
        *steps[3:],
        ["epoch", 1],
        ["end", 2],
    ]
    assert second["events"] == []
    assert first["rows"] == second["rows"]
    assert len(first["rows"]) == 2
    assert "stopped after epoch 2 by on_epoch" in (tmp_path / "run/log.txt").read_text()


# --- the command line

MODULE = """
from torch import nn

class Net(nn.Module):
    "Halves a volume twice"
    def __init__(self, i, o):
        super().__init__()
        self.a = nn.Conv3d(i, 4, 3, 2, 1)
        self.b = nn.Conv3d(4, 8, 3, 2, 1)
        self.c = nn.ConvTranspose3d(8, 4, 2, 2)
        self.d = nn.ConvTranspose3d(4, 4, 2, 2)
        self.head = nn.Conv3d(4, o, 1)

    def forward(self, x):
        for layer in (self.a, self.b, self.c):
            x = layer(x).relu()
        return self.head(self.d(x))

def build(in_channels, out_channels):
    return Net(in_channels, out_channels)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "The current directory, with my_module.py in it, which nobody has imported"
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    yield tmp_path
    sys.modules.pop("my_module", None)


GIVEN = (
    "--patch_size 16 16 16 --batch_size 4 --validation 2 --precision fp32 --lr 1e-3 --epochs 1 "
    "--cache off"
).split()


def train(data, *words):
    "`egcnn_train` in this process: its exit code"
    line = [data, "--out", "run", *GIVEN, *words]
    return train_main([str(word) for word in line])


def predict(data, *words):
    "`egcnn_predict` of one scan in this process: its exit code"
    scan = data / "scan03.nii.gz"
    return predict_main(["run", str(scan), "--out", "out", *words])


def expect_prediction(data, has_edge):
    "The run in the current directory predicts a scan, with edges where it has an edge stream"
    saves = ["--save", "edges"] if has_edge else []
    assert predict(data, *saves) == 0
    assert nib.Nifti1Image.load("out/scan03.nii.gz").shape == (18, 17, 16)
    assert Path("out/scan03_edges.nii.gz").exists() is has_edge
    network, _, _ = load_run("run")
    patch = torch.zeros(1, 1, *PATCH)
    assert network(patch) is not None


@pytest.mark.parametrize("edge", ["on", "off"])
def test_a_network_of_ones_own_on_the_command_line(data, folder, edge, capsys):
    has_edge = edge == "on"
    words = ["--network", "my_module:build", "--edge", edge]
    assert train(data, *words) == 0
    kept = written("run", "settings")
    assert kept["network"] == "my_module:build"
    assert kept["edge"] is has_edge
    assert "norm_head" not in kept["readings"]
    names = weights("run")
    assert ("main.a.weight" in names) is has_edge
    assert ("a.weight" in names) is not has_edge
    assert train(data, *words, "--resume") == 0
    assert "resumed after epoch 1" in Path("run/log.txt").read_text()
    expect_prediction(data, has_edge)
    capsys.readouterr()
    assert train(data, "--resume") == 2  # without its network
    told = capsys.readouterr().err
    assert "found network my_module:build" in told
    assert "expected network None" in told


def test_a_network_that_has_changed_is_told(data, folder, capsys):
    words = ["--network", "my_module:build", "--edge", "off"]
    assert train(data, *words) == 0
    wider = MODULE.replace("nn.Conv3d(4, o, 1)", "nn.Conv3d(4, o, 3, padding=1)")
    (folder / "my_module.py").write_text(wider)
    importlib.invalidate_caches()
    sys.modules.pop("my_module")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    assert train(data, *words, "--resume") == 2
    assert "head.weight has the shape" in capsys.readouterr().err
    assert predict(data) == 2
    assert "head.weight has the shape" in capsys.readouterr().err


# a command as it is installed, without the current folder on Python's path
INSTALLED = """
import sys

sys.path = [p for p in sys.path if p]
from egcnn_nb.commands.{} import main

sys.exit(main(sys.argv[1:]))
"""


def installed(name, where, *words):
    "An installed command in a process of its own"
    env = {**ENV, "PYTHONPATH": str(Path(__file__).parents[1])}
    code = INSTALLED.format(name)
    line = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, env=env, cwd=where, timeout=200)


def test_the_installed_command_finds_the_module(data, folder):
    network = ["--network", "my_module:build", "--edge", "off"]
    done = installed("train", folder, data, "--out", "run", *GIVEN, *network)
    assert done.returncode == 0, done.stderr[-3000:]
    away = folder / "away"
    away.mkdir()
    lost = installed("predict", away, folder / "run", data, "--out", "out")
    assert lost.returncode == 2, lost.stderr[-3000:]
    assert f"names the module my_module, which is not found from {away}" in lost.stderr


def test_what_cannot_be_trained_is_told_before_anything_is_written(data, folder, capsys):
    (folder / "broken.py").write_text("1/0")
    wrong = {
        "Choose multiples of 4": ["my_module:build", "--patch_size", 16, 16, 18],
        "has no function make": ["my_module:make"],
        "cannot be imported (ZeroDivisionError": ["broken:build"],
        "is no name": ["my_module"],
        "width is 4, but the network is built by my_module:build": [
            "my_module:build",
            "--width",
            4,
        ],
    }
    for told, words in wrong.items():
        assert train(data, "--network", *words) == 2
        assert told in capsys.readouterr().err
        assert not (folder / "run").exists()


def test_the_logger_of_the_command_line(data, folder, capsys, monkeypatch):
    # as where tensorboard is missing
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(data, "--edge", "off", "--logger", "tensorboard") == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not (folder / "run").exists()
    writers = tiny.replace_tensorboard(monkeypatch)
    size = ["--edge", "off", "--width", 4, "--levels", 2]
    assert train(data, *size, "--logger", "tensorboard") == 0
    (writer,) = writers
    assert writer.folder == Path("run/tensorboard")
    written = writer.steps()
    assert ("step/total", 2) in written
    assert ("epoch/dice_mean", 2) in written


if __name__ == "__main__":  # started by torchrun
    import torch.distributed as dist

    dist.init_process_group("gloo")
    told = two_at_once(sys.argv[1], Path(sys.argv[2]) / "run")
    (Path(sys.argv[2]) / f"{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
