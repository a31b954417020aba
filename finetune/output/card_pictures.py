"""What is known of a run goes in; the pictures of its card come out, as PNG files with a description in words."""

import csv
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from finetune.output import plots
from finetune.output.card_facts import Facts
from finetune.output.plots import COLOURS, Curves

BINS = 10  # of the probability


@dataclass(frozen=True)
class Picture:
    """A picture in the repository: its path there, what it shows, its natural width in pixels, and the file."""

    path: str
    alt: str
    width: int
    content: bytes

    @property
    def shown(self) -> str:
        """HTML, as Markdown knows no width."""
        return f'<img src="{self.path}" alt="{self.alt}" width="{self.width}">'  # its own words: nothing to escape


def pictures(facts: Facts) -> dict[str, Picture]:
    """Confusion matrix, learning rates and reliability, as far as the run folder tells of them."""
    drawn: dict[str, Picture] = {}

    def add(name: str, alt: str, paint: Callable[[], Figure]) -> None:
        content = io.BytesIO()
        with matplotlib.rc_context(plots.STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure = paint()
            box = figure.get_tightbbox().padded(0.08)
            figure.savefig(content, format="png", dpi=min(150, 1400 / box.width), bbox_inches=box, facecolor="white")
        drawn[name] = Picture(f"images/{name}.png", alt, round(box.width * 100), content.getvalue())

    tally = facts.tally
    if tally is not None and tally.confusion is not None:
        matrix, split = tally.confusion, tally.split
        alt = f"Confusion matrix of {len(facts.labels)} classes, {tally.right.sum()} of {matrix.sum()} rows right"
        add("confusion", alt, lambda: plots.confusion_matrix(matrix, facts.labels, split))
    if facts.steps:
        curves = Curves.of(facts.steps)
        planned = facts.record.get("stages", [])
        stages = [planned[i]["name"] if i < len(planned) else f"stage {i + 1}" for i in range(curves.stage.max() + 1)]
        groups = facts.record.get("groups") or [f"group {i + 1}" for i in range(curves.rates.shape[1])]
        peaks = curves.rates.max(axis=0)
        alt = f"Learning rates over {curves.step[-1]} steps: to {peaks[-1]:.2g} in the head, {peaks[0]:.2g} in the stem"
        add("rates", alt, lambda: plots.rates_curve(curves, groups, stages))
    said = confidences(facts)
    if said is not None:
        error = f"{100 * calibration(*said):.1f} %"
        alt = f"Share of right answers over the probability given; expected calibration error {error}"
        add("reliability", alt, lambda: reliability(*said))
    return drawn


def confidences(facts: Facts) -> tuple[np.ndarray, np.ndarray] | None:
    """For each test row [N] the probability of the class that was predicted, and whether it was right."""
    path = facts.folder.parent / "predictions" / "test.csv"
    if facts.kind != "single_label_classification" or facts.split != "test" or not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    if header[:4] != ["id", "target", "prediction", "probability"] or not rows:
        return None
    return np.array([float(row[3]) for row in rows]), np.array([row[1] == row[2] for row in rows])


def in_bins(probability_N: np.ndarray, right_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each bin of equal width that is not empty: mean probability, share that is right, rows."""
    place_N = np.minimum((probability_N * BINS).astype(int), BINS - 1)
    rows = np.bincount(place_N, minlength=BINS)
    sums = (np.bincount(place_N, values, minlength=BINS)[rows > 0] for values in (probability_N, right_N))
    mean, share = (total / rows[rows > 0] for total in sums)
    return mean, share, rows[rows > 0]


def calibration(probability_N: np.ndarray, right_N: np.ndarray) -> float:
    """Expected calibration error: mean distance of probability and share of right answers (Guo et al. 2017)."""
    mean, share, rows = in_bins(probability_N, right_N)
    return float((np.abs(mean - share) * rows).sum() / rows.sum())


def reliability(probability_N: np.ndarray, right_N: np.ndarray) -> Figure:
    """Share of right answers over the probability that was given; on the diagonal, the two agree."""
    figure = Figure(figsize=(3.6, 3.2))
    axes = figure.add_axes((0, 0, 1, 1))
    mean, share, rows = in_bins(probability_N, right_N)
    axes.set(title="Reliability, test rows", xlabel="probability given", ylabel="share of right answers")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axline((0, 0), slope=1, color=COLOURS["muted"], linestyle=":", linewidth=1.2)
    axes.plot(mean, share, color=COLOURS["first"], linewidth=1)
    axes.scatter(mean, share, s=12 + 150 * rows / rows.sum(), color=COLOURS["first"], zorder=3, clip_on=False)
    return figure
