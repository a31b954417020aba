"""Splits go in; k splits over the same rows come out, in each of which another part is held out as its test."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import datasets
import numpy as np

from finetune.data.draw import VALID_PARTS, divided, draw, stratum_of_rows, tied
from finetune.data.labels import count_classes
from finetune.data.sources import Source, read, shown
from finetune.data.splits import Splits, image_digest
from finetune.errors import DataError

BINS = 10  # ranges of a regression target that folds are balanced over


def folds(splits: Splits, count: int = 5, *, groups: Mapping[str, Any] | None = None, seed: int = 0) -> list[Splits]:
    """Divide the rows of train and valid into `count` parts and hold out one after the other.

    The folds have about the same share of each class (scikit-learn's `StratifiedGroupKFold`). Rows with equal inputs
    are never on both sides, nor are rows of one group. Each fold draws its validation rows from the rest, as loading
    does. The test part of `splits`, if any, is in none of them.

    Args:
        splits: Loaded data.
        count: Folds, at least 2.
        groups: Row id -> group, such as a patient or a video; see `group_column`.
        seed: Same seed, same folds.

    Raises:
        DataError: There are too few rows, or groups, for so many folds; or a row has no group.
    """
    rows = datasets.concatenate_datasets([splits.train, splits.valid])
    targets, ids = rows["target"][:], rows["id"][:]
    if groups is not None and (missing := [name for name in ids if name not in groups]):
        raise DataError(f"groups: {len(missing)} rows have none, {missing[0]} among them; give one for every row")
    together = tied(_keys(rows), None if groups is None else [groups[name] for name in ids])
    parts = len(set(together))
    if not 2 <= count <= parts:
        what = "different rows" if groups is None else "groups of rows"
        raise DataError(
            f"folds={count}: at least 2, and at most the {parts} {what} that there are; give another number"
        )
    strata = stratum_of_rows(targets, splits.task, BINS)
    made = []
    for number, (rest, held) in enumerate(divided(strata, together, count, seed), start=1):
        if groups is None:
            drawn = draw([str(together[k]) for k in rest], [targets[k] for k in rest], splits.task, seed)
            inner = np.array(sorted(drawn), dtype=int)
        else:
            least = min(VALID_PARTS, len({together[k] for k in rest}))
            inner = next(divided([strata[k] for k in rest], [together[k] for k in rest], max(2, least), seed))[1]
        train, valid = rows.select(np.delete(rest, inner)), rows.select(rest[inner])
        if not len(train) or not len(valid):
            raise DataError(f"folds={count}: nothing is left to train on, or to validate on, in fold {number}")
        test = rows.select(held)
        counts = {"train": len(train), "valid": len(valid), "test": len(test)}
        report = replace(splits.report, counts=counts, classes=count_classes(train["target"][:], splits.task))
        made.append(Splits(train, valid, test, splits.task, report, f"{splits.source}, fold {number} of {count}"))
    return made


def group_column(data: Source, column: str) -> dict[str, Any]:
    """Row id -> what a column of a table says, for `folds(groups=...)`.

    Raises:
        DataError: No such column.
    """
    found: dict[str, Any] = {}
    for part in read(data).values():
        if column not in part.data.column_names:
            raise DataError(
                f"{part.where}: no column {column!r} to group by; it has {', '.join(part.data.column_names)}"
            )
        found |= dict(zip(part.ids, part.data[column][:], strict=True))
    if not found:
        raise DataError(f"{shown(data)}: no rows to group by {column!r}")
    return found


def _keys(rows: datasets.Dataset) -> list[str]:
    """What tells rows with equal inputs."""
    if "image" in rows.column_names:
        return [image_digest(cell) for cell in rows["image"]]
    return [
        repr([row[name] for name in ("text", "text_pair", "tokens") if name in row])
        for row in rows.remove_columns("id")
    ]
