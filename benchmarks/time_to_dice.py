"""Seconds from the command to a mean validation Dice of 0.85 on the Decathlon's hippocampus: egcnn_train beside MONAI as its tutorials use it.

    python benchmarks/time_to_dice.py DATA --exclude FILE --tune        # each side tries the same learning rates and lengths, on a seed of its own
    python benchmarks/time_to_dice.py DATA --exclude FILE               # the best of each, seeds 0 to 4, in turn; a table

Imports, loading, caching (into an empty folder) and validation count. All sides: 100 cases for training and 28 for validation, the same ones; batches of 2
patches of 40x56x40, mirrored, intensity shifted and scaled; width 8, 3 levels (MONAI's UNet: its own 16 to 128); Dice of two classes, mean over cases."""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

GOAL, PATCH, TRAIN, VALIDATION = .85, (40, 56, 40), 100, 28
TRIALS = ((1e-3, 10), (3e-3, 10))                                                     # learning rate, epochs
BEST = {"EG-CNN": (3e-3, 10), "our Seg-Net": (3e-3, 10), "MONAI SegResNet": (3e-3, 10), "MONAI UNet": (3e-3, 10)}

def split(data, exclude, seed):
    "Training and validation cases, as egcnn_train splits them"
    from egcnn_nb.patches import split_cases
    from egcnn_nb.layouts import find_dataset
    out = set(Path(exclude).read_text().split())
    return split_cases([c for c in find_dataset(data).cases if c.label and c.name not in out], seed, VALIDATION)

def monai(name, data, exclude, seed, lr, epochs):
    "MONAI's side: CacheDataset, DiceCELoss, AdamW, cosine decay; a line of JSON after each validation"
    train, val = split(data, exclude, seed)
    import torch
    from monai import transforms as T
    from monai.data import CacheDataset, DataLoader
    from monai.inferers import sliding_window_inference
    from monai.losses import DiceCELoss
    from monai.metrics import DiceMetric
    from monai.networks.nets import SegResNet, UNet
    from monai.utils import set_determinism
    set_determinism(seed)
    keys, files = ["x", "y"], lambda cases: [{"x": str(c.images[0]), "y": str(c.label)} for c in cases]
    steady = [T.LoadImaged(keys), T.EnsureChannelFirstd(keys), T.Orientationd(keys, "RAS"), T.NormalizeIntensityd("x")]
    chance = [T.SpatialPadd(keys, PATCH), T.RandSpatialCropd(keys, PATCH, random_size=False), *[T.RandFlipd(keys, .5, a) for a in range(3)], T.RandScaleIntensityd("x", .1, 1), T.RandShiftIntensityd("x", .1, prob=1)]
    loader = DataLoader(CacheDataset(files(train), T.Compose(steady+chance), progress=False), 2, shuffle=True)
    held = DataLoader(CacheDataset(files(val), T.Compose(steady), progress=False), 1)
    net = SegResNet(3, 8, 1, 3, blocks_down=(1, 2, 2), blocks_up=(1, 1)) if name == "MONAI SegResNet" else UNet(3, 1, 3, (16, 32, 64, 128), (2, 2, 2), num_res_units=2)
    loss, optimizer = DiceCELoss(to_onehot_y=True, softmax=True), torch.optim.AdamW(net.parameters(), lr)
    decay, dice, one_hot = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs*len(loader)), DiceMetric(include_background=False), T.AsDiscrete(to_onehot=3)
    for epoch in range(epochs):
        net.train()
        for batch in loader:
            optimizer.zero_grad(); loss(net(batch["x"]), batch["y"]).backward(); optimizer.step(); decay.step()
        net.eval()
        with torch.no_grad():
            for batch in held:
                out = sliding_window_inference(batch["x"], PATCH, 2, net, .25)
                dice([one_hot(out[0].argmax(0, keepdim=True))], [one_hot(batch["y"][0])])
        print(json.dumps({"epoch": epoch+1, "dice": dice.aggregate().item()}), flush=True); dice.reset()

def words(name, data, exclude, seed, lr, epochs, folder):
    "The command of a side"
    if name.startswith("MONAI"): return [sys.executable, __file__, data, "--exclude", exclude, "--one", name, "--seed", str(seed), "--lr", str(lr), "--epochs", str(epochs)]
    return [sys.executable, "-m", "egcnn_nb.train", data, "--exclude", exclude, "--out", f"{folder}/run", "--cache", f"{folder}/cache", "--validation", str(VALIDATION), "--seed", str(seed), "--lr", str(lr), "--epochs", str(epochs),
            "--edge", "on" if name == "EG-CNN" else "off", "--width", "8", "--levels", "3", "--patch_size", *map(str, PATCH)]

def reach(name, data, exclude, seed, lr, epochs):
    "Run a side until the goal is reached: (seconds, epoch, Dice) of each validation"
    with tempfile.TemporaryDirectory() as tmp:
        start, found, log = time.time(), [], Path(tmp)/"run/log.txt"
        run = subprocess.Popen(words(name, data, exclude, seed, lr, epochs, tmp), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if name.startswith("MONAI"): lines = (json.loads(l)["dice"] for l in run.stdout)
        else: lines = followed(run, log)
        for dice in lines:
            found.append((round(time.time()-start, 1), len(found)+1, round(dice, 4)))
            if dice >= GOAL: break
        run.kill(); error = run.communicate()[1]
        assert found, error
        return found

def followed(run, log):
    "Dice of each epoch, as it appears in log.txt"
    seen = 0
    while True:
        done = run.poll() is not None
        epochs = [l for l in log.read_text().splitlines() if l.startswith("epoch ")] if log.exists() else []
        yield from (float(l.split(" dice ")[1].split()[0]) for l in epochs[seen:])
        seen = len(epochs)
        if done: return
        time.sleep(.05)

def told(name, seed, lr, epochs, found):
    seconds, epoch, dice = found[-1]
    print(f"| {name} | {seed} | {lr:g} | {epochs} | {f'{seconds:.0f}' if dice >= GOAL else 'not reached'} | {epoch} | {max(d for *_, d in found):.4f} |", flush=True)
    return seconds if dice >= GOAL else float("inf")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("data"); p.add_argument("--exclude", required=True, metavar="FILE"); p.add_argument("--tune", action="store_true"); p.add_argument("--sides", nargs="*", default=list(BEST), metavar="SIDE")
    p.add_argument("--seeds", type=int, default=5); p.add_argument("--one", help=argparse.SUPPRESS); p.add_argument("--seed", type=int); p.add_argument("--lr", type=float); p.add_argument("--epochs", type=int)
    args = p.parse_args()
    if args.one: return monai(args.one, args.data, args.exclude, args.seed, args.lr, args.epochs)
    print(f"{os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}\n\n| side | seed | learning rate | epochs | seconds to {GOAL} | after epoch | best Dice |\n|---|---|---|---|---|---|---|")
    if args.tune:
        for name in args.sides:
            for lr, epochs in TRIALS: told(name, 100, lr, epochs, reach(name, args.data, args.exclude, 100, lr, epochs))
        return
    seconds = {n: [] for n in args.sides}
    for seed in range(args.seeds):
        for name in args.sides: seconds[name].append(told(name, seed, *BEST[name], reach(name, args.data, args.exclude, seed, *BEST[name])))
    print("\n| side | median seconds |\n|---|---|\n" + "\n".join(f"| {n} | {statistics.median(s):.0f} |" for n, s in seconds.items()))

if __name__ == "__main__": main()
