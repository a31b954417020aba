"""Splits, settings, outcome and evaluation of a run go in; the content of `run.json` and `predictions/test.csv` comes
out."""

import csv
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from finetune.data.splits import Splits
from finetune.data.task import Task, predictions
from finetune.errors import without_secrets
from finetune.model.pretrained import Pretrained
from finetune.plan.settings import Settings
from finetune.plan.stages import Plan, ResolvedPlan
from finetune.train.calibration import applies, cooled, reliability
from finetune.train.evaluate import Evaluation
from finetune.train.progress import Outcome

SCHEMA = 1
_PACKAGES = (
    "finetune-onecycle",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
)


def identity_of(
    splits: Splits, backbone: str, given: dict[str, Any], plan: Plan | None, seed: int, **options: Any
) -> dict[str, Any]:
    """What was asked for, as plain data: two requests that agree in it make the same run."""
    asked = {name: value for name, value in {**given, **options}.items() if value is not None}
    return {
        "data": splits.fingerprint,
        "task": splits.task.kind,
        "backbone": without_secrets(backbone),
        "options": asked,
        "plan": plan.to_json() if plan is not None else None,
        "seed": seed,
    }


def starting_record(
    splits: Splits, pretrained: Pretrained, settings: Settings, identity: dict[str, Any], processes: int, seed: int
) -> dict[str, Any]:
    """`run.json` as it stands when training begins."""
    return {
        "schema": SCHEMA,
        "task": {"kind": splits.task.kind, "modality": splits.task.modality, "labels": list(splits.task.labels)},
        "data": {
            "source": without_secrets(splits.source),
            "counts": splits.n,
            "classes": splits.report.classes,
            "fingerprint": splits.fingerprint,
            "left_out": len(splits.report.left_out),
            "duplicates": splits.report.duplicates,
            "leaks": splits.report.leaks,
            "conflicts": splits.report.conflicts,
            "columns": splits.report.columns,
            "warnings": list(splits.report.warnings),
        },
        "backbone": {"name": without_secrets(pretrained.name), "family": pretrained.family, **pretrained.info},
        "settings": settings.table(),
        "stages": [],
        "metrics": {},
        "seconds": {},
        "processes": processes,
        "seed": seed,
        "command": without_secrets(" ".join(sys.argv)),
        "identity": identity,
        "status": "running",
    }


def describe_run(
    outcome: Outcome,
    test: Evaluation | None,
    plan: ResolvedPlan,
    rows: int,
    seconds: dict[str, float],
    device: torch.device,
) -> dict[str, Any]:
    """What `run.json` gains when training ends."""
    stages, progress = [], outcome.progress
    replayed = [*progress.replayed, *[(False, "")] * len(plan.stages)]
    for planned, spent, (replay, why) in zip(plan.stages, progress.stage_seconds, replayed, strict=False):
        examples = planned.steps / plan.steps_per_epoch * rows
        stages.append(
            {
                "name": planned.name,
                "open_from": planned.open_from,
                "steps": planned.steps,
                "peak_rates": [float(f"{rate:.6g}") for rate in planned.rates],
                "seconds": round(spent, 2),
                "examples_per_second": round(examples / spent, 2) if spent > 0 else None,
                "replayed": replay,
                "why": why,
            }
        )
    return {
        "stages": stages,
        "groups": list(plan.group_names),
        "history": outcome.history,
        "rewinds": progress.rewinds,
        "skipped_steps": progress.skipped,
        "unreadable": progress.unreadable,
        "kept": outcome.kept,
        "metrics": {
            "valid": _plain(outcome.valid.metrics),
            **({"test": _plain(test.metrics)} if test is not None else {}),
        },
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_bytes": peak_memory(device),
        "device": device.type,
        "status": outcome.status,
        "why": outcome.why,
    }


def described_calibration(degrees: float, valid: Evaluation, test: Evaluation | None, task: Task) -> dict[str, Any]:
    """How far probabilities can be trusted, with the temperature that is folded into the head, and before."""
    found: dict[str, Any] = {"temperature": degrees}
    for split, evaluation in (("valid", valid), ("test", test)):
        if evaluation is not None and applies(evaluation, task):
            found[split] = {
                "after": reliability(evaluation),
                "before": reliability(cooled(evaluation, task, 1 / degrees)),
            }
    return found


def peak_memory(device: torch.device) -> int:
    """Most memory that this process has held: on the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a run."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def test_predictions(path: Path, dataset: Dataset, task: Task, test: Evaluation) -> None:
    """Write one line a row: id, target, prediction, and the probability of it (classes) or nothing more (values,
    tags)."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if isinstance(test.outputs, dict):
            writer.writerow(["id", *test.outputs])
            writer.writerows(
                [name, *(np.round(array[row], 6).tolist() for array in test.outputs.values())]
                for row, name in enumerate(dataset["id"])
            )
            return
        results = predictions(task, test.outputs)
        if task.kind == "regression":
            writer.writerow(["id", *(f"target {label}" for label in task.labels), *task.labels])
            writer.writerows(
                [name, *np.ravel(test.targets[row]).tolist(), *np.ravel(results[row]).tolist()]
                for row, name in enumerate(dataset["id"])
            )
            return
        writer.writerow(
            ["id", "target", "prediction", *(["probability"] if task.kind == "single_label_classification" else [])]
        )
        for row, name in enumerate(dataset["id"]):
            writer.writerow([name, *_cells(task, results[row], test.targets[row])])


def _cells(task: Task, result: np.ndarray, target: Any) -> list[Any]:
    if task.kind == "single_label_classification":
        return [task.labels[int(target)], task.labels[int(result.argmax())], round(float(result.max()), 6)]
    if task.kind == "multi_label_classification":
        return [
            " ".join(label for label, on in zip(task.labels, values, strict=True) if on >= 0.5)
            for values in (target, result)
        ]
    return [" ".join(task.labels[int(index)] for index in indices) for indices in (target, result.argmax(-1))]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON can hold."""
    return {
        name: np.asarray(value).tolist() if isinstance(value, list | np.ndarray) else float(value)
        for name, value in values.items()
    }
