"""Time and cost to a target accuracy, in the manner of DAWNBench: CIFAR-10 from scratch, and fine-tuning on small sets.

    python scripts/dawnbench.py --cifar10 cifar10/ --price 2.50      # 94 % from scratch, where a GPU is
    python scripts/dawnbench.py --data ../shared/data --price 0.04   # without: reduced, and the fine-tuning
    python scripts/dawnbench.py --report                             # only prints what is kept

From scratch, one-cycle runs of growing length are tried until one reaches the target on the test set; the clock is
that of this run, from its first step until the look that finds the target reached, without the looks themselves. In
fine-tuning the clock is that of the whole run, from the loaded data to the saved checkpoint, by the defaults of
`finetune.fit` and by the plain loop of compare_plain.py; a run that ends below the target has not reached it. CPU
seconds (one thread) are given beside those of the wall, as a shared machine stretches these; the cost is the price of
an hour times the seconds of the wall on a GPU, and times the CPU seconds otherwise. Results are kept in
scripts/results/dawnbench.json; what is there is not run again. Fine-tunings that compare_plain.py kept are in the table
as well, with the seconds of the wall that they took there.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts import compare_plain  # noqa: E402
from scripts.super_convergence.cells import Cell, train  # noqa: E402
from scripts.super_convergence.networks import ResNet  # noqa: E402
from scripts.super_convergence.sets import cifar10  # noqa: E402
from scripts.super_convergence.study import hardware  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "dawnbench.json"
# Targets of the small sets: what the plain loop reaches on average in compare_plain.json, rounded up to half a point.
TRANSFER = {"hymenoptera": 0.85, "dogs_cats": 0.895}
ARMS = {"fit": "solved head", "plain loop": "plain"}
REDUCED_TARGET = 0.45  # 2,000 pictures of 16x16; ten classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cifar10", type=Path, help="folder with cifar-10-batches-py")
    parser.add_argument("--price", type=float, default=0.0, help="of an hour of this machine, in dollars")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sets", nargs="*", default=list(TRANSFER))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        for seed in range(options.seeds):
            for schedule in ("onecycle", "piecewise"):
                keep("cifar10", schedule, seed, partial(from_scratch, options, schedule, seed))
            for name in options.sets:
                for arm in ARMS:
                    keep(name, arm, seed, partial(fine_tuned, options.data, name, arm, seed))
    report(options.price)


def keep(task: str, arm: str, seed: int, run: Callable[[], dict[str, Any]]) -> None:
    """Run what is not kept, and keep it with what it ran on."""
    rows = results()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = {"task": task, "arm": arm, "seed": seed, "hardware": hardware(device)}
    if any(where.items() <= row.items() for row in rows):
        return
    row = where | run() | {"gpu": device.type == "cuda"}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in [*rows, row]) + "\n]\n")
    print(row, flush=True)


def from_scratch(options: argparse.Namespace, schedule: str, seed: int) -> dict[str, Any]:
    """The shortest of some lengths at which a residual network reaches the target; reduced without CIFAR-10 or GPU."""
    full = options.cifar10 is not None and torch.cuda.is_available()
    if full:
        rows, blocks, width, batch, target = cifar10(options.cifar10), 3, 64, 512, 0.94
        lengths, peak, decay = [round(epochs * 50_000 / batch) for epochs in (10, 15, 20, 30, 60)], 0.4, 5e-4
        rows = rows.to(torch.device("cuda"))
    else:
        rows = cifar10(options.data / "vision/cifar10_small", side=16)
        blocks, width, batch, target = 1, 8, 64, REDUCED_TARGET
        lengths, peak, decay = [300, 600, 1200, 2400], 0.1, 5e-3
    search = time.perf_counter()
    for steps in lengths:
        torch.manual_seed(seed)
        model = ResNet(3, 10, blocks=blocks, width=width).to(rows.train_x.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        cell = Cell(schedule, steps, peak, batch, decay, seed=seed)
        cpu = time.process_time()
        found = train(cell, rows, model, looks=10, until=lambda value: value >= target)
        cpu = time.process_time() - cpu
        if found["accuracy"] >= target:
            break
    return {"reduced": not full, "target": target, "accuracy": found["accuracy"], "steps": found["steps"],
            "of": steps, "seconds": found["seconds"], "cpu_seconds": round(cpu, 1),
            "search_seconds": round(time.perf_counter() - search, 1)}  # fmt: skip


def fine_tuned(data: Path, name: str, arm: str, seed: int) -> dict[str, Any]:
    """A whole fine-tuning of a set of compare_plain.py, evaluated on its test part."""
    cpu = time.process_time()
    row = compare_plain.one_run(data, name, seed, ARMS[arm])
    return {"reduced": False, "target": TRANSFER[name], "accuracy": row["accuracy"], "rows": row["rows"],
            "seconds": row["seconds"], "cpu_seconds": round(time.process_time() - cpu, 1)}  # fmt: skip


def kept_elsewhere() -> list[dict[str, Any]]:
    """The fine-tunings that compare_plain.py has kept, as rows of this table: seconds of the wall, one thread."""
    by_name = {arm: name for name, arm in ARMS.items()}
    return [
        {"task": row["set"], "arm": by_name[row["arm"]], "seed": row["seed"], "target": TRANSFER[row["set"]],
         "accuracy": row["accuracy"], "seconds": row["seconds"], "cpu_seconds": None, "reduced": False,
         "gpu": False, "hardware": "as compare_plain.py ran"}
        for row in compare_plain.results() if row["set"] in TRANSFER and row["arm"] in by_name
    ]  # fmt: skip


def results() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return found


def report(price: float) -> None:
    """A Markdown table, a line a run."""
    print(f"Price of an hour: ${price:g}. {os.cpu_count()} cores here.\n")
    print("| task | by | seed | target | test accuracy | seconds | CPU seconds | cost | hardware |")
    print("|---" * 9 + "|")
    for row in [*results(), *kept_elsewhere()]:
        missed = "" if row["accuracy"] >= row["target"] else ", not reached"
        cpu = row["cpu_seconds"]
        cost = price / 3600.0 * (row["seconds"] if row["gpu"] or cpu is None else cpu)
        cells = [
            row["task"] + " (reduced)" * row["reduced"], row["arm"], row["seed"], f"{row['target']:.1%}",
            f"{row['accuracy']:.1%}{missed}", f"{row['seconds']:.1f}",
            "-" if cpu is None else f"{cpu:.1f}", f"${cost:.5f}",
            row["hardware"],
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
