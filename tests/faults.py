"""Faults, one by one: what is done, what must be true, what happened.

    python tests/faults.py [NAME ...] [--slow]          # a Markdown table; pytest runs the quick rows (tests/test_faults.py)

Each row is a function whose docstring is "what is done -> what must be true"; it returns what happened, and an assertion fails where that is not so."""

import argparse
import contextlib
import csv
import gzip
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny import ENV, begun, children, command, dataset

import egcnn_nb.run.folders as folders
import egcnn_nb.run.steps as steps
import egcnn_nb.run.training as training
from egcnn_nb.commands.predict import main as predict_main
from egcnn_nb.commands.train import main as train_main
from egcnn_nb.core import InputError
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.run.checkpoints import FORMAT, list_checkpoints, newest_checkpoint
from egcnn_nb.run.settings import Settings

ROWS = {}


def row(slow=False):
    "Register a fault under the name of its function"

    def add(f):
        f.slow = slow
        ROWS[f.__name__] = f
        return f

    return add


class Skip(Exception):
    "Cannot be tried on this machine"


QUICK = dict(
    epochs=2,
    width=4,
    levels=2,
    patch_size=(16, 16, 16),
    batch_size=4,
    lr=1e-3,
    validation=2,
    precision="fp32",
)


def settings(tmp, **kw):
    return Settings(
        str(tmp / "data"), str(tmp / "run"), cache=str(tmp / "cache"), **{**QUICK, **kw}
    )


def fit(tmp, resume=False, stop=lambda: False, on_step=None, **kw):
    return training.fit(settings(tmp, **kw), resume, quiet=True, stop=stop, on_step=on_step)


def after(n):
    seen = []
    return lambda: seen.append(1) or len(seen) > n


def refused(f, text):
    "The message of the `InputError` that `f` raises, which must hold `text`"
    try:
        f()
    except InputError as e:
        assert text in str(e), str(e)
        return "refused: " + str(e)[:150]
    raise AssertionError("nothing was refused")


def said(main, words):
    "Exit code and stderr of a command, in this process"
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(w) for w in words])
    return code, err.getvalue()


def words(tmp, *more):
    return [
        tmp / "data",
        "--out",
        tmp / "run",
        "--cache",
        tmp / "cache",
        *"--epochs 2 --width 4 --levels 2 --patch_size 16 16 16 --batch_size 4 --lr 1e-3 --validation 2 --precision fp32".split(),
        *more,
    ]


def started(tmp, *more, epochs=400):
    "A run in a process of its own, some epochs in"
    process = subprocess.Popen(
        command(tmp / "data", tmp / "run", "--epochs", epochs, "--cache", tmp / "cache", *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    begun(process, tmp / "run")
    return process


@contextlib.contextmanager
def small_disk(path, size):
    "A file system of `size` bytes"
    path.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)])


def same(a, b):
    return all(
        (a / n).read_bytes() == (b / n).read_bytes() for n in ("metrics.csv", "model.safetensors")
    )


def alone(tmp, **kw):
    "The run that nothing happens to"
    training.fit(
        Settings(
            str(tmp / "data"), str(tmp / "alone"), cache=str(tmp / "cache"), **{**QUICK, **kw}
        ),
        quiet=True,
    )
    return tmp / "alone"


# --- disks


@row()
def disk_full_while_a_checkpoint_is_written(tmp):
    "the disk is full when the third checkpoint is written -> one line, exit code 2, the last checkpoint verifies, goes on on a larger disk exactly"
    one = alone(tmp, epochs=6, width=8)
    size = sum(p.stat().st_size for n in ("checkpoint-*", "model*") for p in one.glob(n))
    with small_disk(tmp / "disk", size + 60_000) as disk:
        code, err = said(
            train_main,
            [tmp / "data", "--out", disk / "run", *words(tmp)[3:], "--epochs", 6, "--width", 8],
        )
        assert code == 2 and "No space left on device" in err.splitlines()[-1], (code, err)
        state, _ = newest_checkpoint(disk / "run")
        assert state and not list((disk / "run").glob(".part-*"))
        shutil.copytree(disk / "run", tmp / "run")
    rows = fit(tmp, resume=True, epochs=6, width=8)
    assert len(rows) == 6 and same(tmp / "run", one)
    return f"{err.splitlines()[-1][-95:]}; went on after epoch {len(state['rows'])}, same files"


@row()
def disk_full_while_a_prediction_is_written(tmp):
    "a disk of 8 kB for the label map -> one line, exit code 2, no half file"
    fit(tmp)
    with small_disk(tmp / "disk", "8k") as disk:
        (disk / "filler").write_bytes(bytes(4096))
        code, err = said(
            predict_main, [tmp / "run", tmp / "data/scan00.nii.gz", "--out", disk / "out"]
        )
        assert code == 2 and "No space left" in err, err
        assert (
            not list((disk / "out").glob("*.nii.gz")) and not list((disk / "out").glob(".part*"))
            if (disk / "out").exists()
            else True
        )
    return err.strip().splitlines()[-1][-90:]


@row()
def disk_full_while_the_cache_is_written(tmp):
    "a disk of 40 kB for prepared cases -> a warning, the cases stay in memory, the same run"
    with small_disk(tmp / "disk", "40k") as disk, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        training.fit(
            Settings(str(tmp / "data"), str(tmp / "run"), cache=str(disk / "cache"), **QUICK),
            quiet=True,
        )
    assert any("stays in memory" in str(w.message) for w in heard) and same(tmp / "run", alone(tmp))
    return f"{sum('stays in memory' in str(w.message) for w in heard)} warnings, same files"


@row()
def read_only_output(tmp):
    "--out on a read-only file system -> one line, exit code 2"
    with small_disk(tmp / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, err = said(train_main, [tmp / "data", "--out", disk / "run", *words(tmp)[3:]])
        assert code == 2 and "Read-only file system" in err, err
    return err.splitlines()[-1][-90:]


# --- the cache


def spoil(tmp, change):
    "The same run after its cache was spoiled"
    run = alone(tmp)
    entries = sorted((tmp / "cache").glob("*.safetensors"))
    change(entries)
    fit(tmp)
    assert same(tmp / "run", run)
    return "prepared anew, same files"


@row()
def cache_entry_truncated(tmp):
    "an entry is cut in half -> prepared anew"
    return spoil(
        tmp, lambda es: es[0].write_bytes(es[0].read_bytes()[: len(es[0].read_bytes()) // 2])
    )


@row()
def cache_entry_with_a_flipped_bit(tmp):
    "one bit of every entry flips -> prepared anew"

    def flip(es):
        for e in es:
            d = bytearray(e.read_bytes())
            d[len(d) // 2] ^= 4
            e.write_bytes(d)

    return spoil(tmp, flip)


@row()
def cache_entry_of_another_version(tmp):
    "an entry without what this version expects -> prepared anew"
    from safetensors.torch import save_file

    return spoil(
        tmp, lambda es: [save_file({"x": torch.zeros(3)}, e, {"version": "0"}) for e in es]
    )


@row()
def cache_entries_deleted_during_training(tmp):
    "the cache is emptied in the middle of an epoch -> the run ends as if nothing had happened"
    run = alone(tmp)
    calls = []

    def empty(terms):
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(tmp / "cache")

    fit(tmp, on_step=empty)
    assert same(tmp / "run", run)
    return "same files"


@row()
def two_processes_fill_one_cache(tmp):
    "two processes prepare the same cases at once -> both see every case, no half file"
    code = f"from pathlib import Path; from egcnn_nb.data.layouts import find_dataset; from egcnn_nb.data.cache import prepared_cases; d = find_dataset(r'{tmp / 'data'}'); print(sum(float(c.x.sum()) for c in prepared_cases(d.cases, d.task, Path(r'{tmp / 'cache'}'), quiet=True)))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=ENV)
        for _ in range(2)
    ]
    sums = [p.communicate(timeout=120)[0] for p in both]
    assert sums[0] == sums[1] and sums[0].strip() and not list((tmp / "cache").glob(".part-*"))
    return "both have the same voxels"


@row()
def stale_temporary_files_of_a_network_file_system(tmp):
    "half files of runs killed long ago lie in the cache and the run folder -> swept away, never read"
    (tmp / "cache").mkdir()
    old = tmp / "cache/.part-0-x.safetensors"
    old.write_bytes(b"half")
    os.utime(old, (1, 1))
    handle = tmp / "cache/.nfs0001"
    handle.write_bytes(b"held by a client")
    fit(tmp, stop=after(2))
    (tmp / "run/.part-0-checkpoint-00000099.pt").write_bytes(b"half")
    fit(tmp, resume=True)
    assert (
        not old.exists()
        and handle.exists()
        and not list((tmp / "run").glob(".part-*"))
        and same(tmp / "run", alone(tmp))
    )
    return "swept, same files"


# --- data


@row()
def a_case_deleted_during_training(tmp):
    "the files of a case vanish in the middle of a run -> the run ends; to resume it is refused with the name of the file"

    def delete(terms):
        (tmp / "data/scan03.nii.gz").unlink(missing_ok=True)

    rows = fit(tmp, on_step=delete)
    assert len(rows) == 2
    return "ended; then " + refused(lambda: fit(tmp, resume=True), "scan03.nii.gz")


@row()
def a_case_more_when_resumed(tmp):
    "a case is added before a run is resumed -> refused, since the split would change"
    fit(tmp, stop=after(2))
    with open(tmp / "data/cases.csv", "a") as f:
        f.write("case99,scan00.nii.gz,label00.nii.gz\n")
    return refused(lambda: fit(tmp, resume=True), "another split")


@row()
def paths_with_spaces_and_unicode(tmp):
    "folder and files are called 'my dåta 数据' -> read right, the same run"
    run = alone(tmp)
    new = tmp / "my dåta 数据"
    shutil.copytree(tmp / "data", new)
    text = (new / "cases.csv").read_text().replace("scan05.nii.gz", "скан 05.nii.gz")
    (new / "cases.csv").write_text(text)
    (new / "scan05.nii.gz").rename(new / "скан 05.nii.gz")
    training.fit(
        Settings(str(new), str(tmp / "run"), cache=str(tmp / "cache"), **QUICK), quiet=True
    )
    assert same(tmp / "run", run)
    return "same files"


@row()
def a_case_called_dot_dot(tmp):
    "cases.csv calls a case ../../evil, after which files would be called -> refused"
    path = tmp / "data/cases.csv"
    path.write_text(path.read_text().replace("case01", "../../evil"))
    return refused(lambda: fit(tmp), "../../evil")


@row()
def links_out_of_the_folder(tmp):
    "scans are symbolic links to another disk -> read right"
    run = alone(tmp)
    (tmp / "elsewhere").mkdir()
    for f in (tmp / "data").glob("*.nii.gz"):
        f.rename(tmp / "elsewhere" / f.name)
        f.symlink_to(tmp / "elsewhere" / f.name)
    fit(tmp)
    assert same(tmp / "run", run)
    return "same files"


@row()
def a_link_that_leads_nowhere(tmp):
    "a scan is a broken symbolic link -> refused with its name"
    f = tmp / "data/scan02.nii.gz"
    f.unlink()
    f.symlink_to(tmp / "gone")
    return refused(lambda: fit(tmp), "scan02.nii.gz")


@row()
def a_hundred_thousand_files_in_the_folder(tmp):
    "100,000 other files lie beside the cases -> found within 10 s"
    for i in range(100_000):
        (tmp / f"data/{i}.txt").touch()
    start = time.perf_counter()
    found = find_dataset(tmp / "data")
    seconds = time.perf_counter() - start
    assert len(found.cases) == 12 and seconds < 10
    return f"12 cases in {seconds:.2f} s"


@row()
def image_and_label_differ_only_in_sform(tmp):
    "the label has the image's qform and another sform -> refused, since the sform counts"
    image = nib.load(tmp / "data/label04.nii.gz")
    image.set_qform(np.eye(4), 1)
    image.set_sform(np.diag([1, 1, 1.5, 1]), 1)
    nib.save(image, tmp / "data/label04.nii.gz")
    return refused(lambda: fit(tmp), "has another affine")


@row()
def a_poisoned_case(tmp):
    "one case turns NaN after it was read -> its steps are skipped and counted, the others train, weights stay finite"
    real = folders.prepare

    def poisoned(*a, **kw):
        task, train, val, notes = real(*a, **kw)
        train[0].x = torch.full_like(train[0].x, float("nan"))
        return task, train, val, notes

    folders.prepare = poisoned
    try:
        rows = fit(tmp, epochs=3)
    finally:
        folders.prepare = real
    state, _ = newest_checkpoint(tmp / "run")
    assert (
        [r["skipped"] for r in rows] == [1, 1, 1]
        and all(t.isfinite().all() for t in state["model"].values())
        and all(np.isfinite(r["total"]) for r in rows)
    )
    return "1 of 3 steps of each epoch skipped, weights finite"


@row()
def nothing_but_nan(tmp):
    "every step is NaN -> the run stops after ten, the cases named"
    real = folders.prepare

    def poisoned(*a, **kw):
        task, train, val, notes = real(*a, **kw)
        for c in train:
            c.x = torch.full_like(c.x, float("nan"))
        return task, train, val, notes

    folders.prepare = poisoned
    try:
        return refused(
            lambda: fit(tmp, epochs=9), "10 steps in a row that are not finite, the last of case"
        )
    finally:
        folders.prepare = real


def relabelled(tmp, change):
    "Change every label map of the data set"
    for path in sorted((tmp / "data").glob("label*.nii.gz")):
        image = nib.load(path)
        labels = change(np.asarray(image.dataobj))
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), image.affine), path)


@row()
def label_maps_without_foreground(tmp):
    "every label map is empty -> refused before anything is written"
    relabelled(tmp, np.zeros_like)
    told = refused(lambda: fit(tmp), "no label map of 10 cases has a voxel above 0")
    assert not (tmp / "run").exists()
    return told


@row()
def a_class_that_is_not_learned(tmp):
    "one class is a single voxel, where it cannot be learned -> the log says so once, with a remedy, even after an interruption"

    def shrunk(labels):
        labels = np.minimum(labels, 1)
        labels[0, 0, 0] = 2
        return labels

    relabelled(tmp, shrunk)
    fit(tmp, epochs=10, stop=after(17))
    fit(tmp, epochs=10, resume=True)
    lines = [
        line
        for line in (tmp / "run/log.txt").read_text().splitlines()
        if line.startswith("label 2 is not learned")
    ]
    assert (
        len(lines) == 1
        and "below 0.1 for 2 epochs, and 10 of 10 training cases have it. Try a lower --lr"
        in lines[0]
    ), lines
    training.fit(
        Settings(
            str(tmp / "data"),
            str(tmp / "dice"),
            cache=str(tmp / "cache"),
            **{**QUICK, "readings": {"semantic": "dice"}},
        ),
        quiet=True,
    )
    assert (
        "label 2 is not learned" in (told := (tmp / "dice/log.txt").read_text())
        and "Train with --reading semantic=dice_ce" in told
    )
    return lines[0]


@row()
def a_name_to_leave_out_that_is_misspelt(tmp):
    "--exclude names case3, a case with its ending, or is saved as UTF-16 -> refused; with a byte-order mark it is read"
    path = tmp / "out.txt"
    for text, why in (
        ("case3\n", "does not have: case3"),
        ("case03.nii.gz\n", "Write case03 without the ending"),
    ):
        path.write_text(text)
        told = refused(lambda: fit(tmp, exclude=str(path)), why)
    path.write_bytes("case03".encode("utf-16"))
    refused(lambda: fit(tmp, exclude=str(path)), "no text in UTF-8")
    assert not (tmp / "run").exists()
    path.write_text("case03\n", encoding="utf-8-sig")
    fit(tmp, exclude=str(path))
    assert "case03" not in (tmp / "run/config.json").read_text()
    return told


@row()
def settings_that_cannot_work(tmp):
    "-3 epochs, a learning rate of nan, a batch of 0, a temperature of 0 and others -> one line, exit code 2, nothing is read or written"
    shutil.rmtree(tmp / "data")
    wrong = "--epochs -3|--epochs 0|--lr nan|--lr inf|--lr 0|--batch_size 0|--width 0|--width 100000000|--levels 0|--levels 99|--patch_size 16 0 16|--workers -1|--cache_gb nan|--cache_gb -1|--save_minutes -1|--save_minutes nan|--seed -1|--seed 99999999999999|--validation nan|--validation 2.5|--train_cases 0|--accumulate 9|--accumulate 0|--readers 0"
    wrong += "".join(
        f"|--reading {r}"
        for r in (
            "tau=0",
            "lambda1=nan",
            "thickness=0",
            "supervise=3",
            "hard=1",
            "entry=top",
            "attention_relu=3",
            "norm_head=no",
            "semantic=ce",
            "w_cross_entropy=-1",
            "verbose=True",
        )
    )
    for flags in wrong.split("|"):
        code, err = said(train_main, [*words(tmp), *flags.split()])
        assert (
            code == 2
            and len(err.strip().splitlines()) == 1
            and "data" not in err
            and not (tmp / "run").exists()
        ), (flags, err)
    return err.strip()


@row()
def an_infinite_gradient(tmp):
    "one gradient is infinite in one step -> that step is skipped, the next one is not"
    real, calls = steps._is_bad, []

    def poke(model, values):
        calls.append(1)
        p = next(model.parameters())
        if len(calls) == 2:
            p.grad.view(-1)[0] = float("inf")
        return real(model, values)

    steps._is_bad = poke
    try:
        rows = fit(tmp)
    finally:
        steps._is_bad = real
    assert [r["skipped"] for r in rows] == [1, 0]
    return "1 step skipped"


# --- checkpoints


def stopped(tmp, **kw):
    fit(tmp, stop=after(8), epochs=4, **kw)
    return list_checkpoints(tmp / "run")


def ends_as_alone(tmp):
    fit(tmp, resume=True, epochs=4)
    assert same(tmp / "run", alone(tmp, epochs=4))
    return "the one before it was used, same files"


@row()
def the_newest_checkpoint_truncated(tmp):
    "the newest checkpoint is cut short -> the one before it is used"
    path = stopped(tmp)[0]
    path.write_bytes(path.read_bytes()[:2000])
    return ends_as_alone(tmp)


@row()
def the_newest_checkpoint_with_a_flipped_bit(tmp):
    "one bit of the newest checkpoint flips -> the one before it is used"
    path = stopped(tmp)[0]
    d = bytearray(path.read_bytes())
    d[len(d) // 2] ^= 1
    path.write_bytes(d)
    return ends_as_alone(tmp)


@row()
def the_newest_checkpoint_empty(tmp):
    "the newest checkpoint has no bytes, as after a power cut -> the one before it is used"
    stopped(tmp)[0].write_bytes(b"")
    return ends_as_alone(tmp)


@row()
def every_checkpoint_broken(tmp):
    "both checkpoints are broken -> refused, nothing is overwritten"
    found = stopped(tmp)
    [p.write_bytes(b"x") for p in found]
    told = refused(lambda: fit(tmp, resume=True, epochs=4), "none that verifies")
    assert all(p.read_bytes() == b"x" for p in found)
    return told


@row()
def a_checkpoint_of_a_newer_version(tmp):
    "the checkpoint has a newer format -> refused"
    path = stopped(tmp)[0]
    state = torch.load(path, weights_only=True)
    torch.save({**state, "format": FORMAT + 1}, path)
    return refused(lambda: fit(tmp, resume=True, epochs=4), "format")


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@row()
def a_checkpoint_that_is_a_malicious_pickle(tmp):
    "the newest checkpoint would run a command when unpickled -> not run, the one before it is used"
    path = stopped(tmp)[0]
    torch.save({"format": FORMAT, "model": _Evil(tmp / "executed")}, path)
    told = ends_as_alone(tmp)
    assert not (tmp / "executed").exists()
    return told


@row()
def a_model_file_that_is_a_malicious_pickle(tmp):
    "model.safetensors is a pickle that would run a command -> refused, not run"
    fit(tmp)
    torch.save(_Evil(tmp / "executed"), tmp / "run/model.safetensors")
    code, err = said(predict_main, [tmp / "run", tmp / "data/scan00.nii.gz", "--out", tmp / "out"])
    assert code == 2 and "weights that are broken" in err and not (tmp / "executed").exists()
    return err.strip()[-100:]


@row()
def weights_of_another_network(tmp):
    "model.safetensors comes from a wider network -> refused"
    fit(tmp)
    training.fit(
        Settings(
            str(tmp / "data"), str(tmp / "wide"), cache=str(tmp / "cache"), **{**QUICK, "width": 6}
        ),
        quiet=True,
    )
    shutil.copy(tmp / "wide/model.safetensors", tmp / "run/model.safetensors")
    code, err = said(predict_main, [tmp / "run", tmp / "data/scan00.nii.gz", "--out", tmp / "out"])
    assert code == 2 and "another network" in err and not (tmp / "out").exists()
    return err.strip()[-100:]


@row()
def half_a_line_in_metrics_csv(tmp):
    "metrics.csv ends in the middle of a line -> written anew from the checkpoint"
    stopped(tmp)
    path = tmp / "run/metrics.csv"
    path.write_bytes(path.read_bytes()[:-20])
    fit(tmp, resume=True, epochs=4)
    assert same(tmp / "run", alone(tmp, epochs=4))
    return "same files"


@row()
def resumed_with_changed_settings(tmp):
    "resumed with another learning rate and width -> refused, both listed"
    stopped(tmp)
    told = refused(lambda: fit(tmp, resume=True, epochs=4, lr=0.1, width=8), "lr 0.001")
    assert "width 4" in told
    return told


@row()
def config_json_garbage(tmp):
    "config.json is cut short -> refused by training and prediction"
    stopped(tmp)
    path = tmp / "run/config.json"
    path.write_text(path.read_text()[:100])
    told = refused(lambda: fit(tmp, resume=True, epochs=4), "something else")
    code, err = said(predict_main, [tmp / "run", tmp / "data/scan00.nii.gz", "--out", tmp / "out"])
    assert code == 2 and "config.json" in err
    return told


@row()
def two_runs_on_one_folder(tmp):
    "a second run resumes a folder that the first one is writing -> refused; the first goes on"
    told = []

    def second(terms):
        if not told:
            told.append(
                refused(
                    lambda: training.fit(settings(tmp), True, quiet=True),
                    "another egcnn_train that is writing",
                )
            )

    fit(tmp, on_step=second)
    assert same(tmp / "run", alone(tmp))
    return told[0]


@row()
def the_clock_goes_backwards(tmp):
    "the system's clock runs backwards during the run -> the same run"
    run, real, now = alone(tmp), time.time, [2e9]

    def backwards():
        now[0] -= 3600
        return now[0]

    time.time = backwards
    try:
        fit(tmp)
    finally:
        time.time = real
    assert same(tmp / "run", run)
    return "same files"


# --- signals and processes


@row()
def sigterm(tmp):
    "SIGTERM in the middle of an epoch -> saved, exit code 0 within 10 s, a checkpoint of that very step"
    process = started(tmp)
    start = time.time()
    process.terminate()
    process.communicate(timeout=30)
    seconds = time.time() - start
    log = (tmp / "run/log.txt").read_text()
    state, notes = newest_checkpoint(tmp / "run")
    assert (
        process.returncode == 0
        and seconds < 10
        and "all of it is safe" in log
        and not notes
        and f"epoch {len(state['rows']) + 1} after step {state['step']}" in log
    )
    return f"exit code 0 after {seconds:.1f} s"


@row()
def ctrl_c_once(tmp):
    "Ctrl-C -> saved, exit code 130"
    process = started(tmp)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and "all of it is safe" in (tmp / "run/log.txt").read_text()
    return "exit code 130, saved"


@row()
def ctrl_c_twice(tmp):
    "Ctrl-C twice, the second in the middle of a long step -> exits at once, the last checkpoint verifies"
    code = f"""
import sys, time, torch, egcnn_nb.run.training as t
real, calls = t.train_step, []
def slow(*a, **kw):
    calls.append(1)
    if len(calls) == 5: open(r'{tmp / "in a step"}', 'w').close(); [time.sleep(.05) for _ in range(1200)]
    return real(*a, **kw)
t.train_step = slow
from egcnn_nb.commands.train import main
sys.exit(main({[str(w) for w in words(tmp)]!r}))"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (tmp / "in a step").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    start = time.time()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    seconds = time.time() - start
    state, notes = newest_checkpoint(tmp / "run")
    assert process.returncode == 130 and seconds < 5 and len(state["rows"]) == 1 and not notes
    return f"exit code 130 after {seconds:.1f} s, checkpoint of epoch 1"


@row()
def a_loader_worker_killed(tmp):
    "SIGKILL to a loader's process -> one line, exit code 1, the last checkpoint verifies"
    process = started(tmp, "--workers", 1)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    err = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert (
        process.returncode == 1
        and err.startswith("error: A data-loader worker died")
        and newest_checkpoint(tmp / "run")[0]
    )
    return err[:110]


@row()
def a_loader_worker_out_of_memory(tmp):
    "a loader's process may have no more memory -> one line, exit code 1, the last checkpoint verifies"
    process = started(tmp, "--workers", 1, "--augment", "flip", "noise")
    pid = children(process.pid)[0]
    resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))
    err = process.communicate(timeout=120)[1].strip().splitlines()[-1]
    assert process.returncode == 1 and err.startswith("error: A data-loader worker died"), err
    assert newest_checkpoint(tmp / "run")[0]
    return err[:110]


def two_ranks(tmp, *more, epochs=2):
    return subprocess.Popen(
        command(
            tmp / "data",
            tmp / "run",
            "--epochs",
            epochs,
            "--cache",
            tmp / "cache",
            *more,
            processes=2,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )


def ranks_of(process, tmp):
    begun(process, tmp / "run")
    return children(process.pid)


@row(slow=True)
def one_rank_slow(tmp):
    "one of two processes is held for three seconds -> the other waits, the run ends with the losses of one process"
    process = two_ranks(tmp, epochs=30)
    rank = ranks_of(process, tmp)[-1]
    os.kill(rank, signal.SIGSTOP)
    time.sleep(3)
    os.kill(rank, signal.SIGCONT)
    err = process.communicate(timeout=200)[1]
    assert process.returncode == 0, err[-2000:]
    totals = lambda run: [float(r["total"]) for r in csv.DictReader(open(run / "metrics.csv"))]
    gap = np.abs(np.array(totals(tmp / "run")) / totals(alone(tmp, epochs=30)) - 1).max()
    assert gap < 1e-4
    return f"losses differ by {gap:.0e}"


@row(slow=True)
def one_rank_dead(tmp):
    "SIGKILL to one of two processes -> the other leaves with one line, the last checkpoint verifies"
    process = two_ranks(tmp, epochs=400)
    os.kill(ranks_of(process, tmp)[-1], signal.SIGKILL)
    start = time.time()
    err = process.communicate(timeout=100)[1]
    assert (
        process.returncode
        and "Traceback" not in err.split("torch/distributed/elastic")[0]
        and newest_checkpoint(tmp / "run")[0]
    )
    return f"all gone after {time.time() - start:.0f} s"


@row(slow=True)
def rendezvous_port_taken(tmp):
    "another program listens on the port of the rendezvous -> torchrun says so, nothing is written"
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        launch = f"--nnodes=2 --node_rank=0 --master_addr=127.0.0.1 --master_port={port}".split()
        done = subprocess.run(
            command(tmp / "data", tmp / "run", launch=launch),
            capture_output=True,
            text=True,
            timeout=200,
            env=ENV,
        )
    assert (
        done.returncode and "EADDRINUSE" in done.stderr + done.stdout and not (tmp / "run").exists()
    )
    return "EADDRINUSE, exit code 1"


# --- files of others


def bad_scan(tmp, change, text):
    path = tmp / "data/scan01.nii.gz"
    raw = gzip.decompress(path.read_bytes())
    path.write_bytes(change(bytearray(raw)))
    return refused(lambda: fit(tmp), text)


def put(at, kind, value):
    "A change that writes a field and packs the file again"

    def change(d):
        field = np.array(value, kind[-3:]).tobytes()
        d[at : at + len(field)] = field
        return gzip.compress(bytes(d))

    return change


BYTES = {
    "a_header_that_promises_70_terabytes": (put(42, "<i2", [32767] * 3), "promises"),
    "voxels_that_begin_in_the_header": (put(108, "<f4", 0), "begin at byte 0"),
    "an_unknown_sform_code": (put(254, "<i2", 99), "sform_code 99"),
    "an_affine_of_nan": (put(280, "<f4", np.nan), "the affine"),
    "a_slope_of_infinity": (put(112, "<f4", np.inf), "slope inf"),
    "a_slope_beyond_float32": (put(112, "<f4", 3.4e38), "NaN or infinite"),
    "a_dimension_of_zero": (put(44, "<i2", 0), "shape"),
    "a_gzip_of_1000_to_1": (
        lambda d: gzip.compress(bytes(d) + bytes(1 << 28)),
        "more than a MiB behind",
    ),
    "a_wrong_gzip_checksum": (
        lambda d: (lambda g: g[:-8] + bytes([g[-8] ^ 1]) + g[-7:])(gzip.compress(bytes(d))),
        "CRC check failed",
    ),
    "a_scan_without_its_end": (lambda d: gzip.compress(bytes(d))[:-200], "cannot be read"),
    "colours": (put(70, "<i2", 128), "type 128"),
}
for _name, (_change, _text) in BYTES.items():

    def _f(tmp, change=_change, text=_text):
        return bad_scan(tmp, change, text)

    _f.__name__, _f.__doc__ = (
        _name,
        f"{_name.replace('_', ' ')}, in one of twelve scans -> refused before anything is written, the file named",
    )
    row()(_f)


@row()
def a_network_without_bounds(tmp):
    "config.json asks for 10^20 levels, or for 10^8 channels -> refused at once"
    fit(tmp)
    path = tmp / "run/config.json"
    whole = path.read_text()
    told = []
    for old, new in (
        ('"levels": 2', '"levels": 100000000000000000000'),
        ('"width": 4', '"width": 100000000'),
    ):
        path.write_text(whole.replace(old, new))
        start = time.perf_counter()
        code, err = said(
            predict_main, [tmp / "run", tmp / "data/scan00.nii.gz", "--out", tmp / "out"]
        )
        assert code == 2 and old.split('"')[1] in err and time.perf_counter() - start < 5, err
        told.append(err.strip()[:90])
    return told[0]


@row()
def dataset_json_garbage(tmp):
    "dataset.json is a list, deep nesting, or cut short -> refused"
    (tmp / "other").mkdir()
    told = []
    for text in (
        "[" * 100_000,
        '{"modality": 3, "labels": [], "training": 7}',
        '{"channel_names": {"x": 1}, "labels": {"a": "b"}}',
        "{",
    ):
        (tmp / "other/dataset.json").write_text(text)
        told.append(
            refused(lambda: find_dataset(tmp / "other"), "dataset.json" if text == "{" else "")
        )
    return told[0]


def run_row(name):
    "What happened in a row: (ok, text)"
    tmp = Path(tempfile.mkdtemp(prefix="fault"))
    try:
        dataset(tmp / "data")
        return True, ROWS[name](tmp)
    except Skip as e:
        return None, str(e)
    except Exception:
        return False, traceback.format_exc()
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("names", nargs="*")
    p.add_argument("--slow", action="store_true", help="the slow rows too")
    args = p.parse_args()
    names = args.names or [n for n, f in ROWS.items() if args.slow or not f.slow]
    failed = 0
    torch.set_num_threads(1)
    print("| fault | what is done | what must be true | what happened |\n|---|---|---|---|")
    for n in names:
        ok, text = run_row(n)
        done, must = ROWS[n].__doc__.split(" -> ")
        failed += ok is False
        print(
            f"| {n.replace('_', ' ')} | {done} | {must} | {'' if ok else 'skipped: ' if ok is None else 'FAILED: '}{' '.join(str(text).split()) if ok is not False else str(text)} |".replace(
                tempfile.gettempdir(), "TMP"
            ),
            flush=True,
        )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
