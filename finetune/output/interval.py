"""What was predicted for rows, and the metric that it is told in, go in; a 95 % interval of that metric comes out.

Shapes: N rows, C classes, K regression targets, M counts that a metric is made of, R draws of the rows.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from finetune.output.tally import Tested, read_labels

DRAWS = 2000  # of N rows with replacement: bounds settle to about a tenth of the interval's width
CHUNK = 100  # draws at once
Interval = tuple[float, float]


def wilson(share: float, rows: int) -> Interval:
    """Interval of a share of rows (Wilson 1927): right also where it is near 0 or 1, or rows are few."""
    from scipy.stats import binomtest

    found = binomtest(round(share * rows), rows).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def resampled(counts_NM: np.ndarray, score: Callable[[np.ndarray], np.ndarray], value: float) -> Interval | None:
    """Interval of `score`, a function of the sums [R, M] of the rows' counts, over draws of the rows.

    None where `score` of all rows is not `value`: the counts are then of other rows, or of another metric.
    """
    rows = len(counts_NM)
    if not rows or not np.isclose(score(counts_NM.sum(axis=0, keepdims=True))[0], value, rtol=1e-4, atol=1e-6):
        return None
    generator, found = np.random.default_rng(0), []
    for _ in range(DRAWS // CHUNK):
        times_RN = generator.multinomial(rows, np.full(rows, 1 / rows), size=CHUNK)
        found.append(score(times_RN @ counts_NM))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return float(low), float(high)


def of_values(target_NK: np.ndarray, value_NK: np.ndarray, metric: str, value: float) -> Interval | None:
    """Interval of "rmse" or "mae", a mean over the targets."""
    if metric not in ("rmse", "mae"):
        return None
    rows, root = len(target_NK), metric == "rmse"
    error_NK = np.abs(target_NK - value_NK) ** (2 if root else 1)
    return resampled(error_NK, lambda sums_RK: np.mean((sums_RK / rows) ** (0.5 if root else 1), axis=1), value)


def of_classes(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], kind: str, labels: Sequence[str], metric: str, value: float
) -> Interval | None:
    """Interval of F1 over rows of (true, predicted) class numbers: of each word in turn for tags, else as sets."""
    tags = kind == "token_classification"
    if tags and metric == "f1" and any(name.startswith(("B-", "I-")) for name in labels):
        return resampled(_entities(rows, labels), lambda sums: _f1(sums[:, :1], sums[:, 1:])[:, 0], value)
    if metric != ("f1" if tags else "f1_macro"):
        return None
    counts_NM = np.zeros((len(rows), 2 * len(labels)))
    for counts_M, (true, guess) in zip(counts_NM, rows, strict=True):
        right = [t for t, g in zip(true, guess, strict=True) if t == g] if tags else list(set(true) & set(guess))
        np.add.at(counts_M, right, 1)
        np.add.at(counts_M, len(labels) + np.array([*true, *guess], dtype=int), 1)

    def macro(sums_RM: np.ndarray) -> np.ndarray:
        right, both = np.split(sums_RM, 2, axis=1)
        # As scikit-learn counts: among tags, those that are nowhere are left out; a label that is nowhere scores 0.
        named = (both > 0).sum(axis=1) if tags else len(labels)
        return _f1(right, both).sum(axis=1) / np.maximum(named, 1)

    return resampled(counts_NM, macro, value)


def of_test_rows(path: Path, kind: str, labels: Sequence[str], metric: str, value: float) -> Interval | None:
    """The same of the rows in `predictions/test.csv`; None where it cannot be read, or says something else."""
    if kind == "regression":
        values = Tested.read(path, kind, labels).values
        return of_values(*values, metric, value) if values is not None else None
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    if header[:3] != ["id", "target", "prediction"]:
        return None
    try:
        pairs = [(read_labels(row[1], labels), read_labels(row[2], labels)) for row in rows]
        return of_classes(pairs, kind, labels, metric, value)
    except (ValueError, IndexError):
        return None


def _f1(right: np.ndarray, both: np.ndarray) -> np.ndarray:
    return 2 * right / np.maximum(both, 1)


def _entities(rows: Sequence[tuple[Sequence[int], Sequence[int]]], labels: Sequence[str]) -> np.ndarray:
    """For each row [N, 2]: entities that are right, and how many are true or predicted."""
    from nervaluate.loaders import ListLoader

    sides = ([[labels[i] for i in row[side]] for row in rows] for side in (0, 1))
    found = [[{(e.label, e.start, e.end) for e in row} for row in ListLoader().load(side)] for side in sides]
    return np.array([[len(t & g), len(t) + len(g)] for t, g in zip(*found, strict=True)], dtype=float).reshape(-1, 2)
