"Many processes: the same losses as one, whatever their number; every reading; sharded; elastic; two hosts."

import csv
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("tiny") / "data")


FIFTY = [
    "--epochs",
    17,
]  # 51 steps; with 4 processes two of them find no case in the last of an epoch


def train(data, out, *words, **kw):
    done = subprocess.run(
        command(data, out, *words, **kw), capture_output=True, text=True, timeout=300, env=ENV
    )
    assert done.returncode == 0, done.stderr[-3000:]


def table(run):
    return [
        {k: float(v) for k, v in r.items()} for r in csv.DictReader(open(Path(run) / "metrics.csv"))
    ]


def differ(a, b):
    "Largest relative difference of the loss terms, and of Dice"
    a, b = table(a), table(b)
    assert len(a) == len(b)
    terms = [k for k in a[0] if k not in ("epoch", "lr", "skipped") and not k.startswith("dice")]
    return [
        max(abs(x[k] - y[k]) / max(abs(y[k]), 1e-12) for x, y in zip(a, b) for k in keys)
        for keys in (terms, [k for k in a[0] if k.startswith("dice")])
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(data, runs):
    train(data, runs / "one", *FIFTY, "--precision", "fp64")
    return runs / "one"


@pytest.mark.parametrize(
    "processes, more",
    [(2, []), (4, []), (1, ["--accumulate", 3]), (2, ["--accumulate", 2]), (2, ["--shard"])],
)
def test_any_number_of_processes_gives_the_losses_of_one_in_float64(
    data, one, runs, processes, more
):
    out = runs / f"{processes}{''.join(map(str, more))}"
    train(data, out, *FIFTY, "--precision", "fp64", *more, processes=processes)
    losses, dice = differ(out, one)
    assert losses < 1e-9 and dice < 1e-9


def test_and_in_float32(data, runs):
    train(data, runs / "f1", *FIFTY)
    for n in (2, 4):
        train(data, runs / f"f{n}", *FIFTY, processes=n)
        assert differ(runs / f"f{n}", runs / "f1")[0] < 1e-4


def test_readings_over_the_batch_gather_what_they_need(data, runs):
    words = [
        "--precision",
        "fp64",
        "--batch_size",
        5,
        "--reading",
        "reduce=batch",
        "--reading",
        "beta_over=batch",
    ]
    for n in (1, 2):
        train(data, runs / f"batch{n}", *FIFTY, *words, processes=n)
    assert differ(runs / "batch2", runs / "batch1")[0] < 1e-9


@pytest.mark.parametrize("more", [[], ["--shard"], ["--accumulate", 2]])
def test_processes_check_their_layers_together(data, runs, more):
    out = runs / f"half{''.join(map(str, more))}"
    over_batch = [] if "--accumulate" in more else ["--reading", "reduce=batch"]
    train(
        data,
        out,
        "--epochs",
        1,
        "--precision",
        "bf16",
        "--batch_size",
        5,
        *over_batch,
        *more,
        processes=2,
    )
    assert len(table(out)) == 1 and "self-check" not in (out / "log.txt").read_text()


# --- every reading of the paper, on two processes as on one

READINGS = {  # argument -> all values but the default
    "entry": ["decoder_up", "bottleneck", "bottleneck_up"],
    "attention_channels": ["each"],
    "fuse": ["features", "probabilities"],
    "edge_classes": ["any"],
    "fuse_by": ["concatenation"],
    "gate_residual": ["layer", "block"],
    "edge_head": ["norm"],
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
    "weight_negatives": [False],
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

    return {
        name
        for kind in (EGCNN, EGLoss, SegNet)
        for name in inspect.signature(kind.__init__).parameters
    } - NO_READINGS


def every_reading():
    "What is set beside the defaults in each of the small runs"
    known = known_readings()
    single = [
        {"readings": {name: value}}
        for name, values in READINGS.items()
        if name in known
        for value in values
    ]
    return [{}, *single, *({"readings": r} for r in TOGETHER), *NETWORKS_, *MAIN, *BARE]


def losses_of_every_reading(data):
    "Loss terms of the three steps of one epoch, for each of `every_reading`, by this process and those beside it"
    import torch

    from egcnn_nb.run.folders import prepare
    from egcnn_nb.run.settings import Settings
    from egcnn_nb.run.training import Run

    common = dict(
        width=4,
        levels=3,
        patch_size=(8, 8, 8),
        batch_size=4,
        lr=1e-2,
        validation=2,
        precision="fp64",
        cache="off",
        epochs=1,
    )
    task, train, val, _ = prepare(Settings(str(data), "", **common), quiet=True)
    found = {}
    for more in every_reading():
        torch.manual_seed(0)
        steps, run = (
            [],
            Run(
                Settings(str(data), "", **{**common, **more}), task, train, val, torch.device("cpu")
            ),
        )
        run.train_epoch(tick=lambda terms: steps.append(list(terms.values())))
        found[json.dumps(more)] = [steps, run.skipped]
    return found


def test_the_list_of_readings_is_whole():
    from egcnn_nb.method.egcnn import CHOICES

    assert known_readings() <= set(READINGS)
    for name in set(CHOICES) - NO_READINGS:
        assert set(CHOICES[name][1:]) == set(READINGS[name]), name


def test_every_reading_gives_the_losses_of_one_process_on_two(data, tmp_path):
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        data,
        tmp_path / "two.json",
    ]
    two = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV
    )
    one, error = losses_of_every_reading(data), two.communicate(timeout=300)[1]
    assert two.returncode == 0, error[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    assert list(one) == list(two)
    for name, (steps, skipped) in one.items():
        assert len(steps) == 3 and skipped == two[name][1] == 0, name
        for a, b in zip(steps, two[name][0]):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-12), name


def test_a_reading_without_loss_on_the_fused_output_in_pieces(data, runs):
    words = ["--epochs", 2, "--precision", "fp64", "--reading", "supervise=main"]
    train(data, runs / "main1", *words)
    train(data, runs / "main2", *words, "--shard", processes=2)
    losses, dice = differ(runs / "main2", runs / "main1")
    assert losses < 1e-9 and dice < 1e-9


# --- something is lost


def start(words, **kw):
    return subprocess.Popen(
        list(map(str, words)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENV, **kw.pop("env", {})},
        start_new_session=True,
        **kw,
    )


def kill_all(process):
    "torchrun and its ranks, which live in sessions of their own"
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)


def test_a_run_of_four_goes_on_with_two_and_ends_with_one(data, one, tmp_path):
    out, words = tmp_path / "run", [*FIFTY, "--precision", "fp64", "--save_minutes", 0]
    for processes, epochs in ((4, 3), (2, 6)):
        process = start(
            command(data, out, *words, *["--resume"] * out.exists(), processes=processes)
        )
        begun(process, out, epochs)
        kill_all(process)
    train(data, out, *words, "--resume")
    assert (out / "log.txt").read_text().count("resumed after epoch") == 2 and max(
        differ(out, one)
    ) < 1e-9


def test_pieces_are_verified_and_go_on_with_another_number(data, one, tmp_path):
    out, words = tmp_path / "run", [*FIFTY, "--precision", "fp64", "--shard"]
    process = start(command(data, out, *words, processes=2))
    begun(process, out, 3)
    kill_all(process)
    newest = max(out.glob("checkpoint-*"))
    piece = next(newest.glob("*.distcp"))
    bytes_ = bytearray(piece.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    piece.write_bytes(bytes_)
    train(data, out, *words, "--resume", processes=3)
    assert (
        "a broken folder (checksums differ)" in (out / "log.txt").read_text()
        and max(differ(out, one)) < 1e-9
    )


def test_torchrun_brings_a_run_back_after_a_rank_was_killed(data, one, tmp_path):
    out = tmp_path / "run"
    launch = "--nnodes=1:2 --max-restarts=3 --rdzv_backend=c10d --rdzv_endpoint=localhost:0 --rdzv_conf=last_call_timeout=1 --monitor_interval=0.1".split()
    process = start(command(data, out, *FIFTY, "--precision", "fp64", processes=2, launch=launch))
    begun(process, out, 3)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error[-3000:]
    assert "resumed after epoch" in (out / "log.txt").read_text() and max(differ(out, one)) < 1e-9


def test_sigterm_to_torchrun_saves(data, tmp_path):
    out = tmp_path / "run"
    process = start(command(data, out, "--epochs", 400, processes=2))
    begun(process, out, 3)
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert "all of it is safe" in (out / "log.txt").read_text(), error[-3000:]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def hosts():
    "Two network namespaces with a link between them: the command prefix of each, and a switch for the link"
    names = [f"egcnn{os.getpid()}{h}" for h in "ab"]
    made = [ip("netns", "add", n) for n in names]
    if any(m.returncode for m in made):
        pytest.skip(f"no network namespaces here: {made[0].stderr.strip()}")
    try:
        links = [f"v{os.getpid()}{h}" for h in "ab"]
        for words in (
            ["link", "add", links[0], "type", "veth", "peer", "name", links[1]],
            *[["link", "set", l, "netns", n] for l, n in zip(links, names)],
            *[
                w
                for n, l, a in zip(names, links, "12")
                for w in (
                    ["-n", n, "addr", "add", f"10.77.0.{a}/24", "dev", l],
                    ["-n", n, "link", "set", l, "up"],
                    ["-n", n, "link", "set", "lo", "up"],
                )
            ],
        ):
            done = ip(*words)
            if done.returncode:
                pytest.skip(f"no virtual link here: {done.stderr.strip()}")
        yield (
            [
                (["ip", "netns", "exec", n], {"GLOO_SOCKET_IFNAME": l, "TP_SOCKET_IFNAME": l})
                for n, l in zip(names, links)
            ],
            lambda to: ip("-n", names[0], "link", "set", links[0], to),
        )
    finally:
        for n in names:
            ip("netns", "del", n)


def test_two_hosts_whose_link_is_cut(data, one, tmp_path, hosts):
    (sides, link), out = hosts, tmp_path / "run"
    words = [*FIFTY, "--precision", "fp64", "--timeout", 0.2]
    launch = lambda rank: (
        f"--nnodes=2 --node_rank={rank} --master_addr=10.77.0.1 --master_port=29511".split()
    )

    def both(*more):
        return [
            start([*prefix, *command(data, out, *words, *more, launch=launch(rank))], env=env)
            for rank, (prefix, env) in enumerate(sides)
        ]

    hosts_ = both()
    begun(hosts_[0], out, 3)
    cut = time.time()
    assert link("down").returncode == 0
    errors = [p.communicate(timeout=120)[1] for p in hosts_]
    assert time.time() - cut < 60 and all(
        p.returncode for p in hosts_
    )  # 12 seconds are the timeout
    assert all(
        "found that another process of this run is gone or unreachable" in e for e in errors
    ), errors
    assert link("up").returncode == 0
    hosts_ = both("--resume")
    errors = [p.communicate(timeout=200)[1] for p in hosts_]
    assert not any(p.returncode for p in hosts_), errors
    assert max(differ(out, one)) < 1e-9


if __name__ == "__main__":  # started by torchrun in test_every_reading_...
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = losses_of_every_reading(sys.argv[1])
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
