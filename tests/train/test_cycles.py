"""Trainings that begin anew from the same weights, and the average of their ends; half of the way back to the head."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.plan.onecycle import Flat
from finetune.plan.stages import Plan, Stage, gradual_unfreezing
from finetune.train.evaluate import Evaluation
from finetune.train.trainer import Trainer
from tests.train.runs import differences, make, run_killed, state, steps

PLAN = Plan(
    Stage(-1, epochs=1, shape=Flat()), Stage(0, epochs=1, anew=True, name="cycle 1"),
    Stage(0, epochs=1, anew=True, name="cycle 2"),
)  # fmt: skip


def watched(trainer: Trainer) -> list[tuple[dict[str, torch.Tensor], int]]:
    """The weights before each step, and how many parameters the optimizer has a state of."""
    seen: list[tuple[dict[str, torch.Tensor], int]] = []
    original = trainer.step

    def step(*args: Any) -> None:
        seen.append((state(trainer), len(trainer.optimizer.state)))
        original(*args)

    trainer.step = step  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("solvable", [None, "classifier"])
def test_each_begins_where_the_first_began_and_the_ends_are_averaged(
    review_splits: Splits, bert: Path, tmp_path: Path, solvable: str | None
) -> None:
    trainer = make(review_splits, bert, tmp_path, plan=PLAN)
    trainer.solvable = solvable
    seen, ends = watched(trainer), []
    original = trainer.end_epoch

    def end_epoch(*args: Any) -> None:
        ends.append(state(trainer))
        original(*args)

    trainer.end_epoch = end_epoch  # type: ignore[method-assign]
    outcome = trainer.run()
    first, second = trainer.plan.start(1), trainer.plan.start(2)
    assert not differences(seen[first][0], seen[second][0])
    assert differences(seen[0][0], seen[first][0]) and seen[first][1] > 0 and seen[second][1] == 0
    assert differences(ends[1], ends[2]), "another order of the rows, another end"
    assert trainer.average is not None
    for name, tensor in trainer.average.tensors.items():
        torch.testing.assert_close(tensor.float(), (ends[1][name].float() + ends[2][name].float()) / 2)
    assert [entry["stage"] for entry in outcome.history][-3:] == ["head", "cycle 1", "cycle 2"]
    if outcome.kept == "average":
        assert not differences(state(trainer), trainer.average.tensors)


@pytest.mark.parametrize(("solved", "before"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("stop", [7, 10, 13])  # in the first cycle, between both, in the second
def test_resumed_is_uninterrupted(
    review_splits: Splits, bert: Path, tmp_path: Path, stop: int, solved: bool, before: bool
) -> None:
    plan = PLAN if before else Plan(*PLAN[1:])

    def made(folder: Path, every: int | None = None) -> Trainer:
        trainer = make(review_splits, bert, folder, plan=plan, save_steps=every)
        trainer.solvable = "classifier" if solved else None
        return trainer

    whole = made(tmp_path / "whole")
    expected = whole.run()
    run_killed(made(tmp_path / "parts", 1), after=stop - 5 * (not before))
    resumed = made(tmp_path / "parts")
    outcome = resumed.run()
    assert (outcome.history, outcome.kept) == (expected.history, expected.kept)
    assert not differences(state(resumed), state(whole)) and steps(resumed.folder) == steps(whole.folder)


def test_a_cycle_that_runs_away_begins_anew_and_the_others_count(
    review_splits: Splits, bert: Path, tmp_path: Path
) -> None:
    plain = default_loss(review_splits.task)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        away = outputs.requires_grad and trainer.progress.step == 13 and not trainer.progress.rewinds
        return plain(outputs, targets) * (1e4 if away else 1.0)

    trainer = make(review_splits, bert, tmp_path, plan=PLAN, loss=loss)
    seen = watched(trainer)
    outcome = trainer.run()
    assert [back["stage"] for back in outcome.progress.rewinds] == [2]
    assert not differences(seen[5][0], seen[10][0]) and not differences(seen[5][0], seen[14][0])
    assert trainer.average is not None and outcome.status == "finished"
    assert len(seen) == 5 + 5 + 4 + 5


def losses(right: list[float]) -> Evaluation:
    """Validation rows of class 0, five with each margin for it."""
    margins = np.array(5 * right)
    outputs = np.stack([margins / 2, -margins / 2], axis=1).astype(np.float32)
    loss = float(np.log1p(np.exp(-margins)).mean())
    return Evaluation(outputs, np.zeros(len(margins), dtype=np.int64), loss, {"loss": loss}, (margins > 0) * 1.0)


@pytest.mark.parametrize(
    ("middle", "kept", "share"),
    [
        ([3, 3, 3, 3, 3, -2], "half-way", 0.5),
        ([2, 4.2, 3, 1.5, 4, -2], "half-way", 0.5),  # a little worse than the head, which is no proof
        ([-3, -3, 3, -2, -3, -2], "solved head", 1.0),
    ],
)
def test_what_the_head_was_better_than_goes_back_half_of_the_way(
    review_splits: Splits, bert: Path, tmp_path: Path, middle: list[float], kept: str, share: float
) -> None:
    trainer = make(review_splits, bert, tmp_path, plan=Plan(Stage(0, steps=1)), given={"ema": False})
    trainer.solvable = "classifier"
    head, script = losses([3, 3, 3, 3, 3, -2]), [losses([-3, 3, -3, 2, -3, -2]), losses(middle)]
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate() -> Evaluation:
        seen.append(state(trainer))
        return head if len(seen) == 1 else script.pop(0)

    trainer.evaluate = evaluate  # type: ignore[method-assign, assignment]
    outcome = trainer.run()
    assert outcome.kept == kept
    for name, tensor in state(trainer).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.lerp(seen[1][name], seen[0][name], share))


def test_the_last_stage_of_every_named_plan_is_divided() -> None:
    for style in ("none", "head_then_all", "all_but_stem", "three_stages", "one_at_a_time"):
        one = gradual_unfreezing(5, 8.0, style=style)  # type: ignore[arg-type]
        three = gradual_unfreezing(5, 8.0, style=style, cycles=3)  # type: ignore[arg-type]
        assert three[:-3] == one[:-1] and len(three) == len(one) + 2
        assert [stage.name for stage in three[-3:]] == ["cycle 1", "cycle 2", "cycle 3"]
        assert all(stage.anew and stage.epochs == pytest.approx((one[-1].epochs or 0) / 3) for stage in three[-3:])
        assert all(stage.open_from == one[-1].open_from for stage in three[-3:])
        assert Plan.from_json(three.to_json()) == three
