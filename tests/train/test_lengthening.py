"""Cycles that go on from each other while validation gains by them: how many, how long, and the same after a kill."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finetune
from finetune.data.splits import Splits
from finetune.data.task import Task
from finetune.errors import PlanError
from finetune.plan.onecycle import OneCycle
from finetune.plan.stages import Plan, Stage
from finetune.train.evaluate import Evaluation
from finetune.train.lengthening import end_loss, goes_on
from finetune.train.trainer import Trainer
from tests.train.runs import differences, make, run_killed, state, steps

TASK = Task("single_label_classification", "text", ("a", "b"))


def evaluation(sure: float, right: float = 0.75, rows: int = 8) -> Evaluation:
    """Logits that are apart by `sure`, and right for a share of the rows."""
    scores = (np.arange(rows) < right * rows).astype(float)
    outputs = np.where(scores[:, None] > 0, [[sure, 0.0]], [[0.0, sure]]).astype(np.float32)
    return Evaluation(outputs, np.zeros(rows, dtype=int), sure, {}, scores)


def test_a_gain_is_told_by_the_loss_at_the_best_temperature() -> None:
    assert end_loss(evaluation(0.5), TASK) == pytest.approx(end_loss(evaluation(4.0), TASK), rel=1e-4)
    assert end_loss(evaluation(1.0, 0.875), TASK) < end_loss(evaluation(1.0), TASK)
    custom = replace(evaluation(3.0), scores=None)
    assert end_loss(custom, TASK) == 3.0, "as it is"
    assert goes_on(None, 0.5, custom) and goes_on(0.6, 0.5, custom)
    assert not goes_on(0.5, 0.5, custom) and not goes_on(0.5, 0.6, custom)
    assert not goes_on(None, float("nan"), custom)
    assert not goes_on(0.6, 0.5, evaluation(1.0, 1.0)), "all rows are right"


def told(trainer: Trainer, losses: list[float]) -> Trainer:
    """With validations that say these losses at the ends of its cycles, one after the other."""
    original = trainer.evaluate

    def evaluate(*args: Any, **options: Any) -> Evaluation:
        found = original(*args, **options)
        ended = sum(trainer.progress.step > trainer.plan.start(index) for index in range(len(trainer.plan.stages)))
        return replace(found, scores=None, loss=losses[max(0, ended - 1)])

    trainer.evaluate = evaluate  # type: ignore[method-assign]
    return trainer


PLAN = Plan(Stage(-1, epochs=1), Stage(0, epochs=2))


@pytest.mark.parametrize(
    ("doublings", "losses", "cycles"),
    [
        (0, [3.0, 2.0, 1.0, 0.5], []),
        (1, [3.0, 2.0, 1.0, 0.5], [3]),
        (2, [3.0, 2.0, 1.0, 0.5], [3, 6]),
        (2, [3.0, 2.0, 2.0, 0.5], [3]),
    ],
)
def test_each_cycle_is_as_long_as_all_before_it_while_it_gains(
    twelve: Splits, resnet: Path, tmp_path: Path, doublings: int, losses: list[float], cycles: list[int]
) -> None:
    said: list[str] = []
    given = {"doublings": doublings, "lr": 1e-6, "patience": 0}
    trainer = told(make(twelve, resnet, tmp_path, plan=PLAN, given=given, said=said), losses)
    trainer.run()
    per_epoch = trainer.plan.steps_per_epoch
    assert [stage.steps for stage in trainer.plan.stages] == [per_epoch * epochs for epochs in [1, 2, *cycles]]
    assert [stage.name for stage in trainer.plan.stages] == ["head", "all", "cycle 2", "cycle 3"][: 2 + len(cycles)]
    logged = steps(tmp_path)
    assert len(logged) == trainer.plan.steps
    shape = OneCycle()
    for index, stage in enumerate(trainer.plan.stages):  # each climbs and comes down anew
        first = trainer.plan.start(index)
        rates = [line["rates"][-1] for line in logged[first : first + stage.steps]]
        assert rates == pytest.approx([stage.rates[-1] * shape.at(step, stage.steps)[0] for step in range(stage.steps)])
    assert trainer.plan.stages[-1].rates == trainer.plan.stages[1].rates
    assert sum("Longer" in line for line in said) == len(cycles)


@pytest.mark.parametrize(("averaged", "kept"), [(0.5, "last two"), (1.5, "last")])
def test_the_ends_of_the_last_two_are_averaged_where_validation_prefers_that(
    twelve: Splits, resnet: Path, tmp_path: Path, averaged: float, kept: str
) -> None:
    trainer = make(twelve, resnet, tmp_path, plan=PLAN, given={"doublings": 2, "lr": 1e-3, "patience": 0})
    ends, original = [], trainer.end_epoch

    def end_epoch(*args: Any) -> None:
        ends.append(state(trainer))
        original(*args)

    trainer.end_epoch = end_epoch  # type: ignore[method-assign]
    validations = 1 + 2 + 3 + 6
    losses = iter([*(3.0 - 0.1 * number for number in range(validations - 1)), 1.0, averaged])
    plain = trainer.evaluate
    trainer.evaluate = lambda: replace(plain(), scores=None, loss=next(losses))  # type: ignore[method-assign]
    outcome = trainer.run()
    assert outcome.kept == kept and len(ends) == validations
    before, last, now = ends[5], ends[11], state(trainer)
    assert differences(before, last)
    for name in now:
        two = (before[name].double() + last[name].double()) / 2 if last[name].is_floating_point() else last[name]
        torch.testing.assert_close(now[name].double(), (two if kept == "last two" else last[name]).double())


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 7, 11])
def test_resumed_is_uninterrupted(twelve: Splits, resnet: Path, tmp_path: Path, stop: int) -> None:
    def made(folder: Path, every: int | None = None) -> Trainer:
        given = {"doublings": 2, "lr": 1e-3, "patience": 0}
        trainer = make(twelve, resnet, folder, plan=PLAN, given=given, save_steps=every)
        return told(trainer, [3.0, 2.0, 1.0, 0.5])

    whole = made(tmp_path / "whole")
    expected = whole.run()
    per_epoch = whole.plan.steps_per_epoch
    run_killed(made(tmp_path / "parts", 1), after=stop * per_epoch)
    resumed = made(tmp_path / "parts")
    outcome = resumed.run()
    assert resumed.progress.added == whole.progress.added == [3 * per_epoch, 6 * per_epoch]
    assert (outcome.history, outcome.kept) == (expected.history, expected.kept)
    assert not differences(state(resumed), state(whole)) and steps(resumed.folder) == steps(whole.folder)


def test_a_run_says_how_long_it_became(
    review_splits: Splits, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"doublings": 1, "cycles": 1, "epochs": 1}
    run = finetune.fit(review_splits, bert, out=tmp_path / "run", settings=settings)
    names = [stage["name"] for stage in run.record["stages"]]
    assert len(names) == 2 and names[-1] == "cycle 2"
    assert "Stage cycle 2" in finetune.explain(run)
    epochs = run.record["settings"]["epochs"]
    assert (epochs["value"], epochs["by"]) == (2.0, "measured") and "as long again once" in epochs["reason"]
    assert "1 epochs, up to 2 while they help" in capsys.readouterr().out
    with pytest.raises(PlanError, match="doublings"):
        finetune.fit(review_splits, bert, out=tmp_path / "m", minutes=1, settings={"doublings": 1})
    anew = Plan(Stage(0, epochs=1, anew=True), Stage(0, epochs=1, anew=True))
    with pytest.raises(PlanError, match="doublings"):
        finetune.fit(review_splits, bert, out=tmp_path / "p", plan=anew, settings={"doublings": 1})
