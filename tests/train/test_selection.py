"""Which weights of a run are kept: the last ones, unless others are clearly better."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from finetune.data.splits import Splits
from finetune.data.task import Task
from finetune.plan.onecycle import Flat
from finetune.plan.stages import Plan, Stage
from finetune.train.evaluate import Evaluation
from finetune.train.selection import (
    Average,
    averages_at,
    calibrated_losses,
    candidate,
    clearly_better,
    head_is_better,
    standing,
)
from finetune.train.trainer import Trainer
from tests.train.runs import differences, make, state


def evaluation(scores: Sequence[float] | None, loss: float = 1.0) -> Evaluation:
    return Evaluation(None, None, loss, {"loss": loss}, None if scores is None else np.array(scores, dtype=float))


def test_the_mean_score_decides_and_then_the_loss() -> None:
    assert standing(evaluation([1, 1, 0, 0], 0.7)) == (0.5, -0.7)
    assert standing(evaluation([1, 1, 0, 1], 9.0)) > standing(evaluation([1, 1, 0, 0], 0.1))
    assert standing(evaluation([1, 0], 0.1)) > standing(evaluation([0, 1], 0.2))
    assert standing(evaluation(None, 0.1)) > standing(evaluation(None, 0.2))


@pytest.mark.parametrize(
    ("before", "last", "better"),
    [
        ([1] * 100, [1] * 100, False),  # the same
        ([1] * 100, [1] * 99 + [0], False),  # one row: as large as its own standard error
        ([1] * 100, [1] * 97 + [0] * 3, False),  # three rows: less than two standard errors
        ([1] * 100, [1] * 94 + [0] * 6, True),
        ([1] * 50 + [0] * 50, [0] * 49 + [1] * 51, False),  # as many won as lost
        ([1] * 56 + [0] * 44, [0] * 50 + [1] * 50, False),  # won 50 and lost 44: within the noise
        ([1] * 60 + [0] * 40, [0] * 45 + [1] * 55, False),
        ([1] * 70 + [0] * 30, [0] * 50 + [1] * 50, True),
        ([0] * 100, [1] * 100, False),
        ([-0.5] * 10, [-0.7] * 10, True),  # regression: always better by the same
    ],
)
def test_clearly_better(before: list[float], last: list[float], better: bool) -> None:
    assert clearly_better(candidate(evaluation(before), 1), evaluation(last)) is better


TWO = Task("single_label_classification", "text", ("a", "b"))


def logits(right: list[float], sure: float = 1.0) -> Evaluation:
    """Rows of class 0, each with this much more for its class than for the other, times `sure`."""
    margins = np.array(right) * sure
    outputs = np.stack([margins / 2, -margins / 2], axis=1).astype(np.float32)
    loss = float(np.log1p(np.exp(-margins)).mean())
    return Evaluation(outputs, np.zeros(len(right), dtype=np.int64), loss, {"loss": loss}, (margins > 0) * 1.0)


def test_the_solved_head_stays_where_training_lost_something() -> None:
    head = logits([2, 3, -1, 2, 1, 3, 2, -1])
    assert head_is_better(head, logits([2, 3, -2, 2, 1, -3, 2, -1]), TWO)
    assert not head_is_better(head, logits([2, 3, 1, 2, 1, 3, 2, -1]), TWO)


def test_being_too_sure_is_not_being_worse() -> None:
    head, surer = logits([2, 3, -1, 2, 1, 3, 2, -1]), logits([2, 3, -0.5, 2, 1, 3, 2, -1], sure=20.0)
    assert surer.loss > head.loss and not head_is_better(head, surer, TWO)
    plain, sure = (calibrated_losses(logits([2, -1, 1], sure=factor), TWO) for factor in (1.0, 7.0))
    assert plain.shape == (3,) and sure == pytest.approx(plain, rel=1e-3)


def test_without_scores_the_loss_tells() -> None:
    assert clearly_better(candidate(evaluation(None, 0.5), 1), evaluation(None, 0.6))
    assert not clearly_better(candidate(evaluation(None, 0.6), 1), evaluation(None, 0.6))


def test_a_candidate_is_plain_data() -> None:
    assert candidate(evaluation([1, 0], 0.25), 3) == {"epoch": 3, "standing": [0.5, -0.25], "scores": [1.0, 0.0]}
    assert candidate(evaluation(None, 0.25), 3) == {"epoch": 3, "standing": [0.0, -0.25], "scores": None}


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 99, 100, 1_000, 12_345])
def test_averaging_happens_at_the_end_and_not_too_often(steps: int) -> None:
    taken = [step for step in range(steps) if averages_at(step, steps)]
    assert taken[-1] == steps - 1
    assert taken[0] >= 0.7 * steps - 1
    assert min(30, round(0.3 * steps)) <= len(taken) <= 60 or steps == 1 == len(taken)
    assert len({b - a for a, b in zip(taken, taken[1:], strict=False)}) <= 1


def test_the_average_is_exponential_and_has_the_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average, expected = None, 0.0
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            model[0].weight.fill_(value)
            model[1].running_mean.fill_(10 * value)
        average, expected = (Average(model), value) if average is None else (average, expected)
        average.update(model)
        expected = 0.9 * expected + 0.1 * value
    assert average is not None
    torch.testing.assert_close(average.tensors["0.weight"], torch.full((2, 2), expected))
    torch.testing.assert_close(average.tensors["1.running_mean"], torch.full((2,), 10 * expected))


def scripted(trainer: Trainer, evaluations: Sequence[Evaluation]) -> list[dict[str, torch.Tensor]]:
    """Let the trainer get these evaluations, one after the other; the weights that each of them was asked for."""
    weights: list[dict[str, torch.Tensor]] = []

    def evaluate() -> Evaluation:
        weights.append(state(trainer))
        return evaluations[len(weights) - 1]

    trainer.evaluate = evaluate  # type: ignore[method-assign]
    return weights


GOOD, FAIR, CLOSE, POOR = [1] * 20, [1] * 19 + [0], [1] * 17 + [0, 0, 1], [0] * 20


@pytest.mark.parametrize(
    ("ema", "scores", "kept", "which"),
    [
        (False, [POOR, FAIR, GOOD], "last", 2),
        (False, [POOR, FAIR, CLOSE], "last", 2),  # better, but not clearly
        (False, [POOR, GOOD, POOR, GOOD], "epoch 2", 1),
        (False, [GOOD, GOOD, POOR, GOOD], "epoch 1", 0),  # the first of equals
        (True, [POOR, FAIR, FAIR, GOOD], "average", 3),
        (True, [POOR, FAIR, GOOD, FAIR], "last", 2),
        (True, [POOR, FAIR, GOOD, GOOD], "last", 2),
        (True, [POOR, FAIR, POOR, CLOSE], "average", 3),  # the average makes good for the last
        (True, [GOOD, POOR, POOR, POOR, GOOD], "epoch 1", 0),
    ],
)
def test_what_is_kept(
    review_splits: Splits, bert: Path, tmp_path: Path, ema: bool, scores: list[Any], kept: str, which: int
) -> None:
    """The model ends with the weights that were evaluated as number `which`, and their evaluation is the run's."""
    plan = Plan(Stage(-1, epochs=1, shape=Flat()), Stage(0, epochs=2, shape=Flat()))
    trainer = make(review_splits, bert, tmp_path, plan=plan, given={"ema": ema})
    evaluations = [evaluation(score) for score in scores]
    weights = scripted(trainer, evaluations)
    outcome = trainer.run()
    assert outcome.kept == kept
    assert len(weights) == len(scores)
    assert not differences(state(trainer), weights[which])
    assert outcome.valid.scores is not None and outcome.valid.scores.tolist() == scores[which]
    assert all(differences(weights[which], other) for i, other in enumerate(weights[:3]) if i != which)
    if ema:
        assert trainer.average is not None
        averaged = trainer.average.tensors
        assert not differences(averaged, weights[3]) and differences(averaged, weights[2])
    else:
        assert trainer.average is None


def test_weights_with_a_loss_that_is_no_number_are_never_the_best(
    review_splits: Splits, bert: Path, tmp_path: Path
) -> None:
    trainer = make(review_splits, bert, tmp_path, plan=Plan(Stage(-1, epochs=2)), given={"ema": False})
    scripted(trainer, [evaluation(GOOD, float("nan")), evaluation(POOR)])
    outcome = trainer.run()
    assert outcome.kept == "last" and trainer.progress.best is not None and trainer.progress.best["epoch"] == 2
