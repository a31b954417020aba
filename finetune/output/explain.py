"""A run goes in; every dial at length, and what became of the training, come out as text."""

import inspect
import re
from pathlib import Path
from textwrap import fill
from typing import Any

from finetune.console import clock
from finetune.output.report import read_run
from finetune.output.summary import kept_weights
from finetune.plan.settings import DIALS, OPTIONS, Settings
from finetune.run import Run

WIDTH = 100
BY = {"user": "given by you", "rule": "by rule", "measured": "measured"}


def explain(run: Run | str | Path) -> str:
    """Say how a run was set and how it went: each dial with its value, what it does, why it has that value, and how to
    set it otherwise; then every stage, what went wrong on the way, and which weights were kept.

    Args:
        run: A run, or its folder.

    Raises:
        RunError: The folder holds no run.
    """
    record = run.record if isinstance(run, Run) else read_run(Path(run))
    settings, does = record["settings"], meanings()
    given = [dial for dial in DIALS if dial in settings and settings[dial]["by"] == "user"]
    lines = [
        f"{record['backbone']['name']} on {record['data']['counts']['train']:,} training rows: "
        + (f"you set {', '.join(given)}, and the rest was set to suit." if given else "no dial was set by you."),
        'Each can be: fit(..., settings={"span": 10.0}), or by the option named beside it.',
        "",
    ]
    for dial in (dial for dial in DIALS if dial in settings):
        entry = settings[dial]
        option = f"; {OPTIONS[dial]}" if dial in OPTIONS else ""
        lines += [f"{dial} = {_shown(entry['value'])}   ({BY[entry['by']]}{option})", *_paragraph(does[dial])]
        lines += _paragraph(f"Why: {entry['reason']}.") if entry["by"] != "user" else []
        lines += [""]
    return "\n".join([*lines, "What became of it", *_story(record)])


def meanings() -> dict[str, str]:
    """Dial -> what it does, from the list of attributes in the docstring of `Settings`."""
    attributes = inspect.cleandoc(Settings.__doc__ or "").split("Attributes:")[-1]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in found}


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _story(record: dict[str, Any]) -> list[str]:
    """What happened, in order."""
    told = []
    first = record["history"][0] if record.get("history") else None
    if first and first["stage"] == "head" and first["step"] == 0:
        told.append(f"The head was solved in {clock(record['seconds']['head'])}; training began from it.")
    names = record.get("groups") or []
    for number, stage in enumerate(record.get("stages") or []):
        rates = stage["peak_rates"]
        lowest = names[stage["open_from"]] if names else stage["open_from"]
        told.append(
            f"Stage {stage['name']}: {stage['steps']} steps in {clock(stage['seconds'])}, open from {lowest} up, peak "
            f"rates {rates[stage['open_from']]:.2g} to {rates[-1]:.2g}. Frozen part "
            + ("computed once" if stage["replayed"] else "computed anew each time")
            + (f": {stage['why']}." if stage["why"] else ".")
        )
        told += [f"It went back at step {back['step']}, to {back['factor']:g} of the rate: {back['why']}."
                 for back in record.get("rewinds") or [] if back["stage"] == number]  # fmt: skip
    if record.get("skipped_steps"):
        told.append(f"{record['skipped_steps']} steps without a usable gradient were left out.")
    if record.get("why"):
        told.append(f"It ended before its time: {record['why']}.")
    if record.get("kept"):
        told.append(f"Kept: {kept_weights(record)}.")
    degrees = (record.get("calibration") or {}).get("temperature", 1.0)
    if degrees != 1.0:
        sure = "less" if degrees > 1 else "more"
        told.append(f"Made {sure} sure of itself by a temperature of {degrees:.2g}, folded into the head.")
    if not told:
        told.append(f"It has not finished: {record.get('status', 'no status')}.")
    return [line for sentence in told for line in _paragraph(sentence)]


def _paragraph(text: str) -> list[str]:
    return fill(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False).split("\n")
