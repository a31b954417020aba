"""What is known of a trained model goes in; the sections of its card come out, as Markdown.

A section without anything to say is left out. All that comes from data goes through `text`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.output.card_facts import Facts
from finetune.output.markdown import folded, table, text
from finetune.output.report import duration, number
from finetune.output.snippets import snippets

if TYPE_CHECKING:
    from finetune.output.card_examples import Example
    from finetune.output.card_pictures import Picture

SHARES = ("accuracy", "f1", "f1_macro", "f1_micro", "precision", "recall")
SPLITS = {"test": "test", "valid": "validation"}
DOES = {
    "single_label_classification": "puts {unit}s into one of {n} classes",
    "multi_label_classification": "says which of {n} labels {unit}s have",
    "regression": "gives {what} for {unit}s",
    "token_classification": "gives each word of a text one of {n} tags",
}
FEW = 10  # rows of a class, below which its own figures say little


def score(name: str, value: float | None) -> str:
    """A metric as people read it: shares in per cent."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if name in SHARES else f"{value:.3g}"


def opening(facts: Facts, repo_id: str) -> str:
    """Title, the result with its interval, and what the model is."""
    name = repo_id.rpartition("/")[2]
    unit, labels = ("image" if facts.modality == "image" else "text"), facts.labels
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else ""
    origin = base or f"a {text(facts.notes.get('architecture') or 'model')}"
    does = DOES[facts.kind].format(unit=unit, n=len(labels), what=" and ".join(text(label, 40) for label in labels[:3]))
    rows = f" on {facts.data['counts']['train']:,} {unit}s" if facts.data else ""
    data = f" of {data_link(facts)}" if facts.data_name else ""
    is_ = (
        f"a LoRA adapter of rank {facts.adapter['rank']} for {origin}, trained"
        if facts.adapter
        else f"{origin}, fine-tuned"
    )
    what = f"It {does}. It is {is_}{rows}{data} with finetune-onecycle."
    return "\n\n".join(part for part in (f"# {text(name)}", result(facts), what) if part)


def data_link(facts: Facts) -> str:
    """What the data is called, linked where it is on the Hub."""
    if facts.hub_data:
        return f"[{facts.hub_data}](https://huggingface.co/datasets/{facts.hub_data})"
    return text(facts.data_name, 60)


def result(facts: Facts) -> str:
    """The sentence that says how good it is."""
    main, value = facts.main, facts.metrics.get(facts.split, {}).get(facts.main or "")
    if main is None or value is None:
        return ""
    unit = "image" if facts.modality == "image" else "text"
    parts = [f"**{metric_name(facts, main)} {score(main, value)}**"]
    if facts.interval is not None:
        low, high = (score(main, bound) for bound in facts.interval)
        parts.append(f" (95 % interval {low.removesuffix(' %')} to {high})")
    parts.append(f" on {facts.data['counts'][facts.split]:,} {SPLITS[facts.split]} {unit}s")
    if main in facts.trivial:
        parts.append(f"; always giving the {facts.trivial_name} would have {score(main, facts.trivial[main])}")
    note = "" if facts.split == "test" else " Weights were chosen on these rows: expect a little less elsewhere."
    return "".join(parts) + "." + note


def metric_name(facts: Facts, name: str) -> str:
    """A metric in words."""
    names = {"accuracy": "Accuracy", "f1_macro": "F1, mean over the labels,", "rmse": "Root mean squared error"}
    if name == "f1" and any(label.startswith(("B-", "I-")) for label in facts.labels):
        return "F1 of whole entities"
    return names.get(name) or text(name)


def use(facts: Facts, repo_id: str, shown: "Sequence[Example]") -> str:
    """Programs to copy and run, and examples with their answers."""
    parts = [f"{title}\n\n```python\n{code}\n```" for title, code in snippets(facts, repo_id, shown)]
    if shown:
        rows = [
            (f"![example {i}]({each.path})" if each.path else text(each.text), text(each.answer))
            for i, each in enumerate(shown, 1)
        ]
        parts.append(table((facts.modality, "answer"), rows))
    return "\n\n".join(parts)


def labels(facts: Facts) -> str:
    """What the outputs mean, in their order."""
    counted = bool(facts.train_counts.any())
    unit = "words" if facts.kind == "token_classification" else "rows"
    rows = [
        (i, text(label), *([f"{facts.train_counts[i]:,}"] if counted else [])) for i, label in enumerate(facts.labels)
    ]
    content = table((">output", "name", *([f">training {unit}"] if counted else [])), rows)
    return folded(content, f"{len(rows)} of them", len(rows))


def results(facts: Facts, drawn: "dict[str, Picture]") -> str:
    """All metrics, how the interval was made, each class, and pictures."""
    metrics, trivial = facts.metrics, facts.trivial
    if not metrics:
        return ""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    names = [name for name in names if name != "loss"] or names
    header = ["metric", *(f">{SPLITS[split]}" for split in metrics), *([f">{facts.trivial_name}"] if trivial else [])]
    rows = [
        [
            text(name),
            *(score(name, values.get(name)) for values in metrics.values()),
            *([score(name, trivial.get(name))] if trivial else []),
        ]
        for name in names
    ]
    parts = [table(header, rows)]
    notes = []
    if facts.interval is not None:
        how = "Wilson's, for a share of rows" if facts.main == "accuracy" else "from 2,000 draws of the test rows"
        notes.append(f"The interval above is {how}: it says how far another such set of rows might be off.")
    if trivial:
        notes.append(f"The last column is what always giving the {facts.trivial_name} scores.")
    parts += [" ".join(notes)] if notes else []
    parts += [drawn[name].shown for name in ("confusion", "reliability") if name in drawn]
    tally = facts.tally
    if tally is not None:
        unit = "words" if facts.kind == "token_classification" else "rows"
        figures = zip(facts.labels, tally.scores(), tally.present, strict=True)
        worst = sorted(figures, key=lambda item: item[1][2])
        content = table(
            ("name", ">precision", ">recall", ">F1", f">{tally.split} {unit}"),
            [(text(label), *(f"{value:.3f}" for value in values), f"{n:,}") for label, values, n in worst],
        )
        parts.append("### Each one, the weakest first\n\n" + folded(content, f"{len(worst)} of them", len(worst)))
    return "\n\n".join(parts)


def data(facts: Facts) -> str:
    """Where the rows came from, how they were split, and what was left out."""
    told = facts.data
    if not told:
        return ""
    counts = ", ".join(f"{count:,} {SPLITS.get(name, 'training')}" for name, count in told["counts"].items())
    lines = [f"{data_link(facts)}: {counts} rows." if facts.data_name else f"{counts} rows."]
    columns = ", ".join(f"{text(role)} from “{text(name)}”" for role, name in told.get("columns", {}).items())
    lines += [f"Columns: {columns}."] if columns else []
    left = ", ".join(f"{count:,} {text(reason)}" for reason, count in facts.left_out)
    lines.append(f"Left out: {left}." if left else "No row was left out.")
    checks = {
        "duplicates": "training rows repeat another one; they were kept on one side of the split",
        "leaks": "training rows were in the held-out rows too; they were taken out of training",
        "conflicts": "inputs stand there with several labels",
    }
    lines += [f"{told[name]:,} {what}." for name, what in checks.items() if told.get(name)]
    lines.append(f"Seed {facts.record['seed']}, fingerprint of the rows {text(told.get('fingerprint', ''))}.")
    return "\n".join(f"- {line}" for line in lines)


def training(facts: Facts, drawn: "dict[str, Picture]") -> str:
    """Each epoch with the rates of head and stem, the schedule, and the stages."""
    record, parts = facts.record, []
    history = record.get("history", [])
    if history:
        names = ["loss", *([facts.main] if facts.main else [])]
        names = [name for name in names if any(name in entry["valid"] for entry in history)]
        header = [">epoch", ">step", "stage", ">training loss", *(f">validation {text(name)}" for name in names)]
        rates = {step["step"] + 1: step["rates"] for step in facts.steps if step.get("rates")}
        header += [">rate, head", ">rate, stem"] if rates else []
        rows = []
        for entry in history:
            now = rates.get(entry["step"])
            row = [number(entry["epoch"]), number(entry["step"]), text(entry.get("stage", ""))]
            row += [score("loss", entry.get("train_loss")), *(score(name, entry["valid"].get(name)) for name in names)]
            rows.append(row + ([_rate(now, -1), _rate(now, 0)] if rates else []))
        parts.append(folded(table(header, rows), f"{len(rows)} epochs", len(rows), most=15))
        parts.append(f"Rates are those of an epoch's last step. Weights kept: {text(record.get('kept', 'the last'))}.")
    if "rates" in drawn:
        parts.append(drawn["rates"].shown)
    if record.get("stages"):
        groups = record.get("groups", [])
        stages = []
        for stage in record["stages"]:
            first, peaks = stage["open_from"], stage["peak_rates"]
            span = f": {groups[first]} to {groups[-1]}" if groups and first < len(groups) - 1 else ""
            opened = text(f"{len(peaks) - first} of {len(peaks)}{span}")
            stages.append(
                (text(stage["name"]), opened, number(stage["steps"]), _rate(peaks, -1), _rate(peaks, 0),
                 duration(stage["seconds"]))
            )  # fmt: skip
        parts.append(table(("stage", "open groups of layers", ">steps", ">peak, head", ">peak, stem", ">time"), stages))
    return "\n\n".join(parts)


def settings(facts: Facts) -> str:
    """Every dial with its value, who set it, and why."""
    table_ = facts.record.get("settings", {})
    if not table_:
        return ""
    rows = [
        (text(name), text(number(dial["value"])), text(dial["by"]), text(dial["reason"]))
        for name, dial in table_.items()
    ]
    return folded(table(("setting", "value", "set by", "reason"), rows), f"{len(rows)} settings", len(rows), most=0)


def limits(facts: Facts) -> str:
    """What not to expect of it."""
    unit, held = ("image" if facts.modality == "image" else "text"), SPLITS[facts.split]
    lines = []
    if facts.kind == "single_label_classification":
        lines.append(f"It gives every {unit} one of its {len(facts.labels)} labels, also where none of them is right.")
    if facts.metrics:
        lines.append(
            f"Its figures are of {held} rows from the same source as its training rows; elsewhere, measure again."
        )
    tally = facts.tally
    if tally is not None and len(facts.labels) > 1:
        recall, present = tally.right / np.maximum(tally.present, 1), tally.present
        if present.any():
            worst = int(np.where(present > 0, recall, np.inf).argmin())
            said = f"Weakest: {text(facts.labels[worst], 60)}, of which it finds {100 * recall[worst]:.0f} %"
            if tally.confusion is not None:
                wrong = tally.confusion[worst].copy()
                wrong[worst] = 0
                said += (
                    f", and takes most others for {text(facts.labels[int(wrong.argmax())], 60)}" if wrong.any() else ""
                )
            lines.append(said + ".")
        few = int((present < FEW).sum())
        lines += (
            [f"{few} of {len(present)} have fewer than {FEW} {held} rows: their figures say little."] if few else []
        )
    size = facts.notes.get("preprocessing", {}).get("size")
    lines += [f"It sees images at {size[1]} x {size[0]} pixels; smaller details are lost."] if size else []
    if facts.max_tokens:
        lines.append(f"It was trained on the first {facts.max_tokens} tokens of a text.")
    lines.append("Neither the data nor the backbone was examined for bias.")
    return "\n".join(f"- {line}" for line in lines)


def made(facts: Facts) -> str:
    """The command, and the versions of what it ran on."""
    record, parts = facts.record, []
    if record:
        spent, device = record.get("seconds", {}).get("total"), record.get("device")
        time = f" in {duration(spent)}" if spent else ""
        parts.append(f"With finetune-onecycle{time}{f' on {text(device)}' if device else ''}.")
    if facts.command:
        parts.append(f"```\n{facts.command}\n```")
    versions = record.get("versions") or facts.notes.get("versions", {})
    if versions:
        parts.append("Versions: " + ", ".join(f"{text(name)} {text(found)}" for name, found in versions.items()) + ".")
    return "\n\n".join(parts)


def _rate(rates: Sequence[float] | None, group: int) -> str:
    return "–" if rates is None else f"{rates[group]:.1e}" if rates[group] > 0 else "frozen"


def all_sections(
    facts: Facts, repo_id: str, licence: str, shown: "Sequence[Example]", drawn: "dict[str, Picture]"
) -> dict[str, str]:
    """Heading -> text, in the order of the card; "" is what stands above the first heading."""
    headings: dict[str, Any] = {
        "": opening(facts, repo_id),
        "Use it": use(facts, repo_id, shown),
        {"regression": "Targets", "token_classification": "Tags"}.get(facts.kind, "Labels"): labels(facts),
        "Results": results(facts, drawn),
        "Data": data(facts),
        "Training": training(facts, drawn),
        "Settings, and why": settings(facts),
        "Limits": limits(facts),
        "Licence": licence,
        "How it was made": made(facts),
    }
    return {heading: body for heading, body in headings.items() if body}
