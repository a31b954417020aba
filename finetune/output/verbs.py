"""A trained model and somebody's data go in; a table of predictions, or scores on labelled rows, come out.

What stands behind `finetune predict` and `finetune evaluate`.
"""

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from datasets import Dataset

from finetune.data.checks import LeftOut, scan
from finetune.data.labels import encode_cell, multi_hot, tags
from finetune.data.loaders import Batch, make_loader, text_lengths
from finetune.data.sources import read
from finetune.data.splits import Encoded, canonical
from finetune.data.tables import TABLE_SUFFIXES, Part, Roles, find_roles
from finetune.data.task import Task, default_loss, main_metric
from finetune.errors import DataError, RunError
from finetune.output.inputs import is_table
from finetune.output.interval import Interval, of_classes, of_values, wilson
from finetune.output.predict import Prediction, Predictor
from finetune.output.report import read_run, readable
from finetune.train.evaluate import Evaluation, as_float, evaluate
from finetune.train.processes import start_processes

SEVERAL = ("multi_label_classification", "regression")  # kinds whose labels may be the names of columns


def predict_all(
    predictor: Predictor, inputs: Sequence[str], *, column: str | None = None, batch_size: int = 32
) -> list[Prediction]:
    """Predict for files, folders, tables and texts, in the order given; one Prediction for each input.

    Args:
        predictor: A loaded model.
        inputs: For images: files, folders (searched through), tables with paths. For texts: tables, .txt files (one
            text each), or the texts themselves.
        column: Column of the tables; by default found as in training.
        batch_size: Examples at once.

    Raises:
        DataError: A folder without images; a table that cannot be read.
    """
    found: list[Prediction] = []
    single: list[tuple[str, str]] = []  # name, item: predicted together, as long as they follow each other

    def flush() -> None:
        said = predictor.predict([item for _, item in single], batch_size)
        found.extend(replace(one, input=name) for one, (name, _) in zip(said, single, strict=True))
        single.clear()

    for given in inputs:
        reason, item = None, given
        if predictor.task.modality == "text" and not is_table(given):
            item, reason = _text(given)
        elif is_table(given) or os.path.isdir(given):
            flush()
            found += predictor.predict(given, batch_size, column=column)
            continue
        if reason is not None:
            flush()
            found.append(Prediction(given, error=reason))
        else:
            single.append((given, item))
    flush()
    return found


def _text(given: str) -> tuple[str, str | None]:
    """The text that is meant, or why there is none: a text file's content, or what was given itself."""
    path = Path(given)
    named = len(given) < 255 and "\n" not in given and path.suffix.lower() in (".txt", *TABLE_SUFFIXES)
    if not named or (" " in given and not path.exists()):
        return given, None
    if not os.path.exists(path):
        return given, "file not found"
    if not os.path.isfile(path):  # reading a pipe would wait for ever
        return given, "not a file"
    try:
        return path.read_text(encoding="utf-8"), None
    except (OSError, UnicodeDecodeError) as error:
        return given, f"not a text file ({type(error).__name__})"


def rows(predictions: Iterable[Prediction], task: Task) -> Iterator[dict[str, Any]]:
    """A flat row for each prediction: input (of a pair, both), what applies to the task, and error."""
    for one in predictions:
        name = one.input
        pair = tuple(name.values()) if isinstance(name, dict) else name if isinstance(name, tuple) else (name,)
        first = pair[0] if pair else ""
        name = first if not isinstance(first, list) else " ".join(map(str, first))
        row: dict[str, Any] = {"input": name}
        row |= {"input_pair": pair[1]} if len(pair) > 1 else {}
        row |= _answer(one, task) if one.error is None else {}
        yield row | {"error": one.error}


def _answer(one: Prediction, task: Task) -> dict[str, Any]:
    score = None if one.score is None else round(one.score, 6)
    if one.values is not None:
        return {name: value if np.isscalar(value) else json.dumps(value) for name, value in one.values.items()}
    if task.kind == "token_classification":
        return {"tags": " ".join(tag or "?" for tag in one.tags or ()), "score": score}
    if task.kind == "multi_label_classification":
        return {"labels": "|".join(one.labels or ()), "score": score}
    return {"label": one.label, "score": score}


def write_rows(predictions: Sequence[Prediction], task: Task, out: Path | None) -> None:
    """Write predictions as CSV, or to a name that ends in .jsonl as a JSON object a line, with all probabilities.

    Raises:
        RunError: The file cannot be written.
    """
    if out is None:
        return _write_csv(predictions, task, sys.stdout)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            if out.suffix.lower() != ".jsonl":
                return _write_csv(predictions, task, file)
            for one in predictions:
                file.write(json.dumps(dict(one), ensure_ascii=False, default=str) + "\n")
    except (OSError, ValueError) as error:  # the latter of a zero byte in the name
        said = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{out}: cannot be written ({said}); give another file with --out") from None


def _write_csv(predictions: Sequence[Prediction], task: Task, file: TextIO) -> None:
    table = list(rows(predictions, task))
    names = list(dict.fromkeys(name for row in table for name in row if name != "error"))
    writer = csv.DictWriter(file, [*names, "error"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)


@dataclass(frozen=True)
class Measured:
    """What a model scored on labelled rows.

    Attributes:
        source: Which rows.
        rows: How many were scored.
        metrics: By name, the loss among them; lists such as the confusion matrix too.
        main: The metric that the task is told in.
        interval: 95 % interval of it.
        left_out: Rows that could not be scored, and why.
        mirrored: The numbers among the metrics with each picture's mirror image taken into account, if asked for.
    """

    source: str
    rows: int
    metrics: dict[str, Any]
    main: str
    interval: Interval | None
    left_out: tuple[LeftOut, ...]
    mirrored: dict[str, float] | None = None

    def lines(self) -> list[str]:
        """For the console."""
        out = [f"Data      {self.rows} rows of {self.source}"]
        if self.left_out:
            first = f"{self.left_out[0].id}: {self.left_out[0].reason}"
            out.append(f"Left out  {len(self.left_out)} rows, such as {first}")
        for name, value in self.metrics.items():
            if isinstance(value, int | float):
                between = ""
                if name == self.main and self.interval is not None:
                    between = f"   (95 % interval {self.interval[0]:.4g} to {self.interval[1]:.4g})"
                beside = f"   with its mirror image {self.mirrored[name]:.4g}" if self.mirrored else ""
                out.append(f"{name:<9} {value:.4g}{between}{beside}")
        return out

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        left_out = [vars(entry) for entry in self.left_out]
        return {**vars(self), "interval": list(self.interval) if self.interval else None, "left_out": left_out}


def evaluate_on(
    predictor: Predictor,
    data: Any,
    *,
    label: str | Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    usual: Mapping[str, str] | None = None,
    batch_size: int = 32,
    flip: bool = False,
) -> Measured:
    """Score a model on labelled rows: the test part of `data`, or its only one.

    Args:
        predictor: A loaded model.
        data: What `load_dataset` takes: a folder of class folders, a table, a Dataset, the name of a Hub data set.
        label: Column of the label, or several; by default the targets' own names, or found as in training.
        columns: Role ("text", "text_pair", "image", "tokens") -> column; by default found as in training.
        usual: The same and "label" of the data that the model was trained on, used where there are such columns.
        batch_size: Examples at once.
        flip: Also score the mean of the logits of each picture and of its mirror image.

    Raises:
        DataError: The data cannot be read, or no row has a label that the model knows; `flip` of texts.
        RunError: The model's outputs are those of a head of its maker's own, which needs its own scores.
    """
    pretrained, task = predictor.pretrained, predictor.task
    if batch_size < 1:
        raise RunError(f"batch_size: {batch_size}; give a whole number of at least 1")
    if pretrained.custom_head and not pretrained.info.get("linear_head"):
        raise RunError(
            "evaluate: the head is its maker's own, and only its maker knows its scores; use load and predict"
        )
    parts = read(data)
    name = next(split for split in ("test", "valid", "train") if split in parts)
    part = parts[name]
    there, usual = set(part.data.column_names), usual or {}
    if label is None and task.kind in SEVERAL and set(task.labels) <= there:
        label = list(task.labels)
    elif label is None and usual.get("label") in there:
        label = usual["label"]
    inputs = {role: column for role, column in usual.items() if role != "label"}
    if not columns and inputs and set(inputs.values()) <= there:
        columns = inputs
    roles = find_roles(part, modality=task.modality, label=label, **(columns or {}))
    encoded = _encode(part, roles, task)
    dataset = canonical(encoded, roles, task)
    lengths = text_lengths(dataset, task, pretrained.processor) if task.modality == "text" else None  # type: ignore[arg-type]
    if flip and task.modality != "image":
        raise DataError("flip: only pictures have a mirror image; leave it out for texts")
    processes = replace(start_processes(), precision="fp32")
    options: dict[str, Any] = {"loss": default_loss(task), "batch_size": batch_size, "lengths": lengths}
    found = evaluate(pretrained, dataset, task, processes, **options)
    mirrored = None
    if flip:
        both = evaluate(pretrained, dataset, task, processes, replayed=Mirrored(predictor, dataset), **options)
        mirrored = {name: value for name, value in both.metrics.items() if isinstance(value, int | float)}
    reasons = [(encoded.part.ids[row], reason) for row, reason in sorted(encoded.scan.reasons.items())]
    left_out = tuple(LeftOut(row, name, reason) for row, reason in [*part.left_out, *reasons])
    main = main_metric(task)[0]
    return Measured(part.where, len(dataset), found.metrics, main, _interval(task, found, main), left_out, mirrored)


@dataclass(frozen=True)
class Mirrored:
    """Batches of pictures, and for each the mean of what the model says of it and of its mirror image."""

    predictor: Predictor
    dataset: Dataset

    def loader(self, batches: list[list[int]]) -> Iterable[Batch]:
        """One batch for each list of rows."""
        processor: Any = self.predictor.pretrained.processor
        return make_loader(self.dataset, self.predictor.task, processor, batches, train=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits or values [B, C]."""
        model = self.predictor.pretrained
        turned = {name: value.flip(-1) if value.ndim == 4 else value for name, value in batch.inputs.items()}
        return (as_float(model.forward(batch.inputs)) + as_float(model.forward(turned))) / 2


def trained_columns(model: str) -> dict[str, str]:
    """Role -> column of the data that the model in a run folder was trained on; {} where that is not known."""
    for folder in (Path(model), Path(model).parent):
        if (folder / "run.json").is_file():
            with readable(folder):
                columns = read_run(folder).get("data", {}).get("columns", {})
                return {str(role): str(column) for role, column in columns.items()}
    return {}


def _encode(part: Part, roles: Roles, task: Task) -> Encoded:
    """Rows with their targets in the order of the model's labels; a label that it does not know is a reason."""
    part, found = scan(part, roles)
    index = {name: i for i, name in enumerate(task.labels)}
    numbered = task.labels == tuple(map(str, range(task.outputs))) and not roles.several
    multi = task.kind == "multi_label_classification"
    hot = multi and numbered and multi_hot([tags(found.cells[row]) for row in found.rows])
    usable, targets = [], []
    for row in found.rows:
        try:
            targets.append(encode_cell(found.cells[row], task, index, roles.several, hot))
        except KeyError as error:
            found.reasons[row] = f"label {error.args[0]!r} is not one of the model's"
        except ValueError as error:
            found.reasons[row] = str(error)
        else:
            usable.append(row)
    if not usable:
        row, reason = next(iter(found.reasons.items()))
        known = ", ".join(task.labels[:8]) + ("…" if task.outputs > 8 else "")
        raise DataError(
            f"{part.where}: no row can be scored ({part.ids[row]}: {reason}); the model knows {known}; name the column "
            "of the label with label="
        )
    return Encoded(part, found, usable, targets)


def _interval(task: Task, found: Evaluation, main: str) -> Interval | None:
    value = float(found.metrics[main])
    if task.kind == "single_label_classification":
        return wilson(value, len(found.targets))
    if task.kind == "regression":
        shape = (len(found.targets), -1)
        return of_values(np.reshape(found.targets, shape), np.reshape(found.outputs, shape), main, value)
    if task.kind == "multi_label_classification":
        pairs = [
            (np.flatnonzero(y > 0.5), np.flatnonzero(z > 0)) for z, y in zip(found.outputs, found.targets, strict=True)
        ]
    else:
        pairs = [(y, z.argmax(-1)) for z, y in zip(found.outputs, found.targets, strict=True)]
    lists = [(true.tolist(), guess.tolist()) for true, guess in pairs]
    return of_classes(lists, task.kind, task.labels, main, value)
