"""`predictions/test.csv` goes in; counts of each class, the surest mistakes and scores of a trivial answer come out.

C is the number of classes, N of rows, K of regression targets.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Tally:
    """For each class [C] of a split: how often it was predicted rightly, predicted at all, and true."""

    split: str
    right: np.ndarray
    chosen: np.ndarray
    present: np.ndarray
    confusion: np.ndarray | None = None  # [C, C], rows are what is true

    @classmethod
    def of_confusion(cls, split: str, confusion: np.ndarray) -> "Tally":
        """From a confusion matrix."""
        return cls(split, confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1), confusion)

    @classmethod
    def of_lists(cls, split: str, rows: Iterable[tuple[list[int], list[int]]], classes: int, paired: bool) -> "Tally":
        """From (true, predicted) class numbers of each row: of each word in turn where `paired`, else as sets."""
        counts = np.zeros((3, classes), dtype=int)
        for true, guess in rows:
            same = [t for t, g in zip(true, guess, strict=False) if t == g] if paired else set(true) & set(guess)
            for line, found in zip(counts, (same, guess, true), strict=True):
                np.add.at(line, list(found), 1)
        return cls(split, *counts)

    def scores(self) -> list[tuple[float, float, float]]:
        """Precision, recall and F1 of each class; 0 where they have no denominator."""
        precision = self.right / np.maximum(self.chosen, 1)
        recall = self.right / np.maximum(self.present, 1)
        f1 = 2 * self.right / np.maximum(self.chosen + self.present, 1)
        return list(zip(precision.tolist(), recall.tolist(), f1.tolist(), strict=True))


@dataclass(frozen=True)
class Tested:
    """What `predictions/test.csv` says, as far as the task lets it be read."""

    tally: Tally | None = None
    sets: list[list[int]] | None = None  # true labels of each row, where several can be right
    values: tuple[np.ndarray, np.ndarray] | None = None  # true and predicted numbers [N, K]
    mistakes: tuple[tuple[str, str, str, float], ...] = ()  # id, true, predicted, probability; the surest first

    @classmethod
    def read(cls, path: Path, kind: str, labels: Sequence[str]) -> "Tested":
        """Read the table; one that is missing, or that a custom head wrote in its own way, says nothing."""
        if not path.is_file():
            return cls()
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        if kind == "regression":
            if header != ["id", *(f"target {label}" for label in labels), *labels] or not rows:
                return cls()
            values = np.array([row[1:] for row in rows], dtype=float).reshape(len(rows), 2, len(labels))
            return cls(values=(values[:, 0], values[:, 1]))
        if header[:3] != ["id", "target", "prediction"] or len(header) > 4:
            return cls()
        try:
            if kind == "single_label_classification":
                return cls._of_classes(rows, labels)
            parsed = [(read_labels(row[1], labels), read_labels(row[2], labels)) for row in rows]
        except (ValueError, IndexError):
            return cls()
        tally = Tally.of_lists("test", parsed, len(labels), paired=kind == "token_classification")
        return cls(tally, [true for true, _ in parsed] if kind == "multi_label_classification" else None)

    @classmethod
    def _of_classes(cls, rows: list[list[str]], labels: Sequence[str]) -> "Tested":
        index = {label: i for i, label in enumerate(labels)}
        if any(row[1] not in index or row[2] not in index for row in rows):
            return cls()
        confusion = np.zeros((len(labels), len(labels)), dtype=int)
        for _, true, guess, *_ in rows:
            confusion[index[true], index[guess]] += 1
        wrong = [(row[0], row[1], row[2], float(row[3])) for row in rows if row[1] != row[2]]
        wrong.sort(key=lambda mistake: -mistake[3])
        return cls(Tally.of_confusion("test", confusion), mistakes=tuple(wrong[:15]))


def read_labels(cell: str, labels: Sequence[str]) -> list[int]:
    """Class numbers of names joined by spaces. Names may hold spaces themselves: the longest that fits is taken.

    Raises:
        ValueError: A word that no name begins with.
    """
    index, words, found, at = {label: i for i, label in enumerate(labels)}, cell.split(" "), [], 0
    longest = max(label.count(" ") for label in labels) + 1
    while cell and at < len(words):
        for length in range(min(longest, len(words) - at), 0, -1):
            name = " ".join(words[at : at + length])
            if name in index:
                found.append(index[name])
                at += length
                break
        else:
            raise ValueError(words[at])
    return found


def baseline(kind: str, tally: Tally | None, tested: Tested, train: np.ndarray, rows: int) -> dict[str, float]:
    """Metrics of always saying the same: what is most frequent in train, or the mean of the targets.

    Args:
        kind: One of the kinds of task.
        tally: Counts of the split that is scored.
        tested: Its rows.
        train: Rows (tokens: words) of each class in train [C].
        rows: Rows of train.
    """
    if kind == "regression":
        if tested.values is None:
            return {}
        away = tested.values[0] - tested.values[0].mean(axis=0)
        return {"mae": float(np.abs(away).mean()), "rmse": float(np.sqrt((away**2).mean(axis=0)).mean()), "r2": 0.0}
    if tally is None or not train.any():
        return {}
    if kind == "multi_label_classification":
        if tested.sets is None:
            return {}
        always, count = np.flatnonzero(2 * train > rows), len(tested.sets)
        right, chosen = tally.present[always], count * len(always)
        return {
            "accuracy": float(np.mean([sorted(true) == always.tolist() for true in tested.sets])),
            "f1_macro": float((2 * right / np.maximum(right + count, 1)).sum() / len(train)),
            "f1_micro": float(2 * right.sum() / max(1, chosen + tally.present.sum())),
        }
    most, total = int(train.argmax()), max(1, int(tally.present.sum()))
    share = float(tally.present[most] / total)
    if kind == "token_classification":
        return {"accuracy": share}
    named = np.count_nonzero(tally.present) + (tally.present[most] == 0)  # scikit-learn's mean leaves out the others.
    return {"accuracy": share, "f1_macro": 2 * share / (1 + share) / max(1, int(named))}
