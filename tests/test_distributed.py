"Many processes: the same losses as one, whatever their number; every reading; sharded; elastic; two hosts."

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ENV, begun, children, command, dataset

from egcnn_nb.run.steps import is_term, read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return dataset(folder / "data")


# 51 steps; with 4 processes two of them find no case in the last of an epoch
FIFTY = ["--epochs", 17]
FP64 = [*FIFTY, "--precision", "fp64"]


def train(data, out, *words, **kw):
    "Train until the end"
    words = command(data, out, *words, **kw)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]


def log_of(run):
    "The text of a run's log"
    path = run / "log.txt"
    return path.read_text()


def largest_difference(a, b, columns):
    "The largest relative difference between columns of two tables"
    worst = 0
    for x, y in zip(a, b, strict=True):
        for name in columns:
            found = x[name]
            expected = y[name]
            scale = max(abs(expected), 1e-12)
            difference = abs(found - expected)
            worst = max(worst, difference / scale)
    return worst


def differ(a, b, epochs=None):
    "Largest relative difference of the loss terms of two runs, and of Dice; perhaps of the first epochs"
    a = read_metrics(a)[:epochs]
    b = read_metrics(b)[:epochs]
    names = list(a[0])
    terms = [name for name in names if is_term(name)]
    dice = [name for name in names if name.startswith("dice")]
    of_terms = largest_difference(a, b, terms)
    of_dice = largest_difference(a, b, dice)
    return of_terms, of_dice


def expect_same_losses(run, other):
    "Two runs in float64 have the same losses and the same Dice"
    losses, dice = differ(run, other)
    assert losses < 1e-9
    assert dice < 1e-9


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(data, runs):
    out = runs / "one"
    train(data, out, *FP64)
    return out


MANY = [
    (2, []),
    (4, []),
    (1, ["--accumulate", 3]),
    (2, ["--accumulate", 2]),
    (2, ["--shard"]),
]


@pytest.mark.parametrize("processes, more", MANY)
def test_any_number_of_processes_gives_the_losses_of_one_in_float64(
    data, one, runs, processes, more
):
    words = [str(word) for word in more]
    name = "".join([str(processes), *words])
    out = runs / name
    train(data, out, *FP64, *more, processes=processes)
    expect_same_losses(out, one)


def test_and_in_float32(data, runs):
    "Sums in another order differ in the last digit, and the steps of an optimizer make more of that"
    reference = runs / "f1"
    train(data, reference, *FIFTY)
    for n in (2, 4):
        out = runs / f"f{n}"
        train(data, out, *FIFTY, processes=n)
        at_first, _ = differ(out, reference, epochs=1)
        losses, _ = differ(out, reference)
        assert at_first < 1e-6
        assert losses < 1e-3


def test_readings_over_the_batch_gather_what_they_need(data, runs):
    words = [*FP64, "--batch_size", 5, "--reading", "reduce=batch", "--reading", "beta_over=batch"]
    alone = runs / "batch1"
    train(data, alone, *words)
    out = runs / "batch2"
    train(data, out, *words, processes=2)
    losses, _ = differ(out, alone)
    assert losses < 1e-9


@pytest.mark.parametrize("more", [[], ["--shard"], ["--accumulate", 2]])
def test_processes_check_their_layers_together(data, runs, more):
    name = "-".join(["half", *more[:1]])
    out = runs / name
    words = ["--epochs", 1, "--precision", "bf16", "--batch_size", 5, *more]
    if "--accumulate" not in more:
        words += ["--reading", "reduce=batch"]
    train(data, out, *words, processes=2)
    rows = read_metrics(out)
    log = log_of(out)
    assert len(rows) == 1
    assert "self-check" not in log


# --- every reading of the paper, on two processes as on one

READINGS = {  # argument -> all values but the default
    "entry": ["decoder_up", "bottleneck", "bottleneck_up"],
    "attention_channels": ["each"],
    "fuse": ["features", "probabilities"],
    "edge_classes": ["any"],
    "fuse_by": ["concatenation"],
    "gate_residual": ["none", "block"],
    "edge_head": ["plain"],
    "entry_norm": [True],
    "fixed_attention": [0.0, 0.5],
    "gate_norm": [True],
    "gate_bias": [1.0],
    "attention_relu": [False],
    "last_block": [True],
    "norm_head": [False],
    "lambda1": [0.0, 2.0],
    "lambda2": [0.0, 2.0],
    "w_consistency": [0.0, 2.0],
    "tau": [0.5],
    "hard": [True],
    "supervise": ["fused", "main"],
    "thickness": [1, 3],
    "eps_in": ["denominator"],
    "reduce": ["batch"],
    "where": ["union", "all"],
    "consistency_reduce": ["sum"],
    "consistency": ["both"],
    "weight_negatives": [True],
    "beta_over": ["batch"],
    "consistency_alone": [True],
    "w_cross_entropy": [0.0, 1.0],
    "semantic": ["dice", "dice_ce"],
}
NO_READINGS = {
    "self",
    "args",
    "kwargs",
    "net",
    "example_input",
    "activation",
    "features",
    "decoder_entry",
    "head",
    "output",
    "width",
    "verbose",
}
NO_EDGE_LOSS = {"lambda1": 0.0, "lambda2": 0.0}
TOGETHER = [
    NO_EDGE_LOSS,
    {**NO_EDGE_LOSS, "w_consistency": 0.0},
    {**NO_EDGE_LOSS, "w_consistency": 0.0, "supervise": "main"},
    {"supervise": "main", "fuse": "features"},
    {"supervise": "main", "fuse": "probabilities", "last_block": True},
    {"supervise": "fused", "w_consistency": 0.0},
    {"supervise": "fused", "fuse": "features", "fuse_by": "concatenation"},
    {"reduce": "batch", "beta_over": "batch", "supervise": "main"},
    {"consistency": "both", "edge_classes": "any", "where": "all"},
    {**NO_EDGE_LOSS, "consistency": "both", "supervise": "main"},
    {"consistency": "both", "where": "union", "consistency_reduce": "sum", "hard": True},
]
NETWORKS_ = [
    {"backbone": name, "edge": edge}
    for name in ("unet", "vnet", "segresnet", "dynunet")
    for edge in (True, False)
]
MAIN = [{"backbone": name, "readings": {"supervise": "main"}} for name in ("unet", "vnet")]
BARE = [
    {"edge": False},
    {"edge": False, "readings": {"consistency_alone": True}},
    {"edge": False, "readings": {"reduce": "batch"}},
    {
        "edge": False,
        "readings": {"consistency_alone": True, "where": "all", "consistency_reduce": "sum"},
    },
    {"accumulate": 2, "readings": {"supervise": "main"}},
]


def known_readings():
    "Arguments of the network, the losses and the backbone"
    from egcnn_nb.method.backbones import SegNet
    from egcnn_nb.method.egcnn import EGCNN
    from egcnn_nb.method.losses import EGLoss

    names = set()
    for kind in (EGCNN, EGLoss, SegNet):
        names.update(inspect.signature(kind.__init__).parameters)
    return names - NO_READINGS


def every_reading():
    "What is set beside the defaults in each of the small runs"
    known = known_readings()
    single = []
    for name, values in READINGS.items():
        if name in known:
            single += [{name: value} for value in values]
    of_paper = [{"readings": readings} for readings in single + TOGETHER]
    return [{}, *of_paper, *NETWORKS_, *MAIN, *BARE]


COMMON = {
    "width": 4,
    "levels": 3,
    "patch_size": (8, 8, 8),
    "batch_size": 4,
    "lr": 1e-2,
    "validation": 2,
    "precision": "fp64",
    "cache": "off",
    "epochs": 1,
}


def losses_of_every_reading(data):
    """Loss terms of the three steps of one epoch, for each of `every_reading`

    This process computes them, and those beside it.
    """
    import torch

    from egcnn_nb.run.folders import prepare
    from egcnn_nb.run.settings import Settings
    from egcnn_nb.run.training import Run

    cases = prepare(Settings(str(data), "", **COMMON), quiet=True)
    cpu = torch.device("cpu")
    found = {}

    def tick(terms):
        values = terms.values()
        steps.append(list(values))

    for more in every_reading():
        torch.manual_seed(0)
        steps = []
        settings = Settings(str(data), "", **{**COMMON, **more})
        run = Run(settings, cases.task, cases.train, cases.val, cpu)
        run.train_epoch(tick=tick)
        found[json.dumps(more)] = [steps, run.skipped]
    return found


def test_the_list_of_readings_is_whole():
    from egcnn_nb.method.egcnn import CHOICES, EGCNN

    assert known_readings() <= set(READINGS)
    arguments = inspect.signature(EGCNN.__init__).parameters
    for name in set(CHOICES) - NO_READINGS:
        default = arguments[name].default
        others = set(CHOICES[name]) - {default}
        assert others == set(READINGS[name]), name


def test_every_reading_gives_the_losses_of_one_process_on_two(data, tmp_path):
    path = tmp_path / "two.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [sys.executable, *torchrun, __file__, str(data), str(path)]
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV
    )
    one = losses_of_every_reading(data)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    text = path.read_text()
    two = json.loads(text)
    assert list(one) == list(two)
    for name, (steps, skipped) in one.items():
        steps_of_two, skipped_of_two = two[name]
        assert skipped == 0, name
        assert skipped_of_two == 0, name
        assert len(steps) == 3, name
        for a, b in zip(steps, steps_of_two, strict=True):
            expected = pytest.approx(b, rel=1e-9, abs=1e-12)
            assert a == expected, name


def test_a_reading_without_loss_on_the_fused_output_in_pieces(data, runs):
    words = ["--epochs", 2, "--precision", "fp64", "--reading", "supervise=main"]
    alone = runs / "main1"
    train(data, alone, *words)
    out = runs / "main2"
    train(data, out, *words, "--shard", processes=2)
    expect_same_losses(out, alone)


# --- something is lost


def start(words, env=(), **kw):
    "Start a command in a session of its own"
    return subprocess.Popen(
        list(map(str, words)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENV, **dict(env)},
        start_new_session=True,
        **kw,
    )


def started(data, out, *words, **kw):
    "A training that has been started"
    line = command(data, out, *words, **kw)
    return start(line)


def kill_all(process):
    "torchrun and its ranks, which live in sessions of their own"
    ranks = children(process.pid)
    for pid in [*ranks, process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)


def test_a_run_of_four_goes_on_with_two_and_ends_with_one(data, one, tmp_path):
    out = tmp_path / "run"
    words = [*FP64, "--save_minutes", 0]
    four = started(data, out, *words, processes=4)
    begun(four, out, 3)
    kill_all(four)
    words.append("--resume")
    two = started(data, out, *words, processes=2)
    begun(two, out, 6)
    kill_all(two)
    train(data, out, *words)
    log = log_of(out)
    assert log.count("resumed after epoch") == 2
    expect_same_losses(out, one)


def flip_a_bit(path):
    "Change one bit in the middle of a file"
    content = path.read_bytes()
    changed = bytearray(content)
    middle = len(content) // 2
    changed[middle] ^= 1
    path.write_bytes(changed)


def test_pieces_are_verified_and_go_on_with_another_number(data, one, tmp_path):
    out = tmp_path / "run"
    process = started(data, out, *FP64, "--shard", processes=2)
    begun(process, out, 3)
    kill_all(process)
    checkpoints = out.glob("checkpoint-*")
    newest = max(checkpoints)
    piece, *_ = newest.glob("*.distcp")
    flip_a_bit(piece)
    train(data, out, *FP64, "--shard", "--resume", processes=3)
    log = log_of(out)
    assert "a broken folder (checksums differ)" in log
    expect_same_losses(out, one)


def test_torchrun_brings_a_run_back_after_a_rank_was_killed(data, one, tmp_path):
    out = tmp_path / "run"
    elastic = "--nnodes=1:2 --max-restarts=3 --monitor_interval=0.1"
    meeting = "--rdzv_backend=c10d --rdzv_endpoint=localhost:0 --rdzv_conf=last_call_timeout=1"
    launch = f"{elastic} {meeting}".split()
    process = started(data, out, *FP64, processes=2, launch=launch)
    begun(process, out, 3)
    *_, rank = children(process.pid)
    os.kill(rank, signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    log = log_of(out)
    assert "resumed after epoch" in log
    expect_same_losses(out, one)


def test_sigterm_to_torchrun_saves(data, tmp_path):
    out = tmp_path / "run"
    process = started(data, out, "--epochs", 400, processes=2)
    begun(process, out, 3)
    process.terminate()
    _, error = process.communicate(timeout=60)
    log = log_of(out)
    assert "all of it is safe" in log, error[-3000:]


def ip(*words):
    "Run a command of ip"
    line = ["ip", *words]
    return subprocess.run(line, capture_output=True, text=True)


class Host:
    "A network namespace with one end of a link"

    def __init__(self, letter, number):
        own = f"{os.getpid()}{letter}"
        self.name = f"egcnn{own}"
        self.link = f"v{own}"
        self.address = f"10.77.0.{number}/24"
        self.prefix = ["ip", "netns", "exec", self.name]
        self.env = {"GLOO_SOCKET_IFNAME": self.link, "TP_SOCKET_IFNAME": self.link}

    def join(self):
        "Commands that put the end of the link into the namespace, and switch it on"
        inside = ["-n", self.name]
        return [
            ["link", "set", self.link, "netns", self.name],
            [*inside, "addr", "add", self.address, "dev", self.link],
            [*inside, "link", "set", self.link, "up"],
            [*inside, "link", "set", "lo", "up"],
        ]

    def switch(self, to):
        "Switch the link up or down"
        words = ["-n", self.name, "link", "set", self.link, to]
        return ip(*words)


@pytest.fixture
def hosts():
    "Two hosts with a link between them"
    pair = [Host("a", 1), Host("b", 2)]
    made = [ip("netns", "add", host.name) for host in pair]
    if any(done.returncode for done in made):
        pytest.skip(f"no network namespaces here: {made[0].stderr.strip()}")
    try:
        a, b = pair
        link = ["link", "add", a.link, "type", "veth", "peer", "name", b.link]
        for words in (link, *a.join(), *b.join()):
            done = ip(*words)
            if done.returncode:
                pytest.skip(f"no virtual link here: {done.stderr.strip()}")
        yield pair
    finally:
        for host in pair:
            ip("netns", "del", host.name)


def start_on(hosts, data, out, *more):
    "One process of a run on each host"
    words = [*FP64, "--timeout", 0.2, *more]
    processes = []
    for rank, host in enumerate(hosts):
        where = f"--nnodes=2 --node_rank={rank} --master_addr=10.77.0.1 --master_port=29511"
        launch = where.split()
        own = command(data, out, *words, launch=launch)
        line = [*host.prefix, *own]
        process = start(line, env=host.env)
        processes.append(process)
    return processes


def errors_of(processes, seconds):
    "What processes print as errors until they end"
    errors = []
    for process in processes:
        _, error = process.communicate(timeout=seconds)
        errors.append(error)
    return errors


def test_two_hosts_whose_link_is_cut(data, one, tmp_path, hosts):
    out = tmp_path / "run"
    first = hosts[0]
    processes = start_on(hosts, data, out)
    begun(processes[0], out, 3)
    cut = time.time()
    switched = first.switch("down")
    assert switched.returncode == 0
    errors = errors_of(processes, 120)
    seconds = time.time() - cut
    assert seconds < 60  # 12 seconds are the timeout
    gone = "found that another process of this run is gone or unreachable"
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode
        assert gone in error, error
    switched = first.switch("up")
    assert switched.returncode == 0
    processes = start_on(hosts, data, out, "--resume")
    errors = errors_of(processes, 200)
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error
    expect_same_losses(out, one)


if __name__ == "__main__":  # started by torchrun in test_every_reading_...
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = losses_of_every_reading(sys.argv[1])
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
