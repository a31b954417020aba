"""One look at all data before training: a `Part` goes in; usable rows, what was left out and why come out."""

import csv
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import distributed as dist

from finetune.data.images import BadImage, open_image, pixel_key, quiet
from finetune.data.labels import as_list, as_number, is_missing
from finetune.data.tables import Part, Roles
from finetune.errors import DataError

CHUNK = 256  # images that are read at once


@dataclass(frozen=True)
class LeftOut:
    """A row that is not used, and why."""

    id: str
    split: str
    reason: str


@dataclass(frozen=True)
class DataReport:
    """What the data is, what was left out of it, and what to know before training on it.

    Of train, before validation rows are drawn from it, `duplicates` counts rows that repeat an earlier one, `leaks`
    rows equal to one of valid or test (they are left out), and `conflicts` inputs that are there with different labels.
    """

    counts: dict[str, int]
    classes: dict[str, int]  # label -> rows of train (tokens: words); empty for regression
    left_out: tuple[LeftOut, ...] = ()
    duplicates: int = 0
    leaks: int = 0
    conflicts: int = 0
    warnings: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)  # role -> column it was read from
    lengths: dict[str, int] = field(default_factory=dict)  # words a text of train: median, p95, max

    def lines(self) -> list[str]:
        """Describe the data in plain lines for the console."""
        parts = ", ".join(f"{count:,} {name}" for name, count in self.counts.items())
        lines = [f"{sum(self.counts.values()):,} rows: {parts}"]
        if self.classes:
            most = sorted(self.classes.items(), key=lambda item: -item[1])
            shown = most if len(most) <= 8 else [*most[:4], *most[-2:]]
            more = f" and {len(most) - len(shown)} more" if len(most) > len(shown) else ""
            named = ", ".join(f"{label} {n:,}" for label, n in shown)
            lines.append(f"{len(most)} classes: {named}{more}")
        if self.columns:
            lines.append("columns: " + ", ".join(f"{role} from {name!r}" for role, name in self.columns.items()))
        if self.lengths:
            lines.append("words a text: median {median}, 95 % at most {p95}, longest {max}".format(**self.lengths))
        if self.duplicates:
            lines.append(f"repeats: {self.duplicates} rows of train repeat an earlier one")
        if self.left_out:
            reasons = Counter(entry.reason.partition(": ")[0] for entry in self.left_out)
            lines.append(
                f"left out: {len(self.left_out)} rows ({some([f'{n} {r}' for r, n in reasons.most_common()])})"
            )
        return lines + [f"note: {warning}" for warning in self.warnings]

    def left_out_csv(self, path: str | Path) -> None:
        """Write the rows left out to a CSV file with columns id, split, reason."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "split", "reason"])
            writer.writerows([entry.id, entry.split, entry.reason] for entry in self.left_out)


@dataclass
class Scan:
    """What was found in one part, row by row."""

    keys: list[str]  # hash of the input; equal for equal inputs
    reasons: dict[int, str]  # row -> why it cannot be used
    cells: list[Any]  # raw label; a tuple where several columns hold it
    names: tuple[str, ...] | None  # class names that the data declares, in order
    words: list[int]  # words of each text

    @property
    def rows(self) -> list[int]:
        """Rows that can be used."""
        return [row for row in range(len(self.keys)) if row not in self.reasons]


def scan(part: Part, roles: Roles) -> tuple[Part, Scan]:
    """Read every row of a part fully, once: labels, texts, and each image down to its last pixel.

    Returns:
        The part, its image column with resolved paths, and what was found.

    Raises:
        DataError: A column is missing; more than half of the rows have no label; no row can be used.
    """
    for column in (*roles.inputs.values(), *roles.labels):
        if column not in part.data.column_names:
            raise DataError(f"{part.where}: no column {column!r}, which train has; add it")
    cells, names = label_cells(part, roles)
    found = Scan([""] * len(cells), {}, cells, names, [])
    blank = blank_cells([cell if roles.several else (cell,) for cell in cells])
    found.reasons.update((row, f"no label in {' or '.join(map(repr, roles.labels))}") for row in blank)
    if len(blank) * 2 > len(cells):
        rows, columns = some([part.ids[row] for row in blank], 3), roles.columns["label"]
        raise DataError(
            f"{part.where}: {len(blank)} of {len(cells)} rows have no label in column {columns!r} ({rows}); "
            "fill them in, or name another column with label="
        )
    if "image" in roles.inputs:
        part = scan_images(part, roles.inputs["image"], found)
    else:
        scan_texts(part, roles, found)
    if not found.rows:
        row, reason = next(iter(found.reasons.items()))
        what = "images can be read" if "image" in roles.inputs else "rows can be used"
        raise DataError(f"{part.where}: none of the {len(cells)} {what} ({part.ids[row]}: {reason}); mend the files")
    return part, found


def label_cells(part: Part, roles: Roles) -> tuple[list[Any], tuple[str, ...] | None]:
    """Return the raw labels, with names in place of the numbers of a ClassLabel, and these names in order."""
    if roles.several:
        return list(zip(*(part.data[name][:] for name in roles.labels), strict=True)), None
    feature, cells = part.data.features[roles.labels[0]], part.data[roles.labels[0]][:]
    inner = getattr(feature, "feature", None)
    if isinstance(feature, datasets.ClassLabel):
        named = {index: name for index, name in enumerate(feature.names)}
        return [named.get(cell) for cell in cells], tuple(feature.names)  # -1 is no label
    if isinstance(inner, datasets.ClassLabel):
        return [None if row is None else [inner.names[i] for i in row] for row in cells], tuple(inner.names)
    return cells, None


def blank_cells(cells: Sequence[Sequence[Any]]) -> list[int]:
    """Rows in which a label is missing. In a column of numbers, "NA", "null" and "none" are missing too."""
    blank = set()
    for column in zip(*cells, strict=True):
        absent = {row for row, cell in enumerate(column) if is_missing(cell)}
        unsaid = {
            row
            for row, cell in enumerate(column)
            if isinstance(cell, str) and cell.strip().lower() in ("na", "n/a", "null", "none")
        }
        rest = [cell for row, cell in enumerate(column) if row not in absent and row not in unsaid]
        numeric = bool(rest) and all(as_number(cell) is not None for cell in rest)
        blank |= absent | (unsaid if numeric else set())
    return sorted(blank)


def scan_images(part: Part, column: str, found: Scan) -> Part:
    """Decode every image of a part in a thread pool; note its pixel hash, or what is wrong with it.

    Processes that have joined each look at their share, and tell each other.
    """
    data = part.data
    own_paths = isinstance(data.features[column], datasets.Image)
    if own_paths:
        data = data.cast_column(column, datasets.Image(decode=False))
    else:
        cells: list[dict[str, Any]] = []
        for row, value in enumerate(data[column][:]):
            path, reason = inside(str(value or "").strip(), part.root)
            cells.append({"path": path, "bytes": None})
            if reason:
                found.reasons.setdefault(row, reason)
        data = data.remove_columns(column).add_column(column, cells, feature=datasets.Image(decode=False))

    def read(cell: dict[str, Any] | None) -> tuple[str, str]:
        source = None if cell is None else cell["path"] if cell["bytes"] is None else cell["bytes"]
        if source is None:
            return "", "no image"
        if own_paths and isinstance(source, str) and part.root is not None:  # of one's own Dataset, any will do
            reason = inside(os.path.abspath(source), part.root)[1]
            if reason:
                return "", reason
        try:
            return pixel_key(open_image(source)), ""
        except BadImage as error:
            return "", str(error)

    joined = dist.is_available() and dist.is_initialized()
    rank, count = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    seen: list[tuple[int, str, str]] = []
    with quiet(), ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(rank * CHUNK, len(data), count * CHUNK):
            batch = [row for row in range(start, min(start + CHUNK, len(data))) if row not in found.reasons]
            results = pool.map(read, data.select(batch)[column][:])
            seen += [(row, key, reason) for row, (key, reason) in zip(batch, results, strict=True)]
    everyone: list[Any] = [seen] * count
    if joined:
        dist.all_gather_object(everyone, seen)
    for row, key, reason in sorted(chain.from_iterable(everyone)):
        found.keys[row] = key
        if reason:
            found.reasons[row] = reason if part.root is None else name_file(reason, data, column, row, part)
    return replace(part, data=data)


def name_file(reason: str, data: datasets.Dataset, column: str, row: int, part: Part) -> str:
    """Add the file to a reason where the row's id is a line of a table and does not name it."""
    path = (data[row][column] or {}).get("path")
    if not path:
        return reason
    shown = os.path.relpath(path, part.root)
    return reason if Path(shown).as_posix() == part.ids[row] else f"{reason}: {shown}"


def inside(value: str, root: Path | None) -> tuple[str, str]:
    """Resolve a path from a table against its folder; a table must not make this read files elsewhere."""
    if not value:
        return value, "no image"
    base = os.path.abspath(root or ".")
    path = os.path.normpath(os.path.join(base, value))
    if any(Path(path).is_relative_to(folder) for folder in (base, os.path.realpath(base))):
        return path, ""
    return path, f"path leads outside the data folder: {value}"


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def scan_texts(part: Part, roles: Roles, found: Scan) -> None:
    """Hash the normalised texts of a part, count their words, and note which are empty."""
    columns = [part.data[name][:] for name in roles.inputs.values()]
    tokens = "tokens" in roles.inputs
    for row, cells in enumerate(zip(*columns, strict=True)):
        words = [as_list(cell) or [] if tokens else str("" if cell is None else cell).split() for cell in cells]
        found.words.append(sum(map(len, words)))
        if not all(words):
            found.reasons.setdefault(row, "empty text")
        elif tokens and row not in found.reasons and len(words[0]) != len(as_list(found.cells[row]) or []):
            found.reasons[row] = f"{len(words[0])} tokens but {len(as_list(found.cells[row]) or [])} labels"
        found.keys[row] = text_key(" ".join(map(str, part_words)) for part_words in words)


def text_key(texts: Iterable[str]) -> str:
    """Hash of texts: equal where they differ only in case, white space, or the way that characters are composed."""
    joined = "\x1f".join(texts)
    joined = joined if joined.isascii() else unicodedata.normalize("NFKC", joined)
    return blake2b(joined.casefold().encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def find_leaks(scans: dict[str, Scan]) -> dict[int, tuple[str, int]]:
    """Rows of train whose input is in valid or test too -> (split, row there)."""
    held: dict[str, tuple[str, int]] = {}
    for split in ("valid", "test"):
        if split in scans:
            held.update({scans[split].keys[row]: (split, row) for row in reversed(scans[split].rows)})
    train = scans["train"]
    return {row: held[train.keys[row]] for row in train.rows if train.keys[row] in held}


def find_duplicates(keys: Sequence[str], targets: Sequence[Any]) -> tuple[int, list[list[int]]]:
    """Return the number of repeats of an earlier row, and the groups of equal inputs with different labels."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    conflicts = [rows for rows in groups.values() if any(targets[row] != targets[rows[0]] for row in rows)]
    return len(keys) - len(groups), conflicts


def word_lengths(words: Sequence[int]) -> dict[str, int]:
    """Median, 95th percentile and maximum of the words a text."""
    if not words:
        return {}
    return {"median": int(np.median(words)), "p95": int(np.quantile(words, 0.95)), "max": max(words)}


def some(items: Sequence[str], n: int = 5) -> str:
    """List the first `n` items in a sentence."""
    return ", ".join(items[:n]) + (f" and {len(items) - n} more" if len(items) > n else "")
