"""Run folders go in; their metrics side by side, what they were set to differently, and a test on the rows that they
share come out."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from finetune.errors import RunError
from finetune.output.plots import COLOURS, STYLE
from finetune.output.report import duration, lasting, number
from finetune.output.tally import read_labels

DRAWN = ("first", "second", "third", "muted")


@dataclass(frozen=True)
class Paired:
    """A test of two runs on the same rows.

    Attributes:
        other: Position of the run that is compared with the first.
        better: Rows on which it is the better one.
        worse: Rows on which the first one is.
        rows: Rows in all.
        p: Of no difference: the exact test of McNemar where a row is right or wrong, else Wilcoxon's signed ranks.
    """

    other: int
    better: int
    worse: int
    rows: int
    p: float


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; prints as tables.

    Attributes:
        names: Of the runs, as short as tells them apart.
        lines: (what, value of each run), those of the metrics first.
        different: The same for settings and data that are not equal.
        paired: Tests against the first run, where the test rows are the same.
        notes: What could not be compared, and why.
        histories: Validations of each run.
    """

    names: tuple[str, ...]
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    different: tuple[tuple[str, tuple[str, ...]], ...]
    paired: tuple[Paired, ...]
    notes: tuple[str, ...]
    histories: tuple[list[dict[str, Any]], ...]

    def __str__(self) -> str:
        first = max([len(name) for name, _ in (*self.lines, *self.different)] + [10])
        columns = zip(*([self.names] + [values for _, values in (*self.lines, *self.different)]), strict=True)
        widths = [max(map(len, column)) for column in columns]

        def row(name: str, values: Sequence[str]) -> str:
            cells = [f"{value:>{width}}" for value, width in zip(values, widths, strict=True)]
            return f"{name:<{first}}  " + "  ".join(cells)

        said = [row("", self.names), *(row(*line) for line in self.lines)]
        if self.different:
            said += ["", "set differently", *(row(*line) for line in self.different)]
        for test in self.paired:
            verdict = "a difference" if test.p < 0.05 else "no difference that these rows can tell"
            said += [
                "",
                f"{self.names[test.other]} against {self.names[0]}: better on {test.better} of {test.rows} test rows, "
                f"worse on {test.worse}; p = {test.p:.2g}, {verdict}",
            ]
        return "\n".join([*said, *(["", *self.notes] if self.notes else [])])


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Put runs side by side.

    Args:
        folders: Run folders, at least two; the first is what the others are tested against.

    Raises:
        RunError: Fewer than two, or one that is no run.
    """
    places = [Path(folder) for folder in folders]
    if len(places) < 2:
        raise RunError("compare: give at least two run folders")
    records = [_record(place) for place in places]
    kinds = {record["task"]["kind"] for record in records}
    if len(kinds) > 1:
        raise RunError(f"compare: runs of different tasks ({', '.join(sorted(kinds))}); compare those of one task")
    names = _names(places)
    lines = []
    for part in ("test", "valid"):
        figures = [record.get("metrics", {}).get(part, {}) for record in records]
        shown = dict.fromkeys(k for found in figures for k, v in found.items() if isinstance(v, int | float))
        lines += [(f"{part} {name}", tuple(number(found.get(name)) for found in figures)) for name in shown]
    total = [record.get("seconds", {}).get("total") for record in records]
    lines.append(("time", tuple("–" if seconds is None else duration(seconds) for seconds in total)))
    lines.append(("weights kept", tuple(str(record.get("kept", record["status"])) for record in records)))
    rows = [_rows(place / "predictions" / "test.csv", record) for place, record in zip(places, records, strict=True)]
    paired, notes = [], []
    for other in range(1, len(places)):
        try:
            paired.append(_paired(rows[0], rows[other], other))
        except ValueError as why:
            notes.append(f"{names[other]} against {names[0]}: no test on rows, {why}")
    histories = tuple(lasting(record.get("history", [])) for record in records)
    return Comparison(names, tuple(lines), _different(records), tuple(paired), tuple(notes), histories)


def draw_curves(comparison: Comparison, path: Path) -> Path:
    """Write a picture of the validation losses over the steps."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set(title="Loss on the validation rows", xlabel="optimizer steps")
        for i, (name, history) in enumerate(zip(comparison.names, comparison.histories, strict=True)):
            points = [(entry["step"], entry["valid"]["loss"]) for entry in history if "loss" in entry["valid"]]
            if points:
                style = "-" if i < len(DRAWN) else "--"
                axes.plot(*zip(*points, strict=True), "o", linestyle=style, color=COLOURS[DRAWN[i % len(DRAWN)]],
                          markersize=3.5, label=name)  # fmt: skip
        axes.legend()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be written ({error}); give a .png, .svg or .pdf file with --out") from None
    return path


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return {**record, "task": record["task"], "status": record["status"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / 'run.json'}: {error}; give the folder of a run") from None


def _names(places: Sequence[Path]) -> tuple[str, ...]:
    for depth in range(1, 6):
        names = ["/".join(place.absolute().parts[-depth:]) for place in places]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(str(place) for place in places)


def _different(records: Sequence[dict[str, Any]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    def seen(record: dict[str, Any]) -> dict[str, Any]:
        data, backbone = record.get("data", {}), record.get("backbone", {})
        counts = data.get("counts", {})
        return {
            "data": Path(str(data.get("source", ""))).name,
            "rows of train": counts.get("train"),
            "backbone": backbone.get("name"),
            "seed": record.get("seed"),
            **{name: entry.get("value") for name, entry in record.get("settings", {}).items()},
        }

    found = [seen(record) for record in records]
    names = dict.fromkeys(name for one in found for name in one)
    lines = [(name, tuple(number(one.get(name)) for one in found)) for name in names]
    return tuple((name, values) for name, values in lines if len(set(values)) > 1)


def _rows(path: Path, record: dict[str, Any]) -> tuple[list[tuple[str, ...]], np.ndarray, bool]:
    """(id and target of each test row, its score [N], whether scores are 0 or 1); empty where there are none."""
    kind, labels = record["task"]["kind"], [str(label) for label in record["task"]["labels"]]
    if not path.is_file():
        return [], np.zeros(0), True
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    try:
        if kind == "regression":
            k = len(labels)
            values = np.array([row[1 : 1 + 2 * k] for row in rows], dtype=float).reshape(len(rows), 2, k)
            return [tuple(row[: 1 + k]) for row in rows], -np.abs(values[:, 0] - values[:, 1]).mean(axis=1), False
        if header[:3] != ["id", "target", "prediction"]:
            return [], np.zeros(0), True
        if kind == "token_classification":
            pairs = [(read_labels(row[1], labels), read_labels(row[2], labels)) for row in rows]
            scores = [
                np.mean([t == g for t, g in zip(true, guess, strict=True)]) if true else 1.0 for true, guess in pairs
            ]
            return [tuple(row[:2]) for row in rows], np.array(scores), False
        return [tuple(row[:2]) for row in rows], np.array([float(row[1] == row[2]) for row in rows]), True
    except (ValueError, IndexError):
        return [], np.zeros(0), True


def _paired(
    one: tuple[list[tuple[str, ...]], np.ndarray, bool], two: tuple[list[tuple[str, ...]], np.ndarray, bool], other: int
) -> Paired:
    """Raises ValueError, with the reason, where rows are not the same."""
    from scipy.stats import binomtest, wilcoxon

    if not one[0] or not two[0]:
        raise ValueError("for one of them has no predictions on test rows that can be read")
    place = {row: i for i, row in enumerate(two[0])}
    if set(one[0]) != set(place) or len(place) != len(one[0]):
        raise ValueError("for their test rows are not the same")
    difference = two[1][[place[row] for row in one[0]]] - one[1]
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    if better + worse == 0:
        p = 1.0
    elif one[2]:
        p = float(binomtest(better, better + worse).pvalue)
    else:
        p = float(wilcoxon(difference).pvalue)
    return Paired(other, better, worse, len(difference), p)
