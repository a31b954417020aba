"""Ours against a plain loop, and with one of its parts switched off or on: test accuracy over data sets and seeds.

    python scripts/compare_plain.py --data ../shared/data            # runs what is missing, then prints the tables
    python scripts/compare_plain.py --report                         # only prints

Same data, rows, epochs, batch size, augmentation and backbone for every arm. The plain loop is AdamW with one rate
(1e-3 for images, 5e-5 for text) and linear decay, everything open, its head initialised as torch.nn.Linear does.
Results are kept in scripts/results/compare_plain.json as they come, and a run that is there is not repeated. Start it
twice with --shard 0/2 and --shard 1/2 to use two cores.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import finetune
from finetune.data.loaders import epoch_order, make_loader
from finetune.data.task import default_loss
from finetune.train.evaluate import evaluate
from finetune.train.processes import native_precision, start_processes
from finetune.train.trainer import steps_per_epoch, without_remainder

RESULTS = Path(__file__).parent / "results" / "compare_plain.json"
IMAGE_SIZE = 112  # pixels; smaller than the checkpoints' 224 so that two cores can do it
# name: (loader, path, backbone, training rows or None for all)
SETS: dict[str, tuple[str, str, str, int | None]] = {
    "hymenoptera": ("images", "vision/hymenoptera", "weights/mobilenetv2_100_torch", None),
    "dogs_cats": ("images", "vision/dogs_cats", "weights/mobilenetv2_100_tf", 300),
    "face_mask": ("images", "vision/face_mask", "weights/mobilenetv2_100_torch", 300),
    "cr": ("table", "text/cr", "minilm", 400),
    "trec6": ("table", "text/trec6", "minilm", 400),
    "tweet_emotion": ("table", "text/tweet_emotion", "minilm", 400),
}
ARMS = {
    "ours": "discriminative rates, head first, one-cycle; the head trained by gradients, the same epochs as plain",
    "solved head": "the defaults as they are: the head solved, then fewer epochs at other rates",
    "plain": "AdamW, one rate, linear decay, everything open",
    "one rate": "ours with span 1, at the geometric mean of its rates",
    "no stages": "ours with everything open from the start",
    "no one-cycle": "ours with linear decay from the peak, and beta1 fixed at 0.9",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th run from the i-th on")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        shard, shards = map(int, options.shard.split("/"))
        wanted = [(name, seed, arm) for seed in range(options.seeds) for name in options.sets for arm in options.arms]
        for name, seed, arm in wanted[shard::shards]:
            if any((row["set"], row["seed"], row["arm"]) == (name, seed, arm) for row in results()):
                continue
            row = one_run(options.data, name, seed, arm)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps([*results(), row], indent=1) + "\n")
            print(row, flush=True)
    report()


def one_run(data: Path, name: str, seed: int, arm: str) -> dict[str, Any]:
    """Train one arm and evaluate it on the whole test split."""
    kind, path, backbone, rows = SETS[name]
    load = finetune.load_images if kind == "images" else finetune.load_table
    splits = load(data / path, seed=seed)
    if rows is not None:
        chosen = random.Random(seed).sample(range(len(splits.train)), rows)
        splits = replace(splits, train=splits.train.select(chosen))
    pretrained = finetune.load_backbone(
        backbone if backbone == "minilm" else f"local-dir:{data / backbone}", splits.task, seed=seed,
        image_size=IMAGE_SIZE if kind == "images" else None,
    )  # fmt: skip
    begin = time.monotonic()
    accuracy = plain(pretrained, splits, seed) if arm == "plain" else ours(pretrained, splits, seed, arm)
    return {"set": name, "seed": seed, "arm": arm, "rows": len(splits.train), "accuracy": round(accuracy, 5),
            "seconds": round(time.monotonic() - begin, 1), "threads": torch.get_num_threads()}  # fmt: skip


def ours(pretrained: finetune.Pretrained, splits: finetune.Splits, seed: int, arm: str) -> float:
    """`finetune.fit` with its defaults, or with one part switched off."""
    defaults = finetune.choose_settings(splits.task.modality, len(splits.train))
    settings: dict[str, Any] = {} if arm == "solved head" else {"solve_head": False, "patience": 0}
    plan = None
    if arm == "one rate":
        settings |= {"span": 1.0, "lr": defaults.lr / defaults.span**0.5, "head_lr": defaults.head_lr}
    if arm == "no stages":
        settings |= {"unfreezing": "none"}
    if arm == "no one-cycle":
        groups = len(finetune.layer_groups(pretrained))
        plan = finetune.gradual_unfreezing(
            groups, defaults.epochs, head_epochs=defaults.head_epochs, shape=finetune.LinearDecay(),
            head_lr_scale=defaults.head_lr / defaults.lr,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = finetune.fit(splits, pretrained, out=Path(folder) / "run", seed=seed, settings=settings, plan=plan)
    return run.metrics["test"]["accuracy"]


def plain(pretrained: finetune.Pretrained, splits: finetune.Splits, seed: int) -> float:
    """What one writes by hand: AdamW at one rate with linear decay, everything open, the last weights kept."""
    defaults = finetune.choose_settings(splits.task.modality, len(splits.train))
    processes = replace(start_processes(), precision=native_precision(pretrained.model)[0])
    model, loss = pretrained.model.to(memory_format=torch.channels_last), default_loss(splits.task)
    torch.manual_seed(seed)
    steps = steps_per_epoch(len(splits.train), defaults.batch_size) * int(defaults.epochs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if splits.task.modality == "image" else 5e-5, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1.0 - step / steps))
    done = 0
    while done < steps:
        epoch = done // steps_per_epoch(len(splits.train), defaults.batch_size)
        order = epoch_order(len(splits.train), defaults.batch_size, seed=seed, epoch=epoch)
        order = without_remainder(order, defaults.batch_size)
        model.train()
        loader = make_loader(splits.train, splits.task, pretrained.processor, order, train=True, seed=seed, epoch=epoch)
        for batch in loader:
            with processes.autocast():
                value = loss(pretrained.forward(batch.inputs).float(), batch.targets)
            value.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
    assert splits.test is not None
    result = evaluate(pretrained, splits.test, splits.task, processes, loss=loss, batch_size=64)
    return float(result.metrics["accuracy"])


def results() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def report() -> None:
    """Mean and range over the seeds of each set and arm, and the mean difference to `ours` over sets and seeds."""
    rows = results()
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    print(f"{'set':<15}" + "".join(f"{arm:>24}" for arm in arms))
    for name in SETS:
        cells = []
        for arm in arms:
            values = [100 * row["accuracy"] for row in rows if row["set"] == name and row["arm"] == arm]
            mean = statistics.mean(values) if values else 0.0
            cells.append(f"{mean:.1f} ({min(values):.1f}-{max(values):.1f}, n={len(values)})" if values else "-")
        print(f"{name:<15}" + "".join(f"{cell:>24}" for cell in cells))
    mine = {(row["set"], row["seed"]): row["accuracy"] for row in rows if row["arm"] == "ours"}
    for arm in arms[1:]:
        pairs = [(row["set"], 100 * (mine[row["set"], row["seed"]] - row["accuracy"])) for row in rows
                 if row["arm"] == arm and (row["set"], row["seed"]) in mine]  # fmt: skip
        gains = [gain for _, gain in pairs]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        print(f"ours - {arm:<13} {statistics.mean(gains):+.2f} points, standard error {error:.2f}, n={len(gains)}")


if __name__ == "__main__":
    main()
