"""EG-CNN around networks of other people, unmodified.

Each trains for twenty steps, and keeps its own weights and output.

python tests/test_networks.py          # the table: found features, parameters added, loss before and after"""

import copy
import gc
import pickle
import shutil
import warnings
from contextlib import contextmanager

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
        conv, norm, (self.kind, self.mode) = (
            (nn.Conv3d, nn.BatchNorm3d, (kind, "trilinear"))
            if dims == 3
            else (nn.Conv2d, nn.BatchNorm2d, (kind, "bilinear"))
        )

        def block(a, b, s=1):
            return nn.Sequential(conv(a, b, 3, s, 1), norm(b), nn.ReLU())

        self.a, self.b, self.c = block(1, 8), block(8, 16, 2), block(16, 32, 2)
        self.d, self.e, self.out = block(48, 16), block(24, 8), conv(8, 3, 1)

    def forward(self, x):
        def rise(deep, like):
            return torch.cat([F.interpolate(deep, like.shape[2:], mode=self.mode), like], 1)

        a = self.a(x)
        b = self.b(a)
        d = self.d(rise(self.c(b), b))
        y = self.out(self.e(rise(d, a)))
        return {"tensor": y, "tuple": (y, d), "list": [y], "dict": {"out": y, "aux": d}}[self.kind]


class Residual2d(nn.Module):
    "As torchvision builds them: BasicBlock stages with strides, then a decoder"

    def __init__(self):
        super().__init__()

        def stage(a, b, s):
            return nn.Sequential(
                nn.Conv2d(a, b, 3, s, 1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(inplace=True),
                nn.Conv2d(b, b, 3, 1, 1),
                nn.BatchNorm2d(b),
                nn.ReLU(inplace=True),
            )

        self.conv1, self.maxpool = stage(1, 16, 2), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.up1, self.up2, self.head = (
            nn.ConvTranspose2d(64, 32, 2, 2),
            nn.ConvTranspose2d(64, 16, 2, 2),
            nn.Conv2d(32, 3, 1),
        )

    def forward(self, x):
        a = self.layer1(self.maxpool(self.conv1(x)))
        b = self.layer2(a)
        c = self.layer3(b)
        y = self.up2(torch.cat([self.up1(c), b], 1))
        return F.interpolate(self.head(torch.cat([y, a], 1)), size=x.shape[2:], mode="bilinear")


def monai(name, *args, **kw):
    import monai.networks.nets as nets

    return getattr(nets, name)(*args, **kw)


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
    return getattr(unet, name)(**common, **kw)


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
    g = torch.Generator().manual_seed(0)
    y = torch.zeros(2, 3, *sizes)
    first = [slice(n // 5, n // 2) for n in sizes]
    second = [slice(n // 2, 3 * n // 4) for n in sizes]
    y[(slice(None), 1, *first)] = 1
    y[(slice(None), 2, *second)] = 1
    y[:, 0] = 1 - y.sum(1)
    return y[:, 1:2] + 2 * y[:, 2:] + 0.2 * torch.randn(2, 1, *sizes, generator=g), y


def aside(output, y):
    "The loss of whatever else the wrapped network returns: deep supervision, the loss of an autoencoder"

    def tensors(o):
        if torch.is_tensor(o):
            yield o
        elif o is not None:
            yield from (
                t for part in (o.values() if isinstance(o, dict) else o) for t in tensors(part)
            )

    def cost(t):
        if t.dim() == 0:
            return t
        if t.dim() == y.dim() + 1:
            return sum(cost(u) for u in t.unbind(1))
        return (
            dice_loss(t.softmax(1), F.interpolate(y, t.shape[2:]))
            if t.shape[1] == y.shape[1]
            else t.square().mean() * 0
        )

    return sum(map(cost, tensors(output)))


@contextmanager
def own_output(model):
    "A list that holds what the wrapped network itself returns, in DistributedDataParallel too"
    outputs = []
    egcnn = getattr(model, "module", model)
    handle = egcnn.main.register_forward_hook(lambda net, args, output: outputs.append(output))
    yield outputs
    handle.remove()


def train(model, x, y, steps=20, lr=2e-3):
    "The semantic and edge losses of the first and last steps, and names of the parameters without a gradient"
    loss, curve = EGLoss().eval(), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        with own_output(model) as outputs:
            out = model(x)
        terms = loss.terms(out, y)
        optimizer.zero_grad()
        (terms["total"] + 0.1 * aside(outputs[0], y)).backward()
        optimizer.step()
        curve.append(
            (terms["semantic"].item(), (terms["edge_dice"] + 0.5 * terms["edge_bce"]).item())
        )
    return curve, [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]


def unreached(net, x, y):
    "Names of the parameters that get no gradient in the bare network either"
    net = copy.deepcopy(net).train()
    output = net(x)
    (logits_of(output, x.dim() - 2).square().mean() + aside(output, y)).backward()
    return [f"main.{n}" for n, p in net.named_parameters() if p.grad is None]


def wrapped(name):
    "Bare network, EG-CNN around it, and a batch"
    make, size = NETWORKS[name]
    seed_everything(0)
    net = make()
    x, y = batch(size, 2 if name.startswith("2D") else 3)
    return net, EGCNN(net, x, verbose=False), x, y


@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains_and_leaves_the_network_as_it_is(name):
    net, model, x, y = wrapped(name)
    keys, before = list(net.state_dict()), copy.deepcopy(net.state_dict())
    with torch.no_grad():
        same = torch.equal(
            logits_of(model.eval().streams(x).output, x.dim() - 2),
            logits_of(net.eval()(x), x.dim() - 2),
        ) and torch.equal(model(x), logits_of(net(x), x.dim() - 2))
    assert (
        model.main is net
        and same
        and list(net.state_dict()) == keys
        and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    )
    idle = unreached(net, x, y)
    curve, missing = train(model.train(), x, y, STEPS.get(name, 20))
    assert curve[-1][0] < curve[0][0] and curve[-1][1] < curve[0][1], (curve[0], curve[-1])
    assert missing == idle, missing
    model.listener.remove()  # as when the model goes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_found_features_are_those_a_person_would_name():
    found = {
        name: [n for n, _ in wrapped(name)[1].found["encoder"]]
        for name in ("MONAI SegResNet", "MONAI UNETR", "nnU-Net PlainConvUNet", "functional U-Net")
    }
    assert found["MONAI SegResNet"] == [f"down_layers.{i}" for i in range(4)]
    assert [n.split(".")[0] for n in found["MONAI UNETR"]] == [
        "encoder1",
        "encoder2",
        "encoder3",
        "encoder4",
        "vit",
    ]
    assert found["nnU-Net PlainConvUNet"] == [f"encoder.stages.{i}" for i in range(4)] and found[
        "functional U-Net"
    ] == ["a", "b", "c"]
    assert wrapped("MONAI UNETR")[1].found["entry"][0].startswith("decoder5") and wrapped(
        "functional U-Net"
    )[1].found["entry"][0].startswith("d")


@pytest.mark.parametrize("on", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize("shift", [0, 100])
def test_both_streams_are_those_of_float64(on, shift, monkeypatch):
    "With the kernels and without them, and for images whose mean is far from zero"
    monkeypatch.setattr(fast, "enabled", on)
    seed_everything(0)
    model = EGCNN(SegNet(1, 3, width=8, levels=3)).eval()
    exact = copy.deepcopy(model).double()
    x = shift + torch.randn(1, 1, 16, 24, 16)
    with torch.no_grad():
        expected = exact(x.double(), full=True)
        found = model(x, full=True)
        for of_found, true in zip(found[:2], expected[:2], strict=True):
            assert (of_found - true).norm() < 1e-4 * true.norm()


def test_without_kernels_a_model_can_be_traced_and_differentiated_twice(monkeypatch):
    monkeypatch.setattr(fast, "enabled", False)
    seed_everything(0)
    model = EGCNN(SegNet(1, 2, width=4, levels=2)).eval()
    x = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
    traced = torch.jit.trace(model, x)
    assert torch.allclose(traced(2 * x), model(2 * x), atol=1e-5)
    edge = model(x, full=True).edge
    (slope,) = torch.autograd.grad(edge.square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.edge.head.parameters())
    assert model.edge.head.weight.grad.abs().sum() > 0


def test_a_frozen_backbone_stays_and_the_rest_learns():
    net, _, x, y = wrapped("MONAI SegResNet")
    net.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    model = EGCNN(net, x, verbose=False)
    curve, missing = train(model.train(), x, y)
    assert (
        not missing
        and curve[-1][1] < curve[0][1]
        and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    )


def test_autocast_and_channels_last():
    net, model, x, y = wrapped("MONAI DynUNet, deep supervision")
    model.eval()
    with torch.no_grad():
        plain = model(x, full=True)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x, full=True)
        last = model.to(memory_format=torch.channels_last_3d)(
            x.contiguous(memory_format=torch.channels_last_3d), full=True
        )
    for a, b, c in zip(plain[:2], half[:2], last[:2], strict=True):
        assert (a - b.float()).abs().max() < 0.1 * a.abs().max() and torch.allclose(a, c, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert train(model.train(), x, y, 3)[1] == []


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
    with torch.no_grad():
        plain = model.eval()(x, full=True)
        fast = torch.compile(model, backend=backend)(x, full=True)
    for a, b in zip(plain[:2], fast[:2], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_ddp(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _, model, x, y = wrapped("MONAI BasicUNet")
        curve, missing = train(nn.parallel.DistributedDataParallel(model.train()), x, y, 5)
        assert not missing and curve[-1][1] < curve[0][1]
    finally:
        dist.destroy_process_group()


def test_memory_is_flat_over_200_steps():
    _, model, x, y = wrapped("2D residual network")

    def tensors():
        return (gc.collect(), sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))[1]

    train(model, x, y, 10)
    before = tensors()
    train(model, x, y, 200)
    assert tensors() <= before


def test_copy_pickle_and_state():
    _, model, x, _ = wrapped("functional U-Net")
    model.eval()
    with torch.no_grad():
        truth = model(x, full=True)
        again = EGCNN(Functional(), x, verbose=False).eval()
        again.load_state_dict(model.state_dict(), strict=True)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
            found = twin(x, full=True)
            assert all(torch.equal(a, b) for a, b in zip(truth[:2], found[:2], strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: EGCNN(SegNet(1, 3, levels=3)),
        lambda: EGCNN(Functional(), batch(32, 3)[0], verbose=False),
    ],
    ids=["ours", "foreign"],
)
def test_export_and_onnx_give_the_same(make, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    seed_everything(0)
    model, x = make().eval(), batch(32, 3)[0]
    with torch.no_grad():
        truth = model(x)
    exported = torch.export.export(model, (x,)).module()(x)
    assert torch.allclose(truth, exported, atol=1e-5)
    torch.onnx.export(
        model, (x,), tmp_path / "model.onnx", input_names=["x"], dynamo=True, verbose=False
    )
    (out,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
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
    with pytest.raises(InputError) as e:
        EGCNN(net, torch.zeros(1, 1, 8, 8, 8))
    assert what in str(e.value) and "\n" not in str(e.value)


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
    return sum(p.numel() for p in module.parameters())


def row_of(name):
    "What happens when a network is wrapped and trained for twenty steps, as a row of the table"
    net, model, x, y = wrapped(name)
    own = parameters_of(net)
    added = parameters_of(model) - own
    idle = unreached(net, x, y)
    curve, missing = train(model.train(), x, y)
    (semantic_before, edge_before), (semantic_after, edge_after) = curve[0], curve[-1]
    cells = [
        name,
        ", ".join(model.gated),
        model.entry,
        f"{own:,}",
        f"{added:,}",
        f"{semantic_before:.3f} to {semantic_after:.3f}",
        f"{edge_before:.3f} to {edge_after:.3f}",
    ]
    note = "" if missing == idle else f" no gradient: {missing}"
    return f"| {' | '.join(cells)} |{note}"


def table():
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for name in NETWORKS:
        print(row_of(name), flush=True)


if __name__ == "__main__":
    table()
