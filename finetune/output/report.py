"""A run folder goes in; one self-contained page about the run comes out, and its plots as files.

The page says only what the folder says: `run.json`, `steps.jsonl`, `predictions/test.csv`, `left_out.csv`. It loads
nothing from elsewhere and runs no script, so it can be kept, mailed and opened anywhere.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.data.task import MAIN
from finetune.errors import FinetuneError, RunError
from finetune.output import plots
from finetune.output.interval import of_test_rows, wilson
from finetune.output.mistakes import read_mistakes
from finetune.output.plots import Curves, Plot
from finetune.output.summary import kept_weights, nothing_learnt
from finetune.output.tally import Tally, Tested, baseline

BASELINE = {
    "single_label_classification": "majority class",
    "multi_label_classification": "commonest labels",
    "regression": "mean of the targets",
    "token_classification": "majority tag",
}
MOST_PLOTTED = 4  # regression targets that get a plot
MOST_LISTED = 200  # rows left out that are listed


def write_report(folder: Path, target: Path) -> Path:
    """Write the page about a run to `target`, and its plots to `plots/` in the run folder.

    A run that is unfinished, that had no test rows, or whose head is a custom one, gets a page with what there is.

    Returns:
        `target`.

    Raises:
        RunError: There is no run in the folder, or the page cannot be written.
    """
    folder, target = Path(folder), Path(target)
    record = read_run(folder)
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template.filters |= {"number": number, "duration": duration}
    try:
        with readable(folder):
            page = template.get_template("report.html.jinja").render(_content(folder, record))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RunError(f"{target}: cannot be written ({error}); write the report to another path") from None
    return target


def read_run(folder: Path) -> dict[str, Any]:
    """The content of a run's run.json.

    Raises:
        RunError: There is none, or it is damaged.
    """
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{folder / 'run.json'}: {error}; give the folder of a run") from None
    if not isinstance(record, dict):
        raise RunError(f"{folder / 'run.json'}: is damaged, it holds no JSON object; give the folder of a run")
    return record


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Whatever comes of files in a run folder that somebody changed, or that a disk lost, becomes a RunError."""
    try:
        yield
    except (FinetuneError, OSError):
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise RunError(
            f"{folder}: what the run left is damaged ({type(error).__name__}: {said[:200]}); put run.json, "
            "steps.jsonl, left_out.csv and predictions/ back from a copy"
        ) from error


def number(value: Any) -> str:
    """A value of a run as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(number, value))
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else str(value)
    if isinstance(value, int) or (isinstance(value, float) and abs(value) >= 10_000):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _content(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    kind, labels = record["task"]["kind"], [str(label) for label in record["task"]["labels"]]
    data, metrics = record["data"], record.get("metrics", {})
    tested = Tested.read(folder / "predictions" / "test.csv", kind, labels)
    valid = metrics.get("valid", {}).get("confusion") if kind == "single_label_classification" else None
    tallies = {"test": tested.tally, "valid": Tally.of_confusion("validation", np.array(valid)) if valid else None}
    split = "test" if "test" in metrics else "valid"
    tally = tallies[split]
    train = np.array([data.get("classes", {}).get(label, 0) for label in labels])
    same = baseline(kind, tally, tested if split == "test" else Tested(), train, data["counts"]["train"])
    figures = {
        name: {key: value for key, value in values.items() if isinstance(value, int | float)}
        for name, values in metrics.items()
    }
    shown = list(dict.fromkeys(name for values in figures.values() for name in values))
    main = MAIN[kind][0] if MAIN[kind][0] in shown else next((name for name in shown if name != "loss"), None)
    classes, history = _class_rows(tally, labels, train), lasting(record.get("history", []))
    _write_tables(folder / "plots", history, classes)
    named = str(record["backbone"]["name"])
    return {
        "record": record,
        "kept": kept_weights(record) if record.get("kept") else None,
        "backbone": Path(named).name if Path(named).is_dir() else named,
        "name": Path(str(data["source"])).name or data["source"],
        "kind": kind.replace("_", " "),
        "main": main,
        "headline": figures.get(split, {}).get(main or "loss"),
        "split": {"test": "test", "valid": "validation"}[split],
        "interval": _interval(folder, record, labels, split, main, figures.get(split, {}).get(main or "")),
        "probe": _probe(record, main),
        "baseline": BASELINE[kind] if same.keys() & set(shown) else None,
        "baseline_headline": same.get(main or ""),
        "metrics": [
            (name, [figures[part].get(name) for part in ("test", "valid") if part in figures], same.get(name))
            for name in shown
        ],
        "splits": [{"test": "test", "valid": "validation"}[part] for part in ("test", "valid") if part in figures],
        "plots": _plots(folder, record, main, same.get(main or ""), figures),
        "group_plots": _group_plots(folder, history, record.get("groups", [])),
        "calibration": _calibration(folder, record),
        "confusion": _confusion_plot(folder, tally, labels),
        "confusions": _confusions(tally, labels),
        "scatters": _scatter_plots(folder, tested, labels),
        "troubles": _troubles(record),
        "mistakes": tested.mistakes,
        "seen": read_mistakes(folder / "predictions"),
        "classes": classes,
        "class_split": tally.split if tally else "",
        "unit": "words" if kind == "token_classification" else "rows",
        "left_out": _left_out(folder / "left_out.csv"),
        "most_listed": MOST_LISTED,
        "groups": record.get("groups", []),
    }


def _troubles(record: dict[str, Any]) -> list[str]:
    """What training got over, in sentences."""
    said = [sentence[0].upper() + sentence[1:] + "." for sentence in [nothing_learnt(record)] if sentence]
    for rewind in record.get("rewinds", []):
        stage = record["stages"][rewind["stage"]]["name"] if record.get("stages") else f"stage {rewind['stage'] + 1}"
        said.append(
            f"Training of {stage!r} went back to the best weights so far and on at {rewind['factor']:g} of the rate: "
            f"{rewind['why']}."
        )
    if record.get("skipped_steps"):
        said.append(f"{record['skipped_steps']} steps were left out: their loss or gradient was not a number.")
    if lost := record.get("unreadable"):
        names = ", ".join(f"{name} ({why})" for name, why in list(lost.items())[:5])
        said.append(f"{len(lost)} training rows became unreadable under way and were left out from then on: {names}.")
    return said


def lasting(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The validations that were not given up: a run that went back validates the same steps again."""
    kept: list[dict[str, Any]] = []
    for entry in history:
        while kept and entry["step"] <= kept[-1]["step"] and entry["epoch"] > kept[-1]["epoch"]:
            kept.pop()
        kept.append(entry)
    return kept


def _interval(
    folder: Path, record: dict[str, Any], labels: Sequence[str], split: str, main: str | None, value: float | None
) -> tuple[float, float] | None:
    """95 % interval of the headline over such rows: Wilson's for a share of them, else by drawing them again."""
    kind, rows = record["task"]["kind"], record["data"]["counts"].get(split, 0)
    if main is None or value is None or rows < 1:
        return None
    if main == "accuracy" and kind == "single_label_classification":
        return wilson(value, rows) if 0 <= value <= 1 else None
    return of_test_rows(folder / "predictions" / "test.csv", kind, labels, main, value) if split == "test" else None


def _probe(record: dict[str, Any], main: str | None) -> tuple[float, float] | None:
    """The main metric of the linear probe that training began with, and of the model, both on the validation rows."""
    first: dict[str, Any] = next(iter(record.get("history", [])), {"stage": "", "step": 1, "valid": {}})
    then, now = first["valid"].get(main), record.get("metrics", {}).get("valid", {}).get(main)
    return (then, now) if first["stage"] == "head" and first["step"] == 0 and None not in (then, now) else None


def _group_plots(folder: Path, history: Sequence[dict[str, Any]], groups: Sequence[str]) -> list[Plot]:
    """What the gradients said: how large they were in each group, and how far each has moved."""
    drawn = []
    for what, title in (
        ("gradient", "Gradient over weights, by layer group"),
        ("moved", "Distance from the start over weights"),
    ):
        told = [entry["groups"][what] for entry in history if what in entry.get("groups", {})]
        if told and any(value for entry in told for value in entry):
            alt = f"{title}, {len(told)} epochs: in the end head {told[-1][-1]:.3g}, stem {told[-1][0]:.3g}."
            drawn.append(
                plots.draw(folder / "plots", what, alt, lambda t=title, w=what: plots.by_group(t, history, w, groups))  # type: ignore[misc]
            )
    return drawn


def _calibration(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """How far its probabilities can be trusted: a plot and figures, of the test rows where there are any."""
    found = record.get("calibration", {})
    split = next((name for name in ("test", "valid") if name in found), None)
    if split is None:
        return {}
    before, after = found[split]["before"], found[split]["after"]
    words = {"test": "test", "valid": "validation"}[split]
    changed = found["temperature"] != 1.0
    alt = f"Share of right answers over their probability, {words} rows: expected calibration error {after['ece']:.3g}."
    plot = plots.draw(
        folder / "plots", "reliability", alt,
        lambda: plots.reliability(before["bins"] if changed else [], after["bins"], words),
    )  # fmt: skip
    return {"plot": plot, "split": words, "before": before if changed else None, "after": after,
            "temperature": found["temperature"]}  # fmt: skip


def _write_tables(folder: Path, history: Sequence[dict[str, Any]], classes: Sequence[dict[str, Any]]) -> None:
    """The numbers behind the page as CSV files beside its plots."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for entry in history for name in entry["valid"]))
    lines = [[e["epoch"], e["step"], e["stage"], e["train_loss"], *(e["valid"].get(n) for n in names)] for e in history]
    tables = {"history": [["epoch", "step", "stage", "train_loss", *names], *lines]}
    if classes:
        tables["classes"] = [list(classes[0]), *(list(row.values()) for row in classes)]
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def _plots(
    folder: Path, record: dict[str, Any], main: str | None, same: float | None, figures: dict[str, dict[str, float]]
) -> list[Plot]:
    curves = Curves.of(_steps(folder / "steps.jsonl"))
    if not len(curves.step):
        return []
    planned, history = record.get("stages", []), lasting(record.get("history", []))
    stages = [planned[i]["name"] if i < len(planned) else f"stage {i + 1}" for i in range(int(curves.stage.max()) + 1)]
    groups = record.get("groups") or [f"group {i + 1}" for i in range(curves.rates.shape[1])]
    place, losses = folder / "plots", curves.loss[np.isfinite(curves.loss)]
    drawn = []
    if len(losses):
        alt = f"Loss over {curves.step[-1]} steps: it began at {losses[0]:.3g} and ended at {losses[-1]:.3g}."
        drawn.append(plots.draw(place, "loss", alt, lambda: plots.loss_curve(curves, history, stages)))
    seen = [entry["valid"][main] for entry in history if main is not None and main in entry["valid"]]
    if seen and main is not None:
        name, others = main, [("test, at the end", figures["test"][main])] if main in figures.get("test", {}) else []
        others += [(BASELINE[record["task"]["kind"]], same)] if same is not None else []
        alt = f"{name} on the validation rows after each epoch: {', '.join(f'{value:.3g}' for value in seen)}."
        drawn.append(
            plots.draw(place, "metric", alt, lambda: plots.metric_curve(curves, history, stages, name, others))
        )
    peaks = np.max(curves.rates, axis=0)
    alt = f"Learning rates over the steps: the head's rises to {peaks[-1]:.3g}, the stem's to {peaks[0]:.3g}."
    drawn.append(plots.draw(place, "rates", alt, lambda: plots.rates_curve(curves, groups, stages)))
    if np.isfinite(curves.momentum).any():
        low, high = np.nanmin(curves.momentum), np.nanmax(curves.momentum)
        alt = f"Momentum over the steps: it falls to {low:.3g} while rates rise, and returns to {high:.3g}."
        drawn.append(plots.draw(place, "momentum", alt, lambda: plots.momentum_curve(curves, stages)))
    return drawn


def _confusion_plot(folder: Path, tally: Tally | None, labels: Sequence[str]) -> Plot | None:
    if tally is None or tally.confusion is None:
        return None
    matrix, split = tally.confusion, tally.split
    alt = f"Confusion matrix of {len(labels)} classes: {tally.right.sum()} of {matrix.sum()} rows are on the diagonal."
    return plots.draw(folder / "plots", "confusion", alt, lambda: plots.confusion_matrix(matrix, labels, split))


def _confusions(tally: Tally | None, labels: Sequence[str]) -> list[tuple[str, str, int, int]]:
    """The most frequent confusions: true, predicted, how often, of how many rows."""
    if tally is None or tally.confusion is None:
        return []
    wrong = tally.confusion - np.diag(tally.right)
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    pairs = [(int(i) // len(labels), int(i) % len(labels)) for i in order]
    return [(labels[t], labels[p], int(wrong[t, p]), int(tally.present[t])) for t, p in pairs if wrong[t, p] > 0]


def _scatter_plots(folder: Path, tested: Tested, labels: Sequence[str]) -> list[Plot]:
    if tested.values is None:
        return []
    drawn = []
    for k, label in enumerate(labels[:MOST_PLOTTED]):
        target, value = tested.values[0][:, k], tested.values[1][:, k]
        mae = np.abs(target - value).mean()
        alt = f"Predicted over true {label} of {len(target)} test rows; on average they differ by {mae:.3g}."
        name = "scatter" if len(labels) == 1 else f"scatter{k + 1}"
        drawn.append(
            plots.draw(folder / "plots", name, alt, lambda n=label, t=target, v=value: plots.scatter(n, t, v))  # type: ignore[misc]
        )
    return drawn


def _class_rows(tally: Tally | None, labels: Sequence[str], train: np.ndarray) -> list[dict[str, Any]]:
    """A row a class, the worst first."""
    if tally is None:
        return []
    rows = [
        {"label": label, "precision": p, "recall": r, "f1": f1, "rows": int(present), "train": int(seen)}
        for label, (p, r, f1), present, seen in zip(labels, tally.scores(), tally.present, train, strict=True)
    ]
    return sorted(rows, key=lambda row: row["f1"])


def _left_out(path: Path) -> dict[str, Any]:
    """Reasons with their counts, and the first rows."""
    if not path.is_file():
        return {"reasons": [], "rows": []}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file)][1:]
    return {"reasons": Counter(row[2].partition(": ")[0] for row in rows).most_common(), "rows": rows[:MOST_LISTED]}


def _steps(path: Path) -> list[dict[str, Any]]:
    """The lines of the log; of a run that was cut off, the last may be half a line."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            steps.append(json.loads(line))
        except ValueError:
            break
    return steps
