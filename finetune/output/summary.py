"""`run.json` goes in; the last lines on the console come out: what it is worth, where it is weak, where it lies."""

from pathlib import Path
from typing import Any

import numpy as np

from finetune.console import SHARES, headline, shown
from finetune.data.task import MAIN
from finetune.output.interval import wilson


def result_lines(record: dict[str, Any], folder: Path) -> list[str]:
    """What came out of a run, from its `run.json`: the figure with its interval, the gain over the linear probe, the
    weakest class, and what to do next."""
    split = "test" if "test" in record["metrics"] else "valid"
    metrics, rows = record["metrics"][split], record["data"]["counts"][split]
    main = headline(metrics, MAIN[record["task"]["kind"]][0])
    where = f"on {rows:,} {'test' if split == 'test' else 'validation'} rows"
    if main is None:
        said = f"loss {metrics['loss']:.4g} {where}"
    else:
        said = f"{shown(*main)} {where}"
        if main[0] == "accuracy" and record["task"]["kind"] == "single_label_classification":
            low, high = wilson(main[1], rows)
            said += f", 95 % interval {100 * low:.1f} to {100 * high:.1f}"
    lines = [f"Result    {said}   ({record['seconds']['total']:.0f} s, weights: {record['kept']})"]
    also = [_gain(record, main[0]) if main else "", weakest(metrics, record["task"].get("labels") or [])]
    if any(also):
        lines.append(f"          {'; '.join(filter(None, also))}")
    if warning := nothing_learnt(record):
        lines.append(f"Warning   {warning}")
    return [*lines, f"Saved     {folder / 'model'}"]


def _gain(record: dict[str, Any], metric: str) -> str:
    """What training has added to the linear probe that it began with."""
    first: dict[str, Any] = record["history"][0] if record["history"] else {"stage": "", "valid": {}}
    now, probe = record["metrics"]["valid"].get(metric), first["valid"].get(metric)
    if first["stage"] != "head" or first["step"] > 0 or now is None or probe is None or not metric.startswith(SHARES):
        return ""
    points = 100 * (now - probe)
    than = f"{abs(points):.1f} points {'above' if points > 0 else 'below'}" if abs(points) >= 0.05 else "level with"
    return f"{than} the linear probe on validation"


KEPT = {
    "last": "those at the end of the schedule",
    "average": "the average over the end of the schedule, which validation preferred",
    "last two": "the average of the ends of the last two cycles, which validation preferred",
    "half-way": "the middle between the trained ones and the solved head, whose validation loss was lower",
    "solved head": "those that came, with the solved head: training made it no better on validation",
}


def kept_weights(record: dict[str, Any]) -> str:
    """Which weights a run has kept, in words."""
    kept, cycles = record["kept"], record["settings"].get("cycles", {}).get("value", 1)
    if kept == "average" and cycles > 1:
        return f"the average of the ends of {cycles} cycles"
    return KEPT.get(kept, f"those of {kept}, clearly better on validation")


def nothing_learnt(record: dict[str, Any]) -> str:
    """A sentence where the model is no better than always giving the same answer, else ""."""
    split = "test" if "test" in record["metrics"] else "valid"
    metrics, rows = record["metrics"].get(split, {}), record["data"]["counts"].get(split, 0)
    if record["task"]["kind"] == "regression" and rows:
        r2 = metrics.get("r2")
        same = "the mean for every row" if r2 is not None and r2 <= 0 else ""
        found = f"r2 {r2:.3g}" if same else ""
    else:
        confusion = np.asarray(metrics.get("confusion", []))
        if confusion.ndim != 2 or not confusion.sum() or len(confusion) < 2:
            return ""
        share, most = confusion.trace() / confusion.sum(), confusion.sum(axis=1).max() / confusion.sum()
        chance = np.sqrt(max(most * (1 - most), 1e-9) / confusion.sum())  # standard error of the trivial answer's score
        label = record["task"]["labels"][int(confusion.sum(axis=1).argmax())]
        same = f"{label!r} for every row ({100 * most:.1f} %)" if share < most + 2 * chance and share < 1 else ""
        found = f"accuracy {100 * share:.1f} %"
    if not same:
        return ""
    return (
        f"nothing learnable found: {found} on {rows} {'test' if split == 'test' else 'validation'} rows is no better, "
        f"within chance, than {same}; look at the labels, or give more rows"
    )


def weakest(metrics: dict[str, Any], labels: list[str]) -> str:
    """The class that is recognised least often, and what it is taken for."""
    confusion = np.asarray(metrics.get("confusion", []))
    if confusion.ndim != 2 or len(confusion) != len(labels) or not confusion.sum():
        return ""
    present = confusion.sum(axis=1)
    recall = np.where(present > 0, confusion.diagonal() / np.maximum(present, 1), 2.0)
    worst = int(recall.argmin())
    wrong = confusion[worst] - np.diag(confusion.diagonal())[worst]
    if not wrong.any():
        return ""
    taken = labels[int(wrong.argmax())]
    return f"weakest: {labels[worst]}, {100 * recall[worst]:.0f} % recognised, mostly taken for {taken}"
