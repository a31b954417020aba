import math

import numpy as np
import pytest
import torch

from finetune.data.task import (
    Task,
    default_loss,
    full_kind,
    main_metric,
    metrics,
    per_example_score,
    predictions,
    units,
)
from finetune.errors import DataError

SINGLE = Task("single_label_classification", "text", ("a", "b", "c"))
MULTI = Task("multi_label_classification", "image", ("x", "y"))
NUMBER = Task("regression", "text", ("score",))
TAGS = Task("token_classification", "text", ("B-LOC", "B-PER", "I-LOC", "I-PER", "O"))


def one_hot(rows: list[int], width: int) -> np.ndarray:
    return 4.0 * np.eye(width)[rows]


def test_kinds_by_short_name():
    assert full_kind("multi_label") == full_kind("multi_label_classification") == "multi_label_classification"
    with pytest.raises(DataError, match="task: 'binary' is not a kind of task; give one of single_label, multi_label"):
        full_kind("binary")


def test_losses_against_hand_computed_values():
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0]])
    assert default_loss(SINGLE)(logits, torch.tensor([1, 0])) == pytest.approx((math.log(3) + math.log(2)) / 2)
    assert default_loss(MULTI)(torch.zeros(3, 2), torch.ones(3, 2)) == pytest.approx(math.log(2))
    assert default_loss(NUMBER)(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])) == pytest.approx(2.5)


def test_token_loss_skips_unlabelled_positions_and_is_zero_without_any():
    targets = torch.tensor([[0, -100, 2], [-100, -100, 1]])
    logits = torch.randn(2, 3, 5)
    picked = logits.log_softmax(-1)[[0, 0, 1], [0, 2, 2], [0, 2, 1]]
    assert default_loss(TAGS)(logits, targets) == pytest.approx(-picked.mean().item(), rel=1e-5)
    assert units(TAGS, targets) == 3
    assert default_loss(TAGS)(logits, torch.full((2, 3), -100)) == 0
    assert units(SINGLE, torch.tensor([1, 0])) == 2


@pytest.mark.parametrize("task", [SINGLE, MULTI, NUMBER, TAGS])
def test_loss_of_a_batch_is_the_mean_of_its_parts_weighed_by_units(task: Task):
    torch.manual_seed(0)
    logits = torch.randn(6, 4, task.outputs) if task is TAGS else torch.randn(6, task.outputs)
    targets = {
        SINGLE: torch.randint(3, (6,)),
        MULTI: torch.randint(2, (6, 2)).float(),
        NUMBER: torch.randn(6, 1),
        TAGS: torch.tensor([[1, 2, -100, -100], *[[0, 1, 2, -100]] * 4, [-100] * 4]),
    }[task]
    loss, parts = default_loss(task), [slice(0, 1), slice(1, 6)]
    weighed = sum(loss(logits[part], targets[part]) * units(task, targets[part]) for part in parts)
    assert loss(logits, targets) == pytest.approx((weighed / units(task, targets)).item(), rel=1e-5)


def test_single_label_metrics():
    logits, targets = one_hot([0, 0, 1, 2], 3), np.array([0, 1, 1, 2])
    scores = metrics(SINGLE, logits, targets)
    assert scores["accuracy"] == 0.75
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    right, wrong = math.log(math.exp(4) + 2) - 4, math.log(math.exp(4) + 2)
    assert scores["log_loss"] == pytest.approx((3 * right + wrong) / 4)
    assert scores["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert per_example_score(SINGLE, logits, targets).tolist() == [1, 0, 1, 1]
    assert main_metric(SINGLE) == ("accuracy", 1)


def test_single_label_metrics_of_diverged_logits_do_not_crash():
    assert math.isnan(metrics(SINGLE, np.full((2, 3), np.nan), np.array([0, 1]))["log_loss"])


def test_multi_label_metrics():
    logits = np.array([[3.0, -3.0], [3.0, 3.0], [-3.0, -3.0]])
    targets = np.array([[1, 0], [1, 0], [0, 0]], dtype=np.float32)
    scores = metrics(MULTI, logits, targets)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["f1_macro"] == 0.5  # label x perfect, label y never right
    assert scores["f1_micro"] == pytest.approx(0.8)
    low, high = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    assert scores["log_loss"] == pytest.approx((5 * low + high) / 6)
    assert per_example_score(MULTI, logits, targets).tolist() == [1, 0.5, 1]
    assert main_metric(MULTI) == ("f1_macro", 1)


def test_regression_metrics():
    values, targets = np.array([[1.0], [2.0], [4.0]]), np.array([[1.0], [3.0], [2.0]])
    scores = metrics(NUMBER, values, targets)
    assert scores["mae"] == pytest.approx(1.0)
    assert scores["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert scores["spearman"] == pytest.approx(0.5)
    assert scores["r2"] == pytest.approx(1 - 5 / 2)
    assert per_example_score(NUMBER, values, targets).tolist() == [0, -1, -4]
    assert main_metric(NUMBER) == ("rmse", -1)


def test_regression_metrics_of_a_constant_are_numbers():
    assert metrics(NUMBER, np.ones((3, 1)), np.array([[1.0], [2.0], [3.0]]))["spearman"] == 0.0


def test_token_metrics_count_whole_entities():
    # truth: PER at 0-1, LOC at 3; found: PER at 0 only (too short), LOC at 3
    truth, found = [[1, 3, 4, 0], [4, 4]], [[1, 4, 4, 0], [4, 4]]
    scores = metrics(TAGS, [one_hot(row, 5) for row in found], [np.array(row) for row in truth])
    assert scores == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": pytest.approx(5 / 6)}
    padded = [np.array([-100, *row, -100]) for row in truth]
    again = metrics(TAGS, [one_hot([0, *row, 0], 5) for row in found], padded)
    assert again == scores
    shares = per_example_score(TAGS, [one_hot(row, 5) for row in found], [np.array(row) for row in truth])
    assert shares.tolist() == [0.75, 1]
    assert main_metric(TAGS) == ("f1", 1)


def test_token_metrics_without_entities_are_zero():
    scores = metrics(TAGS, [one_hot([4, 4], 5)], [np.array([4, 4])])
    assert (scores["f1"], scores["accuracy"]) == (0, 1)


def test_plain_tags_are_scored_by_token():
    task = Task("token_classification", "text", ("ADJ", "NOUN"))
    scores = metrics(task, [one_hot([0, 1, 1], 2)], [np.array([0, 0, 1])])
    assert scores["f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_predictions():
    assert predictions(SINGLE, np.array([[0.0, 0.0, math.log(2)]])) == pytest.approx(np.array([[0.25, 0.25, 0.5]]))
    assert predictions(MULTI, np.array([[0.0, -1000.0]])) == pytest.approx(np.array([[0.5, 0.0]]))
    assert predictions(NUMBER, np.array([[7.0]])).tolist() == [[7.0]]
    assert predictions(TAGS, [np.zeros((2, 5))])[0].tolist() == [[0.2] * 5] * 2
