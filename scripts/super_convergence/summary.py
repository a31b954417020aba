"""What was kept of a size -> what it says: the best of each schedule and length, and how far one-cycle gets ahead."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from .cells import Cell
from .sizes import Size

LEVEL = 0.05  # points below which a mean is level: less than one picture of a test set of some 1,500


@dataclass(frozen=True)
class Group:
    """The runs of one cell over its seeds.

    Attributes:
        cell: With seed 0.
        scores: Seed -> test accuracy at the end, in percent.
    """

    cell: Cell
    scores: Mapping[int, float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores.values())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 where there is one."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else 0.0

    def ahead_of(self, other: "Group") -> tuple[float, float]:
        """Mean difference over the seeds that both have, in points, and its standard error (0 for one seed); NaN where
        they have none in common."""
        gains = [self.scores[seed] - other.scores[seed] for seed in self.scores if seed in other.scores]
        if not gains:
            return math.nan, math.nan
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return statistics.mean(gains), error

    def __str__(self) -> str:
        at = f"{self.cell.peak:g}, decay {self.cell.weight_decay:g}"
        return f"{self.mean:.2f} ± {self.spread:.2f} (n={len(self.scores)}) at {at}"


def groups(results: Mapping[str, Any]) -> list[Group]:
    """All cells that were kept, their seeds together."""
    found: dict[Cell, dict[int, float]] = defaultdict(dict)
    for entry in results["cells"]:
        cell = Cell(**entry["cell"])
        found[replace(cell, seed=0)][cell.seed] = 100.0 * entry["accuracy"]
    return [Group(cell, scores) for cell, scores in found.items()]


def alike(found: Sequence[Group], **wanted: Any) -> list[Group]:
    """Those whose cell has all of these values."""
    return [group for group in found if all(getattr(group.cell, name) == value for name, value in wanted.items())]


def compared(found: Sequence[Group], size: Size, schedule: str, steps: int, decay: float | None = None) -> list[Group]:
    """The rates of one schedule and length, at one weight decay or at all that are compared, each with the seeds that
    all rates of its decay have: where a comparison is not finished, its rates are still compared alike."""
    same = alike(found, schedule=schedule, steps=steps, optimizer="sgd", momentum=0.9)
    same = [group for group in same if group.cell.peak in {*size.slow[1], *size.cycle[1]}]  # a map has others, too
    level = []
    for each in size.decays if decay is None else (decay,):
        rates = alike(same, weight_decay=each)
        seeds = set.intersection(*(set(group.scores) for group in rates)) if rates else set()
        level += [Group(group.cell, {seed: group.scores[seed] for seed in sorted(seeds)}) for group in rates if seeds]
    most = max((len(group.scores) for group in level), default=0)
    return [group for group in level if len(group.scores) == most]


def best(found: Sequence[Group]) -> Group | None:
    """The one with the highest mean."""
    return max(found, key=lambda group: group.mean, default=None)


def iterations_table(results: Mapping[str, Any], size: Size) -> str:
    """Markdown: for each length, the best rate of each schedule."""
    found = groups(results)
    lines = ["| steps | piecewise constant | cosine | one-cycle |", "|---|---|---|---|"]
    for steps in (*size.lengths, size.full):
        cells = [best(compared(found, size, name, steps)) for name in (size.slow[0], "cosine", size.cycle[0])]
        lines.append(f"| {steps:,} | " + " | ".join(str(cell or "-") for cell in cells) + " |")
    return "\n".join(lines)


def factors_table(results: Mapping[str, Any], size: Size) -> str:
    """Markdown: every one-cycle rate and length against the best long piecewise-constant run, seed by seed."""
    found = groups(results)
    slow = best(compared(found, size, size.slow[0], size.full))
    if slow is None:
        return f"no piecewise-constant run of {size.full:,} steps yet"
    head = " | ".join(f"{steps:,} steps (1/{size.full / steps:.3g})" for steps in size.lengths)
    lines = [f"| one-cycle: decay, peak (over {slow.cell.peak:g}) | {head} |", "|---" * (1 + len(size.lengths)) + "|"]
    for decay, peak in product(size.decays, size.cycle[1]):
        texts = []
        for steps in size.lengths:
            group = next(iter(alike(compared(found, size, size.cycle[0], steps, decay), peak=peak)), None)
            texts.append("{:+.2f} ± {:.2f}".format(*group.ahead_of(slow)) if group else "-")
        lines.append(f"| {decay:g}, {peak:g} ({peak / slow.cell.peak:.3g}x) | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def tenfold_table(results: Mapping[str, Any], size: Size) -> str:
    """Markdown: for each rate of the long piecewise-constant run, one-cycle at 10 times this rate or more."""
    found = groups(results)
    lines = ["| piecewise constant, full length | one-cycle at 10 times its rate: level or ahead after |", "|---|---|"]
    for decay in size.decays:
        for slow in sorted(compared(found, size, size.slow[0], size.full, decay), key=lambda group: group.cell.peak):
            fast = [group for steps in size.lengths for group in compared(found, size, size.cycle[0], steps, decay)
                    if group.cell.peak >= 9.99 * slow.cell.peak and group.ahead_of(slow)[0] >= -LEVEL]  # fmt: skip
            first = min(fast, key=lambda group: (group.cell.steps, -group.mean), default=None)
            text = "none of these lengths"
            if first is not None:
                text = f"{first.cell.steps:,} steps (1/{size.full / first.cell.steps:.3g}): {first}, "
                text += "{:+.2f} ± {:.2f}".format(*first.ahead_of(slow))
            lines.append(f"| {slow} | {text} |")
    return "\n".join(lines)


def verdict(results: Mapping[str, Any], size: Size, decay: float | None = None) -> str:
    """In words, at one weight decay or each run at its best: what the long run reaches, and by which factors one-cycle
    is there sooner, at which rate."""
    found = groups(results)
    tried = compared(found, size, size.slow[0], size.full, decay)
    slow = best(tried)
    if slow is None:
        return f"no piecewise-constant run of {size.full:,} steps yet"
    cycles = [group for steps in size.lengths for group in compared(found, size, size.cycle[0], steps, decay)]
    there = [group for group in cycles if group.ahead_of(slow)[0] >= -LEVEL]
    text = [f"Piecewise constant, {size.full:,} steps, best of {len(tried)}: {slow}."]
    for name, wanted in (
        ("At 10 times its rate or more", [group for group in there if group.cell.peak >= 9.99 * slow.cell.peak]),
        ("In a tenth of its steps or fewer", [group for group in there if group.cell.steps <= size.full / 10]),
        ("At any rate", there),
    ):
        if not wanted:
            text.append(f"{name}, one-cycle is not level with it in any of these lengths.")
            continue
        first = min(wanted, key=lambda group: (group.cell.steps, -group.cell.peak))
        steps, faster = first.cell.steps, first.cell.peak / slow.cell.peak
        gain, error = first.ahead_of(slow)
        text.append(
            f"{name}, one-cycle is level or ahead after {steps:,} steps (1/{size.full / steps:.3g}), at {faster:.3g} "
            f"times its rate: {first}, {gain:+.2f} ± {error:.2f} points."
        )
    return "\n".join(text)


def grid(found: Sequence[Group], lines: str, columns: str) -> tuple[list[Any], list[Any], list[list[float | None]]]:
    """Values of the cells' field `lines`, of `columns`, and the mean accuracy at each pair (None: not kept)."""
    downs = sorted({getattr(group.cell, lines) for group in found})
    acrosses = sorted({getattr(group.cell, columns) for group in found})
    values = {(getattr(group.cell, lines), getattr(group.cell, columns)): group.mean for group in found}
    return downs, acrosses, [[values.get((down, across)) for across in acrosses] for down in downs]


def map_table(found: Sequence[Group], lines: str, columns: str) -> str:
    """Markdown: accuracy over two fields of the cells."""
    downs, acrosses, values = grid(found, lines, columns)
    head = [f"| {lines} \\ {columns} | " + " | ".join(f"{across:g}" for across in acrosses) + " |",
            "|---" * (1 + len(acrosses)) + "|"]  # fmt: skip
    body = [f"| {down:g} | " + " | ".join("-" if value is None else f"{value:.1f}" for value in line) + " |"
            for down, line in zip(downs, values, strict=True)]  # fmt: skip
    return "\n".join(head + body)


def maps(results: Mapping[str, Any], size: Size) -> dict[str, tuple[list[Group], str, str]]:
    """Title -> (runs of one seed, field down, field across) of each map that has at least two values of both."""
    first = [Group(group.cell, {0: group.scores[0]}) for group in groups(results) if 0 in group.scores]
    short = [group for group in alike(first, steps=size.map_steps) if group.cell.schedule != "climb"]
    fixed = "triangle" if size.cycle[0] == "triangle" else "onecycle, fixed momentum"
    found = {}
    for steps in sorted({size.map_steps, *size.other_steps}):
        runs = alike(first, schedule=size.cycle[0], optimizer="sgd", momentum=0.9, steps=steps)
        runs = [run for run in runs if run.cell.weight_decay in size.map_decays and run.cell.peak in size.map_peaks]
        found[f"weight decay and peak rate, {steps:,} steps"] = (runs, "weight_decay", "peak")
    runs = alike(short, schedule=fixed, optimizer="sgd", weight_decay=size.decay)
    runs = [run for run in runs if run.cell.peak in size.map_peaks]
    found[f"momentum and peak rate, {size.map_steps:,} steps"] = (runs, "momentum", "peak")
    for peak in size.adam_peaks:
        runs = alike(short, optimizer="adamw", peak=peak)
        found[f"AdamW at {peak:g}, {size.map_steps:,} steps"] = (runs, "eps", "beta2")
    return {
        title: (runs, lines, columns)
        for title, (runs, lines, columns) in found.items()
        if min(len({getattr(run.cell, field) for run in runs}) for field in (lines, columns)) > 1
    }


def report(results: Mapping[str, Any], size: Size) -> str:
    """Everything above as one Markdown text."""
    parts = [f"## {size.title}", f"On {results.get('hardware', 'unknown hardware')}."]
    if len(size.decays) > 1:
        parts += [f"All at weight decay {decay:g}: {verdict(results, size, decay)}" for decay in size.decays]
    parts += [f"Each at its best: {verdict(results, size)}", iterations_table(results, size)]
    parts += [factors_table(results, size), tenfold_table(results, size)]
    for title, (found, lines, columns) in maps(results, size).items():
        parts.append(f"One-cycle, seed 0: {title}.")
        parts.append(map_table(found, lines, columns))
    if "range_test" in results:
        test = results["range_test"]
        away = f"{test['runs_away']:.2g}" if test["runs_away"] else "no rate"
        parts.append(f"Range test, SGD: the loss runs away at {away}, falls fastest at {test['steepest']:.2g}, "
                     f"suggested peak {test['suggested']:.2g}.")  # fmt: skip
    return "\n\n".join(parts)
