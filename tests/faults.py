"""Faults, one by one: what is done, what must be true, what happened.

    python tests/faults.py [NAME ...] [--slow]          # a Markdown table

pytest runs the quick rows (tests/test_faults.py). Each row is a function whose docstring is "what
is done -> what must be true". It returns what happened, and an assertion fails where that is not
so."""

import argparse
import contextlib
import functools
import gzip
import io
import itertools
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
import tiny
from tiny import ENV, after, begun, children, command, dataset

import egcnn_nb.run.folders as folders
import egcnn_nb.run.steps as steps
import egcnn_nb.run.training as training
from egcnn_nb.commands.predict import main as predict_main
from egcnn_nb.commands.train import main as train_main
from egcnn_nb.core import InputError
from egcnn_nb.data.layouts import find_dataset
from egcnn_nb.run.checkpoints import FORMAT, list_checkpoints, newest_checkpoint
from egcnn_nb.run.steps import read_metrics

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


def settings(tmp, data="data", out="run", cache="cache", **changes):
    "Settings of a quick run; the folders are relative to `tmp`, or absolute"
    return tiny.settings(
        tmp / data,
        tmp / out,
        tmp / cache,
        **changes,
    )


def never():
    "A run that is not stopped"
    return False


def fit(tmp, resume=False, stop=never, on_step=None, **changes):
    "Train a quick run"
    config = settings(tmp, **changes)
    return training.fit(config, resume, quiet=True, stop=stop, on_step=on_step)


def refused(f, text):
    "The message of the `InputError` that `f` raises, which must hold `text`"
    try:
        f()
    except InputError as e:
        message = str(e)
        assert text in message, message
        return "refused: " + message[:150]
    raise AssertionError("nothing was refused")


def fit_refused(tmp, text, **changes):
    "The message with which a run is refused"
    run = functools.partial(
        fit,
        tmp,
        **changes,
    )
    return refused(run, text)


def text_of_log(tmp, run="run"):
    "The log of a run"
    path = tmp / run / "log.txt"
    return path.read_text()


def flip_a_bit(path, bit):
    "Flip a bit in the middle of a file"
    content = path.read_bytes()
    data = bytearray(content)
    middle = len(data) // 2
    data[middle] ^= bit
    path.write_bytes(data)


def cut(path, length):
    "Keep so many bytes of a file, from its beginning"
    content = path.read_bytes()
    kept = content[:length]
    path.write_bytes(kept)


def half_files(folder):
    "Temporary files in a folder"
    found = folder.glob(".part-*")
    return list(found)


def said(main, words):
    "Exit code and stderr of a command, in this process"
    words = [str(word) for word in words]
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = main(words)
    told = err.getvalue()
    return code, told


def last_line(text):
    "The last line of an output"
    *_, last = text.strip().splitlines()
    return last


def predicted(tmp, out=None):
    "Exit code and stderr of `egcnn_predict` of one scan"
    run = tmp / "run"
    scan = tmp / "data/scan00.nii.gz"
    out = out or tmp / "out"
    words = [run, scan, "--out", out]
    return said(predict_main, words)


def words(tmp, *more, out=None):
    "The command line of a quick run"
    run = out or tmp / "run"
    line = [tmp / "data", "--out", run]
    line += ["--cache", tmp / "cache"]
    line += ["--epochs", 2, *tiny.SMALL]
    line += more
    return line


def take_ctrl_c():
    "Ctrl-C raises KeyboardInterrupt in this process, whatever its parent ignores"
    handler = signal.default_int_handler
    signal.signal(signal.SIGINT, handler)


def started(tmp, *more, epochs=400):
    "A run in a process of its own, some epochs in"
    flags = ["--epochs", epochs, "--cache", tmp / "cache", *more]
    process = subprocess.Popen(
        command(tmp / "data", tmp / "run", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        preexec_fn=take_ctrl_c,
    )
    begun(process, tmp / "run")
    return process


@contextlib.contextmanager
def small_disk(path, size):
    "A file system of `size` bytes"
    path.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={size} tmpfs".split()
    done = subprocess.run([*mount, str(path)], capture_output=True, text=True)
    if done.returncode:
        told = done.stderr.strip()
        raise Skip(f"no file system can be mounted here: {told}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)])


def same(a, b):
    "Whether two runs have the same table and the same weights, to the bit"
    for name in ("metrics.csv", "model.safetensors"):
        if (a / name).read_bytes() != (b / name).read_bytes():
            return False
    return True


def alone(tmp, **changes):
    "The run that nothing happens to"
    fit(tmp, out="alone", **changes)
    return tmp / "alone"


def same_as_alone(tmp, **changes):
    "Whether the run has the files of one that nothing happened to"
    run = tmp / "run"
    other = alone(tmp, **changes)
    return same(run, other)


def expect_verified(run):
    "The newest checkpoint of a run can be read; its contents"
    state, _ = newest_checkpoint(run)
    assert state
    return state


def expect_no_space(code, err):
    "A command ended because the disk was full; its last line"
    line = last_line(err)
    assert code == 2, (code, err)
    assert "No space left" in line, err
    return line


def checkpoint(run):
    "The newest checkpoint of a run, which verifies"
    state, notes = newest_checkpoint(run)
    assert state
    assert not notes
    return state


# --- disks


@row()
def disk_full_while_a_checkpoint_is_written(tmp):
    """the disk is full when the third checkpoint is written -> one line, exit code 2, the last
    checkpoint verifies, goes on on a larger disk exactly"""
    one = alone(tmp, epochs=6, width=8)
    size = 60_000
    for file in [*one.glob("checkpoint-*"), *one.glob("model*")]:
        size += file.stat().st_size
    with small_disk(tmp / "disk", size) as disk:
        run = disk / "run"
        line = words(tmp, "--epochs", 6, "--width", 8, out=run)
        code, err = said(train_main, line)
        told = expect_no_space(code, err)
        state = expect_verified(run)
        assert not half_files(run)
        shutil.copytree(run, tmp / "run")
    rows = fit(tmp, resume=True, epochs=6, width=8)
    assert len(rows) == 6
    assert same(tmp / "run", one)
    epochs = len(state["rows"])
    return f"{told[-95:]}; went on after epoch {epochs}, same files"


@row()
def disk_full_while_a_prediction_is_written(tmp):
    "a disk of 8 kB for the label map -> one line, exit code 2, no half file"
    fit(tmp)
    with small_disk(tmp / "disk", "8k") as disk:
        filler = disk / "filler"
        out = disk / "out"
        zeros = bytes(4096)
        filler.write_bytes(zeros)
        code, err = predicted(tmp, out)
        told = expect_no_space(code, err)
        written = list(out.glob("*.nii.gz"))
        assert not written
        assert not half_files(out)
    return told[-90:]


@row()
def disk_full_while_the_cache_is_written(tmp):
    "a disk of 40 kB for prepared cases -> a warning, the cases stay in memory, the same run"
    with small_disk(tmp / "disk", "40k") as disk, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        fit(tmp, cache=disk / "cache")
    in_memory = [w for w in heard if "stays in memory" in str(w.message)]
    count = len(in_memory)
    assert count > 0
    assert same_as_alone(tmp)
    return f"{count} warnings, same files"


@row()
def read_only_output(tmp):
    "--out on a read-only file system -> one line, exit code 2"
    with small_disk(tmp / "disk", "1m") as disk:
        remount = ["mount", "-o", "remount,ro", str(disk)]
        subprocess.run(remount, check=True)
        line = words(tmp, out=disk / "run")
        code, err = said(train_main, line)
        assert code == 2, err
        assert "Read-only file system" in err, err
    told = last_line(err)
    return told[-90:]


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

    def cut_first(entries):
        first = entries[0]
        size = first.stat().st_size
        half = size // 2
        cut(first, half)

    return spoil(tmp, cut_first)


@row()
def cache_entry_with_a_flipped_bit(tmp):
    "one bit of every entry flips -> prepared anew"

    def flip(entries):
        for entry in entries:
            flip_a_bit(entry, 4)

    return spoil(tmp, flip)


@row()
def cache_entry_of_another_version(tmp):
    "an entry without what this version expects -> prepared anew"
    from safetensors.torch import save_file

    def write_old(entries):
        tensors = {"x": torch.zeros(3)}
        about = {"version": "0"}
        for entry in entries:
            save_file(tensors, entry, about)

    return spoil(tmp, write_old)


@row()
def cache_entries_deleted_during_training(tmp):
    "the cache is emptied in the middle of an epoch -> the run ends as if nothing had happened"
    run = alone(tmp)
    cache = tmp / "cache"
    calls = []

    def empty(terms):
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(cache)

    fit(tmp, on_step=empty)
    assert same(tmp / "run", run)
    return "same files"


PREPARE = """
import sys
from pathlib import Path

from egcnn_nb.data.cache import prepared_cases
from egcnn_nb.data.layouts import find_dataset

data, cache = sys.argv[1:]
found = find_dataset(data)
cases = prepared_cases(found.cases, found.task, Path(cache), quiet=True)
print(sum(float(case.x.sum()) for case in cases))
"""


@row()
def two_processes_fill_one_cache(tmp):
    "two processes prepare the same cases at once -> both see every case, no half file"
    data = tmp / "data"
    cache = tmp / "cache"
    line = [sys.executable, "-c", PREPARE, str(data), str(cache)]
    processes = []
    for _ in range(2):
        process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=ENV)
        processes.append(process)
    sums = []
    for process in processes:
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        sums.append(printed.strip())
    first_sum, second_sum = sums
    assert first_sum
    assert first_sum == second_sum
    assert not half_files(cache)
    return "both have the same voxels"


@row()
def stale_temporary_files_of_a_network_file_system(tmp):
    """half files of runs killed long ago lie in the cache and the run folder -> swept away, never
    read"""
    (tmp / "cache").mkdir()
    old = tmp / "cache/.part-0-x.safetensors"
    old.write_bytes(b"half")
    os.utime(old, (1, 1))
    handle = tmp / "cache/.nfs0001"
    handle.write_bytes(b"held by a client")
    fit(tmp, stop=after(2))
    (tmp / "run/.part-0-checkpoint-00000099.pt").write_bytes(b"half")
    fit(tmp, resume=True)
    assert not old.exists()
    assert handle.exists()
    assert not half_files(tmp / "run")
    assert same_as_alone(tmp)
    return "swept, same files"


# --- data


@row()
def a_case_deleted_during_training(tmp):
    """the files of a case vanish in the middle of a run -> the run ends; to resume it is refused
    with the name of the file"""

    def delete(terms):
        scan = tmp / "data/scan03.nii.gz"
        scan.unlink(missing_ok=True)

    rows = fit(tmp, on_step=delete)
    assert len(rows) == 2
    told = fit_refused(tmp, "scan03.nii.gz", resume=True)
    return f"ended; then {told}"


@row()
def a_case_more_when_resumed(tmp):
    "a case is added before a run is resumed -> refused, since the split would change"
    fit(tmp, stop=after(2))
    path = tmp / "data/cases.csv"
    with path.open("a") as f:
        f.write("case99,scan00.nii.gz,label00.nii.gz\n")
    return fit_refused(tmp, "another split", resume=True)


@row()
def paths_with_spaces_and_unicode(tmp):
    "folder and files are called 'my dåta 数据' -> read right, the same run"
    run = alone(tmp)
    new = tmp / "my dåta 数据"
    shutil.copytree(tmp / "data", new)
    replace(new / "cases.csv", "scan05.nii.gz", "скан 05.nii.gz")
    scan = new / "scan05.nii.gz"
    scan.rename(new / "скан 05.nii.gz")
    fit(tmp, data=new)
    assert same(tmp / "run", run)
    return "same files"


def replace(path, old, new):
    "Change a text file"
    text = path.read_text()
    assert old in text, (path.name, old)
    text = text.replace(old, new)
    path.write_text(text)


@row()
def a_case_called_dot_dot(tmp):
    "cases.csv calls a case ../../evil, after which files would be called -> refused"
    path = tmp / "data/cases.csv"
    replace(path, "case01", "../../evil")
    return fit_refused(tmp, "../../evil")


@row()
def links_out_of_the_folder(tmp):
    "scans are symbolic links to another disk -> read right"
    run = alone(tmp)
    elsewhere = tmp / "elsewhere"
    elsewhere.mkdir()
    for f in (tmp / "data").glob("*.nii.gz"):
        moved = elsewhere / f.name
        f.rename(moved)
        f.symlink_to(moved)
    fit(tmp)
    assert same(tmp / "run", run)
    return "same files"


@row()
def a_link_that_leads_nowhere(tmp):
    "a scan is a broken symbolic link -> refused with its name"
    f = tmp / "data/scan02.nii.gz"
    f.unlink()
    f.symlink_to(tmp / "gone")
    return fit_refused(tmp, "scan02.nii.gz")


@row()
def a_hundred_thousand_files_in_the_folder(tmp):
    "100,000 other files lie beside the cases -> found within 10 s"
    data = tmp / "data"
    for i in range(100_000):
        other = data / f"{i}.txt"
        other.touch()
    start = time.perf_counter()
    found = find_dataset(data)
    seconds = time.perf_counter() - start
    assert len(found.cases) == 12
    assert seconds < 10
    return f"12 cases in {seconds:.2f} s"


@row()
def image_and_label_differ_only_in_sform(tmp):
    "the label has the image's qform and another sform -> refused, since the sform counts"
    path = tmp / "data/label04.nii.gz"
    image = nib.Nifti1Image.load(path)
    same = np.eye(4)
    image.set_qform(same, 1)
    stretched = np.diag([1, 1, 1.5, 1])
    image.set_sform(stretched, 1)
    nib.save(image, path)
    return fit_refused(tmp, "has another affine")


@contextlib.contextmanager
def replaced(module, name, new):
    "A function of a module is another one for a while"
    real = getattr(module, name)
    setattr(module, name, new)
    try:
        yield
    finally:
        setattr(module, name, real)


def poisoned(count):
    "`prepare`, whose first training cases turn NaN"
    real = folders.prepare

    def prepare(*args, **options):
        data = real(*args, **options)
        poisoned_cases = data.train[:count]
        for case in poisoned_cases:
            case.x = torch.full_like(case.x, torch.nan)
        return data

    return replaced(folders, "prepare", prepare)


@row()
def a_poisoned_case(tmp):
    """one case turns NaN after it was read -> its steps are skipped and counted, the others train,
    weights stay finite"""
    with poisoned(1):
        rows = fit(tmp, epochs=3)
    state = expect_verified(tmp / "run")
    for row in rows:
        assert row["skipped"] == 1
        assert np.isfinite(row["total"])
    assert len(rows) == 3
    for weight in state["model"].values():
        assert weight.isfinite().all()
    return "1 of 3 steps of each epoch skipped, weights finite"


@row()
def nothing_but_nan(tmp):
    "every step is NaN -> the run stops after ten, the cases named"
    named = "10 steps in a row that are not finite, the last of case"
    with poisoned(None):
        return fit_refused(tmp, named, epochs=9)


def relabelled(tmp, change):
    "Change every label map of the data set"
    paths = (tmp / "data").glob("label*.nii.gz")
    for path in sorted(paths):
        image = nib.Nifti1Image.load(path)
        labels = np.asarray(image.dataobj)
        labels = change(labels)
        labels = labels.astype(np.uint8)
        new = nib.Nifti1Image(labels, image.affine)
        nib.save(new, path)


@row()
def label_maps_without_foreground(tmp):
    "every label map is empty -> refused before anything is written"
    relabelled(tmp, np.zeros_like)
    told = fit_refused(tmp, "no label map of 10 cases has a voxel above 0")
    assert not (tmp / "run").exists()
    return told


@row()
def a_class_that_is_not_learned(tmp):
    """one class is a single voxel, where it cannot be learned -> the log says so once, with a
    remedy, even after an interruption"""

    def shrunk(labels):
        labels = np.minimum(labels, 1)
        labels[0, 0, 0] = 2
        return labels

    relabelled(tmp, shrunk)
    fit(tmp, epochs=10, stop=after(17))
    fit(tmp, epochs=10, resume=True)
    log = text_of_log(tmp).splitlines()
    lines = [line for line in log if line.startswith("label 2 is not learned")]
    assert len(lines) == 1, lines
    remedy = "below 0.1 for 2 epochs, and 10 of 10 training cases have it. Try a lower --lr"
    assert remedy in lines[0], lines
    fit(tmp, out="dice", readings={"semantic": "dice"})
    told = text_of_log(tmp, "dice")
    assert "label 2 is not learned" in told
    assert "Train with --reading semantic=dice_ce" in told
    return lines[0]


@row()
def a_name_to_leave_out_that_is_misspelt(tmp):
    """--exclude names case3, a case with its ending, or is saved as UTF-16 -> refused; with a
    byte-order mark it is read"""
    path = tmp / "out.txt"
    misspelt = {
        "case3\n": "does not have: case3",
        "case03.nii.gz\n": "Write case03 without the ending",
    }
    told = ""
    for text, why in misspelt.items():
        path.write_text(text)
        told = fit_refused(tmp, why, exclude=str(path))
    path.write_text("case03", encoding="utf-16")
    fit_refused(tmp, "no text in UTF-8", exclude=str(path))
    assert not (tmp / "run").exists()
    path.write_text("case03\n", encoding="utf-8-sig")
    fit(tmp, exclude=str(path))
    assert "case03" not in (tmp / "run/config.json").read_text()
    return told


# flag -> values that cannot work, with commas between them
WRONG = {
    "--epochs": "-3,0",
    "--lr": "nan,inf,0",
    "--batch_size": "0",
    "--width": "0,100000000",
    "--levels": "0,99",
    "--patch_size": "16 0 16",
    "--workers": "-1",
    "--cache_gb": "nan,-1",
    "--save_minutes": "-1,nan",
    "--seed": "-1,99999999999999",
    "--validation": "nan,2.5",
    "--train_cases": "0",
    "--accumulate": "9,0",
    "--readers": "0",
    "--reading": "tau=0,lambda1=nan,thickness=0,supervise=3,hard=1,entry=top,attention_relu=3,"
    "norm_head=no,semantic=ce,w_cross_entropy=-1,verbose=True",
}


@row()
def settings_that_cannot_work(tmp):
    """-3 epochs, a learning rate of nan, a batch of 0, a temperature of 0 and others -> one line,
    exit code 2, nothing is read or written"""
    data = tmp / "data"
    shutil.rmtree(data)
    err = ""
    for flag, values in WRONG.items():
        for value in values.split(","):
            given = value.split()
            line = words(tmp, flag, *given)
            code, err = said(train_main, line)
            expect_refused_setting(tmp, code, err)
    return err.strip()


def expect_refused_setting(tmp, code, err):
    "A command ended with one line that says nothing of data, and wrote nothing"
    run = tmp / "run"
    lines = err.strip().splitlines()
    assert code == 2, err
    assert len(lines) == 1, err
    assert "data" not in err, err
    assert not run.exists(), err


@row()
def an_infinite_gradient(tmp):
    "one gradient is infinite in one step -> that step is skipped, the next one is not"
    real = steps._is_bad
    calls = []

    def poke(model, values):
        calls.append(1)
        if len(calls) == 2:
            weight, *_ = model.parameters()
            gradient = weight.grad.view(-1)
            gradient[0] = torch.inf
        return real(model, values)

    with replaced(steps, "_is_bad", poke):
        rows = fit(tmp)
    assert [row["skipped"] for row in rows] == [1, 0]
    return "1 step skipped"


# --- checkpoints


def stopped(tmp):
    "The newest checkpoint of a run that was stopped"
    run = tmp / "run"
    fit(tmp, stop=after(8), epochs=4)
    found = list_checkpoints(run)
    return found[0]


def ends_as_alone(tmp):
    "What happened, after the run went on to its end"
    fit(tmp, resume=True, epochs=4)
    assert same_as_alone(tmp, epochs=4)
    return "the one before it was used, same files"


@row()
def the_newest_checkpoint_truncated(tmp):
    "the newest checkpoint is cut short -> the one before it is used"
    newest = stopped(tmp)
    cut(newest, 2000)
    return ends_as_alone(tmp)


@row()
def the_newest_checkpoint_with_a_flipped_bit(tmp):
    "one bit of the newest checkpoint flips -> the one before it is used"
    newest = stopped(tmp)
    flip_a_bit(newest, 1)
    return ends_as_alone(tmp)


@row()
def the_newest_checkpoint_empty(tmp):
    "the newest checkpoint has no bytes, as after a power cut -> the one before it is used"
    newest = stopped(tmp)
    newest.write_bytes(b"")
    return ends_as_alone(tmp)


@row()
def every_checkpoint_broken(tmp):
    "both checkpoints are broken -> refused, nothing is overwritten"
    stopped(tmp)
    found = list_checkpoints(tmp / "run")
    for path in found:
        path.write_bytes(b"x")
    told = fit_refused(tmp, "none that verifies", resume=True, epochs=4)
    for path in found:
        assert path.read_bytes() == b"x"
    return told


@row()
def a_checkpoint_of_a_newer_version(tmp):
    "the checkpoint has a newer format -> refused"
    newest = stopped(tmp)
    newer = FORMAT + 1
    state = torch.load(newest, weights_only=True)
    state["format"] = newer
    torch.save(state, newest)
    return fit_refused(tmp, "format", resume=True, epochs=4)


class _Evil:
    "Runs a command when it is unpickled"

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        path = self.path
        run_this = f"touch {path}"
        return os.system, (run_this,)


@row()
def a_checkpoint_that_is_a_malicious_pickle(tmp):
    "the newest checkpoint would run a command when unpickled -> not run, the one before it is used"
    executed = tmp / "executed"
    newest = stopped(tmp)
    state = {"format": FORMAT, "model": _Evil(executed)}
    torch.save(state, newest)
    told = ends_as_alone(tmp)
    assert not executed.exists()
    return told


@row()
def a_model_file_that_is_a_malicious_pickle(tmp):
    "model.safetensors is a pickle that would run a command -> refused, not run"
    fit(tmp)
    executed = tmp / "executed"
    evil = _Evil(executed)
    weights = tmp / "run/model.safetensors"
    torch.save(evil, weights)
    code, err = predicted(tmp)
    assert code == 2
    assert "weights that are broken" in err
    assert not executed.exists()
    return err.strip()[-100:]


@row()
def weights_of_another_network(tmp):
    "model.safetensors comes from a wider network -> refused"
    fit(tmp)
    fit(tmp, out="wide", width=6)
    wide = tmp / "wide/model.safetensors"
    own = tmp / "run/model.safetensors"
    shutil.copy(wide, own)
    code, err = predicted(tmp)
    assert code == 2
    assert "another network" in err
    assert not (tmp / "out").exists()
    return err.strip()[-100:]


@row()
def half_a_line_in_metrics_csv(tmp):
    "metrics.csv ends in the middle of a line -> written anew from the checkpoint"
    stopped(tmp)
    cut(tmp / "run/metrics.csv", -20)
    fit(tmp, resume=True, epochs=4)
    assert same_as_alone(tmp, epochs=4)
    return "same files"


@row()
def resumed_with_changed_settings(tmp):
    "resumed with another learning rate and width -> refused, both listed"
    stopped(tmp)
    told = fit_refused(tmp, "lr 0.001", resume=True, epochs=4, lr=0.1, width=8)
    assert "width 4" in told
    return told


@row()
def config_json_garbage(tmp):
    "config.json is cut short -> refused by training and prediction"
    stopped(tmp)
    cut(tmp / "run/config.json", 100)
    told = fit_refused(tmp, "something else", resume=True, epochs=4)
    code, err = predicted(tmp)
    assert code == 2
    assert "config.json" in err
    return told


@row()
def two_runs_on_one_folder(tmp):
    "a second run resumes a folder that the first one is writing -> refused; the first goes on"
    told = []

    def second(terms):
        if not told:
            message = fit_refused(tmp, "another egcnn_train that is writing", resume=True)
            told.append(message)

    fit(tmp, on_step=second)
    assert same_as_alone(tmp)
    return told[0]


@row()
def the_clock_goes_backwards(tmp):
    "the system's clock runs backwards during the run -> the same run"
    run = alone(tmp)
    hours = itertools.count(2e9, step=-3600)

    def backwards():
        return next(hours)

    with replaced(time, "time", backwards):
        fit(tmp)
    assert same(tmp / "run", run)
    return "same files"


# --- signals and processes


@row()
def sigterm(tmp):
    """SIGTERM in the middle of an epoch -> saved, exit code 0 within 10 s, a checkpoint of that
    very step"""
    process = started(tmp)
    start = time.time()
    process.terminate()
    process.communicate(timeout=30)
    seconds = time.time() - start
    assert process.returncode == 0
    assert seconds < 10
    log = text_of_log(tmp)
    assert "all of it is safe" in log
    state = checkpoint(tmp / "run")
    rows = state["rows"]
    epoch = len(rows) + 1
    step = state["step"]
    assert f"epoch {epoch} after step {step}" in log
    return f"exit code 0 after {seconds:.1f} s"


@row()
def ctrl_c_once(tmp):
    "Ctrl-C -> saved, exit code 130"
    process = started(tmp)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    log = text_of_log(tmp)
    assert "all of it is safe" in log
    return "exit code 130, saved"


# a run whose fifth step takes a minute; its first word is a file that says when that begins
SLOW_STEP = """
import sys
import time
from pathlib import Path

import egcnn_nb.run.training as training
from egcnn_nb.commands.train import main

real = training.train_step
calls = []


def slow(*args, **options):
    calls.append(1)
    if len(calls) == 5:
        Path(sys.argv[1]).touch()
        for _ in range(1200):
            time.sleep(0.05)
    return real(*args, **options)


training.train_step = slow
sys.exit(main(sys.argv[2:]))
"""


@row()
def ctrl_c_twice(tmp):
    """Ctrl-C twice, the second in the middle of a long step -> exits at once, the last checkpoint
    verifies"""
    in_a_step = tmp / "in a step"
    line = [sys.executable, "-c", SLOW_STEP, in_a_step, *words(tmp)]
    process = subprocess.Popen(
        [str(word) for word in line],
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        preexec_fn=take_ctrl_c,
    )
    while not in_a_step.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    start = time.time()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    seconds = time.time() - start
    assert process.returncode == 130
    assert seconds < 5
    assert len(checkpoint(tmp / "run")["rows"]) == 1
    return f"exit code 130 after {seconds:.1f} s, checkpoint of epoch 1"


@row()
def a_loader_worker_killed(tmp):
    "SIGKILL to a loader's process -> one line, exit code 1, the last checkpoint verifies"
    process = started(tmp, "--workers", 1)
    worker = first_child(process)
    os.kill(worker, signal.SIGKILL)
    return expect_worker_died(process, tmp)


def first_child(process):
    "The first process that a process has started"
    first, *_ = children(process.pid)
    return first


def expect_worker_died(process, tmp):
    "The last line of a run whose loader died; its last checkpoint verifies"
    run = tmp / "run"
    _, err = process.communicate(timeout=120)
    told = last_line(err)
    assert process.returncode == 1, err
    assert told.startswith("error: A data-loader worker died"), err
    expect_verified(run)
    return told[:110]


@row()
def a_loader_worker_out_of_memory(tmp):
    """a loader's process may have no more memory -> one line, exit code 1, the last checkpoint
    verifies"""
    process = started(tmp, "--workers", 1, "--augment", "flip", "noise")
    worker = first_child(process)
    mib = 1 << 20
    limits = (mib, mib)
    resource.prlimit(worker, resource.RLIMIT_AS, limits)
    return expect_worker_died(process, tmp)


def two_ranks(tmp, epochs):
    "A run on two processes"
    flags = ["--epochs", epochs, "--cache", tmp / "cache"]
    return subprocess.Popen(
        command(tmp / "data", tmp / "run", *flags, processes=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )


def last_rank(process, tmp):
    "The last process of a run that has begun"
    run = tmp / "run"
    begun(process, run)
    *_, rank = children(process.pid)
    return rank


def totals(run):
    "The column total of metrics.csv"
    values = []
    for row in read_metrics(run):
        total = row["total"]
        values.append(total)
    return np.array(values)


@row(slow=True)
def one_rank_slow(tmp):
    """one of two processes is held for three seconds -> the other waits, the run ends with the
    losses of one process"""
    process = two_ranks(tmp, epochs=30)
    rank = last_rank(process, tmp)
    os.kill(rank, signal.SIGSTOP)
    time.sleep(3)
    os.kill(rank, signal.SIGCONT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-2000:]
    one = alone(tmp, epochs=30)
    of_two = totals(tmp / "run")
    of_one = totals(one)
    ratio = of_two / of_one
    gap = np.abs(ratio - 1).max()
    assert gap < 1e-4
    return f"losses differ by {gap:.0e}"


@row(slow=True)
def one_rank_dead(tmp):
    """SIGKILL to one of two processes -> the other leaves with one line, the last checkpoint
    verifies"""
    process = two_ranks(tmp, epochs=400)
    rank = last_rank(process, tmp)
    os.kill(rank, signal.SIGKILL)
    start = time.time()
    _, err = process.communicate(timeout=100)
    seconds = time.time() - start
    assert process.returncode
    ours, _, _ = err.partition("torch/distributed/elastic")
    assert "Traceback" not in ours
    expect_verified(tmp / "run")
    return f"all gone after {seconds:.0f} s"


@row(slow=True)
def rendezvous_port_taken(tmp):
    "another program listens on the port of the rendezvous -> torchrun says so, nothing is written"
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        _, port = s.getsockname()
        launch = f"--nnodes=2 --node_rank=0 --master_addr=127.0.0.1 --master_port={port}".split()
        line = command(tmp / "data", tmp / "run", launch=launch)
        done = subprocess.run(line, capture_output=True, text=True, timeout=200, env=ENV)
    assert done.returncode
    printed = done.stderr + done.stdout
    assert "EADDRINUSE" in printed
    assert not (tmp / "run").exists()
    return "EADDRINUSE, exit code 1"


# --- files of others


def bad_scan(tmp, change, text):
    "What is told of a scan whose bytes are changed"
    path = tmp / "data/scan01.nii.gz"
    packed = path.read_bytes()
    content = gzip.decompress(packed)
    changed = change(bytearray(content))
    path.write_bytes(changed)
    return fit_refused(tmp, text)


def pack(data):
    "Bytes, packed as gzip packs them"
    content = bytes(data)
    return gzip.compress(content)


def put(at, kind, value):
    "A change that writes a field and packs the file again"

    def change(data):
        field = np.array(value, kind).tobytes()
        end = at + len(field)
        data[at:end] = field
        return pack(data)

    return change


def with_zeros(data):
    "A file that unpacks to a thousand times its size"
    size = 1 << 28
    zeros = bytes(size)
    return pack(data + zeros)


def wrong_checksum(data):
    "A file whose checksum has a bit that is flipped"
    packed = bytearray(pack(data))
    packed[-8] ^= 1
    return bytes(packed)


def without_end(data):
    "A file that is cut off"
    packed = pack(data)
    return packed[:-200]


BYTES = {
    "a_header_that_promises_70_terabytes": (put(42, "<i2", [32767] * 3), "promises"),
    "voxels_that_begin_in_the_header": (put(108, "<f4", 0), "begin at byte 0"),
    "an_unknown_sform_code": (put(254, "<i2", 99), "sform_code 99"),
    "an_affine_of_nan": (put(280, "<f4", np.nan), "the affine"),
    "a_slope_of_infinity": (put(112, "<f4", np.inf), "slope inf"),
    "a_slope_beyond_float32": (put(112, "<f4", 3.4e38), "NaN or infinite"),
    "a_dimension_of_zero": (put(44, "<i2", 0), "shape"),
    "a_gzip_of_1000_to_1": (with_zeros, "more than a MiB behind"),
    "a_wrong_gzip_checksum": (wrong_checksum, "CRC check failed"),
    "a_scan_without_its_end": (without_end, "cannot be read"),
    "colours": (put(70, "<i2", 128), "type 128"),
}


def add_bad_scan(name, change, text):
    "Register a row about a scan whose bytes are changed"

    def fault(tmp):
        return bad_scan(tmp, change, text)

    fault.__name__ = name
    fault.__doc__ = (
        f"{name.replace('_', ' ')}, in one of twelve scans -> "
        "refused before anything is written, the file named"
    )
    row()(fault)


for _name, (_change, _text) in BYTES.items():
    add_bad_scan(_name, _change, _text)


@row()
def a_network_without_bounds(tmp):
    "config.json asks for 10^20 levels, or for 10^8 channels -> refused at once"
    fit(tmp)
    path = tmp / "run/config.json"
    whole = path.read_text()
    told = []
    beyond = {"levels": (2, 10**20), "width": (4, 10**8)}
    for name, (old, new) in beyond.items():
        changed = whole.replace(f'"{name}": {old}', f'"{name}": {new}')
        assert changed != whole
        path.write_text(changed)
        start = time.perf_counter()
        code, err = predicted(tmp)
        seconds = time.perf_counter() - start
        assert code == 2, err
        assert name in err, err
        assert seconds < 5, err
        told.append(err.strip()[:90])
    return told[0]


@row()
def dataset_json_garbage(tmp):
    "dataset.json is a list, deep nesting, or cut short -> refused"
    (tmp / "other").mkdir()
    told = []
    garbage = {
        "[" * 100_000: "",
        '{"modality": 3, "labels": [], "training": 7}': "",
        '{"channel_names": {"x": 1}, "labels": {"a": "b"}}': "",
        "{": "dataset.json",
    }
    for text, why in garbage.items():
        (tmp / "other/dataset.json").write_text(text)
        message = refused(lambda: find_dataset(tmp / "other"), why)
        told.append(message)
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


def in_one_line(text):
    "Words with one space between them"
    text = str(text)
    words = text.split()
    return " ".join(words)


def table_row(name, ok, text):
    "A row of the table in Markdown"
    function = ROWS[name]
    about = in_one_line(function.__doc__)
    done, must = about.split(" -> ")
    title = name.replace("_", " ")
    happened = in_one_line(text)
    if ok is None:
        happened = f"skipped: {happened}"
    elif not ok:
        happened = f"FAILED: {text}"
    row = f"| {title} | {done} | {must} | {happened} |"
    return row.replace(tempfile.gettempdir(), "TMP")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--slow", action="store_true", help="the slow rows too")
    args = parser.parse_args()
    names = args.names
    if not names:
        names = [name for name, fault in ROWS.items() if args.slow or not fault.slow]
    failed = 0
    torch.set_num_threads(1)
    print("| fault | what is done | what must be true | what happened |\n|---|---|---|---|")
    for name in names:
        ok, text = run_row(name)
        if ok is False:
            failed += 1
        print(table_row(name, ok, text), flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
