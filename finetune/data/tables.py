"""Files of rows: a CSV, TSV, JSON, JSONL or Parquet file goes in, a `Part` comes out; and which column is what."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.labels import as_list, as_number
from finetune.errors import DataError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm .avif .heic .heif".split())
TEXT_NAMES = "text sentence content review comment message tweet question utterance document body title".split()
PAIR_NAMES = (("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
              ("question1", "question2"), ("text", "text_pair"), ("text1", "text2"))  # fmt: skip
TOKEN_NAMES = ("tokens", "words")
IMAGE_NAMES = "image img photo picture file_name filename file image_path filepath path".split()
LABEL_NAMES = (
    "label labels target targets class category sentiment intent emotion score rating stars y tags ner_tags".split()
)
ROW_NAMES = frozenset(("", "id", "idx", "index", "guid", "uid", "unnamed: 0", "__index_level_0__"))
MOST_LISTED = 30  # columns in an error
Record: TypeAlias = tuple[int, int, list[str]]  # first line, last line, cells


@dataclass(frozen=True)
class Part:
    """One split as it was read: raw columns, and an id for each row."""

    data: datasets.Dataset
    ids: Sequence[str]
    where: str  # the file, folder or split, as errors call it
    root: Path | None = None  # folder that image paths are relative to and must stay in
    left_out: tuple[tuple[str, str], ...] = ()  # (id, reason) of rows that could not even be read
    notes: tuple[str, ...] = ()
    class_folders: bool = False  # labels are names of folders


@dataclass(frozen=True)
class Roles:
    """Which column is what. `inputs` maps "image", "text", "text_pair" or "tokens" to a column's name."""

    modality: str
    inputs: dict[str, str]
    labels: tuple[str, ...]

    @property
    def several(self) -> bool:
        """Whether the label is spread over several columns."""
        return len(self.labels) > 1

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column, for the report."""
        return {**self.inputs, "label": ", ".join(self.labels)}


@dataclass
class Rows:
    """Rows while they are being read, column by column."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def add(self, row_id: str, cells: dict[str, Any]) -> None:
        """Append a row; columns that it lacks, or that are new with it, are None elsewhere."""
        for name in cells.keys() - self.columns.keys():
            self.columns[name] = [None] * len(self.ids)
        for name, column in self.columns.items():
            column.append(cells.get(name))
        self.ids.append(row_id)


def read_table(path: Path, root: Path | None = None) -> Part:
    """Read a file of rows. An id is "file.csv:17", the line (for JSON lists and Parquet the row, from 1) in an editor.

    Raises:
        DataError: The file is no table of a kind in `TABLE_SUFFIXES`, or holds no rows.
    """
    suffix, root = path.suffix.lower(), root or path.parent
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{path}: not a table that can be read; give one of {', '.join(TABLE_SUFFIXES)}")
    if suffix == ".parquet":
        return read_parquet(path, root)
    text, notes = read_text(path)
    rows = read_csv(path, text) if suffix in (".csv", ".tsv") else read_json(path, text)
    if not rows.ids:
        bad = f" (first: {rows.left_out[0][0]}: {rows.left_out[0][1]})" if rows.left_out else ""
        raise DataError(f"{path}: no rows{bad}; it needs a header line with column names and a line for each example")
    unnamed = next((name for name in rows.columns if "\0" in name), None)
    if unnamed is not None:
        raise DataError(f"{path}: the name of column {unnamed!r} has zero bytes in it; save the file as UTF-8")
    return Part(columns_to_dataset(rows.columns), rows.ids, str(path), root, tuple(rows.left_out), notes)


def read_text(path: Path) -> tuple[str, tuple[str, ...]]:
    """Decode a file: UTF-8 with or without BOM, UTF-16 with BOM, otherwise Windows-1252 with a note."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace"), ()
    try:
        return content.decode("utf-8-sig"), ()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        note = f"{path.name}:{line}: not UTF-8, so it was read as Windows-1252; save it as UTF-8 if letters are wrong."
        return content.decode("cp1252", errors="replace"), (note,)


def read_csv(path: Path, text: str) -> Rows:
    """Read separated values as strings, keeping the line on which each record starts."""
    tabs = path.suffix.lower() == ".tsv" and "\t" in text.partition("\n")[0]
    delimiter = "\t" if tabs else find_delimiter(text)
    try:
        records = list(csv_records(text, delimiter, strict=True))
    except csv.Error:  # a stray quote: in .tsv quotes mean nothing, in .csv read on as spreadsheets do
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        try:
            records = list(csv_records(text, delimiter, quoting=quoting))
            check_last_quote(path, records)
        except csv.Error as error:
            raise DataError(f"{path}: not separated values ({error}); save it as CSV again") from None
    if not records:
        raise DataError(f"{path}: empty file; it needs a header line with column names and a line for each example")
    header = [name.strip() for name in records[0][2]]
    named = [name for name in header if name]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise DataError(f"{path}:1: column {twice!r} is there twice; rename one")
    rows = Rows({name: [] for name in named})
    for line, end, cells in records[1:]:
        row_id = f"{path.name}:{line}"
        if len(cells) != len(header):
            runs = f" (it runs to line {end}; is a quote left open?)" if end > line else ""
            rows.left_out.append((row_id, f"{len(cells)} fields where the header has {len(header)}{runs}"))
        else:
            rows.add(row_id, {name: cell for name, cell in zip(header, cells, strict=True) if name})
    return rows


def check_last_quote(path: Path, records: list[Record]) -> None:
    """Refuse a file in which a quote that is never closed has swallowed the rest.

    Raises:
        DataError: As above.
    """
    line, end, cells = records[-1]
    if len(cells) != len(records[0][2]) and end > line:
        raise DataError(f"{path}:{line}: a quote opened here is never closed; close it, or double it if it is text")


def csv_records(text: str, delimiter: str, **options: Any) -> Iterator[Record]:
    """Yield (first line, last line, cells) of each record that is not blank."""
    limit = csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 KiB is less than a long document
    try:
        reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **options), 1
        for cells in reader:
            if any(cells):
                yield line, reader.line_num, cells
            line = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def find_delimiter(text: str) -> str:
    """Tell which of , ; tab | splits the first lines into equal rows of the most fields; a comma where none does."""
    head = "".join(text.splitlines(keepends=True)[:50])

    def fields(delimiter: str) -> tuple[float, int]:
        widths = [len(cells) for *_, cells in csv_records(head, delimiter)][:40]
        width = widths[0] if widths else 0
        return (widths.count(width) / len(widths), width) if width > 1 else (0.0, width)

    return max(",;\t|", key=fields)


def read_json(path: Path, text: str) -> Rows:
    """Read a list of objects, one object a line, or an object of columns."""
    rows = Rows()
    try:
        content = json.loads(text) if path.suffix.lower() == ".json" else None
    except (ValueError, RecursionError):
        content = None  # .json with one object a line
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]):
            content = lists[0]  # {"data": [{…}, …]}
        elif lists and len(lists) == len(content) and len({len(column) for column in lists}) == 1:
            content = [dict(zip(content, row, strict=True)) for row in zip(*lists, strict=True)]
        else:
            content = [content]
    numbered: Any = enumerate(content, 1) if content is not None else enumerate(text.split("\n"), 1)
    for number, row in numbered:
        if isinstance(row, str):
            if not row.strip():
                continue
            try:
                row = json.loads(row)
            except (ValueError, RecursionError):  # also of a number of more digits than Python reads
                row = None
        if isinstance(row, dict):
            rows.add(f"{path.name}:{number}", {whole(name): cell for name, cell in row.items()})
        else:
            rows.left_out.append((f"{path.name}:{number}", "not a JSON object"))
    return rows


def read_parquet(path: Path, root: Path) -> Part:
    """Read a Parquet file, with the features that `datasets` may have left in it."""
    try:
        data = datasets.Dataset(datasets.table.InMemoryTable(pq.read_table(path)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); write it again") from None
    if not len(data):
        raise DataError(f"{path}: no rows; it needs a row for each example")
    return Part(data, [f"{path.name}:{row}" for row in range(1, len(data) + 1)], str(path), root)


def columns_to_dataset(columns: dict[str, list[Any]]) -> datasets.Dataset:
    """Make a Dataset; a column that mixes types (1, "a", None) becomes strings."""

    def uniform(column: list[Any]) -> list[Any]:
        try:
            pa.array(column)
        except UnicodeEncodeError:
            return uniform([whole(cell) for cell in column])
        except (pa.ArrowException, OverflowError):
            return [None if cell is None else cell if isinstance(cell, str) else json.dumps(cell) for cell in column]
        return column

    return datasets.Dataset.from_dict({name: uniform(column) for name, column in columns.items()})


def whole(cell: Any) -> Any:
    """A value of JSON, with a sign in place of each half of a character (of an emoji cut in two, "\\ud83d")."""
    if isinstance(cell, str):
        return cell if cell.isascii() else cell.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(cell, dict):
        return {whole(name): whole(value) for name, value in cell.items()}
    return [whole(value) for value in cell] if isinstance(cell, list) else cell


def find_roles(
    part: Part,
    *,
    modality: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    tokens: str | None = None,
    label: str | Sequence[str] | None = None,
    leave: str | None = None,
) -> Roles:
    """Tell inputs and labels among the columns of `part`: as named, else by usual names, else the only ones left.
    `leave` is neither.

    Raises:
        DataError: A named column is not there, or no column fits a role; the text lists the columns.
    """
    named = {"image": image, "tokens": tokens, "text": text, "text_pair": text_pair}
    inputs = {role: column for role, column in named.items() if column is not None}
    labels = () if label is None else (label,) if isinstance(label, str) else tuple(label)
    for option, column in [*inputs.items(), *(("label", column) for column in labels)]:
        if column not in part.data.column_names:
            raise DataError(f"{part.where}: no column {column!r}; {listed(part)}; name one with {option}=")
    given = [*inputs.values(), *labels]
    twice = next((column for column in given if given.count(column) > 1), None)
    if twice is not None:
        raise DataError(
            f"{part.where}: column {twice!r} is named twice; {listed(part)}; name another for one of the two"
        )
    free = [name for name in part.data.column_names if name not in given and name != leave]
    lower = {name.lower(): name for name in reversed(free)}
    if not labels:
        labels = tuple(lower[name] for name in LABEL_NAMES if name in lower)[:1]
    others = [name for name in free if name.lower() not in ROW_NAMES and name not in labels]
    if not inputs:
        inputs = find_inputs(part, others, modality, labels)
    if not inputs:
        role = "image" if modality == "image" else "text"
        raise DataError(f"{part.where}: no {role} column found; {listed(part)}; name it with {role}=")
    if not labels:
        rest = [name for name in others if name not in inputs.values()]
        if len(rest) != 1:
            raise DataError(f"{part.where}: no label column found; {listed(part)}; name it with label=")
        labels = (rest[0],)
    return Roles("image" if "image" in inputs else "text", inputs, labels)


def find_inputs(part: Part, names: list[str], modality: str | None, labels: tuple[str, ...]) -> dict[str, str]:
    """Find the input columns among `names`; empty where nothing fits."""
    features = part.data.features  # once, and all cells at once: `datasets` copies them all for each column
    plain = [name for name in names if not isinstance(features[name], datasets.Image)]
    cells = part.data.select_columns(plain)[: min(50, len(part.data))] if plain else {}  # of no column: an error there
    values = {name: [cell for cell in cells[name] if cell not in (None, "")] for name in plain}
    lower = {name.lower(): name for name in reversed(names)}
    images = [name for name in names if name not in values]
    paths = [name for name, cells in values.items() if cells and all(is_image_path(cell) for cell in cells)]
    strings = [name for name, cells in values.items() if cells and all(isinstance(cell, str) for cell in cells)]
    words = [name for name in strings if not all(as_number(cell) is not None for cell in values[name])]
    if modality != "text" and (images or modality == "image"):
        known = [lower[name] for name in IMAGE_NAMES if name in lower and lower[name] in images + paths + strings]
        found = images[:1] or [name for name in known if name in paths] or paths[:1] or known
        return {"image": found[0]} if found else {}
    for name in TOKEN_NAMES:
        if name in lower and all(as_list(cell) is not None for cell in values[lower[name]]):
            return {"tokens": lower[name]}
    for first, second in PAIR_NAMES:
        if first in lower and second in lower:
            return {"text": lower[first], "text_pair": lower[second]}
    for name in TEXT_NAMES:
        if name in lower and lower[name] in strings:
            return {"text": lower[name]}
    if modality != "text" and paths:
        return {"image": paths[0]}
    if not labels and len(words) == 2 == len(names):  # two columns without a telling name: the longer one is the text
        words.sort(key=lambda name: sum(map(len, values[name])), reverse=True)
        words = words[:1]
    return {"text": words[0]} if len(words) == 1 else {}


def is_image_path(cell: Any) -> bool:
    """Whether a cell is spelled like the path of an image."""
    return isinstance(cell, str) and "\n" not in cell and Path(cell.strip()).suffix.lower() in IMAGE_SUFFIXES


def listed(part: Part) -> str:
    """Describe the columns with a value of each, for errors."""
    first, features = part.data[0] if len(part.data) else {}, part.data.features

    def shown(name: str) -> str:
        if isinstance(features[name], datasets.Image):
            return f"{name} (image)"
        value = repr(first.get(name))
        return f"{name} ({value if len(value) <= 30 else value[:27] + '…'})"

    names = part.data.column_names
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return "the columns are " + ", ".join(shown(name) for name in names[:MOST_LISTED]) + more
