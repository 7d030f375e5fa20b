"""EG-CNN around networks of other people, unmodified.

Each trains for twenty steps, and keeps its own weights and output.

python tests/test_networks.py          # the table: found features, parameters added, loss before and after"""

import copy
import gc
import pickle
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import egcnn_nb.fast as fast
from egcnn_nb.core import InputError
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.features import logits_of
from egcnn_nb.method.losses import EGLoss, dice_loss
from egcnn_nb.tensors import seed_everything

warnings.filterwarnings("ignore")


class Functional(nn.Module):
    "A U-Net by hand: functional interpolation, no module for up-sampling, and any kind of output"

    def __init__(self, kind="tensor", dims=3):
        super().__init__()
        self.kind = kind
        self.dims = dims
        self.a = self.block(1, 8)
        self.b = self.block(8, 16, 2)
        self.c = self.block(16, 32, 2)
        self.d = self.block(48, 16)
        self.e = self.block(24, 8)
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.out = conv(8, 3, 1)

    def block(self, before, channels, stride=1):
        "Convolution, normalisation, activation"
        conv, norm = nn.Conv2d, nn.BatchNorm2d
        if self.dims == 3:
            conv, norm = nn.Conv3d, nn.BatchNorm3d
        first = conv(before, channels, 3, stride, 1)
        second = norm(channels)
        return nn.Sequential(first, second, nn.ReLU())

    def rise(self, deep, like):
        "A deep map at the size of another one, beside it"
        mode = "trilinear" if self.dims == 3 else "bilinear"
        _, _, *size = like.shape
        up = F.interpolate(deep, size, mode=mode)
        return torch.cat([up, like], 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        d = self.d(self.rise(c, b))
        e = self.e(self.rise(d, a))
        y = self.out(e)
        outputs = {
            "tensor": y,
            "tuple": (y, d),
            "list": [y],
            "dict": {"out": y, "aux": d},
        }
        return outputs[self.kind]


def stage(before, channels, stride):
    "A stage of a residual network"
    return nn.Sequential(
        nn.Conv2d(before, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 3, 1, 1),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class Residual2d(nn.Module):
    "As torchvision builds them: BasicBlock stages with strides, then a decoder"

    def __init__(self):
        super().__init__()
        self.conv1 = stage(1, 16, 2)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = stage(16, 16, 1)
        self.layer2 = stage(16, 32, 2)
        self.layer3 = stage(32, 64, 2)
        self.up1 = nn.ConvTranspose2d(64, 32, 2, 2)
        self.up2 = nn.ConvTranspose2d(64, 16, 2, 2)
        self.head = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        stem = self.conv1(x)
        stem = self.maxpool(stem)
        a = self.layer1(stem)
        b = self.layer2(a)
        c = self.layer3(b)
        up = self.up1(c)
        both = torch.cat([up, b], 1)
        up = self.up2(both)
        both = torch.cat([up, a], 1)
        logits = self.head(both)
        _, _, *size = x.shape
        return F.interpolate(logits, size=size, mode="bilinear")


def monai(name, *args, **kw):
    "A network of MONAI"
    import monai.networks.nets as nets

    make = getattr(nets, name)
    return make(*args, **kw)


def nnunet(name, **kw):
    unet = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet",
        reason="pip install --no-deps dynamic-network-architectures",
    )
    common = dict(
        input_channels=1,
        n_stages=4,
        features_per_stage=[8, 16, 32, 64],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2, 2],
        num_classes=3,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    make = getattr(unet, name)
    return make(**common, **kw)


NETWORKS = {  # name -> (network, size of the input)
    "MONAI UNet": (lambda: monai("UNet", 3, 1, 3, (8, 16, 32), (2, 2), num_res_units=1), 32),
    "MONAI BasicUNet": (lambda: monai("BasicUNet", 3, 1, 3, features=(8, 8, 16, 32, 64, 8)), 32),
    "MONAI BasicUNetPlusPlus": (
        lambda: monai(
            "BasicUNetPlusPlus", 3, 1, 3, features=(8, 8, 16, 32, 64, 8), deep_supervision=True
        ),
        32,
    ),
    "MONAI DynUNet, deep supervision": (
        lambda: monai(
            "DynUNet",
            3,
            1,
            3,
            [3] * 4,
            [1, 2, 2, 2],
            [2] * 3,
            filters=[8, 16, 32, 64],
            deep_supervision=True,
            deep_supr_num=2,
        ),
        32,
    ),
    "MONAI SegResNet": (
        lambda: monai("SegResNet", init_filters=8, in_channels=1, out_channels=3),
        32,
    ),
    "MONAI SegResNetVAE": (
        lambda: monai("SegResNetVAE", (32, 32, 32), init_filters=8, in_channels=1, out_channels=3),
        32,
    ),
    "MONAI VNet": (
        lambda: monai("VNet", 3, 1, 3),
        (32, 16, 16),
    ),  # 46 million weights, kernels of 5×5×5: two voxels at the deepest level
    "MONAI AttentionUnet": (lambda: monai("AttentionUnet", 3, 1, 3, (8, 16, 32), (2, 2)), 32),
    "MONAI SwinUNETR": (
        lambda: monai(
            "SwinUNETR", 1, 3, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)
        ),
        64,
    ),
    "MONAI SwinUNETR, checkpointing": (
        lambda: monai(
            "SwinUNETR",
            1,
            3,
            feature_size=12,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 4, 8),
            use_checkpoint=True,
        ),
        64,
    ),
    "MONAI UNETR": (
        lambda: monai(
            "UNETR", 1, 3, (32, 32, 32), feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4
        ),
        32,
    ),
    "MONAI FlexibleUNet": (
        lambda: monai(
            "FlexibleUNet",
            1,
            3,
            "efficientnet-b0",
            spatial_dims=3,
            decoder_channels=(64, 32, 16, 8, 8),
        ),
        64,
    ),
    "nnU-Net PlainConvUNet": (lambda: nnunet("PlainConvUNet", n_conv_per_stage=1), 32),
    "nnU-Net ResidualEncoderUNet": (
        lambda: nnunet("ResidualEncoderUNet", n_blocks_per_stage=1),
        32,
    ),
    "2D residual network": (Residual2d, 64),
    "functional U-Net": (Functional, 32),
    "a tuple": (lambda: Functional("tuple"), 32),
    "a list": (lambda: Functional("list"), 32),
    "a dict": (lambda: Functional("dict"), 32),
}

STEPS = {"MONAI VNet": 8}  # of training, where a step takes seconds; 20 elsewhere


def batch(size, dims):
    "Two noisy boxes and their one-hot masks; `size` is that of each axis, or of all"
    sizes = (size,) * dims if isinstance(size, int) else size
    generator = torch.Generator()
    generator.manual_seed(0)
    noise = torch.randn(2, 1, *sizes, generator=generator)
    first = torch.zeros_like(noise)
    second = torch.zeros_like(noise)
    near = [slice(n // 5, n // 2) for n in sizes]
    far = [slice(n // 2, 3 * n // 4) for n in sizes]
    first[..., *near] = 1
    second[..., *far] = 1
    background = 1 - first - second
    y = torch.cat([background, first, second], 1)
    image = first + 2 * second
    return image + 0.2 * noise, y


def tensors_in(output):
    "The tensors of whatever a network returns"
    if output is None:
        return []
    if torch.is_tensor(output):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    found = []
    for part in parts:
        found += tensors_in(part)
    return found


def cost_of(tensor, y):
    "The loss of one of them: a loss as it is, logits of any size by their Dice"
    if tensor.dim() == 0:
        return tensor
    if tensor.dim() == y.dim() + 1:  # several outputs, stacked
        outputs = tensor.unbind(1)
        return sum_of_costs(outputs, y)
    _, classes, *size = tensor.shape
    if classes != y.shape[1]:
        return 0 * tensor.square().mean()
    prob = tensor.softmax(1)
    masks = F.interpolate(y, size)
    return dice_loss(prob, masks)


def sum_of_costs(tensors, y):
    "The loss of several"
    costs = [cost_of(tensor, y) for tensor in tensors]
    return sum(costs)


def aside(output, y):
    "The loss of whatever else the wrapped network returns: deep supervision, the loss of an autoencoder"
    tensors = tensors_in(output)
    return sum_of_costs(tensors, y)


@contextmanager
def own_output(model):
    "A list that holds what the wrapped network itself returns, in DistributedDataParallel too"
    outputs = []

    def keep(net, args, output):
        outputs.append(output)

    egcnn = getattr(model, "module", model)
    handle = egcnn.main.register_forward_hook(keep)
    yield outputs
    handle.remove()


@dataclass
class Trained:
    "The losses of each step, and names of the parameters without a gradient"

    semantic: list
    edge: list
    missing: list

    def note(self, terms):
        "Note the losses of a step"
        values = {name: term.item() for name, term in terms.items()}
        semantic = values["semantic"]
        edge = values["edge_dice"] + 0.5 * values["edge_bce"]
        self.semantic.append(semantic)
        self.edge.append(edge)


def learns(curve):
    "Whether a loss is smaller at the end than at the beginning"
    first, *_, last = curve
    return last < first


def without_gradient(model):
    "Names of the parameters that should have a gradient and have none, or one that is not finite"
    found = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if not parameter.requires_grad:
            continue
        if gradient is None or not gradient.isfinite().all():
            found.append(name)
    return found


def train(model, x, y, steps=20, lr=2e-3):
    "Train for some steps on one batch"
    loss = EGLoss()
    loss.eval()
    done = Trained([], [], [])
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr)
    for _ in range(steps):
        with own_output(model) as outputs:
            out = model(x)
        terms = loss.terms(out, y)
        (output,) = outputs
        rest = aside(output, y)
        total = terms["total"] + 0.1 * rest
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        done.note(terms)
    done.missing = without_gradient(model)
    return done


def unreached(net, x, y):
    "Names of the parameters that get no gradient in the bare network either"
    net = copy.deepcopy(net)
    net.train()
    output = net(x)
    logits = own_logits(output, x)
    squares = logits.square()
    total = squares.mean() + aside(output, y)
    total.backward()
    found = []
    for name, parameter in net.named_parameters():
        if parameter.grad is None:
            found.append(f"main.{name}")
    return found


def own_logits(output, x):
    "The logits in what a network returns for an image"
    axes = x.dim() - 2
    logits = logits_of(output, axes)
    assert logits is not None
    return logits


def wrapped(name):
    "Bare network, EG-CNN around it, and a batch"
    make, size = NETWORKS[name]
    dims = 2 if name.startswith("2D") else 3
    seed_everything(0)
    net = make()
    x, y = batch(size, dims)
    model = EGCNN(net, x, verbose=False)
    return net, model, x, y


def expect_same_state(net, before):
    "A network has the state of before, to the bit and in the same order"
    state = net.state_dict()
    assert list(state) == list(before)
    for name, value in state.items():
        same = torch.equal(value, before[name])
        assert same, name


@pytest.mark.parametrize("name", NETWORKS)
def test_the_wrapped_network_is_as_it_was(name):
    net, model, x, _ = wrapped(name)
    before = copy.deepcopy(net.state_dict())
    model.eval()
    with torch.no_grad():
        streams = model.streams(x)
        output = net(x)
        fused = model(x)
    inside = own_logits(streams.output, x)
    alone = own_logits(output, x)
    assert model.main is net
    assert torch.equal(inside, alone)
    assert torch.equal(fused, alone)
    expect_same_state(net, before)


def has_hooks(layer):
    "Whether something still listens to a layer"
    after = layer._forward_hooks
    before = layer._forward_pre_hooks
    return bool(after or before)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains(name):
    net, model, x, y = wrapped(name)
    idle = unreached(net, x, y)
    steps = STEPS.get(name, 20)
    model.train()
    done = train(model, x, y, steps)
    assert learns(done.semantic), done
    assert learns(done.edge), done
    assert done.missing == idle
    model.listener.remove()  # as when the model goes
    for layer in model.modules():
        assert not has_hooks(layer)


ENCODERS = {
    "MONAI SegResNet": ["down_layers.0", "down_layers.1", "down_layers.2", "down_layers.3"],
    "MONAI UNETR": ["encoder1", "encoder2", "encoder3", "encoder4", "vit"],
    "nnU-Net PlainConvUNet": [f"encoder.stages.{i}" for i in range(4)],
    "functional U-Net": ["a", "b", "c"],
}
ENTRIES = {"MONAI UNETR": "decoder5", "functional U-Net": "d"}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_found_features_are_those_a_person_would_name(name):
    _, model, _, _ = wrapped(name)
    found = model.found
    layers = []
    for layer, _ in found["encoder"]:
        if name == "MONAI UNETR":
            layer, *_ = layer.split(".")
        layers.append(layer)
    assert layers == ENCODERS[name]
    entry, _ = found["entry"]
    if name in ENTRIES:
        start = ENTRIES[name]
        assert entry.startswith(start)


@pytest.mark.parametrize("on", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("shift", [0, 100])
def test_both_streams_are_those_of_float64(on, shift, monkeypatch):
    "With the kernels and without them, and for images whose mean is far from zero"
    monkeypatch.setattr(fast, "enabled", on)
    seed_everything(0)
    model = EGCNN(SegNet(1, 3, width=8, levels=3)).eval()
    exact = copy.deepcopy(model).double()
    noise = torch.randn(1, 1, 16, 24, 16)
    x = shift + noise
    exact_x = x.double()
    with torch.no_grad():
        expected = exact(exact_x, full=True)
        found = model(x, full=True)
    for of_found, true in zip(found[:2], expected[:2], strict=True):
        error = of_found - true
        assert error.norm() < 1e-4 * true.norm()


def test_without_kernels_a_model_can_be_traced_and_differentiated_twice(monkeypatch):
    monkeypatch.setattr(fast, "enabled", False)
    seed_everything(0)
    model = EGCNN(SegNet(1, 2, width=4, levels=2)).eval()
    x = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
    traced: Any = torch.jit.trace(model, x)
    other = 2 * x
    found = traced(other)
    expected = model(other)
    assert torch.allclose(found, expected, atol=1e-5)
    out = model(x, full=True)
    length = out.edge.square().sum()
    (slope,) = torch.autograd.grad(length, x, create_graph=True)
    second = slope.square().sum()
    second.backward()
    head = model.edge.head
    for parameter in head.parameters():
        gradient = parameter.grad
        assert gradient is not None
        assert gradient.isfinite().all()
    gradient = head.weight.grad
    assert gradient is not None
    assert gradient.any()


def test_a_frozen_backbone_stays_and_the_rest_learns():
    net, _, x, y = wrapped("MONAI SegResNet")
    net.requires_grad_(False)
    state = net.state_dict()
    before = copy.deepcopy(state)
    model = EGCNN(net, x, verbose=False)
    model.train()
    done = train(model, x, y)
    assert not done.missing
    assert learns(done.edge)
    expect_same_state(net, before)


def test_autocast_and_channels_last():
    net, model, x, y = wrapped("MONAI DynUNet, deep supervision")
    model.eval()
    with torch.no_grad():
        plain = model(x, full=True)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x, full=True)
        last_x = x.contiguous(memory_format=torch.channels_last_3d)
        moved: Any = model
        moved.to(memory_format=torch.channels_last_3d)
        last = model(last_x, full=True)
    for a, b, c in zip(plain[:2], half[:2], last[:2], strict=True):
        difference = a - b
        error = difference.abs()
        size = a.abs()
        assert error.max() < 0.1 * size.max()
        assert torch.allclose(a, c, atol=1e-4)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        done = train(model, x, y, 3)
    assert done.missing == []


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles with g++"),
        ),
    ],
)
def test_compile_gives_the_same(backend):
    _, model, x, _ = wrapped("functional U-Net")
    model.eval()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        plain = model(x, full=True)
        fast = compiled(x, full=True)
    for a, b in zip(plain[:2], fast[:2], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_ddp(tmp_path):
    import torch.distributed as dist

    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        _, model, x, y = wrapped("MONAI BasicUNet")
        shared = nn.parallel.DistributedDataParallel(model.train())
        done = train(shared, x, y, 5)
    finally:
        dist.destroy_process_group()
    assert not done.missing
    assert learns(done.edge)


def tensors_alive():
    "How many tensors Python knows"
    gc.collect()
    objects = gc.get_objects()
    count = 0
    for thing in objects:
        if isinstance(thing, torch.Tensor):
            count += 1
    return count


def test_memory_is_flat_over_200_steps():
    _, model, x, y = wrapped("2D residual network")
    train(model, x, y, 10)
    before = tensors_alive()
    train(model, x, y, 200)
    after = tensors_alive()
    assert after <= before


def pickled(model):
    "A network that was written and read again"
    content = pickle.dumps(model)
    return pickle.loads(content)


def test_copy_pickle_and_state():
    _, model, x, _ = wrapped("functional U-Net")
    model.eval()
    net = Functional()
    again = EGCNN(net, x, verbose=False)
    again.eval()
    state = model.state_dict()
    again.load_state_dict(state, strict=True)
    twins = (copy.deepcopy(model), pickled(model), again)
    with torch.no_grad():
        truth = model(x, full=True)
        for twin in twins:
            found = twin(x, full=True)
            assert torch.equal(found.logits, truth.logits)
            assert torch.equal(found.edge, truth.edge)


def around_ours():
    "An EG-CNN around Seg-Net"
    net = SegNet(1, 3, levels=3)
    return EGCNN(net)


def around_foreign():
    "An EG-CNN around a network of other people"
    net = Functional()
    x, _ = batch(32, 3)
    return EGCNN(net, x, verbose=False)


@pytest.mark.parametrize("make", [around_ours, around_foreign], ids=["ours", "foreign"])
def test_export_and_onnx_give_the_same(make, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    seed_everything(0)
    model = make()
    model.eval()
    x, _ = batch(32, 3)
    exact_model = copy.deepcopy(model).double()
    exact_x = x.double()
    with torch.no_grad():
        truth = model(x)
        exact = exact_model(exact_x)
    program = torch.export.export(model, (x,))
    exported = program.module()
    found = exported(x)
    largest = exact.abs().max()
    rounding = 1e-5 * largest.item()
    for logits in (truth, found):
        assert torch.allclose(logits.double(), exact, rtol=0, atol=rounding)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (out,) = session.run(None, {"x": x.numpy()})
    assert torch.allclose(truth, torch.tensor(out), atol=1e-3)


class Vanishing(nn.Module):
    "Goes down to one voxel and has no map on the way"

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(8, 8)

    def forward(self, x):
        return self.line(x)


@pytest.mark.parametrize(
    "net, what",
    [
        (
            nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 3, 1)),
            "expected an encoder that lowers the resolution; name the layers: features=",
        ),
        (
            nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), nn.Conv3d(4, 3, 3, 2, 1)),
            "expected a decoder; name the layer: decoder_entry=",
        ),
        (Vanishing(), "expected convolutions that are modules; name the layers: features="),
        (
            nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Flatten()),
            "wrap the network so that it returns its logits",
        ),
    ],
)
def test_a_network_that_cannot_work_is_told_in_one_sentence(net, what):
    x = torch.zeros(1, 1, 8, 8, 8)
    with pytest.raises(InputError) as refused:
        EGCNN(net, x)
    message = str(refused.value)
    assert what in message
    assert "\n" not in message


COLUMNS = (
    "network",
    "gates, deep to fine",
    "begins with",
    "parameters",
    "added",
    "semantic loss, 20 steps",
    "edge loss",
)


def parameters_of(module):
    "Number of the weights of a network"
    count = 0
    for parameter in module.parameters():
        count += parameter.numel()
    return count


def change(curve):
    "The first and the last value of a curve"
    first, *_, last = curve
    return f"{first:.3f} to {last:.3f}"


def row_of(name):
    "What happens when a network is wrapped and trained for twenty steps, as a row of the table"
    net, model, x, y = wrapped(name)
    own = parameters_of(net)
    added = parameters_of(model) - own
    idle = unreached(net, x, y)
    done = train(model.train(), x, y)
    cells = [
        name,
        ", ".join(model.gated),
        model.entry,
        f"{own:,}",
        f"{added:,}",
        change(done.semantic),
        change(done.edge),
    ]
    row = " | ".join(cells)
    if done.missing == idle:
        return f"| {row} |"
    return f"| {row} | no gradient: {done.missing}"


def table():
    "Print the table"
    head = " | ".join(COLUMNS)
    rules = "|---" * len(COLUMNS)
    print(f"| {head} |\n{rules}|")
    for name in NETWORKS:
        row = row_of(name)
        print(row, flush=True)


if __name__ == "__main__":
    table()
