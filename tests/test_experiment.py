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
from egcnn_nb.study.experiments import tables_of
from egcnn_nb.study.paper import TABLE_1, TABLE_2
from egcnn_nb.study.report import PRIMARY, comparisons

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "results").rglob("scores.csv"))
SHIPPED = [path for path in RESULTS if (path.parent / "tables").is_dir()]

CREDIT = "phantoms; ours"
BACKBONES = {"U-Net": "unet", "V-Net": "vnet", "Seg-Net": "segnet"}


def command(*words):
    return [sys.executable, "-m", "egcnn_nb.commands.experiment", *map(str, words)]


def run(line, timeout=300, env=ENV):
    "Run a command to its end"
    return subprocess.run(line, capture_output=True, text=True, env=env, timeout=timeout)


def small(tmp_path, arms, *more):
    "The command of an experiment of tiny runs, each of one seed, on a tiny dataset"
    words = (
        f"--backbones segnet --arms {arms} --seeds 1 --width 4 --levels 2 --precision fp32 "
        "--validation 2 --test_cases 3"
    )
    places = ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    data = tmp_path / "data"
    if not data.exists():
        dataset(data)
    return command(data, *places, *words.split(), *more)


def rows_of(path):
    "The rows of a CSV file as dicts of text"
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def cells_of(path):
    "Rows of a Markdown table as dicts"
    lines = []
    for line in path.read_text().splitlines():
        cells = line.strip("|").split("|")
        lines.append([cell.strip() for cell in cells])
    head, _, *rows = lines
    return [dict(zip(head, row, strict=True)) for row in rows]


def network_of(line):
    "Backbone and arm of a line of a table"
    name = line["network"]
    backbone = BACKBONES[re.match("[A-Za-z-]*Net", name)[0]]
    if "EG-CNN" in name:
        return backbone, "eg"
    return backbone, "matched" if "wider" in name else "bare"


def scores_of(rows, network, region, seed, score):
    "A score of every case of one run"
    wanted = (*network, region, seed)
    found = [r for r in rows if (r["backbone"], r["arm"], r["region"], r["seed"]) == wanted]
    return [float(row[score]) for row in found]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "What --quick makes of the phantoms: the folder, and what was printed"
    out = tmp_path_factory.mktemp("experiment")
    done = run(quick_line(out, "--credit", CREDIT), timeout=1500, env=None)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def quick_line(out, *more):
    "The command whose results `quick` has"
    places = ["--out", out, "--cache", out / "cache"]
    return command(ROOT / "data_samples", *places, "--quick", *more)


@pytest.mark.parametrize(
    "name, table, figure",
    [("brats2019", "table_1", "figure_2"), ("kits2019", "table_2", "figure_3")],
)
def test_quick_writes_every_table_and_figure(quick, name, table, figure):
    folder = quick[0] / name
    tables = (table, "scores", "edges", "differences", "trials", "costs")
    wanted = {f"{t}.{end}" for t in tables for end in ("md", "tex", "html")}
    assert {f.name for f in (folder / "tables").iterdir()} == wanted
    for f in ("differences", "training", figure):
        assert (folder / f"figures/{f}.png").read_bytes()[:4] == b"\x89PNG"
    page = (folder / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("<img") == 3
    assert page.count("<table>") == 7
    assert "no evidence of anything" in page


@pytest.mark.parametrize("name, task", [("brats2019", BRATS), ("kits2019", KITS)])
def test_quick_says_what_it_scored_and_how_to_repeat_it(quick, name, task):
    folder = quick[0] / name
    rows = rows_of(folder / "scores.csv")
    regions = [*task.regions, "mean"]
    assert len(rows) == 9 * 2 * 2 * len(regions)  # networks, seeds, cases
    about = json.loads((folder / "experiment.json").read_text())
    assert CREDIT in shlex.split(about["command"])  # a command that can be copied
    names = (folder / "test_cases.txt").read_text().split()
    assert names == sorted({row["case"] for row in rows})


@pytest.mark.parametrize(
    "name, task, table, printed",
    [("brats2019", BRATS, "table_1", TABLE_1), ("kits2019", KITS, "table_2", TABLE_2)],
)
def test_quick_prints_dice_beside_that_of_the_paper(quick, name, task, table, printed):
    folder = quick[0] / name
    rows = rows_of(folder / "scores.csv")
    for line in cells_of(folder / f"tables/{table}.md"):
        network = network_of(line)
        for region in [*task.regions, "mean"]:
            a, b = [np.mean(scores_of(rows, network, region, s, "dice")) for s in "01"]
            assert line[region] == f"{(a + b) / 2:.4f} ± {abs(a - b) / 2**0.5:.4f}"
        # The averages agree with their parts, which not all of the paper's do
        parts = [float(line[region].split()[0]) for region in task.regions]
        assert abs(np.mean(parts) - float(line["mean"].split()[0])) <= 1e-4
        if network[1] == "matched":
            assert line["paper's mean"] == ""
            continue
        backbone = line["network"].split()[0].strip(",")
        row = printed[backbone, network[1] == "eg"]
        mean, spread = row.get("average", row.get("composite"))
        assert line["paper's mean"] == f"{mean:.4f} ± {spread:.4f}"


@pytest.mark.parametrize(
    "name, regions",
    # Kidneys are kidney and tumor, and have no map of their own
    [("brats2019", [*BRATS.regions, "mean"]), ("kits2019", ["tumor", "mean"])],
)
def test_quick_shows_edges_beside_those_of_the_mask(quick, name, regions):
    folder = quick[0] / name
    rows = rows_of(folder / "scores.csv")
    table = cells_of(folder / "tables/edges.md")
    assert [line["edges of"] for line in table] == regions * 9
    for line in table:
        network, region = network_of(line), line["edges of"]
        for column, score, digits in (
            ("F1 of the mask", "mask_edge_f1", 4),
            ("F1", "edge_f1", 4),
            ("deep voxels", "deep_share", 3),
        ):
            if column == "F1" and network[1] != "eg":
                assert line[column] == ""
                continue
            seeds = [np.nanmean(scores_of(rows, network, region, s, score)) for s in "01"]
            mean, spread = np.mean(seeds), np.std(seeds, ddof=1)
            assert line[column] == f"{mean:.{digits}f} ± {spread:.{digits}f}"
        for seed in "01":  # one threshold for all cases
            assert len(set(scores_of(rows, network, region, seed, "mask_ods"))) == 1


def test_quick_again_computes_nothing(quick):
    out = quick[0]
    table = out / "brats2019/tables/differences.md"
    assert table.read_text().count("primary: Seg-Net, EG-CNN minus wider") == 1
    files = [*out.glob("*/scores.csv"), *out.glob("*/*/model.safetensors")]
    assert len(files) == 2 + 36
    written = [f.stat().st_mtime_ns for f in files]
    done = run(quick_line(out, "--exploratory"), env=None)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "begun (" not in done.stderr
    assert written == [f.stat().st_mtime_ns for f in files]
    assert "primary" not in table.read_text()
    page = (out / "brats2019/report.html").read_text()
    assert "All questions here are exploratory" in page
    done = run(quick_line(out, "--width", 6), env=None)
    assert done.returncode == 2
    assert "other flags for" in done.stderr.splitlines()[-1]


def stop_in_epoch_3(line, log):
    "Begin an experiment, and send it SIGTERM when a run has ended its third epoch"
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV
    )
    while not (log.exists() and "epoch 3/" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    runs = children(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert not [p for p in runs if Path(f"/proc/{p}").exists()]


def test_a_stopped_experiment_goes_on(tmp_path):
    words = "--train_cases 2 --jobs 2 --lr 1e-3 --epochs 40 --patch_size 16 16 16"
    line = small(tmp_path, "bare eg", *words.split())
    out = tmp_path / "out"
    log = out / "segnet-bare-2-0-lr0.001/log.txt"
    stop_in_epoch_3(line, log)
    assert "stopped in epoch" in log.read_text()
    done = run([*line, "--test"])  # no look at the test cases
    assert done.returncode == 2
    assert "that are not done" in done.stderr
    assert not (out / "scores.csv").exists()
    done = run(line)
    assert done.returncode == 0, done.stderr
    assert "with --test" in done.stdout
    assert log.read_text().count("epoch 1/40") == 1
    done = run([*line, "--test"])
    assert done.returncode == 0, done.stderr
    assert "All questions here are exploratory" in (out / "report.html").read_text()


def best_of(folder):
    "Best validation Dice that the log of a run names"
    lines = (folder / "log.txt").read_text().splitlines()
    words = [line.split() for line in lines if line.startswith("epoch ")][-1]
    return float(words[words.index("best") + 1])


VALIDATION_COLUMNS = (
    "arm readings seed case region output dice surface_dice hd95 edge_f1 edge_width filled ods "
    "mask_edge_f1 mask_edge_width mask_filled deep_share"
)


def make_unreadable(data, out):
    "Spoil every test case, so that a look at one of them would fail"
    for name in (out / "test_cases.txt").read_text().split():
        for kind in ("scan", "label"):
            (data / f"{kind}{name[4:]}.nii.gz").write_bytes(b"nobody opens this")


def check_validation_scores(rows, folders):
    "What a row of validation_scores.csv holds, for a bare run and one with edges"
    assert set(VALIDATION_COLUMNS.split()) <= set(rows[0])
    assert len(rows) == 3 * 2 * 3  # outputs, cases, regions and mean
    assert {(r["arm"], r["readings"], r["output"]) for r in rows} == {
        ("bare", "", "main"),
        ("eg", "thickness=3", "main"),
        ("eg", "thickness=3", "fused"),
    }
    for folder, output in folders.items():  # the weights of the best epoch
        wanted = (folder.name, output, "mean")
        own = [r for r in rows if (r["run"], r["output"], r["region"]) == wanted]
        dice = np.mean([float(row["dice"]) for row in own])
        assert abs(dice - best_of(folder)) < 1e-4
    for row in rows:
        if row["arm"] == "bare":
            assert row["edge_f1"] == "nan"
            assert row["mask_edge_f1"] != "nan"
        else:
            assert 0 <= float(row["edge_f1"]) <= 1
            assert 0 <= float(row["ods"]) <= 1


def test_runs_are_scored_on_validation_cases_alone(tmp_path):
    words = "--lr 1e-3 --epochs 2 --patch_size 16 16 16"
    line = small(tmp_path, "bare eg+thickness=3", *words.split())
    score = [*line, "--score_validation"]
    out = tmp_path / "out"
    refused = run(score)
    assert refused.returncode == 2
    assert "Train first" in refused.stderr
    assert not out.exists()
    assert run(line).returncode == 0
    make_unreadable(tmp_path / "data", out)
    bare, eg = out / "segnet-bare-all-0-lr0.001", out / "segnet-eg+thickness=3-all-0-lr0.001"
    eg.rename(tmp_path / "away")  # one has not ended yet
    assert run(score).returncode == 0
    path = out / "validation_scores.csv"
    first = path.read_text()
    (tmp_path / "away").rename(eg)
    done = run(score)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert path.read_text().startswith(first)
    assert not (out / "scores.csv").exists()
    rows = rows_of(path)
    split = json.loads((eg / "config.json").read_text())["split"]["validation"]
    assert {row["case"] for row in rows} == set(split)
    check_validation_scores(rows, {bare: "main", eg: "fused"})
    stamp = path.stat().st_mtime_ns
    assert run(score).returncode == 0
    assert path.stat().st_mtime_ns == stamp
    assert "Leave out --test" in run([*score, "--test"]).stderr


def as_0_1_left_it(folder):
    "Change a run folder into what 0.1 would have written with Dice alone"
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config["settings"]["readings"]["semantic"] == "dice"
    for name in ("spacing", "init", "self_check", "readers", "preset"):
        del config["settings"][name]
    del config["versions"]["egcnn_nb"]
    config["settings"]["readings"] = None
    path.write_text(json.dumps(config))


def forget_semantic(record):
    "Change the record of an experiment into what 0.1 would have written"
    flags = json.loads(record.read_text())
    for name, words in flags.items():
        assert words[-2:] == ["--reading", "semantic=dice"]
        flags[name] = words[:-2]
    record.write_text(json.dumps(flags))


def test_cells_of_0_1_are_not_mixed_with_those_of_today(tmp_path):
    words = "--lr 1e-3 --epochs 2 --patch_size 16 16 16"
    line = small(tmp_path, "bare eg", *words.split())
    as_dice = [*line, "--reading", "semantic=dice"]
    out = tmp_path / "out"
    record = out / "cells.json"
    assert run(as_dice).returncode == 0
    first, second = out / "segnet-bare-all-0-lr0.001", out / "segnet-eg-all-0-lr0.001"
    rows = (second / "metrics.csv").read_text()
    forget_semantic(record)
    as_0_1_left_it(first)  # done
    shutil.rmtree(second)  # left
    done = run(line)
    assert done.returncode == 2
    assert not second.exists()
    told = done.stderr.splitlines()[-1]
    assert "semantic=dice, and this command gives it semantic=dice_ce" in told
    assert "Add --reading semantic=dice to go on" in told
    assert run([*line, "--test"]).returncode == 2
    assert not (out / "scores.csv").exists()
    assert run(as_dice).returncode == 0
    assert (second / "metrics.csv").read_text() == rows
    assert "semantic=dice" in record.read_text()
    as_0_1_left_it(second)  # begun: its log has one epoch
    log = second / "log.txt"
    text = log.read_text()
    one_epoch = text[: text.index("epoch 2/2")]
    log.write_text(one_epoch)
    assert run(line).returncode == 2
    assert log.read_text() == one_epoch
    assert run(as_dice).returncode in (0, 2)
    assert "resumed after epoch 2" in log.read_text()


ONE_EPOCH = "--lr 1e-3 --epochs 1 --patch_size 8 8 8"


def test_an_experiment_takes_one_spacing(tmp_path):
    done = run(small(tmp_path, "eg", *ONE_EPOCH.split(), "--spacing", "2"))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    flags = json.loads((out / "cells.json").read_text())["segnet-eg-all-0-lr0.001"]
    assert flags[flags.index("--spacing") :][:4] == ["--spacing", "2.0", "2.0", "2.0"]
    config = json.loads((out / "segnet-eg-all-0-lr0.001/config.json").read_text())
    assert config["settings"]["spacing"] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "bad, told",
    [
        ("--epochs 0", "epochs is 0"),
        ("--lr nan", "lr is nan"),
        ("--jobs 0", "--jobs is 0"),
        ("--reading tau=0", "tau is 0"),
        ("--spacing 0", "is no voxel size"),
        ("--train_cases -2", "train_cases is -2"),
    ],
)
def test_an_experiment_refuses_bad_settings(tmp_path, bad, told):
    (tmp_path / "data").mkdir()  # settings are checked before any file is read
    done = run(small(tmp_path, "eg", *ONE_EPOCH.split(), *bad.split()), timeout=100)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=[p.parent.name for p in SHIPPED])
def test_shipped_tables_come_from_the_shipped_scores(path):
    about = json.loads((path.parent / "experiment.json").read_text())
    rows = read_scores(path)
    primary = None if about.get("exploratory") else PRIMARY
    for name, table in tables_of(rows, comparisons(rows, primary=primary)).items():
        text = tabulate(table, "keys", "github", disable_numparse=True)
        assert (path.parent / f"tables/{name}.md").read_text() == text + "\n"


@pytest.fixture
def seen(monkeypatch, tmp_path):
    "A function: the arguments with which egcnn_experiment begins, for the words of a command line"
    found = []
    monkeypatch.setattr(experiments, "run_experiment", lambda data, out, args: found.append(args))

    def begin(*words):
        code = experiments.main([ROOT / "data_samples/kits2019", "--out", tmp_path / "out", *words])
        assert code == 0
        return found[-1]

    return begin


def test_an_experiment_takes_the_values_of_the_preset(seen, capsys):
    args = seen("--preset", "paper")
    assert (args.batch_size, args.lr) == (8, [0.0001])
    assert tuple(args.spacing) == (1, 1, 1)
    assert tuple(args.augment) == ()
    # The paper does not name these
    assert (args.epochs, args.width, args.levels) == (100, 8, 4)
    assert (args.patch_size, args.seeds) == (None, 5)
    assert capsys.readouterr().out == "preset paper\n"
    assert seen("--preset", "default").batch_size == 2


def test_a_flag_wins_over_the_preset(seen, capsys):
    given = "--batch_size 2 --lr 5e-4 1e-3 --preset paper --reading semantic=dice_ce"
    args = seen(*given.split())
    assert (args.batch_size, args.lr) == (2, [5e-4, 1e-3])
    assert capsys.readouterr().out == (
        "preset paper, but batch_size 2 in place of 8, lr 0.0005 0.001 in place of 0.0001, "
        "semantic dice_ce in place of dice\n"
    )
    with pytest.raises(SystemExit):
        seen("--preset", "papers")
    assert "argument --preset: invalid choice: 'papers'" in capsys.readouterr().err


def test_quick_sets_what_the_preset_leaves_open(seen):
    args = seen("--quick", "--preset", "paper")
    assert (args.batch_size, args.lr) == (8, [0.0001])
    assert (args.epochs, args.width, args.patch_size) == (2, 4, [24, 24, 24])
    assert seen("--quick").lr == [3e-3]


def test_every_cell_of_an_experiment_gets_the_preset(tmp_path):
    words = "--epochs 1 --patch_size 16 16 16 --jobs 2"
    line = small(tmp_path, "bare eg eg+lambda2=1", *words.split())
    paper = [*line, "--preset", "paper"]
    planned = run([*paper, "--plan"])
    assert planned.returncode == 0, planned.stderr[-2000:]
    assert planned.stdout.startswith("preset paper\n")
    assert "3 runs" in planned.stdout
    assert not list((tmp_path / "out").glob("segnet*"))
    done = run(paper)
    assert done.returncode == 0, done.stderr[-3000:]
    for arm, lambda2 in {"bare": None, "eg": 0.5, "eg+lambda2=1": 1}.items():
        folder = tmp_path / f"out/segnet-{arm}-all-0-lr0.0001"
        settings = json.loads((folder / "config.json").read_text())["settings"]
        assert (settings["preset"], settings["batch_size"]) == ("paper", 8)
        assert (settings["lr"], settings["augment"]) == (1e-4, [])
        assert settings["spacing"] == [1, 1, 1]
        readings = settings["readings"]
        assert readings["semantic"] == "dice"
        assert readings["w_cross_entropy"] == 0
        assert readings.get("lambda2") == lambda2
        assert readings.get("weight_negatives") == (None if arm == "bare" else True)
    again = run(paper)
    assert again.returncode == 0
    assert "begun" not in again.stderr
    other = run([*line, "--lr", "1e-4"])  # cells of another recipe are not mixed with these
    assert other.returncode == 2
    assert "semantic=dice" in other.stderr.splitlines()[-1]


def test_a_plan_opens_no_test_case(tmp_path, capsys):
    words = [ROOT / "data_samples/kits2019", "--out", tmp_path / "out", "--plan", "--test"]
    assert experiments.main(words) == 2
    assert "--plan starts nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
