"""Labels as they are written in data: cells go in; the kind of task, the class names and the targets come out."""

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from finetune.data.task import Task, full_kind
from finetune.errors import DataError

NUMBER = re.compile(r"\s*[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?\s*", re.IGNORECASE | re.ASCII)


def is_missing(value: Any) -> bool:
    """Whether a label cell holds nothing: None, NaN, or an empty string. An empty list is an answer: no tags."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip().lower() in ("", "nan")


def as_number(value: Any) -> float | None:
    """Read a number from a cell, or None. "007" is a code and no number."""
    if isinstance(value, str):
        return float(value) if NUMBER.fullmatch(value) else None
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else None


def as_list(value: Any) -> list[Any] | None:
    """Read a list from a cell, be it a list or its spelling in a CSV file ("['a', 'b']"), or None."""
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    if isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]"):
        try:
            return list(ast.literal_eval(value.strip()))
        except (ValueError, SyntaxError, TypeError):
            return None
    return None


def label_name(value: Any) -> str:
    """Name of a class in a cell, as it is spelled, but "1" for 1.0: integers come as floats where a cell is empty."""
    text = str(value).strip()
    return text[: text.index(".")] if re.fullmatch(r"-?(0|[1-9]\d*)\.0*", text) else text


def label_order(names: Sequence[str] | set[str]) -> tuple[str, ...]:
    """Sort class names: numbers by value, all else alphabetically."""
    unique = set(names)
    numbers = all(as_number(name) is not None for name in unique)
    return tuple(sorted(unique, key=lambda name: (float(name), name) if numbers else (0.0, name)))


def infer_kind(values: Sequence[Any], *, several: bool = False, tokens: bool = False) -> str:
    """Tell the kind of task from the labels of all train rows, none of them missing.

    Args:
        values: One cell a row; a list of cells a row when `several` columns were named.
        several: Several label columns were named.
        tokens: The inputs are lists of words, with one label a word.
    """
    if tokens:
        return "token_classification"
    cells = [cell for row in values for cell in row] if several else list(values)
    if several:
        binary = all(isinstance(cell, bool) or as_number(cell) in (0.0, 1.0) for cell in cells)
        return "multi_label_classification" if binary else "regression"
    lists = [as_list(cell) for cell in cells]
    if all(row is not None for row in lists):
        flat = [cell for row in lists for cell in row or []]
        fractions = any(isinstance(cell, float) and cell not in (0.0, 1.0) for cell in flat)
        return "regression" if fractions else "multi_label_classification"
    numbers = [as_number(cell) for cell in cells]
    if any(number is None for number in numbers):
        return "single_label_classification"
    distinct, rows = len(set(numbers)), len(cells)
    if not all(number is not None and number.is_integer() for number in numbers):
        return "regression"
    if any(isinstance(cell, float) or (isinstance(cell, str) and "." in cell) for cell in cells):
        few = distinct <= 20 and distinct <= max(2, 0.05 * rows)
    else:
        few = distinct <= max(20, rows / 2)  # whole numbers that hardly ever repeat are quantities, not classes
    return "single_label_classification" if few else "regression"


def multi_hot(rows: Sequence[list[Any]]) -> bool:
    """Whether lists are already one 0/1 a class: all of one length, above one, and nothing but 0 and 1."""
    sizes = {len(row) for row in rows}
    return (
        len(sizes) == 1 and sizes.pop() > 1 and all(isinstance(c, int | float) and c in (0, 1) for r in rows for c in r)
    )


def make_task(
    cells: Sequence[Any],
    *,
    columns: tuple[str, ...],
    modality: str,
    tokens: bool = False,
    names: tuple[str, ...] | None = None,
    kind: str | None = None,
) -> Task:
    """Make the Task out of the labels of train, none of them missing.

    Args:
        cells: One label a row; a tuple of them where several columns hold it.
        columns: Names of the label columns.
        modality: "image" or "text".
        tokens: The inputs are lists of words, with one label a word.
        names: Class names in order, where the data declares them.
        kind: Kind of task, full or short; by default, inferred.

    Raises:
        DataError: The kind does not exist, or does not fit the inputs.
    """
    if kind is None and names is not None and not tokens and as_list(cells[0]) is None:
        kind = "single_label"  # the data declares classes, whatever their names look like
    kind = full_kind(kind) if kind else infer_kind(cells, several=len(columns) > 1, tokens=tokens)
    if (kind == "token_classification") != tokens:
        needs = "does not fit lists of words" if tokens else "needs a column with lists of words, name it with tokens="
        raise DataError(f"task: {kind} {needs}")
    return Task(kind, modality, (names if kind != "regression" else None) or label_names(cells, columns, kind))


def label_names(cells: Sequence[Any], columns: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """Names of the outputs in order, where the data does not declare them."""
    if len(columns) > 1:
        return columns
    if kind == "single_label_classification":
        return label_order({label_name(cell) for cell in cells})
    if kind == "regression":
        width = max((len(as_list(cell) or [0]) for cell in cells), default=1)
        return columns if width == 1 else tuple(f"{columns[0]}_{k}" for k in range(width))
    rows = [tags(cell) for cell in cells]
    if kind == "multi_label_classification" and multi_hot(rows):
        return tuple(map(str, range(len(rows[0]))))
    return label_order({label_name(cell) for row in rows for cell in row})


def tags(cell: Any) -> list[Any]:
    """Tags in a cell: a list, or a string with | ; or , between them."""
    items = as_list(cell)
    if items is None:
        separator = next((sign for sign in "|;," if sign in str(cell)), "|")
        items = [tag for tag in map(str.strip, str(cell).split(separator)) if tag]
    return items


def encode_cell(cell: Any, task: Task, index: dict[str, int], several: bool, hot: bool) -> Any:
    """Turn one raw label into a target.

    Raises:
        KeyError: With the name of a label that `index` lacks.
        ValueError: The label is not of the task's kind.
    """
    if task.kind == "single_label_classification":
        return index[label_name(cell)]
    if task.kind == "token_classification":
        return [index[label_name(tag)] for tag in as_list(cell) or []]
    if task.kind == "multi_label_classification" and not several and not hot:
        chosen = {index[label_name(tag)] for tag in tags(cell)}
        return [float(i in chosen) for i in range(task.outputs)]
    values = list(cell) if several else as_list(cell) if as_list(cell) is not None else [cell]
    numbers = [float(value) if isinstance(value, bool) else as_number(value) for value in values or []]
    pairs = zip(values or [], numbers, strict=True)
    bad = [value for value, number in pairs if number is None or not np.isfinite(number)]
    if bad:
        raise ValueError(f"label {bad[0]!r} is not a number")
    if len(numbers) != task.outputs:
        raise ValueError(f"{len(numbers)} values where other rows have {task.outputs}")
    if task.kind == "multi_label_classification" and not set(numbers) <= {0.0, 1.0}:
        raise ValueError(f"label {next(n for n in numbers if n not in (0.0, 1.0)):g} is neither 0 nor 1")
    return numbers


def classes_of(target: Any, task: Task) -> list[int]:
    """Class indices in a target; a token's class counts once for each token."""
    if task.kind == "multi_label_classification":
        return [i for i, on in enumerate(target) if on]
    return [target] if isinstance(target, int) else list(target)


def count_classes(targets: Iterable[Any], task: Task) -> dict[str, int]:
    """Label -> examples (tokens: words); empty for regression."""
    if task.kind == "regression":
        return {}
    counts = Counter(i for target in targets for i in classes_of(target, task))
    return {label: counts[i] for i, label in enumerate(task.labels)}
