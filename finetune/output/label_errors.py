"""Runs of k folds go in; the probabilities that each row got from the model that never saw it come out, and the labels
that these say are wrong.

A row whose given label its own model finds improbable is hard, or labelled wrong (Northcutt et al. 2021, "Confident
learning", in its simplest form): the list is for a person to look at, from the top.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.splits import Splits
from finetune.data.task import Task, default_loss, metrics, softmax
from finetune.errors import DataError
from finetune.model.pretrained import Pretrained
from finetune.train.evaluate import evaluate
from finetune.train.processes import start_processes


@dataclass(frozen=True)
class OutOfFold:
    """Rows with what a model that did not train on them says.

    Attributes:
        ids: Names of the rows: the file, or file and line.
        given: Their labels, as indices [N].
        probabilities: Of each label [N, C].
        task: The task, with the labels.
    """

    ids: tuple[str, ...]
    given: np.ndarray
    probabilities: np.ndarray
    task: Task

    @property
    def metrics(self) -> dict[str, Any]:
        """Accuracy, log-loss and the others over all rows."""
        return metrics(self.task, np.log(self.probabilities.clip(1e-12)), self.given)

    def __add__(self, other: "OutOfFold") -> "OutOfFold":
        """Both, one after the other."""
        return OutOfFold(
            self.ids + other.ids,
            np.concatenate([self.given, other.given]),
            np.concatenate([self.probabilities, other.probabilities]),
            self.task,
        )

    def write(self, path: Path) -> None:
        """Write a table: id, target, prediction, and the probability of each label."""
        labels = self.task.labels
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "target", "prediction", *labels])
            for name, given, row in zip(self.ids, self.given, self.probabilities, strict=True):
                writer.writerow([name, labels[given], labels[int(row.argmax())], *(f"{p:.6g}" for p in row)])


@dataclass(frozen=True)
class LabelError:
    """A row whose label is likely wrong.

    Attributes:
        id: The file, or file and line.
        given: Its label.
        likely: The label that the model finds most probable.
        confidence: Probability of the likely label.
        probability: Probability of the given one; the list is in its order.
    """

    id: str
    given: str
    likely: str
    confidence: float
    probability: float


def out_of_fold(pretrained: Pretrained, splits: Splits) -> OutOfFold:
    """What a model says of the test part of `splits`, which it has not seen. All processes have to call it.

    Raises:
        DataError: The rows do not have one label each.
    """
    task, rows = splits.task, splits.test
    if task.kind != "single_label_classification" or rows is None:
        raise DataError(f"label errors: found among rows with one label each, not for {task.kind}")
    found = evaluate(pretrained, rows, task, start_processes(), loss=default_loss(task), batch_size=32)
    return OutOfFold(tuple(rows["id"]), np.asarray(found.targets), softmax(found.outputs), task)


def read_out_of_fold(path: Path, task: Task) -> OutOfFold:
    """The table that `OutOfFold.write` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    given = np.array([task.labels.index(row[1]) for row in rows])
    return OutOfFold(tuple(row[0] for row in rows), given, np.array([row[3:] for row in rows], dtype=float), task)


def label_errors(found: OutOfFold) -> list[LabelError]:
    """The rows whose most probable label is not the given one, the least probable given labels first."""
    labels, likely = found.task.labels, found.probabilities.argmax(1)
    at = np.arange(len(likely))
    of_given, of_likely = found.probabilities[at, found.given], found.probabilities[at, likely]
    order = sorted(np.flatnonzero(likely != found.given).tolist(), key=lambda row: (of_given[row], -of_likely[row]))
    return [
        LabelError(
            found.ids[row], labels[found.given[row]], labels[likely[row]], float(of_likely[row]), float(of_given[row])
        )
        for row in order
    ]


def write_label_errors(errors: Sequence[LabelError], path: Path) -> None:
    """Write a table: id, given label, likely label, confidence in it, probability of the given one."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "given", "likely", "confidence", "probability of given"])
        writer.writerows([e.id, e.given, e.likely, f"{e.confidence:.4f}", f"{e.probability:.4g}"] for e in errors)
