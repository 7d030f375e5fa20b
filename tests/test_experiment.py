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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tabulate import tabulate
from tiny import ENV, children, dataset

from egcnn_nb.commands import experiment as experiments
from egcnn_nb.core import BRATS, KITS
from egcnn_nb.run.folders import READINGS_0_1, readings_in_force
from egcnn_nb.run.settings import Settings
from egcnn_nb.study import cells
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
    "The words of egcnn_experiment"
    script = [sys.executable, "-m", "egcnn_nb.commands.experiment"]
    return script + [str(word) for word in words]


def run(line, timeout=300, env=ENV):
    "Run a command to its end"
    return subprocess.run(line, capture_output=True, text=True, env=env, timeout=timeout)


def succeeded(line, **options):
    "Run a command, which must end well"
    done = run(line, **options)
    error = done.stderr
    assert done.returncode == 0, error
    return done


def refused(line, *texts, **options):
    "Run a command, which must be refused with these texts"
    done = run(line, **options)
    error = done.stderr
    assert done.returncode == 2, error
    for text in texts:
        assert text in error
    return error


SMALL = (
    "--backbones segnet --seeds 1 --width 4 --levels 2 --precision fp32 --validation 2 "
    "--test_cases 3"
)


def small(tmp_path, arms, more):
    "The command of an experiment of tiny runs, each of one seed, on a tiny dataset"
    data = tmp_path / "data"
    if not data.exists():
        dataset(data)
    out, cache = tmp_path / "out", tmp_path / "cache"
    words = f"{SMALL} --arms {arms} {more}".split()
    return command(data, "--out", out, "--cache", cache, *words)


def rows_of(path):
    "The rows of a CSV file as dicts of text"
    with open(path, newline="") as f:
        reader = csv.DictReader(f)
        return list(reader)


def json_of(path):
    "The contents of a JSON file"
    text = path.read_text()
    return json.loads(text)


def settings_of(run):
    "The settings of a run, as it keeps them"
    config = json_of(run / "config.json")
    return config["settings"]


def cells_of(path):
    "Rows of a Markdown table as dicts"
    lines = []
    for line in path.read_text().splitlines():
        cells = line.strip("|").split("|")
        lines.append([cell.strip() for cell in cells])
    head, _, *rows = lines
    return [dict(zip(head, row, strict=True)) for row in rows]


def arm_of(name):
    "The arm of a network of the table"
    if "EG-CNN" in name:
        return "eg"
    if "wider" in name:
        return "matched"
    return "bare"


def network_of(line):
    "Backbone and arm of a line of a table"
    name = line["network"]
    arm = arm_of(name)
    found = re.match("[A-Za-z-]*Net", name)
    assert found, name
    backbone = BACKBONES[found[0]]
    return backbone, arm


@dataclass
class Scores:
    "The rows of scores.csv"

    rows: list

    def of(self, network, region, seed, score):
        "A score of every case of one run"
        wanted = [*network, region, seed]
        found = []
        for row in self.rows:
            about = [row["backbone"], row["arm"], row["region"], row["seed"]]
            if about == wanted:
                found.append(float(row[score]))
        return found

    def means(self, network, region, score):
        "The mean of a score over the cases, for each of two seeds"
        means = []
        for seed in "01":
            values = self.of(network, region, seed, score)
            means.append(np.nanmean(values))
        return means


def scores_in(folder):
    "The scores of an experiment"
    rows = rows_of(folder / "scores.csv")
    return Scores(rows)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "What --quick makes of the phantoms: the folder, and what was printed"
    out = tmp_path_factory.mktemp("experiment")
    line = quick_line(out, "--credit", CREDIT)
    done = succeeded(line, timeout=1500, env=None)
    printed = done.stdout
    return out, printed


def quick_line(out, *more):
    "The command whose results `quick` has"
    data = ROOT / "data_samples"
    cache = out / "cache"
    return command(data, "--out", out, "--cache", cache, "--quick", *more)


@pytest.mark.parametrize(
    "name, table, figure",
    [("brats2019", "table_1", "figure_2"), ("kits2019", "table_2", "figure_3")],
)
def test_quick_writes_every_table_and_figure(quick, name, table, figure):
    folder = quick[0] / name
    written = {path.name for path in (folder / "tables").iterdir()}
    expected = set()
    for stem in (table, "scores", "edges", "differences", "trials", "costs"):
        expected |= {f"{stem}.md", f"{stem}.tex", f"{stem}.html"}
    assert written == expected
    for stem in ("differences", "training", figure):
        picture = folder / f"figures/{stem}.png"
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    links = re.findall(r'(?:src|href)="(?!data:)', page)
    assert not links
    assert page.count("<img") == 3
    assert page.count("<table>") == 7
    assert "no evidence of anything" in page


@pytest.mark.parametrize("name, task", [("brats2019", BRATS), ("kits2019", KITS)])
def test_quick_says_what_it_scored_and_how_to_repeat_it(quick, name, task):
    folder = quick[0] / name
    rows = rows_of(folder / "scores.csv")
    regions = [*task.regions, "mean"]
    networks, seeds, cases = 9, 2, 2
    assert len(rows) == networks * seeds * cases * len(regions)
    about = json_of(folder / "experiment.json")
    words = shlex.split(about["command"])  # a command that can be copied
    assert CREDIT in words
    names = (folder / "test_cases.txt").read_text()
    scored = {row["case"] for row in rows}
    assert names.split() == sorted(scored)


def with_spread(values, digits=4):
    "Mean and deviation as the tables print them"
    mean = np.mean(values)
    spread = np.std(values, ddof=1)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def printed_mean(cell):
    "The mean of a cell of a table"
    mean, *_ = cell.split()
    return float(mean)


def printed_in_paper(line, arm, table):
    "What the paper prints for a network, which has no wider ones"
    if arm == "matched":
        return ""
    backbone, *_ = line["network"].split()
    row = table[backbone.strip(","), arm == "eg"]
    mean, spread = row.get("average", row.get("composite"))
    return f"{mean:.4f} ± {spread:.4f}"


@pytest.mark.parametrize(
    "name, task, table, printed",
    [("brats2019", BRATS, "table_1", TABLE_1), ("kits2019", KITS, "table_2", TABLE_2)],
)
def test_quick_prints_dice_beside_that_of_the_paper(quick, name, task, table, printed):
    folder = quick[0] / name
    scores = scores_in(folder)
    for line in cells_of(folder / f"tables/{table}.md"):
        backbone, arm = network_of(line)
        for region in [*task.regions, "mean"]:
            means = scores.means((backbone, arm), region, "dice")
            assert line[region] == with_spread(means)
        # The averages agree with their parts, which not all of the paper's do
        parts = [printed_mean(line[region]) for region in task.regions]
        gap = np.mean(parts) - printed_mean(line["mean"])
        assert abs(gap) <= 1e-4
        expected = printed_in_paper(line, arm, printed)
        assert line["paper's mean"] == expected


EDGE_COLUMNS = (
    ("F1 of the mask", "mask_edge_f1", 4),
    ("F1", "edge_f1", 4),
    ("deep voxels", "deep_share", 3),
)


def check_edges(line, scores):
    "A line of the table of edges has the means of the scores; only an edge stream has an F1"
    network, region = network_of(line), line["edges of"]
    has_stream = "eg" in network
    for column, score, digits in EDGE_COLUMNS:
        means = scores.means(network, region, score) if has_stream or column != "F1" else None
        expected = with_spread(means, digits) if means else ""
        assert line[column] == expected
    for seed in "01":  # one threshold for all cases
        thresholds = scores.of(network, region, seed, "mask_ods")
        assert len(set(thresholds)) == 1


@pytest.mark.parametrize(
    "name, regions",
    # Kidneys are kidney and tumor, and have no map of their own
    [("brats2019", [*BRATS.regions, "mean"]), ("kits2019", ["tumor", "mean"])],
)
def test_quick_shows_edges_beside_those_of_the_mask(quick, name, regions):
    folder = quick[0] / name
    scores = scores_in(folder)
    table = cells_of(folder / "tables/edges.md")
    shown = [line["edges of"] for line in table]
    assert shown == regions * 9
    for line in table:
        check_edges(line, scores)


def times_of(files):
    "When some files were written"
    return [file.stat().st_mtime_ns for file in files]


def test_quick_again_computes_nothing(quick):
    out, _ = quick
    folder = out / "brats2019"
    table = folder / "tables/differences.md"
    text = table.read_text()
    assert text.count("primary: Seg-Net, EG-CNN minus wider") == 1
    files = [*out.glob("*/scores.csv"), *out.glob("*/*/model.safetensors")]
    assert len(files) == 2 + 36
    before = times_of(files)
    line = quick_line(out, "--exploratory")
    done = succeeded(line, env=None)
    assert "begun (" not in done.stderr
    assert times_of(files) == before
    assert "primary" not in table.read_text()
    page = (folder / "report.html").read_text()
    assert "All questions here are exploratory" in page
    line = quick_line(out, "--width", 6)
    refused(line, "other flags for", env=None)


def has_text(log, text):
    "Whether a log that may not exist yet has a text"
    if not log.exists():
        return False
    return text in log.read_text()


def is_alive(pid):
    "Whether a process exists"
    return Path(f"/proc/{pid}").exists()


def stop_in_epoch_3(line, log):
    "Begin an experiment, and send it SIGTERM when a run has ended its third epoch"
    process = subprocess.Popen(
        line,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    while not has_text(log, "epoch 3/"):
        assert process.poll() is None
        time.sleep(0.02)
    runs = children(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    for pid in runs:
        assert not is_alive(pid)


def test_a_stopped_experiment_goes_on(tmp_path):
    words = "--train_cases 2 --jobs 2 --lr 1e-3 --epochs 40 --patch_size 16 16 16"
    line = small(tmp_path, "bare eg", words)
    with_test = [*line, "--test"]
    out = tmp_path / "out"
    log = out / "segnet-bare-2-0-lr0.001/log.txt"
    stop_in_epoch_3(line, log)
    assert "stopped in epoch" in log.read_text()
    refused(with_test, "that are not done")  # no look at the test cases
    assert not (out / "scores.csv").exists()
    done = succeeded(line)
    assert "with --test" in done.stdout
    text = log.read_text()
    assert text.count("epoch 1/40") == 1
    succeeded(with_test)
    page = (out / "report.html").read_text()
    assert "All questions here are exploratory" in page


def best_of(folder):
    "Best validation Dice that the log of a run names"
    log = (folder / "log.txt").read_text()
    found = re.findall(r"^epoch .* best (\S+)", log, re.M)
    return float(found[-1])


VALIDATION_COLUMNS = (
    "arm readings seed case region output dice surface_dice hd95 edge_f1 edge_width filled ods "
    "mask_edge_f1 mask_edge_width mask_filled deep_share"
)


def make_unreadable(data, out):
    "Spoil every test case, so that a look at one of them would fail"
    names = (out / "test_cases.txt").read_text()
    for name in names.split():
        number = name.removeprefix("case")
        for kind in ("scan", "label"):
            file = f"{kind}{number}.nii.gz"
            path = data / file
            path.write_bytes(b"nobody opens this")


OUTPUTS = {
    ("bare", "", "main"),
    ("eg", "thickness=3", "main"),
    ("eg", "thickness=3", "fused"),
}


def mean_dice(rows, run, output):
    "Mean Dice of an output of a run over the cases"
    wanted = [run, output, "mean"]
    values = []
    for row in rows:
        about = [row["run"], row["output"], row["region"]]
        if about == wanted:
            values.append(float(row["dice"]))
    return np.mean(values)


def check_edge_scores(row):
    "A bare run has edges of its mask alone"
    if row["arm"] == "bare":
        assert row["edge_f1"] == "nan"
        assert row["mask_edge_f1"] != "nan"
        return
    for name in ("edge_f1", "ods"):
        score = float(row[name])
        assert 0 <= score <= 1


def check_validation_scores(rows, folders):
    "What a row of validation_scores.csv holds, for a bare run and one with edges"
    columns = set(rows[0])
    assert columns >= set(VALIDATION_COLUMNS.split())
    outputs, cases, regions = 3, 2, 3
    assert len(rows) == outputs * cases * regions
    found = {(row["arm"], row["readings"], row["output"]) for row in rows}
    assert found == OUTPUTS
    for folder, output in folders.items():  # the weights of the best epoch
        dice = mean_dice(rows, folder.name, output)
        gap = dice - best_of(folder)
        assert abs(gap) < 1e-4
    for row in rows:
        check_edge_scores(row)


TWO_EPOCHS = "--lr 1e-3 --epochs 2 --patch_size 16 16 16"


def test_runs_are_scored_on_validation_cases_alone(tmp_path):
    line = small(tmp_path, "bare eg+thickness=3", TWO_EPOCHS)
    score = [*line, "--score_validation"]
    out = tmp_path / "out"
    refused(score, "Train first")
    assert not out.exists()
    succeeded(line)
    make_unreadable(tmp_path / "data", out)
    bare = out / "segnet-bare-all-0-lr0.001"
    eg = out / "segnet-eg+thickness=3-all-0-lr0.001"
    away = tmp_path / "away"
    eg.rename(away)  # one has not ended yet
    succeeded(score)
    path = out / "validation_scores.csv"
    first = path.read_text()
    away.rename(eg)
    done = succeeded(score)
    assert str(path) in done.stdout
    whole = path.read_text()
    assert whole.startswith(first)
    assert not (out / "scores.csv").exists()
    rows = rows_of(path)
    split = json_of(eg / "config.json")["split"]
    scored = {row["case"] for row in rows}
    assert scored == set(split["validation"])
    check_validation_scores(rows, {bare: "main", eg: "fused"})
    before = times_of([path])
    succeeded(score)
    assert times_of([path]) == before
    refused([*score, "--test"], "Leave out --test")


def as_0_1_left_it(folder):
    "Change a run folder into what 0.1 would have written with Dice alone"
    path = folder / "config.json"
    config = json_of(path)
    settings = config["settings"]
    assert settings["readings"]["semantic"] == "dice"
    for name in ("spacing", "init", "self_check", "readers", "preset"):
        del settings[name]
    del config["versions"]["egcnn_nb"]
    settings["readings"] = None
    text = json.dumps(config)
    path.write_text(text)


OF_0_1 = {
    "edge_head": "plain",
    "gate_residual": "none",
    "semantic": "dice",
    "weight_negatives": "True",
}


def test_every_reading_whose_default_changed_is_named_in_the_record():
    settings = Settings("", "")
    today = readings_in_force(settings)
    changed = set()
    for name, value in READINGS_0_1.items():
        if today[name] != value:
            changed.add(name)
    follows = "w_cross_entropy"  # from the kind of the semantic loss
    named = {*cells._CHANGED, "semantic", follows}
    assert changed == named


def forget_readings(record):
    "Change the record of an experiment into what 0.1 would have written"
    flags = json_of(record)
    for name, words in flags.items():
        first = words.index("--reading")
        flags[name] = words[:first]
    text = json.dumps(flags)
    record.write_text(text)


def test_cells_of_0_1_go_on_with_its_readings_and_are_not_mixed_with_those_of_today(tmp_path):
    line = small(tmp_path, "bare eg", TWO_EPOCHS)
    as_0_1 = [*line]
    for name, value in OF_0_1.items():
        as_0_1 += ["--reading", f"{name}={value}"]
    out = tmp_path / "out"
    record = out / "cells.json"
    succeeded(as_0_1)
    bare = out / "segnet-bare-all-0-lr0.001"
    eg = out / "segnet-eg-all-0-lr0.001"
    metrics = eg / "metrics.csv"
    rows = metrics.read_text()
    assert "gate_residual" not in " ".join(json_of(record)[bare.name])
    forget_readings(record)
    as_0_1_left_it(bare)  # done
    shutil.rmtree(eg)  # left
    refused(
        line,
        "semantic=dice, and this command gives it semantic=dice_ce",
        "Add --reading semantic=dice to go on",
    )
    assert not eg.exists()
    refused([*line, "--test"])
    assert not (out / "scores.csv").exists()
    succeeded(as_0_1)
    assert metrics.read_text() == rows
    assert "semantic=dice" in record.read_text()
    as_0_1_left_it(eg)  # begun: its log has one epoch
    log = eg / "log.txt"
    one_epoch, _ = log.read_text().split("epoch 2/2")
    log.write_text(one_epoch)
    refused([*line, "--reading", "semantic=dice"], "gate_residual=none", "weight_negatives=True")
    assert log.read_text() == one_epoch


def test_a_reading_that_no_arm_uses_is_refused(tmp_path):
    line = small(tmp_path, "bare matched", ONE_EPOCH)
    line += ["--reading", "gate_residual=none"]
    refused(line, "gate_residual", "--edge on")
    out = tmp_path / "out"
    assert not out.exists()


ONE_EPOCH = "--lr 1e-3 --epochs 1 --patch_size 8 8 8"


def test_an_experiment_takes_one_spacing(tmp_path):
    line = small(tmp_path, "eg", f"{ONE_EPOCH} --spacing 2")
    succeeded(line)
    out = tmp_path / "out"
    name = "segnet-eg-all-0-lr0.001"
    flags = json_of(out / "cells.json")[name]
    assert "--spacing 2.0 2.0 2.0" in " ".join(flags)
    settings = settings_of(out / name)
    assert settings["spacing"] == [2.0, 2.0, 2.0]


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
    line = small(tmp_path, "eg", f"{ONE_EPOCH} {bad}")
    error = refused(line, told, timeout=100)
    lines = error.splitlines()
    assert len(lines) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", SHIPPED, ids=[p.parent.name for p in SHIPPED])
def test_shipped_tables_come_from_the_shipped_scores(path):
    folder = path.parent
    about = json_of(folder / "experiment.json")
    rows = read_scores(path)
    primary = None if about.get("exploratory") else PRIMARY
    differences = comparisons(rows, primary=primary)
    for name, table in tables_of(rows, differences).items():
        text = tabulate(table, "keys", "github", disable_numparse=True)
        shipped = folder / f"tables/{name}.md"
        assert shipped.read_text() == text + "\n"


@pytest.fixture
def seen(monkeypatch, tmp_path):
    "A function: the arguments with which egcnn_experiment begins, for the words of a command line"
    found = []

    def note(data, out, args):
        found.append(args)

    def begin(words):
        data, out = ROOT / "data_samples/kits2019", tmp_path / "out"
        line = [data, "--out", out, *words.split()]
        assert experiments.main(line) == 0
        return found[-1]

    monkeypatch.setattr(experiments, "run_experiment", note)
    return begin


def test_an_experiment_takes_the_values_of_the_preset(seen, capsys):
    args = seen("--preset paper")
    assert args.batch_size == 8
    assert args.lr == [0.0001]
    assert tuple(args.spacing) == (1, 1, 1)
    assert tuple(args.augment) == ()
    # The paper does not name these
    assert args.epochs == 100
    assert args.width == 8
    assert args.levels == 4
    assert args.patch_size is None
    assert args.seeds == 5
    printed = capsys.readouterr()
    assert printed.out == "preset paper\n"
    args = seen("--preset default")
    assert args.batch_size == 2


def test_a_flag_wins_over_the_preset(seen, capsys):
    args = seen("--batch_size 2 --lr 5e-4 1e-3 --preset paper --reading semantic=dice_ce")
    assert args.batch_size == 2
    assert args.lr == [5e-4, 1e-3]
    printed = capsys.readouterr()
    assert printed.out == (
        "preset paper, but batch_size 2 in place of 8, lr 0.0005 0.001 in place of 0.0001, "
        "semantic dice_ce in place of dice\n"
    )
    with pytest.raises(SystemExit):
        seen("--preset papers")
    printed = capsys.readouterr()
    assert "argument --preset: invalid choice: 'papers'" in printed.err


def test_quick_sets_what_the_preset_leaves_open(seen):
    args = seen("--quick --preset paper")
    assert args.batch_size == 8
    assert args.lr == [0.0001]
    assert args.epochs == 2
    assert args.width == 4
    assert args.patch_size == [24, 24, 24]
    args = seen("--quick")
    assert args.lr == [3e-3]


def expect_paper(settings):
    "A run has the values of the paper"
    assert settings["preset"] == "paper"
    assert settings["batch_size"] == 8
    assert settings["lr"] == 1e-4
    assert settings["augment"] == []
    assert settings["spacing"] == [1, 1, 1]
    readings = settings["readings"]
    assert readings["semantic"] == "dice"
    assert readings["w_cross_entropy"] == 0


def test_every_cell_of_an_experiment_gets_the_preset(tmp_path):
    words = "--epochs 1 --patch_size 16 16 16 --jobs 2"
    line = small(tmp_path, "bare eg eg+lambda2=1", words)
    paper = [*line, "--preset", "paper"]
    planned = succeeded([*paper, "--plan"])
    plan = planned.stdout
    assert plan.startswith("preset paper\n")
    assert "3 runs" in plan
    out = tmp_path / "out"
    runs = list(out.glob("segnet*"))
    assert not runs
    succeeded(paper)
    for arm, lambda2 in {"bare": None, "eg": 0.5, "eg+lambda2=1": 1}.items():
        settings = settings_of(out / f"segnet-{arm}-all-0-lr0.0001")
        expect_paper(settings)
        readings = settings["readings"]
        assert readings.get("lambda2") == lambda2
        expected = None if arm == "bare" else True
        assert readings.get("weight_negatives") == expected
    again = succeeded(paper)
    assert "begun" not in again.stderr
    other = [*line, "--lr", "1e-4"]  # cells of another recipe are not mixed with these
    refused(other, "semantic=dice")


def test_a_plan_opens_no_test_case(tmp_path, capsys):
    data = ROOT / "data_samples/kits2019"
    words = [data, "--out", tmp_path / "out", "--plan", "--test"]
    assert experiments.main(words) == 2
    assert "--plan starts nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
