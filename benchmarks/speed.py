"""How fast it is, as ratios to what others would run: both in this process, in turn, the median of
several.

    python benchmarks/speed.py [ROW ...] [--threads 1] [--json FILE] [--keep_memory] [--cpu_time]

Rows (default: all): sobel sobel_backward losses step forms segresnet bf16 batch_1 compile predict
distances startup.
Seg-Net (a): width 8, 3 levels, batch 2 of 1×48×64×48; (b): width 16, 4 levels, batch 1 of 4×96³; 3
classes, readings by default; (c): as (a), batch 2 of 1×40³. With --keep_memory the allocator keeps
freed memory, as egcnn_train and egcnn_predict do, for both sides. With --cpu_time a time is what the
processor spends on this process, which other work on the machine changes little; use one thread."""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jupyter_client.manager import start_new_kernel

from egcnn_nb.core import keep_memory, processor_name
from egcnn_nb.method.backbones import SegNet
from egcnn_nb.method.egcnn import EGCNN
from egcnn_nb.method.losses import EGLoss, EGOutput
from egcnn_nb.method.sobel import sobel_magnitude
from egcnn_nb.run.metrics import distances
from egcnn_nb.run.models import autocast, best_precision, infer
from egcnn_nb.run.steps import compiled, seconds_of_compiling
from egcnn_nb.tensors import one_hot

CPU = torch.device("cpu")
FASTER = "times as fast"
SHARE = "of the peer's time"
PAGE = 4096  # bytes
THREE_CHANNELS = (1, 3, 128, 128, 128)
WINDOW = (96, 96, 96)


now = time.perf_counter  # the seconds that `time_of` compares; --cpu_time takes another clock


def time_of(call):
    "Milliseconds that a call takes"
    start = now()
    call()
    seconds = now() - start
    return 1e3 * seconds


def medians(again=5, **calls):
    "Milliseconds of each function, run in turn, after one round that does not count"
    times = {name: [] for name in calls}
    for turn in range(again + 1):
        for name, call in calls.items():
            taken = time_of(call)
            if turn > 0:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def status(name):
    "A line of /proc/self/status in bytes"
    lines = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+)", lines)
    assert found, name
    kilobytes = int(found[1])
    return 1024 * kilobytes


def forget_peak():
    "The most memory that this process held is counted from now on"
    Path("/proc/self/clear_refs").write_text("5")


def extra_memory(call):
    "The most memory in bytes that a call adds to what is there, a page at least"
    call()
    before = status("VmRSS")
    forget_peak()
    call()
    added = status("VmHWM") - before
    return max(added, PAGE)


def matmul_rate(dtype=torch.float32, n=2048):
    "Multiply-adds a second of a product of two square matrices"
    noise = torch.randn(n, n)
    matrix = noise.to(dtype)
    found = medians(5, product=lambda: matrix @ matrix)
    seconds = 1e-3 * found["product"]
    return n**3 / seconds


@dataclass
class Row:
    "One line of the table: our time beside that of the fastest peer"

    what: str  # the work
    ours: float  # ms
    peers: dict  # name -> ms
    must: str  # the goal of the ratio
    better: str = FASTER  # what the ratio is

    def peer(self):
        "The name of the fastest peer"
        return min(self.peers, key=self.peers.__getitem__)

    def peer_ms(self):
        "The time of the fastest peer"
        name = self.peer()
        return self.peers[name]

    def ratio(self):
        "How many times as fast as the peer, or the share of its time"
        if self.better == FASTER:
            return self.peer_ms() / self.ours
        return self.ours / self.peer_ms()

    def goal(self):
        "The goal as it is printed, with a sign where it is a number"
        if not self.must[0].isdigit():
            return self.must
        sign = "≥" if self.better == FASTER else "≤"
        return f"{sign} {self.must}"

    def values(self):
        "The numbers of the row, rounded, as the JSON file holds them"
        return {
            "what": self.what,
            "ours_ms": round(self.ours, 2),
            "peer": self.peer(),
            "peer_ms": round(self.peer_ms(), 2),
            "ratio": round(self.ratio(), 2),
            "is": self.better,
            "must be": self.must,
            "all": {name: round(value, 1) for name, value in self.peers.items()},
        }


# ---- Sobel


def sobel_kernels():
    "The three kernels of Sobel, along each axis (3,1,3,3,3)"
    difference = torch.tensor([-1.0, 0, 1])
    smooth = torch.tensor([1.0, 2, 1])
    kernels = []
    for axis in range(3):
        along = [smooth, smooth, smooth]
        along[axis] = difference
        kernel = torch.einsum("i,j,k->ijk", *along)
        kernels.append(kernel)
    return torch.stack(kernels)[:, None]


KERNELS = sobel_kernels()
BORDER = (1, 1, 1, 1, 1, 1)  # one voxel at each side


def by_convolution(x):
    "The magnitude by one depthwise convolution"
    padded = F.pad(x, BORDER, mode="replicate")
    channels = padded.flatten(0, 1)[:, None]
    gradient = F.conv3d(channels, KERNELS)
    squared = gradient.square().sum(1)
    magnitude = (squared + 1e-8).sqrt()
    return magnitude.view_as(x)


def by_scipy(x):
    "The magnitude by scipy, channel by channel"
    from scipy.ndimage import sobel

    image = x[0].numpy()
    squared = 0
    for axis in range(3):
        channels = [sobel(channel, axis=axis, mode="nearest") for channel in image]
        squared = squared + np.stack(channels) ** 2
    return np.sqrt(squared)


def by_monai(channel, gradients):
    "The magnitude of one channel by MONAI's transform"
    gradient = gradients(channel[None])
    squared = gradient.square().sum(0)
    return squared.sqrt()


def check_magnitudes(x):
    "Our magnitude is that of scipy and of the convolution"
    ours = sobel_magnitude(x)
    convolved = by_convolution(x)
    scipys = torch.from_numpy(by_scipy(x))
    assert torch.allclose(ours, convolved, atol=1e-3)
    assert torch.allclose(ours[0], scipys, atol=1e-3)


def sobel():
    "Sobel's magnitude, as it is and compiled"
    from monai.transforms import SobelGradients

    gradients = SobelGradients(padding_mode="replicate")
    x = torch.randn(THREE_CHANNELS)
    check_magnitudes(x)
    t = medians(
        ours=lambda: sobel_magnitude(x),
        scipy=lambda: by_scipy(x),
        conv3d=lambda: by_convolution(x),
        MONAI=lambda: [by_monai(channel, gradients) for channel in x[0]],
    )
    ours = t.pop("ours")
    compiled = torch.compile(sobel_magnitude)
    fast = medians(compiled=lambda: compiled(x))
    return [
        Row("Sobel magnitude, 3×128³", ours, t, "2.5"),
        Row("the same, torch.compile", fast["compiled"], t, "5"),
    ]


def there_and_back(magnitude, x):
    "The gradient of the sum of all magnitudes with respect to the image"
    image = x.clone().requires_grad_()
    total = magnitude(image).sum()
    total.backward()
    assert image.grad is not None
    return image.grad


def sobel_backward():
    "Sobel's magnitude and its gradient"
    x = torch.randn(THREE_CHANNELS)
    ours = there_and_back(sobel_magnitude, x)
    theirs = there_and_back(by_convolution, x)
    assert torch.allclose(ours, theirs, atol=1e-2)
    t = medians(
        ours=lambda: there_and_back(sobel_magnitude, x),
        conv3d=lambda: there_and_back(by_convolution, x),
    )
    taken = t.pop("ours")
    return [Row("Sobel magnitude, forward and backward", taken, t, "3")]


# ---- training steps


@dataclass
class Size:
    "A network and a batch that are measured"

    name: str
    width: int
    levels: int
    shape: tuple  # of the batch (B,C,D,H,W)
    again: int  # repetitions

    def segnet(self, width=None):
        "Seg-Net of this size, perhaps of another width"
        channels = self.shape[1]
        if width is None:
            width = self.width
        return SegNet(channels, 3, width, self.levels)

    def egcnn(self, **readings):
        "The same with an edge stream, in one of its forms"
        return EGCNN(self.segnet(), **readings)


SMALL = Size("a", 8, 3, (2, 1, 48, 64, 48), 7)
DEFAULT = Size("c", 8, 3, (2, 1, 40, 40, 40), 9)
SIZES = (SMALL, Size("b", 16, 4, (1, 4, 96, 96, 96), 3))
FORMS = {
    "the stream of 0.1": {"edge_head": "plain", "gate_residual": "none"},
    "no residual layer": {"gate_residual": "none"},
    "one residual layer": {"gate_residual": "layer"},
    "a residual block": {"gate_residual": "block"},
}


def problem(shape):
    "Noise as an image, and a target with two nested boxes, a half and a sixth of each side long"
    batch, _, *size = shape
    labels = torch.zeros(batch, *size, dtype=torch.long)
    outer = [slice(n // 4, 3 * n // 4) for n in size]
    inner = [slice(n // 3, n // 2) for n in size]
    labels[:, *outer] = 1
    labels[:, *inner] = 2
    target = one_hot(labels, range(3))
    return torch.randn(shape), target


def keys_of(x):
    "Names of the noise, one a case"
    cases = len(x)
    return [(0, i) for i in range(cases)]


def step(net, x, target, precision="fp32", eg=None):
    """A function that trains one step, as egcnn_train does; `eg`: whether the network has an edge
    stream, where its class does not say"""
    loss = EGLoss()
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)
    keys = keys_of(x)
    if eg is None:
        eg = isinstance(net, EGCNN)

    def train():
        with autocast(precision, x.device):
            out = net(x, full=True) if eg else net(x)
        total = loss(out, target, keys=keys)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return train


def cost(net, x):
    """Parameters and multiply-adds, as the network is written: on a CPU ours multiplies with some
    zeros besides (`layers`)"""
    from torch.utils.flop_counter import FlopCounterMode

    twin = deepcopy(net).to("meta")
    image = x.to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(image)
    sizes = [weight.numel() for weight in net.parameters()]
    adds = counter.get_total_flops() // 2
    return sum(sizes), adds


def losses_alone(net, x, target):
    "A function that computes all losses of the network's output, forward and backward"
    loss = EGLoss()
    keys = keys_of(x)
    with torch.no_grad():
        outputs = net(x, full=True)[:3]

    def alone():
        leaves = [output.clone().requires_grad_() for output in outputs]
        out = EGOutput(*leaves)
        total = loss(out, target, keys=keys)
        total.backward()

    return alone


def losses_row(size):
    "The losses beside the step that they are part of"
    x, target = problem(size.shape)
    net = size.egcnn()
    t = medians(
        min(size.again, 5),
        losses=losses_alone(net, x, target),
        step=step(net, x, target),
    )
    what = f"edge targets and all losses, ({size.name})"
    whole = {"the whole step": t["step"]}
    return Row(what, t["losses"], whole, "0.05", SHARE)


def losses():
    "The share of the losses in a step"
    return [losses_row(size) for size in SIZES]


def wider_than(size, x, least):
    "The narrowest Seg-Net with at least this cost"
    least_parameters, least_adds = least
    for width in count(size.width):
        net = size.segnet(width)
        parameters, adds = cost(net, x)
        if parameters >= least_parameters and adds >= least_adds:
            return net
    raise AssertionError("no width is enough")


def step_rows(size):
    "EG-CNN beside its bare backbone, and beside a backbone that costs as much"
    x, target = problem(size.shape)
    eg = size.egcnn()
    bare = size.segnet()
    least = cost(eg, x)
    wider = wider_than(size, x, least)
    t = medians(
        size.again,
        ours=step(eg, x, target),
        bare=step(bare, x, target),
        wider=step(wider, x, target),
    )
    what = f"a step of EG-CNN, ({size.name})"
    width = wider.channels[0]
    alone = {"the bare backbone": t["bare"]}
    as_costly = {f"bare, width {width}": t["wider"]}
    return [
        Row(what, t["ours"], alone, "1.25", SHARE),
        Row(what, t["ours"], as_costly, "1.0", SHARE),
    ]


def of_each_size(rows_of):
    "The rows that a function makes of each size"
    found = []
    for size in SIZES:
        found += rows_of(size)
    return found


def steps():
    "Steps of EG-CNN beside those of backbones"
    return of_each_size(step_rows)


def form_rows(size):
    "Each form of the edge stream beside the bare backbone"
    x, target = problem(size.shape)
    networks = {"bare": size.segnet()}
    for form, readings in FORMS.items():
        networks[form] = size.egcnn(**readings)
    calls = {name: step(net, x, target) for name, net in networks.items()}
    times = medians(size.again, **calls)
    alone = {"the bare backbone": times["bare"]}
    adds = {name: cost(net, x)[1] for name, net in networks.items()}
    rows = []
    for form in FORMS:
        share = adds[form] / adds["bare"]
        what = f"a step with {form}, {share:.2f} of the multiply-adds, ({size.name})"
        row = Row(what, times[form], alone, "no goal", SHARE)
        rows.append(row)
    return rows


def forms():
    "What each form of the edge stream costs"
    return of_each_size(form_rows)


def monai_segresnet(size):
    "MONAI's network with the same parameters"
    from monai.networks.nets import SegResNet

    channels = size.shape[1]
    blocks_down = (1, 2, 2, 4)[: size.levels]
    blocks_up = (1,) * (size.levels - 1)
    return SegResNet(
        3,
        size.width,
        channels,
        3,
        blocks_down=blocks_down,
        blocks_up=blocks_up,
    )


def print_rate(size, adds, milliseconds, dtype):
    "Print the share of a matrix product's rate; forward, and backward twice as much"
    seconds = 1e-3 * milliseconds
    rate = 3 * adds / seconds
    fastest = matmul_rate(dtype)
    share = rate / fastest
    print(f"Seg-Net ({size.name}) in {dtype}: {share:.0%} of the rate of a matrix product")


def batch_of_two(x):
    "A batch of two as it is, or a batch of one twice"
    case = x.shape[1:]
    two = x.expand(2, *case)
    return two.clone()


def segresnet_row(size):
    "Seg-Net beside MONAI's network of the same cost, at batch 2: neither is on torch's slow path"
    x, target = problem(size.shape)
    x = batch_of_two(x)
    target = batch_of_two(target)
    ours = size.segnet()
    theirs = monai_segresnet(size)
    own = cost(ours, x)
    other = cost(theirs, x)
    assert own == other, (own, other)
    t = medians(
        size.again,
        ours=step(ours, x, target),
        theirs=step(theirs, x, target),
    )
    _, adds = own
    print_rate(size, adds, t["ours"], torch.float32)
    if best_precision(CPU) == "bf16":
        half = medians(3, ours=step(ours, x, target, "bf16"))
        print_rate(size, adds, half["ours"], torch.bfloat16)
    what = f"a step of Seg-Net, ({size.name}), batch 2"
    peer = {"MONAI SegResNet": t["theirs"]}
    return Row(what, t["ours"], peer, "1.0", SHARE)


def segresnet():
    "Steps of Seg-Net beside those of MONAI's network"
    return [segresnet_row(size) for size in SIZES]


def bf16_row(size):
    "A step in bfloat16 beside one in float32"
    x, target = problem(size.shape)
    half_net = size.egcnn()
    full_net = size.egcnn()
    half = step(half_net, x, target, "bf16")
    full = step(full_net, x, target)
    t = medians(ours=half, fp32=full)
    ours = t.pop("ours")
    what = f"a step in bfloat16, ({size.name})"
    return Row(what, ours, t, "1.8")


def bf16():
    "Steps in bfloat16, where the processor computes it fast"
    if best_precision(CPU) != "bf16":
        return []
    return [bf16_row(size) for size in SIZES]


def corner(volumes):
    "A part of 40×56×40 voxels (B,C,D,H,W)"
    part = volumes[..., :40, :56, :40]
    return part.contiguous()


def batch_1():
    "A step at batch 1 beside half a step at batch 2"
    x, target = problem(SMALL.shape)
    x = corner(x)
    target = corner(target)
    net = SMALL.egcnn()
    one = step(net, x[:1], target[:1])
    two = step(net, x, target)
    t = medians(ours=one, two=two)
    half = t["two"] / 2
    peer = {"half a step at batch 2": half}
    return [Row("a step at batch 1, 40×56×40", t["ours"], peer, "about 1", SHARE)]


def compiled_row(size, precision):
    "A step whose forward pass torch.compile has translated beside one as it is"
    x, target = problem(size.shape)
    net = size.egcnn()
    translated = compiled(net)
    torch.compiler.reset()  # nothing that was compiled before is taken
    before = seconds_of_compiling()
    t = medians(
        size.again,
        ours=step(translated, x, target, precision, eg=True),
        eager=step(net, x, target, precision),
    )
    seconds = seconds_of_compiling() - before
    ours = t.pop("ours")
    what = f"a compiled step in {precision}, ({size.name})"
    print(f"{what}: compiling took {seconds:.0f} s")
    return Row(what, ours, t, "1.0")


def compiled_steps():
    "Steps of `egcnn_train --compile` beside those without"
    precisions = ["fp32"]
    if best_precision(CPU) == "bf16":
        precisions.append("bf16")
    for size in (DEFAULT, SMALL):
        for precision in precisions:
            yield compiled_row(size, precision)


# ---- the rest


def image_and_head():
    "An image that is zero outside the head, and the part with the head (C,D,H,W)"
    image = torch.zeros(4, 240, 240, 155)
    head = image[:, 40:200, 25:215, 5:150]
    head.normal_()
    return image, head.contiguous()


def by_sliding_window(volume, net):
    "MONAI's prediction for a volume"
    from monai.inferers import sliding_window_inference

    batch = volume[None]
    logits = sliding_window_inference(
        batch, WINDOW, 2, net, 0.25, mode="gaussian", padding_mode="replicate"
    )
    return logits[0]


def print_extra_memory(calls):
    "Print the most memory that each call adds"
    words = []
    for name, call in calls.items():
        extra = extra_memory(call)
        mebibytes = extra / 2**20
        words.append(f"{name} {mebibytes:.0f}")
    listed = ", ".join(words)
    print(f"most memory that it adds, MiB: {listed}")


def check_predictions(ours, theirs):
    "Both calls give the same"
    own = ours()
    other = theirs()
    assert torch.allclose(own, other, atol=1e-4)


def predict():
    "Prediction beside MONAI's, of the whole image and of the head alone"
    net = SegNet(4, 3, 8, 4).eval()
    whole, inside = image_and_head()
    calls = {
        "ours": lambda: infer(net, inside, WINDOW),
        "theirs": lambda: by_sliding_window(whole, net),
        "cropped": lambda: by_sliding_window(inside, net),
    }
    with torch.no_grad():
        check_predictions(calls["ours"], calls["cropped"])
        t = medians(2, **calls)
        print_extra_memory(calls)
    what = "240×240×155×4, windows of 96³"
    same = "the same, both cropped to the head"
    return [
        Row(what, t["ours"], {"MONAI, whole image": t["theirs"]}, "0.8", SHARE),
        Row(same, t["ours"], {"MONAI": t["cropped"]}, "1.0", SHARE),
    ]


def ball(points, radius):
    "Mask of the points that are nearer than the radius (1,1,D,H,W)"
    squared = points.square().sum(0)
    inside = squared < radius**2
    return inside[None, None]


def two_masks():
    "A mask of an ellipsoid, and one that is a little off (1,1,240,240,155)"
    axes = [torch.arange(n) - n / 2 for n in (240, 240, 155)]
    grid = torch.meshgrid(*axes, indexing="ij")
    points = torch.stack(grid)
    radii = torch.tensor([30, 40, 25])
    stretched = points / radii.view(3, 1, 1, 1)
    truth = ball(stretched, 1)
    shifted = truth.roll(2, 2)
    round_one = ball(points, 27)
    found = shifted | round_one
    return found, truth


def by_monai_metrics(found, truth):
    "HD95 and surface Dice by MONAI"
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    distance = compute_hausdorff_distance(found, truth, include_background=True, percentile=95)
    dice = compute_surface_dice(found, truth, [1.0], include_background=True)
    return distance, dice


def metric():
    "HD95 and surface Dice beside MONAI's"
    masks = two_masks()
    theirs = by_monai_metrics(*masks)
    for own, other in zip(distances(*masks), theirs, strict=True):
        assert torch.allclose(own, other.float(), atol=1e-4)
    t = medians(
        3,
        ours=lambda: distances(*masks),
        MONAI=lambda: by_monai_metrics(*masks),
    )
    ours = t.pop("ours")
    return [Row("HD95 and surface Dice, 240×240×155", ours, t, "5")]


LESSON = Path(__file__).parents[1] / "nbs/1_method"


def code_cells(path):
    "The code of a notebook, cell by cell"
    text = path.read_text()
    notebook = json.loads(text)
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            cells.append(code)
    return cells


def run_until_picture(client, cells):
    "Run cells in a kernel until a picture has arrived"
    pictures = []

    def keep(message):
        data = message["content"].get("data", {})
        if "image/png" in data:
            pictures.append(message)

    for cell in cells:
        reply = client.execute_interactive(cell, output_hook=keep)
        content = reply["content"]
        assert content["status"] == "ok"
        if pictures:
            break
    assert pictures, "the notebook draws no picture"


def first_picture():
    "Start a kernel and run the cells of 02_scans_and_masks until a picture has arrived"
    cells = code_cells(LESSON / "02_scans_and_masks.ipynb")
    manager, client = start_new_kernel(cwd=str(LESSON))
    try:
        run_until_picture(client, cells)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def python(*words):
    "A function that runs Python with these words, in a process of its own"
    line = [sys.executable, *words]
    return lambda: subprocess.run(line, check=True, capture_output=True)


def startup():
    "The command's help, an import, and the first picture of a lesson"
    t = medians(
        3,
        picture=first_picture,
        help=python("-m", "egcnn_nb.train", "--help"),
        sobel=python("-c", "import egcnn_nb.method.sobel"),
        torch=python("-c", "import torch"),
        monai=python("-c", "import monai"),
    )
    monai = {"import monai": t["monai"]}
    picture = "first picture of 02_scans_and_masks, a fresh kernel"
    imported = {"import torch": t["torch"]}
    return [
        Row("egcnn_train --help", t["help"], monai, "0.5 s", SHARE),
        Row("import egcnn_nb.method.sobel", t["sobel"], imported, "+ 0.1 s", SHARE),
        Row(picture, t["picture"], monai, "3 s", SHARE),
    ]


ROWS = {
    "sobel": sobel,
    "sobel_backward": sobel_backward,
    "losses": losses,
    "step": steps,
    "forms": forms,
    "segresnet": segresnet,
    "bf16": bf16,
    "batch_1": batch_1,
    "compile": compiled_steps,
    "predict": predict,
    "distances": metric,
    "startup": startup,
}


def about_this_run(args):
    "The machine, the settings and the versions of packages; memory is kept from here on, if wanted"
    kept = keep_memory() if args.keep_memory else False
    capability = torch.backends.cpu.get_cpu_capability()
    about = {
        "cpu": f"{processor_name()}, {capability}",
        "threads": args.threads,
        "memory kept": kept,
    }
    for package in ("torch", "monai", "scipy", "numpy"):
        about[package] = version(package)
    return about


def print_head(about):
    "Print the line above the table, and the head of the table"
    words = [f"{name} {value}" for name, value in about.items()]
    listed = ", ".join(words)
    print(listed)
    print("\n| work | ms | against | ms | ratio | must be |\n|---|---|---|---|---|---|")


def print_row(row):
    "Print one line of the table"
    values = row.values()
    goal = row.goal()
    cells = "| {what} | {ours_ms} | {peer} | {peer_ms} | {ratio} {is}".format(**values)
    print(f"{cells} | {goal} |", flush=True)


def measured(names):
    "The rows with these names; each is printed when it is measured"
    found = []
    for name in names:
        measure = ROWS[name]
        for row in measure():
            found.append(row)
            print_row(row)
    return found


def arguments():
    "The arguments of the command line"
    names = " ".join(ROWS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"out of {names}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--keep_memory", action="store_true")
    parser.add_argument("--cpu_time", action="store_true")
    args = parser.parse_args()
    odd = set(args.rows) - set(ROWS)
    if odd:
        parser.error(f"no row {sorted(odd)}")
    return args


def write_json(path, about, rows):
    "Write the rows and what is known about the run"
    found = [row.values() for row in rows]
    content = {"about": about, "rows": found}
    text = json.dumps(content, indent=1)
    file = Path(path)
    file.write_text(text)


def main():
    global now
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.cpu_time:
        now = time.process_time
    about = about_this_run(args)
    print_head(about)
    rows = measured(args.rows or ROWS)
    if args.json:
        write_json(args.json, about, rows)


if __name__ == "__main__":
    main()
