"""What a run logged goes in; plots come out, as SVG that follows the page's colours and as PNG files.

Colours are those of a light page; in the SVG each becomes a CSS variable, which a dark page sets anew.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure

from finetune.errors import RunError
from finetune.plan.range_test import RangeTest

COLOURS = {
    "ink": "#1d2433",
    "muted": "#5d6778",
    "line": "#d4d9e2",
    "first": "#1f6fb5",
    "second": "#c4561b",
    "third": "#2c8157",
}
Bins: TypeAlias = Sequence[Sequence[float]]  # (how sure, share right, rows)
POINTS = 400  # of a curve: more cannot be seen, and would weigh on the page
NAMED = 100  # classes up to which a confusion matrix names them
COUNTED = 25  # classes up to which it shows the counts
STYLE: dict[Any, Any] = {
    "axes.edgecolor": COLOURS["line"],
    "axes.grid": True,
    "axes.labelcolor": COLOURS["muted"],
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "svg.fonttype": "none",
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # A class may well be called "$".
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


@dataclass(frozen=True)
class Plot:
    """A plot for the page: its SVG, and its natural width in CSS pixels."""

    name: str
    svg: Markup
    width: int


def draw(folder: Path, name: str, alt: str, paint: Callable[[], Figure]) -> Plot:
    """Run `paint`, write its figure to `folder`/`name`.png, and give it as SVG; `alt` says in words what it shows."""
    salted = {**STYLE, "svg.hashsalt": name}  # Ids must differ between the plots of a page.
    with matplotlib.rc_context(salted), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # The browser has the font that matplotlib lacks.
        figure, text = paint(), io.StringIO()
        folder.mkdir(parents=True, exist_ok=True)
        box = figure.get_tightbbox().padded(0.08)  # "tight" would draw each figure twice more.
        figure.savefig(folder / f"{name}.png", dpi=min(150, 1400 / box.width), bbox_inches=box)
        figure.savefig(text, format="svg", bbox_inches=box, transparent=True)
    return Plot(name, *_inline(text.getvalue(), alt))


def _inline(svg: str, alt: str) -> tuple[Markup, int]:
    """An SVG file as an element of a page. Texts in it are escaped by matplotlib."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    body = re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index(">", svg.index("<svg")) + 1 :])
    body = re.sub(r"(font: [^;\"]*?px) '[^;\"]*", r"\1 var(--font)", body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'viewBox="0 0 {size[1]} {size[2]}" aria-label="{escape(alt)}">'
    )
    return Markup(head + body), round(float(size[1]) * 4 / 3)


@dataclass(frozen=True)
class Curves:
    """The steps of a run as arrays [steps]: step counts from 1, `stage` is an index, rates are [steps, groups]."""

    step: np.ndarray
    stage: np.ndarray
    loss: np.ndarray
    rates: np.ndarray
    momentum: np.ndarray

    @classmethod
    def of(cls, steps: Sequence[dict[str, Any]]) -> "Curves":
        """From the lines of `steps.jsonl`."""
        return cls(
            np.array([entry["step"] + 1 for entry in steps]),
            np.array([entry["stage"] for entry in steps]),
            np.array([entry["loss"] for entry in steps], dtype=float),
            np.array([entry["rates"] for entry in steps], dtype=float),
            np.array([entry["momentum"] for entry in steps], dtype=float),
        )

    def spans(self) -> list[tuple[int, float, float]]:
        """(stage, where it begins, where it ends) on the axis of steps."""
        starts = np.flatnonzero(np.diff(self.stage, prepend=-1))
        ends = [*self.step[starts[1:]], self.step[-1] + 1]
        return [(int(self.stage[i]), self.step[i] - 0.5, end - 0.5) for i, end in zip(starts, ends, strict=True)]

    def some(self) -> np.ndarray:
        """Indices of at most about `POINTS` steps, the first and last of each stage among them."""
        borders = np.flatnonzero(np.diff(self.stage))
        even = np.linspace(0, len(self.step) - 1, min(POINTS, len(self.step))).round().astype(int)
        return np.unique(np.concatenate([even, borders, borders + 1]))


def loss_curve(curves: Curves, history: Sequence[dict[str, Any]], stages: Sequence[str]) -> Figure:
    """Training loss of each step, smoothed, and the loss on the validation rows after each epoch."""
    figure, axes = _axes("Loss", curves, stages)
    parts = np.array_split(np.arange(len(curves.step)), min(POINTS, len(curves.step)))
    x = [curves.step[part].mean() for part in parts]
    axes.plot(x, [curves.loss[part].mean() for part in parts], color=COLOURS["first"], alpha=0.3, linewidth=0.8)
    smooth, chosen = _smooth(curves.loss), curves.some()
    axes.plot(curves.step[chosen], smooth[chosen], color=COLOURS["first"], label="train, smoothed")
    valid = [(entry["step"], entry["valid"]["loss"]) for entry in history if "loss" in entry["valid"]]
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color=COLOURS["second"], markersize=3.5, label="validation")
    axes.legend()
    return figure


def metric_curve(
    curves: Curves,
    history: Sequence[dict[str, Any]],
    stages: Sequence[str],
    name: str,
    others: Sequence[tuple[str, float]],
) -> Figure:
    """A validation metric after each epoch; `others` are levels to see it beside, such as the majority class."""
    figure, axes = _axes(f"{name} on the validation rows", curves, stages)
    points = [(entry["step"], entry["valid"][name]) for entry in history if name in entry["valid"]]
    axes.plot(*zip(*points, strict=True), "o-", color=COLOURS["second"], markersize=3.5, label="validation")
    for (label, value), colour, style in zip(others, ("third", "muted"), ("--", ":"), strict=False):
        axes.axhline(value, color=COLOURS[colour], linestyle=style, linewidth=1.2, label=label)
    axes.legend()
    return figure


def rates_curve(curves: Curves, groups: Sequence[str], stages: Sequence[str]) -> Figure:
    """Learning rates of stem, middle and head on a logarithmic axis; a frozen group has no line."""
    figure, axes = _axes("Learning rate", curves, stages)
    count, chosen = curves.rates.shape[1], curves.some()
    for (name, index), colour in zip(
        {"stem": 0, "middle": count // 2, "head": count - 1}.items(), ("first", "third", "second"), strict=True
    ):
        if (name == "head") or (index < count - 1 and (name == "stem" or index > 0)):
            rates = np.where(curves.rates[chosen, index] > 0, curves.rates[chosen, index], np.nan)
            label = f"{name}: {groups[index]}" if groups[index] != name else name
            axes.plot(curves.step[chosen], rates, color=COLOURS[colour], label=_short(label, 32))
    peaks = np.array([curves.rates[curves.stage == stage].max(axis=0) for stage in np.unique(curves.stage)])
    if peaks.any():
        axes.set_yscale("log")
        # The last steps of a cycle fall far below where it began: following them would flatten all the rest.
        axes.set_ylim(peaks[peaks > 0].min() / 40, peaks.max() * 2)
        axes.yaxis.set_major_formatter(_power)
        axes.minorticks_off()
    axes.legend()
    return figure


def momentum_curve(curves: Curves, stages: Sequence[str]) -> Figure:
    """Momentum (Adam's first beta) over the steps."""
    figure, axes = _axes("Momentum (beta1)", curves, stages)
    chosen = curves.some()
    axes.plot(curves.step[chosen], curves.momentum[chosen], color=COLOURS["first"])
    return figure


def confusion_matrix(matrix: np.ndarray, labels: Sequence[str], split: str) -> Figure:
    """Shade: share of the rows of a class that were given each class. Rows are what is true."""
    count = len(labels)
    cell = min(0.55, max(0.15, 4.5 / count)) if count <= NAMED else 10.0 / count
    figure = Figure(figsize=(count * cell + 1.5, count * cell + 1.2))
    axes = figure.add_axes((0, 0, 1, 1))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    blue = to_rgb(COLOURS["first"])
    # Transparent where nothing is, so that light and dark pages both shine through.
    shade = LinearSegmentedColormap.from_list("shade", [(*blue, 0.12), (*blue, 1.0)])
    axes.imshow(np.ma.masked_equal(shares, 0), cmap=shade, vmin=0, vmax=1, interpolation="nearest")
    axes.set(title=f"Confusion matrix, {split} rows", xlabel="predicted", ylabel="true")
    axes.grid(False)
    if count <= NAMED:
        names = [_short(label, 28) for label in labels]
        size = 9 if count <= COUNTED else 7
        axes.set_xticks(range(count), names, rotation=90, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
        axes.tick_params(length=0)
        for lines in (axes.hlines, axes.vlines):
            lines(np.arange(count + 1) - 0.5, -0.5, count - 0.5, color=COLOURS["line"], linewidth=0.4)
    if count <= COUNTED:
        for true, guess in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[true, guess] > 0.7 else COLOURS["ink"]
            axes.text(guess, true, f"{matrix[true, guess]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    return figure


def reliability(before: Bins, after: Bins, split: str) -> Figure:
    """Share of right answers over how sure the model was of them; on the diagonal, it is as right as it is sure."""
    figure = Figure(figsize=(3.6, 3.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(title=f"How sure, and how often right ({split})", xlabel="probability of the answer", ylabel="share right")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linestyle=":", linewidth=1.2)
    most = max((rows for _, _, rows in [*before, *after]), default=1)
    for bins, colour, label in ((before, "third", "before the temperature"), (after, "first", "as saved")):
        if bins:
            sure, right, rows = zip(*bins, strict=True)
            axes.plot(sure, right, color=COLOURS[colour], linewidth=0.8, alpha=0.6)
            sizes = [8 + 60 * count / most for count in rows]
            axes.scatter(sure, right, s=sizes, color=COLOURS[colour], label=label, linewidths=0)
    axes.legend(loc="upper left")
    return figure


def by_group(title: str, history: Sequence[dict[str, Any]], what: str, groups: Sequence[str]) -> Figure:
    """A number of each layer group after each epoch, on a logarithmic scale of shades; the head stands on top."""
    told = [entry for entry in history if what in entry.get("groups", {})]
    values_GE = np.array([entry["groups"][what] for entry in told], dtype=float).T
    count, epochs = values_GE.shape
    figure = Figure(figsize=(4.7, min(4.2, max(1.6, 0.17 * count))))
    axes = figure.add_axes((0, 0, 1, 1))
    blue = to_rgb(COLOURS["first"])
    shade = LinearSegmentedColormap.from_list("shade", [(*blue, 0.06), (*blue, 1.0)])
    positive = values_GE[np.isfinite(values_GE) & (values_GE > 0)]
    low, high = (positive.min(), positive.max()) if len(positive) else (1e-3, 1.0)
    image = axes.imshow(
        np.ma.masked_where(~(values_GE > 0), values_GE), cmap=shade, aspect="auto", origin="lower",
        interpolation="nearest", norm=LogNorm(low, high if high > low else 2 * low),
    )  # fmt: skip
    axes.set(title=title, xlabel="epoch")
    axes.grid(False)
    ticks = np.unique(np.linspace(0, epochs - 1, min(epochs, 10)).round().astype(int))
    axes.set_xticks(ticks, [str(told[i]["epoch"]) for i in ticks])
    rows = np.unique(np.linspace(0, count - 1, min(count, 12)).round().astype(int))
    axes.set_yticks(rows, [_short(groups[i] if i < len(groups) else str(i), 22) for i in rows])
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.yaxis.set_major_formatter(_power)
    bar.ax.minorticks_off()
    return figure


def scatter(name: str, target: np.ndarray, value: np.ndarray) -> Figure:
    """Predicted over true values of one regression target, [N] each; on the diagonal, they agree."""
    figure = Figure(figsize=(4.6, 3.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(title=f"{_short(name, 40)}, test rows", xlabel="true", ylabel="predicted")
    some = np.random.default_rng(0).permutation(len(target))[:2000]
    axes.plot(target[some], value[some], "o", color=COLOURS["first"], markersize=3.5, alpha=0.4, markeredgewidth=0)
    axes.axline((float(np.mean(target)),) * 2, slope=1, color=COLOURS["muted"], linestyle=":", linewidth=1.2)
    return figure


def draw_range_test(found: RangeTest, path: Path) -> Path:
    """Write a picture of a range test: the loss over the rate, and the rates that it tells.

    Raises:
        RunError: The file cannot be written, or is of no kind of picture.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set(title="Range test", xlabel="peak learning rate of the head", ylabel="loss", xscale="log")
        low = min(found.smooth)
        axes.plot(found.rates, found.losses, color=COLOURS["first"], alpha=0.3, linewidth=0.8)
        axes.plot(found.rates, found.smooth, color=COLOURS["first"], label="smoothed")
        if found.runs_away is not None:
            axes.axvline(found.runs_away, color=COLOURS["second"], linestyle="--", label="runs away")
        axes.axvline(found.suggested, color=COLOURS["third"], linestyle=":", label="suggested")
        finite = [value for value in found.losses if np.isfinite(value)]
        axes.xaxis.set_major_formatter(_power)
        axes.minorticks_off()
        axes.set_ylim(min([low, *finite]) * 0.9, min(max(finite), 3 * max(found.smooth[0], low)) * 1.05)
        axes.legend()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be written ({error}); give a .png, .svg or .pdf file with --out") from None
    return path


def _axes(title: str, curves: Curves, stages: Sequence[str]) -> tuple[Figure, Axes]:
    """An empty plot over the steps, every second stage shaded, each with its name, or number where there are many."""
    figure = Figure(figsize=(4.7, 2.4))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(title=title, xlabel="optimizer steps")
    spans = curves.spans()
    for number, (stage, begin, end) in enumerate(spans):
        if number % 2:
            axes.axvspan(begin, end, color=COLOURS["muted"], alpha=0.1, linewidth=0)
        label = _short(stages[stage], 14) if len(spans) <= 4 else str(stage + 1)
        axes.text(
            (begin + end) / 2,
            1.0,
            label,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=COLOURS["muted"],
        )
    axes.set_title(title, pad=14)
    axes.set_xlim(spans[0][1], spans[-1][2])
    return figure, axes


def _power(rate: float, _: Any) -> str:
    """A rate on a logarithmic axis."""
    return f"{rate:.0e}".replace("e-0", "e-").replace("e+00", "")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a thirtieth of the run, without a bias to its start."""
    keep, mean, weight, smooth = 1 - 1 / max(1.0, len(values) / 30), 0.0, 0.0, []
    for value in values:
        if np.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight if weight else np.nan)
    return np.array(smooth)


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
