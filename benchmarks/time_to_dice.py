"""Seconds from the command to a mean validation Dice of 0.85 on the Decathlon's hippocampus:
egcnn_train beside MONAI as its tutorials use it.

    python benchmarks/time_to_dice.py DATA --exclude FILE --tune
    python benchmarks/time_to_dice.py DATA --exclude FILE
    python benchmarks/time_to_dice.py DATA --exclude FILE --lr 2e-3 --epochs 8 \\
        --sides "Seg-Net + consistency loss + cross entropy"

With --tune each side tries the same learning rates and lengths, on a seed of its own. Without it, each
side runs at its best, or with the rate and length that are given, seeds 0 to 4, in turn.

Imports, loading, caching (into an empty folder) and validation count. All sides: the same 100 cases
for training and 28 for validation, whatever the seed; batches of 2 patches of 40x56x40, intensity
shifted and scaled (--mirror: and mirrored along each axis); validation after each epoch, mean Dice of
two classes over cases; width 8 and 3 levels (MONAI's UNet: its own 16 to 128); bfloat16 on both sides
where the processor has it (--fp32: on neither)."""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOAL = 0.85
PATCH = (40, 56, 40)
VALIDATION = 28
# tried by each side; learning takes longer where patches are mirrored
RATES = (1e-3, 3e-3)
EPOCHS = {False: (6, 12), True: (12, 20)}
COLUMNS = [
    "side",
    "seed",
    "lr",
    "epochs",
    "mirror",
    "precision",
    "threads",
    "seconds",
    "epochs run",
    "reached",
    "best dice",
    "curve",
]
DICE = ["--reading", "semantic=dice"]
ENTROPY = ["--reading", "semantic=dice_ce"]
CONSISTENT = ["--edge", "off", "--reading", "consistency_alone=True"]
PLAIN = ["--reading", "norm_head=False"]
OURS = {
    "EG-CNN": ["--edge", "on", *DICE],
    "EG-CNN + cross entropy": ["--edge", "on", *ENTROPY],
    "Seg-Net + consistency loss + cross entropy": [*CONSISTENT, *ENTROPY],
    "EG-CNN, plain head": ["--edge", "on", *DICE, *PLAIN],
    "Seg-Net + cross entropy, plain head": ["--edge", "off", *ENTROPY, *PLAIN],
    "Seg-Net + consistency loss + cross entropy, plain head": [*CONSISTENT, *ENTROPY, *PLAIN],
}
BEST: dict[str, tuple[float, int]] = {
    "EG-CNN": (3e-3, 6),
    "EG-CNN + cross entropy": (3e-3, 12),
    "Seg-Net + consistency loss + cross entropy": (1e-3, 12),
    "MONAI SegResNet": (3e-3, 6),
    "MONAI UNet": (3e-3, 6),
    "EG-CNN, plain head": (1e-3, 12),
    "Seg-Net + cross entropy, plain head": (1e-3, 6),
    "Seg-Net + consistency loss + cross entropy, plain head": (1e-3, 6),
}  # the fastest of its four, not mirrored


@dataclass
class Trial:
    "One run of a side"

    side: str
    seed: int
    lr: float
    epochs: int


@dataclass
class Validation:
    "What a side said after an epoch"

    seconds: float  # since the command
    epoch: int  # from 1
    dice: float


def split(args):
    "Training and validation cases"
    from egcnn_nb.data.layouts import find_dataset
    from egcnn_nb.data.patches import split_cases

    text = Path(args.exclude).read_text()
    left_out = set(text.split())
    dataset = find_dataset(args.data)
    labelled = [case for case in dataset.cases if case.label]
    cases = [case for case in labelled if case.name not in left_out]
    return split_cases(cases, 0, VALIDATION)


# ---- MONAI's side


def monai_transforms(mirror):
    "Transforms without chance, and those with it"
    from monai import transforms as T

    keys = ["x", "y"]
    steady = [
        T.LoadImaged(keys),
        T.EnsureChannelFirstd(keys),
        T.Orientationd(keys, "RAS"),
        T.NormalizeIntensityd("x"),
    ]
    chance = [T.SpatialPadd(keys, PATCH), T.RandSpatialCropd(keys, PATCH, random_size=False)]
    if mirror:
        chance += [T.RandFlipd(keys, 0.5, axis) for axis in range(3)]
    chance += [
        T.RandScaleIntensityd("x", 0.1, 1),
        T.RandShiftIntensityd("x", 0.1, prob=1),
    ]
    return steady, chance


def monai_loaders(args):
    "Loaders of the training and of the validation cases"
    from monai import transforms as T
    from monai.data import CacheDataset, DataLoader

    def dataset(cases, transforms):
        files = []
        for case in cases:
            image = str(case.images[0])
            files.append({"x": image, "y": str(case.label)})
        transform = T.Compose(transforms)
        return CacheDataset(files, transform, progress=False)

    train, validation = split(args)
    steady, chance = monai_transforms(args.mirror)
    seen = dataset(train, [*steady, *chance])
    held_out = dataset(validation, steady)
    return DataLoader(seen, 2, shuffle=True), DataLoader(held_out, 1)


def monai_network(side):
    "MONAI's SegResNet, or its UNet"
    from monai.networks.nets import SegResNet, UNet

    if side == "MONAI SegResNet":
        down, up = (1, 2, 2), (1, 1)
        return SegResNet(3, 8, 1, 3, blocks_down=down, blocks_up=up)
    channels = (16, 32, 64, 128)
    strides = (2, 2, 2)
    return UNet(3, 1, 3, channels, strides, num_res_units=2)


def monai_dice(net, loader):
    "Mean Dice over the validation cases"
    from monai import transforms as T
    from monai.inferers import sliding_window_inference
    from monai.metrics import DiceMetric

    dice = DiceMetric(include_background=False)
    one_hot: Any = T.AsDiscrete(to_onehot=3)
    for batch in loader:
        out = sliding_window_inference(batch["x"], PATCH, 2, net, 0.25)
        predicted = one_hot(out[0].argmax(0, keepdim=True))
        dice([predicted], [one_hot(batch["y"][0])])
    mean: Any = dice.aggregate()
    return mean.item()


def monai(args):
    """MONAI's side: CacheDataset, DiceCELoss, AdamW, cosine decay; a line of JSON after each
    validation"""
    import torch
    from monai.losses import DiceCELoss
    from monai.utils import set_determinism

    from egcnn_nb.run.models import autocast, best_precision

    set_determinism(args.seed)
    cpu = torch.device("cpu")
    precision = "fp32" if args.fp32 else best_precision(cpu)
    loader, held_out = monai_loaders(args)
    net = monai_network(args.one)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(net.parameters(), args.lr)
    steps = args.epochs * len(loader)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(args.epochs):
        net.train()
        for batch in loader:
            optimizer.zero_grad()
            with autocast(precision, cpu):
                out = net(batch["x"])
            loss(out.float(), batch["y"]).backward()
            optimizer.step()
            decay.step()
        net.eval()
        with torch.no_grad(), autocast(precision, cpu):
            dice = monai_dice(net, held_out)
        print(json.dumps({"epoch": epoch + 1, "dice": dice}), flush=True)


# ---- both sides


def words(trial, args, folder):
    "The command of a side"
    shared = [args.data, "--exclude", args.exclude]
    shared += ["--seed", str(trial.seed), "--lr", str(trial.lr)]
    shared += ["--epochs", str(trial.epochs)]
    if trial.side in OURS:
        own = our_words(trial, args, folder)
        return [sys.executable, "-m", "egcnn_nb.train", *shared, *own]
    command = [sys.executable, __file__, *shared, "--one", trial.side]
    if args.fp32:
        command.append("--fp32")
    if args.mirror:
        command.append("--mirror")
    return command


def our_words(trial, args, folder):
    "The flags of egcnn_train that MONAI's side does not have"
    found = ["--out", f"{folder}/run", "--cache", f"{folder}/cache"]
    found += ["--validation", f"{folder}/validation.txt", *OURS[trial.side]]
    found += ["--width", "8", "--levels", "3"]
    found += ["--patch_size", *[str(n) for n in PATCH]]
    found += ["--precision", precision_of(args)]
    found += ["--augment", "intensity"]
    if args.mirror:
        found.append("flip")
    return found


def precision_of(args):
    "The precision of our side"
    return "fp32" if args.fp32 else "auto"


def reach(trial, args):
    "Run a side until the goal is reached: its validations"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, validation = split(args)
        names = [case.name for case in validation]
        text = "\n".join(names)
        (folder / "validation.txt").write_text(text)
        # files and not pipes: a pipe that nobody reads fills, and the run waits for ever
        with open(folder / "errors.txt", "w+") as errors:
            found = validations(trial, args, folder, errors)
            errors.seek(0)
            assert found, errors.read()
    return found


def validations(trial, args, folder, errors):
    "Start a side, read its validations until the goal is reached, and end it"
    ours = trial.side in OURS
    start = time.time()
    run = subprocess.Popen(
        words(trial, args, folder),
        stdout=subprocess.DEVNULL if ours else subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    found = []
    try:
        for dice in followed(run, folder / "run/log.txt") if ours else printed(run):
            seconds = round(time.time() - start, 1)
            found.append(Validation(seconds, len(found) + 1, round(dice, 4)))
            if dice >= GOAL:
                break
    finally:
        run.kill()
        run.wait()
    return found


def printed(run):
    "Dice of each epoch, as MONAI's side prints it"
    for line in run.stdout:
        yield json.loads(line)["dice"]


def followed(run, log):
    "Dice of each epoch, as it appears in log.txt"
    seen = 0
    while True:
        done = run.poll() is not None
        lines = log.read_text().splitlines() if log.exists() else []
        epochs = [line for line in lines if line.startswith("epoch ")]
        for line in epochs[seen:]:
            _, _, rest = line.partition(" dice ")
            yield float(rest.split()[0])
        seen = len(epochs)
        if done:
            return
        time.sleep(0.05)


def told(trial, args):
    "Run a side and print its line; seconds to the goal"
    found = reach(trial, args)
    last = found[-1]
    best = max(validation.dice for validation in found)
    reached = last.dice >= GOAL
    seconds = f"{last.seconds:.0f}"
    if not reached:
        seconds = f"not within {seconds}"
    about = f"{trial.side} | {trial.seed} | {trial.lr:g} | {trial.epochs}"
    print(f"| {about} | {seconds} | {last.epoch} | {best:.4f} |", flush=True)
    if args.csv:
        row = row_of(trial, args, found)
        keep(args.csv, row)
    return last.seconds if reached else float("inf")


def row_of(trial, args, found):
    "A run as a row of the file, in the order of COLUMNS"
    last = found[-1]
    curve = [f"{validation.seconds}:{validation.dice}" for validation in found]
    return [
        trial.side,
        trial.seed,
        trial.lr,
        trial.epochs,
        args.mirror,
        precision_of(args),
        os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
        last.seconds,
        last.epoch,
        last.dice >= GOAL,
        max(validation.dice for validation in found),
        " ".join(curve),
    ]


def keep(path, row):
    "Append a run to a file"
    new = not Path(path).exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(row)


def arguments():
    "What the command line says"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("data")
    unseen = "names of the test cases, which nobody sees"
    flag("--exclude", required=True, metavar="FILE", help=unseen)
    flag("--tune", action="store_true", help="try, on seed 100")
    flag("--sides", nargs="*", default=list(BEST), choices=list(BEST), metavar="SIDE")
    flag("--seeds", type=int, default=5)
    flag("--fp32", action="store_true", help="no bfloat16")
    flag("--mirror", action="store_true", help="mirror along each axis, half of the time")
    flag("--csv", metavar="FILE", help="append the runs there")
    rate = "learning rate of all sides, in place of the best of each; not for --tune"
    flag("--lr", type=float, help=rate)
    flag("--epochs", type=int, help="and their number of epochs")
    flag("--one", help=argparse.SUPPRESS)
    flag("--seed", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def expect_columns(path):
    "Fail unless a file of runs, if there is one, has the columns of today"
    if path and Path(path).exists():
        text = Path(path).read_text()
        first, _, _ = text.partition("\n")
        columns = first.split(",")
        message = f"{path}: found other columns, expected {COLUMNS}: choose another file"
        assert columns == COLUMNS, message


def tune(args):
    "Try every learning rate and length on every side"
    lengths = EPOCHS[args.mirror]
    for lr in RATES:
        for epochs in lengths:
            for side in args.sides:
                told(Trial(side, 100, lr, epochs), args)


def compare(args):
    "Run every side with every seed, and print the medians"
    seconds = {side: [] for side in args.sides}
    for seed in range(args.seeds):
        for side in args.sides:
            lr, epochs = BEST[side]
            trial = Trial(side, seed, args.lr or lr, args.epochs or epochs)
            spent = told(trial, args)
            seconds[side].append(spent)
    print("\n| side | median seconds |\n|---|---|")
    for side, spent in seconds.items():
        median = statistics.median(spent)
        print(f"| {side} | {median:.0f} |")


def main():
    args = arguments()
    if args.one:
        return monai(args)
    expect_columns(args.csv)
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print(f"{os.cpu_count()} cores, OMP_NUM_THREADS={threads}\n")
    print(
        f"| side | seed | learning rate | epochs | seconds to {GOAL} | epochs run | best Dice |\n"
        "|---|---|---|---|---|---|---|"
    )
    if args.tune:
        tune(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
