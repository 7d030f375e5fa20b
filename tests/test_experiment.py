"egcnn_experiment as a user runs it, and the tables that it leaves, computed once more from the scores."

import csv
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tabulate import tabulate
from tiny import ENV, children, dataset

from egcnn_nb.commands import experiment as experiments
from egcnn_nb.core import BRATS, KITS
from egcnn_nb.study.evaluation import read_scores
from egcnn_nb.study.experiments import TABLE_1, TABLE_2, tables_of
from egcnn_nb.study.report import PRIMARY, comparisons

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    p for p in (ROOT / "results").rglob("scores.csv") if (p.parent / "tables").is_dir()
)

CREDIT = "phantoms; ours"


def command(*words):
    return [sys.executable, "-m", "egcnn_nb.commands.experiment", *map(str, words)]


def cells_of(path):
    "Rows of a Markdown table as dicts"
    head, _, *rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in path.read_text().splitlines()
    ]
    return [dict(zip(head, row)) for row in rows]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "What --quick makes of the phantoms"
    out = tmp_path_factory.mktemp("experiment")
    done = subprocess.run(
        command(
            ROOT / "data_samples",
            "--out",
            out,
            "--quick",
            "--cache",
            out / "cache",
            "--credit",
            CREDIT,
        ),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.mark.parametrize(
    "name, task, table, figure, printed",
    [
        ("brats2019", BRATS, "table_1", "figure_2", TABLE_1),
        ("kits2019", KITS, "table_2", "figure_3", TABLE_2),
    ],
)
def test_quick_writes_every_table_and_figure(quick, name, task, table, figure, printed):
    folder, regions = quick[0] / name, [*task.regions, "mean"]
    assert {f.name for f in (folder / "tables").iterdir()} == {
        f"{t}.{e}"
        for t in (table, "scores", "edges", "differences", "trials", "costs")
        for e in ("md", "tex", "html")
    }
    for f in ("differences", "training", figure):
        assert (folder / f"figures/{f}.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / "report.html").read_text()
    assert (
        not re.findall(r'(?:src|href)="(?!data:)', page)
        and page.count("<img") == 3
        and page.count("<table>") == 7
        and "no evidence of anything" in page
    )
    with open(folder / "scores.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 9 * 2 * 2 * len(regions)  # networks, seeds, cases
    assert CREDIT in shlex.split(
        json.loads((folder / "experiment.json").read_text())["command"]
    )  # a command that can be copied
    assert (folder / "test_cases.txt").read_text().split() == sorted({r["case"] for r in rows})
    for line in cells_of(folder / f"tables/{table}.md"):  # the mean and its ±, by hand
        backbone = {"U-Net": "unet", "V-Net": "vnet", "Seg-Net": "segnet"}[
            re.match("[A-Za-z-]*Net", line["network"])[0]
        ]
        arm = (
            "eg"
            if "EG-CNN" in line["network"]
            else "matched"
            if "wider" in line["network"]
            else "bare"
        )
        for region in regions:
            own = [
                np.mean(
                    [
                        float(r["dice"])
                        for r in rows
                        if (r["backbone"], r["arm"], r["region"], r["seed"])
                        == (backbone, arm, region, seed)
                    ]
                )
                for seed in "01"
            ]
            assert line[region] == f"{np.mean(own):.4f} ± {abs(own[0] - own[1]) / 2**0.5:.4f}"
        own = [float(line[r].split()[0]) for r in task.regions]
        assert (
            abs(np.mean(own) - float(line["mean"].split()[0])) <= 1e-4
        )  # the averages agree with their parts, which not all of the paper's do
        mean = printed[line["network"].split()[0].strip(","), arm == "eg"]
        assert line["paper's mean"] == (
            ""
            if arm == "matched"
            else "{:.4f} ± {:.4f}".format(*mean.get("average", mean.get("composite")))
        )


@pytest.mark.parametrize("name, task", [("brats2019", BRATS), ("kits2019", KITS)])
def test_quick_shows_edges_beside_those_of_the_mask(quick, name, task):
    folder = quick[0] / name
    with open(folder / "scores.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    own_map = (
        [*BRATS.regions, "mean"] if task is BRATS else ["tumor", "mean"]
    )  # kidneys are kidney and tumor, and have no map of their own
    table = cells_of(folder / "tables/edges.md")
    assert [line["edges of"] for line in table] == own_map * 9
    for line in table:
        backbone = {"U-Net": "unet", "V-Net": "vnet", "Seg-Net": "segnet"}[
            re.match("[A-Za-z-]*Net", line["network"])[0]
        ]
        arm = (
            "eg"
            if "EG-CNN" in line["network"]
            else "matched"
            if "wider" in line["network"]
            else "bare"
        )
        own = [
            r
            for r in rows
            if (r["backbone"], r["arm"], r["region"]) == (backbone, arm, line["edges of"])
        ]
        for column, score, digits in (
            ("F1 of the mask", "mask_edge_f1", 4),
            ("F1", "edge_f1", 4),
            ("deep voxels", "deep_share", 3),
        ):
            seeds = [
                np.nanmean([float(r[score]) for r in own if r["seed"] == seed])
                if arm == "eg" or column != "F1"
                else None
                for seed in "01"
            ]
            assert line[column] == (
                ""
                if None in seeds
                else f"{np.mean(seeds):.{digits}f} ± {np.std(seeds, ddof=1):.{digits}f}"
            )
        for seed in "01":  # one threshold for all cases
            assert len({r["mask_ods"] for r in own if r["seed"] == seed}) == 1


def test_quick_again_computes_nothing(quick):
    table = quick[0] / "brats2019/tables/differences.md"
    assert table.read_text().count("primary: Seg-Net, EG-CNN minus wider") == 1
    files = {f: f.stat().st_mtime_ns for f in quick[0].glob("*/*") if f.name == "scores.csv"} | {
        f: f.stat().st_mtime_ns for f in quick[0].glob("*/*/model.safetensors")
    }
    done = subprocess.run(
        command(
            ROOT / "data_samples",
            "--out",
            quick[0],
            "--quick",
            "--cache",
            quick[0] / "cache",
            "--exploratory",
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "begun (" not in done.stderr and len(files) == 2 + 36, (
        done.stderr[-2000:]
    )
    assert files == {f: f.stat().st_mtime_ns for f in files}
    assert (
        "primary" not in table.read_text()
        and "All questions here are exploratory" in (quick[0] / "brats2019/report.html").read_text()
    )
    done = subprocess.run(
        command(
            ROOT / "data_samples",
            "--out",
            quick[0],
            "--quick",
            "--width",
            6,
            "--cache",
            quick[0] / "cache",
        ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "other flags for" in done.stderr.splitlines()[-1]


def test_a_stopped_experiment_goes_on(tmp_path):
    data, out = dataset(tmp_path / "data"), tmp_path / "out"
    line = command(
        data,
        "--out",
        out,
        *"--backbones segnet --arms bare eg --train_cases 2 --seeds 1 --jobs 2 --lr 1e-3 --epochs 40 --width 4 --levels 2 --patch_size 16 16 16 --precision fp32 --validation 2 --test_cases 3".split(),
        "--cache",
        tmp_path / "cache",
    )
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV
    )
    log = out / "segnet-bare-2-0-lr0.001/log.txt"
    while not (log.exists() and "epoch 3/" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    runs = children(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0 and not [p for p in runs if Path(f"/proc/{p}").exists()]
    assert "stopped in epoch" in log.read_text()
    done = subprocess.run([*line, "--test"], capture_output=True, text=True, env=ENV, timeout=300)
    assert (
        done.returncode == 2
        and not (out / "scores.csv").exists()
        and "that are not done" in done.stderr
    )  # no look at the test cases
    done = subprocess.run(line, capture_output=True, text=True, env=ENV, timeout=300)
    assert (
        done.returncode == 0
        and "with --test" in done.stdout
        and log.read_text().count("epoch 1/40") == 1
    ), done.stderr
    done = subprocess.run([*line, "--test"], capture_output=True, text=True, env=ENV, timeout=300)
    assert (
        done.returncode == 0
        and "All questions here are exploratory" in (out / "report.html").read_text()
    ), done.stderr


def best_of(run):
    "Best validation Dice that the log of a run names"
    last = [
        line.split()
        for line in (run / "log.txt").read_text().splitlines()
        if line.startswith("epoch ")
    ][-1]
    return float(last[last.index("best") + 1])


def test_runs_are_scored_on_validation_cases_alone(tmp_path):
    data, out = dataset(tmp_path / "data"), tmp_path / "out"
    words = "--backbones segnet --arms bare eg+thickness=3 --seeds 1 --lr 1e-3 --epochs 2 --width 4 --levels 2 --patch_size 16 16 16 --precision fp32 --validation 2 --test_cases 3"
    line = command(data, "--out", out, *words.split(), "--cache", tmp_path / "cache")

    def run(*more):
        return subprocess.run([*line, *more], capture_output=True, text=True, env=ENV, timeout=300)

    refused = run("--score_validation")
    assert refused.returncode == 2 and "Train first" in refused.stderr and not out.exists()
    assert run().returncode == 0
    for name in (out / "test_cases.txt").read_text().split():  # a look at a test case would fail
        for kind in ("scan", "label"):
            (data / f"{kind}{name[4:]}.nii.gz").write_bytes(b"nobody opens this")
    bare, eg = out / "segnet-bare-all-0-lr0.001", out / "segnet-eg+thickness=3-all-0-lr0.001"
    eg.rename(tmp_path / "away")  # one has not ended yet
    assert run("--score_validation").returncode == 0
    path = out / "validation_scores.csv"
    first = path.read_text()
    (tmp_path / "away").rename(eg)
    done = run("--score_validation")
    assert done.returncode == 0 and str(path) in done.stdout, done.stderr
    assert path.read_text().startswith(first) and not (out / "scores.csv").exists()
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    wanted = "arm readings seed case region output dice surface_dice hd95 edge_f1 edge_width filled ods mask_edge_f1 mask_edge_width mask_filled deep_share"
    assert set(wanted.split()) <= set(rows[0])
    split = json.loads((eg / "config.json").read_text())["split"]["validation"]
    assert {r["case"] for r in rows} == set(split) and len(
        rows
    ) == 3 * 2 * 3  # outputs, cases, regions and mean
    assert {(r["arm"], r["readings"], r["output"]) for r in rows} == {
        ("bare", "", "main"),
        ("eg", "thickness=3", "main"),
        ("eg", "thickness=3", "fused"),
    }
    for folder, output in ((bare, "main"), (eg, "fused")):  # the weights of the best epoch
        own = [
            float(r["dice"])
            for r in rows
            if (r["run"], r["output"], r["region"]) == (folder.name, output, "mean")
        ]
        assert abs(np.mean(own) - best_of(folder)) < 1e-4
    assert all(
        r["edge_f1"] == "nan" and r["mask_edge_f1"] != "nan" for r in rows if r["arm"] == "bare"
    )
    assert all(
        0 <= float(r["edge_f1"]) <= 1 and 0 <= float(r["ods"]) <= 1
        for r in rows
        if r["arm"] == "eg"
    )
    stamp = path.stat().st_mtime_ns
    assert run("--score_validation").returncode == 0 and path.stat().st_mtime_ns == stamp
    assert "Leave out --test" in run("--score_validation", "--test").stderr


def as_0_1_left_it(run):
    "Change a run folder and the record of its experiment into what 0.1 would have written with Dice alone"
    path = run / "config.json"
    config = json.loads(path.read_text())
    assert config["settings"]["readings"]["semantic"] == "dice"
    for name in ("spacing", "init", "self_check", "readers", "preset"):
        del config["settings"][name]
    del config["versions"]["egcnn_nb"]
    config["settings"]["readings"] = None
    path.write_text(json.dumps(config))


def test_cells_of_0_1_are_not_mixed_with_those_of_today(tmp_path):
    data, out = dataset(tmp_path / "data"), tmp_path / "out"
    line = command(
        data,
        "--out",
        out,
        *"--backbones segnet --arms bare eg --seeds 1 --lr 1e-3 --epochs 2 --width 4 --levels 2 --patch_size 16 16 16 --precision fp32 --validation 2 --test_cases 3".split(),
        "--cache",
        tmp_path / "cache",
    )
    as_dice = [*line, "--reading", "semantic=dice"]

    def run(words):
        done = subprocess.run(words, capture_output=True, text=True, env=ENV, timeout=300)
        return done.returncode, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""

    assert run(as_dice)[0] == 0
    first, second = out / "segnet-bare-all-0-lr0.001", out / "segnet-eg-all-0-lr0.001"
    rows = (second / "metrics.csv").read_text()
    record = json.loads((out / "cells.json").read_text())
    assert all(flags[-2:] == ["--reading", "semantic=dice"] for flags in record.values())
    (out / "cells.json").write_text(
        json.dumps({name: flags[:-2] for name, flags in record.items()})
    )
    as_0_1_left_it(first)  # done
    shutil.rmtree(second)  # left
    code, told = run(line)
    assert (
        code == 2
        and not second.exists()
        and "semantic=dice, and this command gives it semantic=dice_ce" in told
        and "Add --reading semantic=dice to go on" in told
    )
    code, told = run([*line, "--test"])
    assert code == 2 and not (out / "scores.csv").exists()
    assert run(as_dice)[0] == 0
    assert (second / "metrics.csv").read_text() == rows and "semantic=dice" in (
        out / "cells.json"
    ).read_text()
    as_0_1_left_it(second)  # begun: its log has one epoch
    log = (second / "log.txt").read_text()
    (second / "log.txt").write_text(log[: log.index("epoch 2/2")])
    assert run(line)[0] == 2 and (second / "log.txt").read_text() == log[: log.index("epoch 2/2")]
    assert run(as_dice)[0] in (0, 2) and "resumed after epoch 2" in (second / "log.txt").read_text()


def test_an_experiment_takes_one_spacing_and_refuses_bad_settings(tmp_path):
    data, out = dataset(tmp_path / "data"), tmp_path / "out"
    words = [
        "--out",
        out,
        *"--backbones segnet --arms eg --seeds 1 --lr 1e-3 --epochs 1 --width 4 --levels 2 --validation 2 --test_cases 3 --patch_size 8 8 8 --precision fp32".split(),
        "--cache",
        tmp_path / "cache",
    ]
    done = subprocess.run(
        command(data, *words, "--spacing", "2"),
        capture_output=True,
        text=True,
        env=ENV,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    flags = json.loads((out / "cells.json").read_text())["segnet-eg-all-0-lr0.001"]
    assert flags[flags.index("--spacing") :][:4] == ["--spacing", "2.0", "2.0", "2.0"]
    assert json.loads((out / "segnet-eg-all-0-lr0.001/config.json").read_text())["settings"][
        "spacing"
    ] == [2.0, 2.0, 2.0]
    for bad, told in (
        ("--epochs 0", "epochs is 0"),
        ("--lr nan", "lr is nan"),
        ("--jobs 0", "--jobs is 0"),
        ("--reading tau=0", "tau is 0"),
        ("--spacing 0", "is no voxel size"),
        ("--train_cases -2", "train_cases is -2"),
    ):
        done = subprocess.run(
            command(tmp_path / "nowhere", *words, "--out", tmp_path / "other", *bad.split()),
            capture_output=True,
            text=True,
            env=ENV,
            timeout=100,
        )
        assert (
            done.returncode == 2
            and told in done.stderr
            and len(done.stderr.splitlines()) == 1
            and not (tmp_path / "other").exists()
        ), done.stderr


@pytest.mark.parametrize("path", SHIPPED, ids=[p.parent.name for p in SHIPPED])
def test_shipped_tables_come_from_the_shipped_scores(path):
    rows, about = read_scores(path), json.loads((path.parent / "experiment.json").read_text())
    for name, table in tables_of(
        rows, comparisons(rows, primary=None if about.get("exploratory") else PRIMARY)
    ).items():
        assert (path.parent / f"tables/{name}.md").read_text() == tabulate(
            table, "keys", "github", disable_numparse=True
        ) + "\n"


def seen_by(monkeypatch, tmp_path, *words):
    "Arguments with which egcnn_experiment begins, and what it prints"
    found = []
    monkeypatch.setattr(experiments, "run_experiment", lambda data, out, args: found.append(args))
    assert (
        experiments.main([ROOT / "data_samples/kits2019", "--out", tmp_path / "out", *words]) == 0
    )
    return found[0]


def test_an_experiment_takes_the_values_of_the_preset(monkeypatch, tmp_path, capsys):
    args = seen_by(monkeypatch, tmp_path, "--preset", "paper")
    assert (args.batch_size, args.lr, tuple(args.spacing), tuple(args.augment)) == (
        8,
        [0.0001],
        (1, 1, 1),
        (),
    )
    assert (args.epochs, args.width, args.levels, args.patch_size, args.seeds) == (
        100,
        8,
        4,
        None,
        5,
    )  # not named by the paper
    assert capsys.readouterr().out == "preset paper\n"
    args = seen_by(
        monkeypatch,
        tmp_path,
        "--batch_size",
        "2",
        "--lr",
        "5e-4",
        "1e-3",
        "--preset",
        "paper",
        "--reading",
        "semantic=dice_ce",
    )
    assert (args.batch_size, args.lr) == (2, [5e-4, 1e-3])
    told = "preset paper, but batch_size 2 in place of 8, lr 0.0005 0.001 in place of 0.0001, semantic dice_ce in place of dice\n"
    assert capsys.readouterr().out == told
    args = seen_by(
        monkeypatch, tmp_path, "--quick", "--preset", "paper"
    )  # quick sets what the paper leaves open
    assert (args.batch_size, args.lr, args.epochs, args.width, args.patch_size) == (
        8,
        [0.0001],
        2,
        4,
        [24, 24, 24],
    )
    assert seen_by(monkeypatch, tmp_path, "--preset", "default").batch_size == 2
    assert seen_by(monkeypatch, tmp_path, "--quick").lr == [3e-3]
    with pytest.raises(SystemExit):
        experiments.main(
            [ROOT / "data_samples/kits2019", "--out", tmp_path / "out", "--preset", "papers"]
        )
    assert "argument --preset: invalid choice: 'papers'" in capsys.readouterr().err


def test_every_cell_of_an_experiment_gets_the_preset(tmp_path):
    small = "--backbones segnet --arms bare eg eg+lambda2=1 --seeds 1 --epochs 1 --width 4 --levels 2 --patch_size 16 16 16 --precision fp32 --validation 2 --test_cases 3 --jobs 2".split()
    line = command(
        dataset(tmp_path / "data"), "--out", tmp_path / "out", *small, "--cache", tmp_path / "cache"
    )
    planned = subprocess.run(
        [*line, "--preset", "paper", "--plan"], capture_output=True, text=True, env=ENV, timeout=300
    )
    assert (
        planned.returncode == 0
        and planned.stdout.startswith("preset paper\n")
        and "3 runs" in planned.stdout
    ), planned.stderr[-2000:]
    assert not list((tmp_path / "out").glob("segnet*"))
    done = subprocess.run(
        [*line, "--preset", "paper"], capture_output=True, text=True, env=ENV, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lambdas = {"bare": None, "eg": 0.5, "eg+lambda2=1": 1}
    for arm, lambda2 in lambdas.items():
        folder = tmp_path / f"out/segnet-{arm}-all-0-lr0.0001"
        config = json.loads((folder / "config.json").read_text())["settings"]
        assert (
            config["preset"],
            config["batch_size"],
            config["lr"],
            config["augment"],
            config["spacing"],
        ) == ("paper", 8, 1e-4, [], [1, 1, 1])
        readings = config["readings"]
        assert readings["semantic"] == "dice" and readings["w_cross_entropy"] == 0
        assert (readings.get("lambda2"), readings.get("weight_negatives")) == (
            lambda2,
            None if arm == "bare" else True,
        )
    again = subprocess.run(
        [*line, "--preset", "paper"], capture_output=True, text=True, env=ENV, timeout=300
    )
    assert again.returncode == 0 and "begun" not in again.stderr
    other = subprocess.run(
        [*line, "--lr", "1e-4"], capture_output=True, text=True, env=ENV, timeout=300
    )
    assert (
        other.returncode == 2 and "semantic=dice" in other.stderr.splitlines()[-1]
    )  # the cells of another recipe are not mixed with these
