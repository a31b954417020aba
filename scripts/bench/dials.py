"""What the automatic settings give away against tuned ones: runs into scripts/results/bench_dials.json, and a report.

    python scripts/bench/dials.py --data ../shared/data --minutes 300     # goes on where it stopped
    python scripts/bench/dials.py --report

A task is a set, a backbone and a size: 200 rows (banking77: 400) or up to 1,000, of which `fit` validates on 15 %.
Rules are made on the sets of DEVELOP; those of HELD_OUT are for reporting. (hymenoptera, cifar10_small, trec6, cr and
sst2 were looked at when the rules of today were made; so were dogs_cats and digits, with fewer runs.)

The grid goes through `fit` like all else, from a solved head, but does not fall back to this head where validation
prefers it: else most cells of a small set would be the head, and nothing could be lost. *tuned* is its cell with the
best validation score (of equal ones the lowest log-loss), *oracle* that with the best test score; sts is scored by
Spearman's correlation. *fixed* is the cell with the best mean test score on the other sets, *fixed by modality* on
those of the same modality, *fixed or head* the latter with the fallback.
Rivals see as many examples as ours, but for "hf, 3 epochs". The probe is the solved head.

A task's score is the mean over its seeds, each with rows of its own: single ones differ by points. A task on which
*tuned* leads the median of its grid by less than half a point says nothing about the normalised regret, and is left
out of its mean; "of means" is the mean regret over the mean lead, of all tasks.

Left out, so that it takes about five hours of a core: pictures are 96 px wide, texts 64 tokens long, tests have 400
rows at most, of later seeds 1,000. Of the small size's grid, cells of 10 epochs are the candidates for *fixed* and the
4 pairs (rate, span) that are best at 3 epochs, the one of 30 epochs the best of these, which favours high rates a
little; decay 0 and 0.05 at the best cell. Of the larger: 3 rates, 2 spans, 3 epochs, and 10 at the best. hymenoptera
(244) has one size. AutoGluon's 20 epochs and BiT's 500 steps are cut to ours, BiT's batches too; BiT is for images.
fastai's own head is not built.
Prodigy and Schedule-Free need `pip install prodigyopt schedulefree`. --seed adds a seed to the first.
"""

import argparse
import fcntl
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "bench_dials.json"
VISION = ("hymenoptera", "dogs_cats", "face_mask", "cifar10_small", "digits")
DEVELOP = {  # set: backbones
    "hymenoptera": ("torch", "insect"), "cifar10_small": ("torch", "fractals"), "trec6": ("minilm", "llama"),
    "cr": ("minilm",), "sst2": ("minilm",), "sts": ("minilm",),
}  # fmt: skip
HELD_OUT = {
    "dogs_cats": ("torch",), "face_mask": ("insect",), "digits": ("torch", "fractals"), "ag_news": ("minilm",),
    "sms_spam": ("minilm", "llama"), "banking77": ("minilm",), "tweet_emotion": ("minilm",),
}  # fmt: skip
ROWS = {"small": {"": 200, "banking77": 400}, "large": {"": 1000}}
GRIDS: dict[str, dict[str, Any]] = {  # lengths: (epochs, how many of the best pairs of the length before)
    "small": {"rates": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "spans": (1, 10, 100), "lengths": ((10, 4), (30, 1))},
    "large": {"rates": (1e-4, 3e-4, 1e-3), "spans": (1, 10), "lengths": ((10, 1),)},
}
CANDIDATES = {"small": (3, 10), "large": (3,)}  # epochs, of the rates 1e-4 to 1e-3 and spans 1 and 10
DECAYS = (0.0, 0.05)
PHASES = ("first", "ours", "grid", "rivals", "ablations")
RIVALS = ("hf, 3 epochs", "hf", "fastai", "autogluon", "bit", "prodigy", "schedule-free")
ABLATIONS: dict[str, dict[str, Any]] = {  # one automatic choice off, everything else as chosen
    "one cycle": {"cycles": 1},
    "no solved head": {"solve_head": False},
    "no fallback": {},
    "no one-cycle": {},
    "no momentum cycle": {},
    "peak rate of 3e-4": {},
    "one rate": {"span": 1.0},
    "no average": {"ema": False},
    "no calibration": {"calibrate": False},
    "no decay": {"weight_decay": 0.0},
    "no clipping": {"clip": 0.0},
    "climb over half": {"pct_start": 0.5},
    "div_factor of 5": {"div_factor": 5.0},
    "betas .9, .999": {"betas": (0.9, 0.999)},
    "epsilon of 1e-5": {"eps": 1e-5},
    "3 epochs": {"epochs": 3},
    "batch of 32": {"batch_size": 32},
    "no patience": {"patience": 0},
    "no doublings": {"doublings": 0},
    "no augmentation": {"augment": "none"},
    "views in any case": {"augment": "default"},
    "batch statistics": {"freeze_batchnorm": False},
    "stem open": {"unfreezing": "head_then_all"},
    "adapters": {"lora": 8},
    "classes alike": {"balance": True},
    "no replay": {"replay": "off"},
    "one view": {"replay_views": 1},
}
OF_IMAGES, OF_TEXTS, OF_LARGE = (
    ("bit", "no augmentation", "views in any case", "batch statistics", "one view"),
    ("stem open",),
    ("no patience", "no average", "no doublings"),
)
OF_SMALL = ("one cycle",)
Entry = dict[str, Any]
Cell = tuple[str, dict[str, Any]]  # an arm and its dials


def test_rows(seed: int) -> int:
    """Rows of a test at most; 400 put a standard error of 1 to 2 points on each difference."""
    return 1000 if seed else 400


def modality(name: str) -> str:
    return "image" if name in VISION else "text"


@dataclass(frozen=True)
class Task:
    """Rows of a set, for a backbone."""

    set: str
    backbone: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.set}/{self.backbone}/{self.size}"

    @property
    def rows(self) -> int:
        return ROWS[self.size].get(self.set, ROWS[self.size][""])


def tasks(half: Mapping[str, tuple[str, ...]], size: str) -> list[Task]:
    """All of a half of the sets, each set's first backbone before any second one."""
    sets = [name for name in half if not (size == "large" and name == "hymenoptera")]
    return [Task(name, half[name][turn], size) for turn in (0, 1) for name in sets if len(half[name]) > turn]


def key(entry: Mapping[str, Any]) -> str:
    """What a run is known by."""
    return " ".join(json.dumps(entry[part], sort_keys=True) for part in ("task", "arm", "dials", "seed"))


def usable(entry: Mapping[str, Any]) -> bool:
    """Whether a run ended with numbers."""
    return "error" not in entry and math.isfinite(entry["test"]["score"]) and math.isfinite(entry["valid"]["score"])


def pick(found: Iterable[Entry], count: int) -> list[Entry]:
    """The best by validation, of equal ones those with the lowest log-loss."""

    def standing(entry: Entry) -> tuple[float, float]:
        return entry["valid"]["score"], -entry["valid"].get("log_loss", 0.0)

    return sorted(filter(usable, found), key=standing, reverse=True)[:count]


def candidates(size: str) -> list[dict[str, Any]]:
    return [{"lr": lr, "span": span, "epochs": epochs}
            for epochs, lr, span in product(CANDIDATES[size], (1e-4, 3e-4, 1e-3), (1, 10))]  # fmt: skip


def wanted(task: Task, found: list[Entry], phase: str) -> list[Cell]:
    """Runs of a phase that can be made now, given those of this task that are there.

    Rungs of the grid appear as those before them are complete, so this is asked again until nothing is left.
    """
    there = {(entry["arm"], json.dumps(entry["dials"], sort_keys=True)) for entry in found}

    def missing(cells: list[Cell]) -> list[Cell]:
        return [(arm, dials) for arm, dials in cells if (arm, json.dumps(dials, sort_keys=True)) not in there]

    if phase == "first":
        return missing([("probe", {}), *(("grid", dials) for dials in candidates(task.size))])
    if phase == "ours":
        return missing([("ours", {})])
    if phase in ("rivals", "ablations"):
        of = RIVALS if phase == "rivals" else tuple(ABLATIONS)
        return missing(arms(task, of, [entry for entry in found if entry["arm"] == "ours"]))
    grid = GRIDS[task.size]
    cells = [("grid", {"lr": lr, "span": span, "epochs": 3}) for lr, span in product(grid["rates"], grid["spans"])]
    cells = missing(cells)
    before = 3
    for epochs, count in grid["lengths"]:
        if cells:
            return cells
        at = [entry for entry in found if entry["dials"].get("epochs") == before and plain(entry)]
        cells = missing([("grid", {**entry["dials"], "epochs": epochs}) for entry in pick(at, count)])
        before = epochs
    if not cells:
        best = pick((entry for entry in found if plain(entry)), 1)
        cells = missing([("grid", {**entry["dials"], "weight_decay": decay}) for entry in best for decay in DECAYS])
    return cells


def plain(entry: Mapping[str, Any]) -> bool:
    """Whether it is a cell of the grid at the rule's decay."""
    return entry["arm"] == "grid" and "weight_decay" not in entry["dials"]


def arms(task: Task, of: Iterable[str], ours: list[Entry]) -> list[Cell]:
    """Rivals at the length of ours, and ours with one choice off."""
    if not ours or not usable(ours[0]):
        return []
    chosen, image = ours[0]["chosen"], modality(task.set) == "image"
    same = {"epochs": chosen["epochs"]}
    skipped = (*(OF_TEXTS if image else OF_IMAGES), *(OF_SMALL if chosen["cycles"] == 1 else OF_LARGE))
    skipped += ("batch of 32",) if chosen["batch_size"] == 32 else ()
    skipped += ("3 epochs", "hf, 3 epochs") if chosen["epochs"] == 3 else ()
    skipped += ("no calibration", "classes alike") if task.set == "sts" else ()
    skipped += ("adapters",) if image else ()
    skipped += ("classes alike",) if task.backbone == "llama" else ()  # its head has no bias
    dials = dict.fromkeys((*RIVALS[1:], "no solved head", "one cycle"), same)
    unsolved = {} if chosen.get("solve_head", True) else {"solve_head": False}
    dials["no one-cycle"] = dials["no momentum cycle"] = same | {"cycles": chosen["cycles"]} | unsolved
    dials["peak rate of 3e-4"] = {"lr": 3e-4, "span": chosen["span"]}
    return [(arm, dials.get(arm, {})) for arm in of if arm not in skipped]


# Figures


def leave_one_out(scores: Mapping[str, Mapping[str, float]], groups: Mapping[str, str]) -> dict[str, str]:
    """For each unit, the configuration with the best mean score over the units of other groups.

    `scores`: unit -> configuration -> score, where configurations that some unit lacks are left out.
    """
    common = sorted(set.intersection(*(set(row) for row in scores.values()))) if scores else []
    chosen = {}
    for unit in scores:
        others = [row for other, row in scores.items() if groups[other] != groups[unit]]
        if others and common:
            chosen[unit] = max(common, key=lambda name: statistics.mean(row[name] for row in others))
    return chosen


def by_task(values: Mapping[str, float]) -> dict[str, float]:
    """Means over the seeds of each task, of values by task and seed ("set/backbone/size 0")."""
    seeds: dict[str, list[float]] = {}
    for unit, value in values.items():
        seeds.setdefault(unit.rpartition(" ")[0], []).append(value)
    return {task: statistics.mean(found) for task, found in seeds.items()}


def summary(regrets: list[float], spans: list[float]) -> dict[str, float]:
    """Of regrets in points, and of what the grid has to give (tuned - median; below half a point it says nothing)."""
    total = sum(spans)
    parts = [regret / span for regret, span in zip(regrets, spans, strict=True) if span >= 0.5]
    return {
        "mean": statistics.mean(regrets),
        "worst": max(regrets),
        "share": sum(regret <= 0.1 for regret in regrets) / len(regrets),
        "normalised": statistics.mean(parts) if parts else math.nan,
        "of means": sum(regrets) / total if total > 0 else math.nan,
    }


def bootstrap(differences: list[float], groups: list[str], rounds: int = 10_000) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval; groups (sets) are drawn, not their members."""
    names = sorted(set(groups))
    table = np.array([[sum(d for d, g in zip(differences, groups, strict=True) if g == name), groups.count(name)]
                      for name in names])  # fmt: skip
    drawn = table[np.random.default_rng(0).integers(len(names), size=(rounds, len(names)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return statistics.mean(differences), float(low), float(high)


def table_of(entries: list[Entry], size: str, half: Mapping[str, Any]) -> dict[str, dict[str, Entry]]:
    """Task and seed -> arm -> run, where the candidates are all there; *fixed* and *tuned* are among the arms."""
    units: dict[str, list[Entry]] = {}
    for entry in entries:
        name, _, of_size = entry["task"].split("/")
        if name in half and of_size == size:
            units.setdefault(f"{entry['task']} {entry['seed']}", []).append(entry)
    needed = {json.dumps(dials, sort_keys=True) for dials in candidates(size)}
    rows, cells = {}, {}
    for unit, found in units.items():
        grid = {json.dumps(e["dials"], sort_keys=True): e for e in found if e["arm"] == "grid" and usable(e)}
        arm = {entry["arm"]: entry for entry in found if entry["arm"] != "grid"}
        if needed <= set(grid) and {"ours", "probe"} <= set(arm) and usable(arm["probe"]):
            median = statistics.median(entry["test"]["score"] for entry in grid.values())
            oracle = max(grid.values(), key=lambda entry: entry["test"]["score"])
            extra = {"tuned": pick(grid.values(), 1)[0], "oracle": oracle, "median": {"test": {"score": median}}}
            rows[unit], cells[unit] = extra | arm, grid
    scores = {unit: {name: entry["test"]["score"] for name, entry in grid.items()} for unit, grid in cells.items()}
    sets = {unit: unit.split("/")[0] for unit in cells}
    for arm_name, kinds in (("fixed", [("image", "text")]), ("fixed by modality", [("image",), ("text",)])):
        for of in kinds:
            part = {unit: row for unit, row in scores.items() if modality(sets[unit]) in of}
            for unit, name in leave_one_out(part, sets).items():
                rows[unit][arm_name] = cells[unit][name]
                if len(of) == 1:
                    head = cells[unit][name].get("head_better")
                    rows[unit]["fixed or head"] = rows[unit]["probe"] if head else cells[unit][name]
    return rows


def report(entries: list[Entry]) -> None:
    """Markdown."""
    for title, half in (("Development", DEVELOP), ("Held out", HELD_OUT)):
        by_size = {size: rows for size in ROWS if (rows := table_of(entries, size, half))}
        for size, rows in by_size.items():
            print(f"\n### {title}, {size}: {counted(rows)}\n")
            arm_table(rows)
            task_table(rows)
        if len(by_size) > 1:
            rows = {unit: row for rows in by_size.values() for unit, row in rows.items()}
            print(f"\n### {title}, both sizes: {counted(rows)}\n")
            arm_table(rows)
    ablation_table(entries)
    failed = [f"{entry['task']} {entry['arm']} {entry['dials']}: {entry['error']}" for entry in entries
              if "error" in entry]  # fmt: skip
    print(f"\n{len(entries)} runs, {len(failed)} ended with an error.", *failed, sep="\n")


def counted(rows: Mapping[str, Any]) -> str:
    """How many tasks, and how many seeds of them."""
    return f"{len(by_task(dict.fromkeys(rows, 0.0)))} tasks, {len(rows)} with their seeds"


def ablation_table(entries: list[Entry]) -> None:
    """One automatic choice off, against ours, over the tasks of both halves that have it."""
    ours = {(entry["task"], entry["seed"]): entry for entry in entries if entry["arm"] == "ours" and usable(entry)}
    print("\n### One choice off, minus ours, both halves\n")
    print("| off | tasks | points | worst | best | log-loss | CPU, of ours |\n" + "|---" * 7 + "|")
    for arm in ABLATIONS:
        pairs = [(entry, before) for entry in entries if entry["arm"] == arm and usable(entry)
                 and (before := ours.get((entry["task"], entry["seed"])))]  # fmt: skip
        if not pairs:
            continue
        points = [100 * (entry["test"]["score"] - before["test"]["score"]) for entry, before in pairs]
        losses = [entry["test"]["log_loss"] - before["test"]["log_loss"] for entry, before in pairs
                  if "log_loss" in entry["test"]]  # fmt: skip
        cost = statistics.median(entry["cpu_seconds"] / before["cpu_seconds"] for entry, before in pairs)
        print(f"| {arm} | {len(pairs)} | {statistics.mean(points):+.2f} | {min(points):+.1f} | {max(points):+.1f} | "
              f"{statistics.mean(losses or [math.nan]):+.3f} | {cost:.2f} |")  # fmt: skip


def arm_table(rows: Mapping[str, Mapping[str, Entry]]) -> None:
    """One row an arm, of means by task; failures and runs below the probe are counted as they are, seed by seed."""
    order = ("ours", "tuned", "oracle", "fixed", "fixed by modality", "fixed or head", "median", "probe")
    print("| arm | tasks | mean regret, points | worst | share <= 0.1 | normalised | of means | minus ours | log-loss "
          "| failed | below the probe: tasks (runs) | CPU, of a fixed run |")  # fmt: skip
    print("|---" * 12 + "|")
    for arm in (*order, *RIVALS, *ABLATIONS):
        there = [unit for unit in rows if arm in rows[unit]]
        good = [unit for unit in there if arm == "median" or usable(rows[unit][arm])]
        if not good:
            continue

        def lead(first: str, second: str, units: list[str] = good) -> dict[str, float]:
            return by_task({unit: points(rows[unit], first) - points(rows[unit], second) for unit in units})

        found = summary(list(lead("tuned", arm).values()), list(lead("tuned", "median").values()))
        change = lead(arm, "ours", [unit for unit in good if usable(rows[unit]["ours"])]).values()
        losses = by_task({unit: e["test"]["log_loss"] for unit in good if "log_loss" in (e := rows[unit][arm])["test"]})
        cost = [rows[unit][arm]["cpu_seconds"] / rows[unit]["fixed"]["cpu_seconds"] for unit in good
                if "fixed" in rows[unit] and arm != "median"]  # fmt: skip
        bad = len(there) - len(good) + sum(rows[unit][arm].get("status") == "diverged" for unit in good)
        above = lead(arm, "probe").values()
        runs = sum(points(rows[unit], arm) < points(rows[unit], "probe") for unit in good)
        regrets = f"{found['mean']:+.2f} | {found['worst']:+.1f} | {found['share']:.2f} | {found['normalised']:+.2f}"
        means = [statistics.mean(values or [math.nan]) for values in (change, losses.values())]
        print(f"| {arm} | {len(above)} | {regrets} | {found['of means']:+.2f} | {means[0]:+.2f} | {means[1]:.3f} | "
              f"{bad} | {sum(value < 0 for value in above)} ({runs}) | "
              f"{statistics.median(cost or [math.nan]):.2f} |")  # fmt: skip
    good = [row for row in rows.values() if usable(row["ours"])]
    leads = [[points(row, "tuned") - points(row, other) for row in good] for other in ("ours", "median")]
    if good:
        print(f"\nOurs, run by run: normalised regret {summary(*leads)['normalised']:+.2f}\n")
    for arm in ("fixed", "fixed by modality", "fixed or head", "tuned"):
        gaps = by_task({unit: points(row, "ours") - points(row, arm) for unit, row in rows.items()
                        if arm in row and usable(row["ours"])})  # fmt: skip
        if gaps:
            mean, low, high = bootstrap(list(gaps.values()), [task.split("/")[0] for task in gaps])
            print(f"Ours minus *{arm}*: {mean:+.2f} points (95 % {low:+.2f} to {high:+.2f}, {len(gaps)} tasks)\n")


def points(row: Mapping[str, Entry], arm: str) -> float:
    return 100 * float(row[arm]["test"]["score"])


def task_table(rows: Mapping[str, Mapping[str, Entry]]) -> None:
    print("| task | ours | probe | tuned | oracle | median | fixed | fixed by modality | tuned dials | fixed dials |")
    print("|---" * 10 + "|")
    for unit, row in rows.items():
        names = ("ours", "probe", "tuned", "oracle", "median", "fixed", "fixed by modality")
        cells = [f"{100 * row[arm]['test']['score']:.1f}" if arm in row and "test" in row[arm] else "" for arm in names]
        dials = [" ".join(f"{value:g}" for value in row[arm]["dials"].values()) if arm in row else ""
                 for arm in ("tuned", "fixed by modality")]  # fmt: skip
        print(f"| {unit} | {' | '.join(cells + dials)} |")


# Work


def read() -> list[Entry]:
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []


def keep(new: list[Entry], drop: Iterable[str] = ()) -> None:
    """Add runs to the file, and forget those of some arms, while no other process does; it is whole at any time."""
    RESULTS.parent.mkdir(exist_ok=True)
    with (Path(tempfile.gettempdir()) / "bench_dials.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = {key(entry): entry for entry in read() if entry["arm"] not in drop}
        runs |= {key(entry): entry for entry in new}
        half = RESULTS.with_suffix(".partial")
        half.write_text('{"script": "scripts/bench/dials.py", "clock": "CPU", "runs": [\n'
                        + ",\n".join(map(json.dumps, runs.values())) + "\n]}\n")  # fmt: skip
        os.replace(half, RESULTS)


def work(task: Task, phase: str, seed: int, data: Path, deadline: float, commit: str) -> None:
    """All runs of a phase, in this process."""
    from dials_tasks import Worker

    worker = None
    while time.time() < deadline:
        found = [entry for entry in read() if entry["task"] == task.name and entry["seed"] == seed]
        cells = wanted(task, found, phase)
        if not cells:
            break
        worker = worker or Worker(task, seed, data)
        arm, dials = cells[0]
        figures = worker.run(arm, dials)
        what = {"task": task.name, "arm": arm, "dials": dials, "seed": seed}
        keep([what | figures | {"commit": commit, "date": date.today().isoformat()}])
        said = figures.get("error") or f"{figures['test']['score']:.3f} {figures['cpu_seconds']} s"
        print(time.strftime("%H:%M:%S"), task.name, arm, dials, said, flush=True)
    if worker:
        worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th task from the i-th on")
    parser.add_argument("--phases", nargs="*", default=PHASES, help="those alone")
    parser.add_argument("--tasks", default="", help="those alone whose name has this regular expression")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--redo", nargs="*", default=[], help="forget these arms first, as after a change of the rules")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.report:
        return report(read())
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import dials_tasks  # noqa: F401  # its imports are paid once, here

    if options.redo:
        keep([], options.redo)
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    deadline, (shard, shards) = time.time() + 60 * options.minutes, map(int, options.shard.split("/"))
    for size, half in product(ROWS, (DEVELOP, HELD_OUT)):
        for phase in options.phases:
            for task in filter(lambda task: re.search(options.tasks, task.name), tasks(half, size)[shard::shards]):
                arguments = (task, phase, options.seed, options.data, deadline, commit)
                process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
                process.start()
                process.join()
                if process.exitcode:
                    print(f"{task.name}, {phase}: exit {process.exitcode}", flush=True)


if __name__ == "__main__":
    main()
