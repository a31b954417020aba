"""Intervals of metrics: against scipy's bootstrap, against scikit-learn's scores, and None where rows do not fit."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import f1_score

from finetune.data.task import Task, entity_scores, token_metrics
from finetune.output.interval import of_classes, of_test_rows, of_values, wilson

LABELS = ["O", "B-x", "I-x", "B-y"]


def test_a_share() -> None:
    assert wilson(0.9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)  # Wilson 1927, as published tables have it
    assert wilson(1.0, 20)[1] == 1.0 and wilson(1.0, 20)[0] == pytest.approx(0.8389, abs=1e-4)


@pytest.mark.parametrize("metric", ["rmse", "mae"])
def test_values_as_scipy_draws_them(metric: str) -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(150, 2))
    value = target + rng.normal(size=(150, 2)) * [0.5, 2.0]

    def score(rows: np.ndarray) -> float:
        error = np.abs(target - value)[rows]
        return float((np.sqrt((error**2).mean(axis=0)) if metric == "rmse" else error.mean(axis=0)).mean())

    found = of_values(target, value, metric, score(np.arange(150)))
    same = bootstrap((np.arange(150),), score, n_resamples=2000, method="percentile", vectorized=False, rng=1)
    assert found == pytest.approx(tuple(same.confidence_interval), abs=0.03)
    assert of_values(target, value, metric, 9.0) is None  # not the score of these rows
    assert of_values(target, value, "spearman", 0.5) is None


def test_labels_and_plain_tags_score_as_scikit_learn_does() -> None:
    rng = np.random.default_rng(0)
    true, guess = rng.random((80, 4)) < 0.4, rng.random((80, 4)) < 0.4
    rows = [(np.flatnonzero(t).tolist(), np.flatnonzero(g).tolist()) for t, g in zip(true, guess, strict=True)]
    value = f1_score(true, guess, average="macro")
    low, high = of_classes(rows, "multi_label_classification", list("abcd"), "f1_macro", value) or (0, 0)
    assert 0.0 < low < value < high < 1.0 and 0.08 < high - low < 0.3
    tags = [([0, 1, 1], [0, 1, 0]), ([2, 0], [2, 2]), ([1], [1])]
    flat = [[tag for row in tags for tag in row[side]] for side in (0, 1)]
    value = f1_score(*flat, average="macro", zero_division=0)
    assert of_classes(tags, "token_classification", ["a", "b", "c", "absent"], "f1", value) is not None


def test_entities_score_as_the_run_does() -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(4, size=9).tolist(), rng.integers(4, size=9).tolist()) for _ in range(60)]
    names = [[[LABELS[i] for i in row[side]] for row in rows] for side in (0, 1)]
    value, *_ = entity_scores(*names)
    low, high = of_classes(rows, "token_classification", LABELS, "f1", value) or (0, 0)
    assert 0.0 < low < value < high < 1.0
    task = Task("token_classification", "text", tuple(LABELS))
    logits = [np.eye(4)[row[1]] for row in rows]
    assert token_metrics(task, logits, [np.array(row[0]) for row in rows])["f1"] == pytest.approx(value)


def test_rows_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "test.csv"
    kind = "multi_label_classification"
    assert of_test_rows(path, kind, ["a", "b"], "f1_macro", 0.5) is None
    rows = [["id", "target", "prediction"], *[["1", "a", "a"], ["2", "a b", "b"], ["3", "b", "a"]] * 9]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    value = f1_score([[1, 0], [1, 1], [0, 1]] * 9, [[1, 0], [0, 1], [1, 0]] * 9, average="macro")
    low, high = of_test_rows(path, kind, ["a", "b"], "f1_macro", value) or (0, 0)
    assert low < value < high
    assert of_test_rows(path, kind, ["a", "c"], "f1_macro", value) is None
    assert of_test_rows(path, kind, ["a", "b"], "f1_macro", 0.123) is None
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "target y", "y"], *([i, i, i + (-1) ** i * i / 10] for i in range(30))])
    value = float(np.sqrt(np.mean([(i / 10) ** 2 for i in range(30)])))
    assert of_test_rows(path, "regression", ["y"], "rmse", value) is not None
