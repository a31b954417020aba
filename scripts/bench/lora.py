"""Adapters against all weights, at several rates and ranks: test accuracy, seconds, memory; a table and JSON.

    python scripts/bench/lora.py --data ../shared/data     # runs what is missing, about a minute each; then prints
    python scripts/bench/lora.py --report

Everything else is as `fit` chooses it, from a solved head. A rate of 10 means ten times that of all weights, for every
layer group. Each run is a process of its own, so that its memory is its own; seconds are of the processor.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results" / "bench_lora.json"
# name: (folder of the data, backbone, training rows or None for all, rows of the test)
SETS: dict[str, tuple[str, str, int | None, int]] = {
    "trec6": ("text/trec6", "minilm", 300, 500),
    "cr": ("text/cr", "minilm", 300, 500),
    "hymenoptera": ("vision/hymenoptera", "weights/mobilenetv2_100_torch", None, 153),
}
# name: (rank, rate, alpha)
ARMS = {"all weights": (0, 1, 16)} | {f"rank 8, rate x{rate}": (8, rate, 16) for rate in (1, 3, 10, 30)}
RANKS = {f"rank {r}, alpha {a}": (r, 10, a) for r, a in ((2, 16), (2, 4), (32, 16), (32, 64))}  # on trec6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return one(options.data, *json.loads(options.job))
    done = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    seen = {(run["set"], run["arm"], run["seed"]) for run in done}
    for seed in range(options.seeds):
        for name in () if options.report else options.sets:
            for arm in ARMS | (RANKS if name == "trec6" else {}):
                if (name, arm, seed) not in seen:
                    job = ["--data", str(options.data), "--job", json.dumps([name, arm, seed])]
                    said = subprocess.run([sys.executable, __file__, *job], capture_output=True, text=True, check=True)
                    done.append(json.loads(said.stdout.splitlines()[-1]))
                    print(done[-1], flush=True)
                    save(done)
    report(done)


def save(runs: list[dict[str, Any]]) -> None:
    head = {"script": "scripts/bench/lora.py", "date": date.today().isoformat(), "cores": os.cpu_count()}
    RESULTS.write_text(json.dumps({**head, "runs": runs}, indent=1) + "\n")


def one(data: Path, name: str, arm: str, seed: int) -> None:
    """A run; its figures as a line of JSON."""
    import pandas
    import torch

    import finetune
    from finetune.model import lora
    from finetune.plan import settings

    torch.set_num_threads(1)
    folder, backbone, rows, tested = SETS[name]
    rank, settings.LORA_RATE, lora.ALPHA = (ARMS | RANKS)[arm]
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        if folder.startswith("text"):
            for split, count, drawn in (("train", rows, seed), ("test", tested, 0)):
                table = pandas.read_csv(data / folder / f"{split}.csv").sample(count, random_state=drawn)
                table.to_csv(Path(scratch) / f"{split}.csv", index=False)
            splits, size = finetune.load_table(scratch, seed=seed), None
        else:
            splits, size = finetune.load_images(data / folder, seed=seed), 112
        place = backbone if backbone == "minilm" else data / backbone
        dials = {"lora": rank, "precision": "fp32"}
        run = finetune.fit(splits, place, out=Path(scratch) / "run", image_size=size, settings=dials, seed=seed)
    record = run.record
    adapter = record.get("adapter", {"trained": 1, "weights": 1})
    figures = {
        "set": name,
        "arm": arm,
        "seed": seed,
        "accuracy": round(record["metrics"]["test"]["accuracy"], 4),
        "log_loss": round(record["metrics"]["test"]["log_loss"], 4),
        "cpu_seconds": round(time.process_time() - begin, 1),
        "peak_memory_bytes": record["peak_memory_bytes"],
        "trained": round(adapter["trained"] / adapter["weights"], 4),
        "lr": record["settings"]["lr"]["value"],
        "kept": record["kept"],
    }
    print(json.dumps(figures))


def report(runs: list[dict[str, Any]]) -> None:
    names = [name for name in SETS if any(run["set"] == name for run in runs)]
    print(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for arm in ARMS | RANKS:
        cells = []
        for name in names:
            found = [run for run in runs if run["set"] == name and run["arm"] == arm]
            if not found:
                cells.append("")
                continue
            scores = [100 * run["accuracy"] for run in found]
            mean, loss, seconds, memory = (
                statistics.mean(values)
                for values in (
                    scores,
                    [run["log_loss"] for run in found],
                    [run["cpu_seconds"] for run in found],
                    [run["peak_memory_bytes"] / 2**20 for run in found],
                )
            )
            spread = f"{min(scores):.1f} to {max(scores):.1f}"
            cells.append(f"{mean:.1f} ({spread}), {loss:.2f}, {seconds:.0f} s, {memory:.0f} MiB")
        print(f"| {arm} | {' | '.join(cells)} |")
    print("\nTest accuracy in per cent: mean and range over the seeds; log-loss; processor seconds; peak memory.")


if __name__ == "__main__":
    main()
