"""The last lines of a run."""

from pathlib import Path
from typing import Any

import pytest

from finetune.output.summary import nothing_learnt, result_lines, weakest


def record(**changes: Any) -> dict[str, Any]:
    metrics = {"accuracy": 0.9, "confusion": [[50, 0, 0], [2, 35, 3], [0, 5, 5]], "loss": 0.3}
    probe = {"stage": "head", "step": 0, "valid": {"accuracy": 0.8, "loss": 0.5}}
    return {
        "metrics": {"valid": {**metrics, "accuracy": 0.85}, "test": metrics},
        "data": {"counts": {"train": 300, "valid": 40, "test": 100}},
        "task": {"kind": "single_label_classification", "labels": ["a", "b", "c"]},
        "history": [probe, {"stage": "all", "step": 9, "valid": {"accuracy": 0.85}}],
        "seconds": {"total": 61.4},
        "kept": "last",
    } | changes


def test_a_classifier() -> None:
    assert result_lines(record(), Path("runs/x")) == [
        "Result    accuracy 90.0 % on 100 test rows, 95 % interval 82.6 to 94.5   (61 s, weights: last)",
        "          5.0 points above the linear probe on validation; weakest: c, 50 % recognised, mostly taken for b",
        "Saved     runs/x/model",
    ]


@pytest.mark.parametrize(
    ("valid", "said"),
    [(0.78, " 2.0 points below the linear probe"), (0.8, " level with the linear probe"), (None, " weakest")],
)
def test_against_the_probe(valid: float | None, said: str) -> None:
    found = record()
    found["metrics"]["valid"]["accuracy"] = valid
    line = result_lines(found, Path("x"))[1]
    assert said in line and ("linear probe" in line) == (valid is not None)


def test_without_a_probe_or_a_test() -> None:
    found = record(history=[{"stage": "head", "step": 5, "valid": {"accuracy": 0.1}}])
    del found["metrics"]["test"]
    line = result_lines(found, Path("x"))[0]
    assert line.startswith("Result    accuracy 85.0 % on 40 validation rows, 95 % interval ") and "probe" not in line


def test_other_tasks() -> None:
    found = record(task={"kind": "regression"})
    found["metrics"]["test"] = {"mae": 1.25, "loss": 0.5}
    assert result_lines(found, Path("x"))[0].startswith("Result    mae 1.25 on 100 test rows   (61 s")
    found["metrics"]["test"] = {"loss": 0.5}
    assert result_lines(found, Path("x"))[0].startswith("Result    loss 0.5 on 100 test rows")


def test_a_perfect_model_has_no_weakest_class() -> None:
    assert weakest({"confusion": [[3, 0], [0, 4]]}, ["a", "b"]) == ""
    assert weakest({"confusion": [[0, 0], [1, 4]]}, ["a", "b"]) == ("weakest: b, 80 % recognised, mostly taken for a")


@pytest.mark.parametrize(
    ("confusion", "said"),
    [
        (
            [[26, 24], [25, 25]],
            "accuracy 51.0 % on 100 test rows is no better, within chance, than 'a' for every row (50.0 %)",
        ),
        (
            [[90, 0], [10, 0]],
            "accuracy 90.0 % on 100 test rows is no better, within chance, than 'a' for every row (90.0 %)",
        ),
        ([[40, 10], [10, 40]], ""),
        ([[50, 0], [0, 50]], ""),
    ],
)
def test_nothing_learnt(confusion: list[list[int]], said: str) -> None:
    found = record(task={"kind": "single_label_classification", "labels": ["a", "b"]})
    found["metrics"]["test"] = {"accuracy": 0.5, "confusion": confusion, "loss": 1.0}
    assert nothing_learnt(found) == (
        f"nothing learnable found: {said}; look at the labels, or give more rows" if said else ""
    )
    assert any(line.startswith("Warning   nothing") for line in result_lines(found, Path("x"))) == bool(said)


def test_nothing_learnt_of_numbers() -> None:
    found = record(task={"kind": "regression", "labels": ["size"]})
    found["metrics"]["test"] = {"r2": -0.01, "loss": 1.0}
    assert "r2 -0.01 on 100 test rows is no better, within chance, than the mean" in nothing_learnt(found)
    found["metrics"]["test"]["r2"] = 0.4
    assert nothing_learnt(found) == ""
