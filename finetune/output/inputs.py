"""Whatever a model is to be used on (files, a folder, texts, a table) goes in; its items come out one by one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from finetune.data.checks import inside
from finetune.data.shards import find_shards, is_member, is_shards, read_shards
from finetune.data.tables import (
    IMAGE_SUFFIXES,
    LABEL_NAMES,
    ROW_NAMES,
    TABLE_SUFFIXES,
    Part,
    find_inputs,
    listed,
    read_table,
    whole,
)
from finetune.data.task import Task
from finetune.errors import DataError


@dataclass(frozen=True)
class Input:
    """One thing to predict for: what to call it, the thing itself, and why it cannot be used (None when it can)."""

    name: Any
    item: Any
    error: str | None = None


def named_inputs(inputs: Any, task: Task, column: str | None = None) -> Iterator[Input]:
    """Yield each item, in order; see `Predictor.predict` for what `inputs` may be.

    Raises:
        DataError: A folder without images; a table without rows, or without a column of images or texts.
    """
    if isinstance(inputs, datasets.Dataset):
        part = Part(inputs, [f"row {i}" for i in range(1, len(inputs) + 1)], "data set")
        return rows(part, task, column)
    if isinstance(inputs, str | Path) and is_table(inputs):
        return rows(read_table(Path(inputs)), task, column)
    if isinstance(inputs, str) and is_shards(inputs):
        return rows(read_shards(find_shards(inputs), inputs), task, column)
    return images(inputs) if task.modality == "image" else texts(inputs)


def images(inputs: Any) -> Iterator[Input]:
    """Yield the pictures of a folder, searched through, or of a list, or the only one."""
    many: Iterable[Any] = [inputs]
    if isinstance(inputs, str | Path) and Path(inputs).is_dir():
        below = sorted(path.relative_to(inputs) for path in Path(inputs).rglob("*"))
        shown = [path for path in below if not any(part.startswith(".") for part in path.parts)]
        many = [Path(inputs) / path for path in shown if path.suffix.lower() in IMAGE_SUFFIXES]
        if not many:
            raise DataError(f"{inputs}: no images in this folder; give a folder with .jpg or .png files")
    elif isinstance(inputs, Iterable) and not isinstance(inputs, str | Path | bytes):
        many = inputs
    for i, item in enumerate(many):
        name = str(item) if isinstance(item, str | Path) else f"image {i}"
        if item is None or (isinstance(item, str) and not item.strip()):
            yield Input(name, item, "nothing given")
        else:  # a number would be taken for an open file
            usable = isinstance(item, str | Path | bytes | Image.Image)
            yield Input(name, item, None if usable else "neither a path nor an image")


def texts(inputs: Any) -> Iterator[Input]:
    """Yield the texts of a list, or the only one."""
    single = isinstance(inputs, str | bytes | dict | tuple) or not isinstance(inputs, Iterable)
    for item in [inputs] if single else inputs:
        yield Input(item, item, empty(item))


def rows(part: Part, task: Task, column: str | None) -> Iterator[Input]:
    """Yield the images or texts of a table: of `column`, or of the column that training would find too."""
    names = part.data.column_names
    if column is not None and column not in names:
        raise DataError(f"{part.where}: no column {column!r}; {listed(part)}; name one with column=")
    role = "image" if task.modality == "image" else "tokens" if task.kind == "token_classification" else "text"
    found = {role: column} if column is not None else {}
    if not found:
        labels = tuple(name for name in names if name.lower() in LABEL_NAMES)[:1]
        free = [name for name in names if name.lower() not in ROW_NAMES and name not in labels]
        found = find_inputs(part, free, task.modality, labels)
    if not found:
        raise DataError(f"{part.where}: no {task.modality} column found; {listed(part)}; name it with column=")
    data = part.data
    if task.modality == "image" and isinstance(data.features[found["image"]], datasets.Image):
        data = data.cast_column(found["image"], datasets.Image(decode=False))
    for i in range(len(data)):
        cells = [data[i][name] for name in found.values()]
        if task.modality == "image":
            yield image_cell(cells[0], part, i)
        else:
            item = tuple(cells) if len(cells) > 1 else cells[0]
            yield Input(item, item, empty(item))
    for row_id, reason in part.left_out:
        yield Input(row_id, None, reason)


def image_cell(cell: Any, part: Part, i: int) -> Input:
    """Read an image cell: a path, which is relative to the table, or {"path", "bytes"}."""
    name, item = part.ids[i], cell
    if isinstance(cell, dict):
        item = cell["bytes"] or cell["path"]
        name = name if is_member(item) else cell["path"] or name
    reason = None if item else "nothing given"
    if isinstance(item, str) and item.strip() and not is_member(item):
        name = item
        if part.root is not None:
            path, outside = inside(item.strip(), part.root)
            item, reason = Path(path), outside or None
    return Input(name, item, reason)


def is_table(given: str | Path) -> bool:
    """Whether this is the path of a table, and not a text."""
    try:
        return Path(given).suffix.lower() in TABLE_SUFFIXES and Path(given).is_file()
    except (OSError, ValueError):  # a text may be too long for a path, or hold a zero byte
        return False


def empty(item: Any) -> str | None:
    """Say why there is nothing to read in an item; None when there is something."""
    if item is None:
        return "nothing given"
    if isinstance(item, bytes) or (isinstance(item, dict) and "text" not in item):
        return "neither a text nor a pair of texts"
    blank = not item.strip() if isinstance(item, str) else isinstance(item, Sequence) and not any(item)
    return "empty text" if blank else None


def pair(item: Any) -> tuple[str, str | None]:
    """A text, and the second of a pair of texts or None."""
    if isinstance(item, dict):
        item = (item["text"], item.get("text_pair"))
    several = isinstance(item, tuple | list)
    first, second = (*item, None)[:2] if several else (item, None)
    return whole(str(first)), None if second is None else whole(str(second))


def words(item: Any) -> list[str]:
    """The words of a text that came as one string, cut at white space, or as a list."""
    return [whole(str(word)) for word in (item.split() if isinstance(item, str) else item)]
