"""Seconds from the command to a mean validation Dice of 0.85 on the Decathlon's hippocampus: egcnn_train beside MONAI as its tutorials use it.

    python benchmarks/time_to_dice.py DATA --exclude FILE --tune        # each side tries the same learning rates and lengths, on a seed of its own
    python benchmarks/time_to_dice.py DATA --exclude FILE               # the best of each, seeds 0 to 4, in turn; a table
    python benchmarks/time_to_dice.py DATA --exclude FILE --sides "Seg-Net + consistency loss + cross entropy" --lr 2e-3 --epochs 8       # others than the best

Imports, loading, caching (into an empty folder) and validation count. All sides: the same 100 cases for training and 28 for validation, whatever the seed;
batches of 2 patches of 40x56x40, intensity shifted and scaled (--mirror: and mirrored along each axis); validation after each epoch, mean Dice of two classes over cases; width 8 and
3 levels (MONAI's UNet: its own 16 to 128); bfloat16 on both sides where the processor has it (--fp32: on neither)."""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

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
BEST = {
    "EG-CNN": (3e-3, 6),
    "EG-CNN + cross entropy": (3e-3, 12),
    "Seg-Net + consistency loss + cross entropy": (1e-3, 12),
    "MONAI SegResNet": (3e-3, 6),
    "MONAI UNet": (3e-3, 6),
    "EG-CNN, plain head": (1e-3, 12),
    "Seg-Net + cross entropy, plain head": (1e-3, 6),
    "Seg-Net + consistency loss + cross entropy, plain head": (1e-3, 6),
}  # the fastest of its four, not mirrored


def split(args):
    "Training and validation cases"
    from egcnn_nb.data.layouts import find_dataset
    from egcnn_nb.data.patches import split_cases

    out = set(Path(args.exclude).read_text().split())
    return split_cases(
        [c for c in find_dataset(args.data).cases if c.label and c.name not in out], 0, VALIDATION
    )


def monai(args):
    "MONAI's side: CacheDataset, DiceCELoss, AdamW, cosine decay; a line of JSON after each validation"
    train, val = split(args)
    import torch
    from monai import transforms as T
    from monai.data import CacheDataset, DataLoader
    from monai.inferers import sliding_window_inference
    from monai.losses import DiceCELoss
    from monai.metrics import DiceMetric
    from monai.networks.nets import SegResNet, UNet
    from monai.utils import set_determinism

    from egcnn_nb.run.models import autocast, best_precision

    set_determinism(args.seed)
    cpu = torch.device("cpu")
    precision = "fp32" if args.fp32 else best_precision(cpu)
    keys = ["x", "y"]
    files = lambda cases: [{"x": str(c.images[0]), "y": str(c.label)} for c in cases]
    steady = [
        T.LoadImaged(keys),
        T.EnsureChannelFirstd(keys),
        T.Orientationd(keys, "RAS"),
        T.NormalizeIntensityd("x"),
    ]
    chance = [
        T.SpatialPadd(keys, PATCH),
        T.RandSpatialCropd(keys, PATCH, random_size=False),
        *[T.RandFlipd(keys, 0.5, a) for a in range(3) if args.mirror],
        T.RandScaleIntensityd("x", 0.1, 1),
        T.RandShiftIntensityd("x", 0.1, prob=1),
    ]
    loader = DataLoader(
        CacheDataset(files(train), T.Compose(steady + chance), progress=False), 2, shuffle=True
    )
    held = DataLoader(CacheDataset(files(val), T.Compose(steady), progress=False), 1)
    net = (
        SegResNet(3, 8, 1, 3, blocks_down=(1, 2, 2), blocks_up=(1, 1))
        if args.one == "MONAI SegResNet"
        else UNet(3, 1, 3, (16, 32, 64, 128), (2, 2, 2), num_res_units=2)
    )
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(net.parameters(), args.lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    dice = DiceMetric(include_background=False)
    one_hot = T.AsDiscrete(to_onehot=3)
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
            for batch in held:
                out = sliding_window_inference(batch["x"], PATCH, 2, net, 0.25)
                dice([one_hot(out[0].argmax(0, keepdim=True))], [one_hot(batch["y"][0])])
        print(json.dumps({"epoch": epoch + 1, "dice": dice.aggregate().item()}), flush=True)
        dice.reset()


def words(name, args, seed, lr, epochs, folder):
    "The command of a side"
    shared = [
        args.data,
        "--exclude",
        args.exclude,
        "--seed",
        str(seed),
        "--lr",
        str(lr),
        "--epochs",
        str(epochs),
    ]
    if name not in OURS:
        return [
            sys.executable,
            __file__,
            *shared,
            "--one",
            name,
            *["--fp32"] * args.fp32,
            *["--mirror"] * args.mirror,
        ]
    return [
        sys.executable,
        "-m",
        "egcnn_nb.train",
        *shared,
        "--out",
        f"{folder}/run",
        "--cache",
        f"{folder}/cache",
        "--validation",
        f"{folder}/validation.txt",
        *OURS[name],
        "--width",
        "8",
        "--levels",
        "3",
        "--patch_size",
        *map(str, PATCH),
        "--precision",
        "fp32" if args.fp32 else "auto",
        "--augment",
        *["flip"] * args.mirror,
        "intensity",
    ]


def reach(name, args, seed, lr, epochs):
    "Run a side until the goal is reached: (seconds, epoch, Dice) of each validation"
    with (
        tempfile.TemporaryDirectory() as tmp,
        open(f"{tmp}/errors.txt", "w+") as errors,
    ):  # files and not pipes: a pipe that nobody reads fills, and the run waits for ever
        (Path(tmp) / "validation.txt").write_text("\n".join(c.name for c in split(args)[1]))
        start = time.time()
        found = []
        ours = name in OURS
        run = subprocess.Popen(
            words(name, args, seed, lr, epochs, tmp),
            stdout=subprocess.DEVNULL if ours else subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            for dice in (
                followed(run, Path(tmp) / "run/log.txt")
                if ours
                else (json.loads(l)["dice"] for l in run.stdout or ())
            ):
                found.append((round(time.time() - start, 1), len(found) + 1, round(dice, 4)))
                if dice >= GOAL:
                    break
        finally:
            run.kill()
            run.wait()
        errors.seek(0)
        assert found, errors.read()
        return found


def followed(run, log):
    "Dice of each epoch, as it appears in log.txt"
    seen = 0
    while True:
        done = run.poll() is not None
        epochs = (
            [l for l in log.read_text().splitlines() if l.startswith("epoch ")]
            if log.exists()
            else []
        )
        yield from (float(l.split(" dice ")[1].split()[0]) for l in epochs[seen:])
        seen = len(epochs)
        if done:
            return
        time.sleep(0.05)


def told(name, args, seed, lr, epochs):
    "Run a side and print its line; seconds to the goal"
    found = reach(name, args, seed, lr, epochs)
    (seconds, epoch, dice) = found[-1]
    best = max(d for *_, d in found)
    print(
        f"| {name} | {seed} | {lr:g} | {epochs} | {f'{seconds:.0f}' if dice >= GOAL else f'not within {seconds:.0f}'} | {epoch} | {best:.4f} |",
        flush=True,
    )
    if args.csv:
        keep(
            args.csv,
            [
                name,
                seed,
                lr,
                epochs,
                args.mirror,
                "fp32" if args.fp32 else "auto",
                os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
                seconds,
                epoch,
                dice >= GOAL,
                best,
                " ".join(f"{s}:{d}" for s, _, d in found),
            ],
        )
    return seconds if dice >= GOAL else float("inf")


def keep(path, row):
    "Append a run to a file"
    new = not Path(path).exists()
    with open(path, "a", newline="") as f:
        csv.writer(f).writerows([COLUMNS, row] if new else [row])


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("data")
    p.add_argument(
        "--exclude",
        required=True,
        metavar="FILE",
        help="names of the test cases, which nobody sees",
    )
    p.add_argument("--tune", action="store_true", help="try, on seed 100")
    p.add_argument("--sides", nargs="*", default=list(BEST), choices=list(BEST), metavar="SIDE")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--fp32", action="store_true", help="no bfloat16")
    p.add_argument("--mirror", action="store_true", help="mirror along each axis, half of the time")
    p.add_argument("--csv", metavar="FILE", help="append the runs there")
    p.add_argument(
        "--lr",
        type=float,
        help="learning rate of all sides, in place of the best of each; not for --tune",
    )
    p.add_argument("--epochs", type=int, help="and their number of epochs")
    p.add_argument("--one", help=argparse.SUPPRESS)
    p.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        return monai(args)
    if args.csv and Path(args.csv).exists():
        assert Path(args.csv).read_text().partition("\n")[0].split(",") == COLUMNS, (
            f"{args.csv}: found other columns, expected {COLUMNS}: choose another file"
        )
    print(
        f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}\n\n| side | seed | learning rate | epochs | seconds to {GOAL} | epochs run | best Dice |\n|---|---|---|---|---|---|---|"
    )
    if args.tune:
        for (lr, epochs), name in product(product(RATES, EPOCHS[args.mirror]), args.sides):
            told(name, args, 100, lr, epochs)
        return
    seconds = {n: [] for n in args.sides}
    for seed, name in product(range(args.seeds), args.sides):
        seconds[name].append(
            told(name, args, seed, args.lr or BEST[name][0], args.epochs or BEST[name][1])
        )
    print(
        "\n| side | median seconds |\n|---|---|\n"
        + "\n".join(f"| {n} | {statistics.median(s):.0f} |" for n, s in seconds.items())
    )


if __name__ == "__main__":
    main()
