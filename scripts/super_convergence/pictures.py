"""What was kept of a size -> its plots as PNG files: accuracy over steps, the range test, the maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from finetune.output.plots import COLOURS, STYLE

from .cells import Cell
from .sizes import Size
from .summary import Group, best, compared, grid, groups, maps


def draw_all(results: Mapping[str, Any], size: Size, folder: Path) -> list[Path]:
    """Draw `super_convergence_SIZE_*.png` into `folder`, as far as there is something to draw; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # Ticks of a logarithmic axis are set in mathematics.
    with matplotlib.rc_context({**STYLE, "text.parse_math": True}):
        for name, figure in (
            ("iterations", _iterations(results, size)),
            ("range", _range(results, size)),
            ("maps", _maps(results, size)),
        ):
            if figure is not None:
                path = folder / f"super_convergence_{size.name}_{name}.png"
                figure.savefig(path, dpi=110)
                written.append(path)
    return written


def _iterations(results: Mapping[str, Any], size: Size) -> Figure | None:
    found = groups(results)
    schedules = ((size.slow[0], "piecewise constant", "second"), ("cosine", "cosine", "third"),
                 (size.cycle[0], "one-cycle", "first"))  # fmt: skip
    slow = best(compared(found, size, size.slow[0], size.full))
    if slow is None:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    ends, ways = figure.subplots(1, 2)
    top, low = slow.mean, slow.mean
    for name, label, colour in schedules:
        bests = [group for steps in (*size.lengths, size.full) if (group := best(compared(found, size, name, steps)))]
        if not bests:
            continue
        top, low = max(top, *(g.mean + g.spread for g in bests)), min(low, *(g.mean - g.spread for g in bests))
        ends.errorbar(
            [g.cell.steps for g in bests],
            [g.mean for g in bests],
            [g.spread for g in bests],
            **{"color": COLOURS[colour], "label": label, "marker": "o", "markersize": 4, "capsize": 3},
        )
    cycles = [group for steps in size.lengths if (group := best(compared(found, size, size.cycle[0], steps)))]
    for number, (group, colour) in enumerate([(slow, "second"), *((group, "first") for group in cycles)]):
        name = "piecewise" if number == 0 else "one-cycle"
        curve = next(e["curve"] for e in results["cells"] if Cell(**e["cell"]) == group.cell)
        ways.plot([step for step, _ in curve], [100 * value for _, value in curve], color=COLOURS[colour],
                  alpha=1.0 if number == 0 else 0.4 + 0.6 * number / len(cycles), linewidth=1.2, marker=".",
                  label=f"{name}, {group.cell.steps:,}, {group.cell.peak:g}")  # fmt: skip
    room = max(top - low, 0.5)
    ends.set_ylim(low - 0.5 * room, min(100.0, top + 0.2 * room))
    for axes, title in (
        (ends, "At the end of runs, best rate of each, mean and sd"),
        (ways, "On the way, seed 0: steps, peak"),
    ):
        axes.set(xscale="log", xlabel="steps", title=title)
        axes.set_xticks([*size.lengths, size.full], [f"{steps:,}" for steps in (*size.lengths, size.full)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(loc="lower right")
    ends.set_ylabel("test accuracy, %")
    figure.suptitle(size.title, fontsize=10)
    return figure


def _range(results: Mapping[str, Any], size: Size) -> Figure | None:
    if "range_test" not in results:
        return None
    test = results["range_test"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, climb = figure.subplots(1, 2)
    loss.plot(test["rates"][: len(test["smooth"])], test["smooth"], color=COLOURS["first"], linewidth=1.2)
    finite = [value for value in test["smooth"] if value == value and value < 1e6]
    loss.set(xscale="log", xlabel="rate, growing by the same factor each step", ylabel="training loss, averaged",
             title="finetune.plan.range_test", ylim=(0.0, 2.0 * finite[0]))  # fmt: skip
    for rate, label, colour in ((test["suggested"], "suggested", "third"), (test["runs_away"], "runs away", "second")):
        if rate:
            loss.axvline(rate, color=COLOURS[colour], linewidth=1.0, label=f"{label}: {rate:.2g}")
    loss.legend(loc="upper left")
    for entry in results["cells"]:
        cell = Cell(**entry["cell"])
        if cell.schedule == "climb":
            climb.plot([cell.peak * step / cell.steps for step, _ in entry["curve"]],
                       [100 * value for _, value in entry["curve"]], color=COLOURS["first"], marker=".")  # fmt: skip
    climb.set(xlabel="rate, growing along a line", ylabel="test accuracy, %", title="as Smith reads it")
    figure.suptitle(size.title, fontsize=10)
    return figure


def _maps(results: Mapping[str, Any], size: Size) -> Figure | None:
    drawn = maps(results, size)
    if not drawn:
        return None
    across = min(2, len(drawn))
    down = -(-len(drawn) // across)
    figure = Figure(figsize=(1.5 + 4.0 * across, 3.2 * down), layout="constrained")
    for number, (title, entry) in enumerate(drawn.items()):
        _heat(figure.add_subplot(down, across, number + 1), title, *entry)
    figure.suptitle(f"{size.title}\none-cycle, test accuracy in %, seed 0", fontsize=10)
    return figure


def _heat(axes: Axes, title: str, found: list[Group], lines: str, columns: str) -> None:
    downs, acrosses, values = grid(found, lines, columns)
    top = max(value for line in values for value in line if value is not None)
    # Colours tell the last points apart: what is 15 below the best is as good as lost.
    axes.imshow([[float("nan") if value is None else value for value in line] for line in values], cmap="viridis",
                vmin=top - 15.0, vmax=top, aspect="auto", origin="lower")  # fmt: skip
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value is not None:
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8,
                          color="black" if value > top - 5.0 else "white")  # fmt: skip
    axes.set(title=title, xlabel=columns.replace("_", " "), ylabel=lines.replace("_", " "))
    axes.set_xticks(range(len(acrosses)), [f"{across:g}" for across in acrosses])
    axes.set_yticks(range(len(downs)), [f"{down:g}" for down in downs])
    axes.grid(False)
