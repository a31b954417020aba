"""The loop: what is frozen stays as it is, rates are the plan's, and micro-batches add up to their batch."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.data.sources import load_images
from finetune.data.splits import Splits
from finetune.data.task import Task, default_loss
from finetune.errors import DataError, PlanError
from finetune.plan.onecycle import Flat, OneCycle
from finetune.plan.stages import Plan, Stage
from finetune.train.progress import Outcome
from finetune.train.trainer import Trainer, steps_per_epoch
from tests.train.runs import STAGES, differences, make, run_killed, state, steps


class Watch:
    """Looks at a trainer at each optimizer step: the groups, gradients and state, the weights before, what trains."""

    def __init__(self, trainer: Trainer) -> None:
        self.groups: list[list[dict[str, Any]]] = []
        self.with_gradient: list[set[str]] = []
        self.with_state: list[set[str]] = []
        self.before: list[dict[str, torch.Tensor]] = []
        self.training: list[set[str]] = []
        self.evaluated: list[dict[str, torch.Tensor]] = []
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        original = trainer.optimizer.step

        def step() -> None:
            self.groups.append(
                [{key: group[key] for key in group if key != "params"} for group in trainer.optimizer.param_groups]
            )
            self.with_gradient.append({n for n, p in trainer.model.named_parameters() if p.grad is not None})
            self.before.append(state(trainer))
            self.training.append({name for name, module in trainer.model.named_modules() if module.training})
            original()
            self.with_state.append({names[id(parameter)] for parameter in trainer.optimizer.state})

        def evaluate(plain: Any = trainer.evaluate) -> Any:
            self.evaluated.append(state(trainer))
            return plain()

        trainer.optimizer.step = step  # type: ignore[method-assign, assignment]
        trainer.evaluate = evaluate  # type: ignore[method-assign]


def running(trainer: Trainer) -> set[str]:
    return {name for name, _ in trainer.model.named_buffers() if "running_" in name or "num_batches" in name}


@pytest.mark.parametrize("freeze_batchnorm", [True, False])
def test_frozen_groups_stay_as_they_are_bit_for_bit(
    twelve: Splits, resnet: Path, tmp_path: Path, freeze_batchnorm: bool
) -> None:
    plan = Plan(*(Stage(first, steps=2, shape=Flat()) for first in (-1, "layer4", 0)))
    trainer = make(twelve, resnet, tmp_path, plan=plan, given={"freeze_batchnorm": freeze_batchnorm})
    watch, groups = Watch(trainer), trainer.groups
    first = [stage.open_from for stage in trainer.plan.stages]
    assert first[0] == len(groups) - 1 > first[1] > 1 and first[2] == 0
    trainer.run()
    ends = watch.evaluated[:3]
    for stage, (begin, end) in enumerate(zip([watch.before[0], *ends[:2]], ends, strict=True)):
        opened = {name for group in groups[first[stage] :] for name in group.parameters}
        for step in (2 * stage, 2 * stage + 1):
            assert watch.with_gradient[step] == opened
            assert watch.with_state[step] == opened
        changed = set(differences(begin, end))
        assert changed & dict(trainer.model.named_parameters()).keys() == opened
        buffers = {name for name in changed if name in running(trainer)}
        below = {name for index in range(first[stage]) for name in groups.modules[index]}
        assert not {name.rpartition(".")[0] for name in buffers} & below
        assert not {name for name in watch.training[2 * stage] if name and name in below}
        assert bool(buffers) == (not freeze_batchnorm and stage > 0), stage
    if not freeze_batchnorm:
        assert set(differences(ends[1], ends[2])) >= running(trainer)


def test_rates_and_momentum_are_the_plans(twelve: Splits, resnet: Path, tmp_path: Path) -> None:
    trainer = make(twelve, resnet, tmp_path)
    watch = Watch(trainer)
    trainer.run()
    logged = steps(tmp_path)
    assert trainer.plan.steps == len(logged) == len(watch.groups) == 8
    for number, (line, groups) in enumerate(zip(logged, watch.groups, strict=True)):
        point = trainer.plan.at(number)
        assert (line["step"], line["stage"], line["momentum"]) == (number, point.stage, point.momentum)
        assert line["rates"] == pytest.approx(point.rates, rel=1e-5)
        assert line["grad_norm"] > 0.0 and line["loss"] > 0.0
        for group in groups:
            assert group["lr"] == point.rates[group["layer_group"]]
            assert group["betas"] == (point.momentum, 0.99)
    shape = OneCycle(pct_start=0.4)
    peak = trainer.plan.stages[1].rates[0]
    assert [line["rates"][0] for line in logged] == pytest.approx(
        [0.0] * 2 + [peak * shape.at(step, 6)[0] for step in range(6)], rel=1e-5
    )
    assert all(set(json.loads(line)) == {"step", "stage", "loss", "rates", "momentum", "grad_norm", "seconds"}
               for line in (tmp_path / "steps.jsonl").read_text().splitlines())  # fmt: skip


def test_a_shape_without_momentum_leaves_the_optimizers(twelve: Splits, resnet: Path, tmp_path: Path) -> None:
    trainer = make(twelve, resnet, tmp_path, plan=Plan(Stage(0, steps=2, shape=Flat())), given={"betas": (0.7, 0.9)})
    watch = Watch(trainer)
    trainer.run()
    assert {group["betas"] for groups in watch.groups for group in groups} == {(0.7, 0.9)}
    assert [line["momentum"] for line in steps(tmp_path)] == [None, None]


@pytest.mark.parametrize("kind", ["images", "tags"])
def test_eight_micro_batches_of_one_are_one_batch_of_eight(
    square_splits: Splits, tag_splits: Splits, resnet: Path, plain_bert: Path, tmp_path: Path, kind: str
) -> None:
    sixteen = replace(square_splits, train=square_splits.train.select(range(16)))
    splits, backbone = (sixteen, resnet) if kind == "images" else (tag_splits, plain_bert)
    whole, parts = (
        make(splits, backbone, tmp_path / str(count), given={"accumulation": count, "eps": 1e-3, "ema": False})
        for count in (1, 8)
    )
    forwards: list[int] = []
    parts.model.register_forward_hook(lambda module, *_: forwards.append(1) if torch.is_grad_enabled() else None)
    whole.run()
    parts.run()
    one, other = steps(tmp_path / "1"), steps(tmp_path / "8")
    assert len(one) == len(other) == 8 and len(forwards) >= 8 * 4
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert [line["grad_norm"] for line in other] == pytest.approx([line["grad_norm"] for line in one], rel=1e-3)
    for name, tensor in parts.model.state_dict().items():
        torch.testing.assert_close(tensor, whole.model.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


def test_micro_batches_have_every_row_of_their_step_once(twelve: Splits, resnet: Path, tmp_path: Path) -> None:
    """Also those of a last batch that is shorter."""
    trainer = make(twelve, resnet, tmp_path, given={"accumulation": 4}, plan=Plan(Stage(-1, epochs=1)))
    micro = [[batch.index.tolist() for batch in batches] for batches in trainer.steps_of_epoch(0, 0, 0)]
    assert sorted(sum(sum(micro, []), [])) == list(range(12))
    assert [[len(rows) for rows in batches] for batches in micro] == [[2] * 4, [1] * 4]
    assert trainer.run().status == "finished" and len(steps(tmp_path)) == 2


def test_more_micro_batches_than_rows(twelve: Splits, resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="^batch_size=8: the shortest batch has 4 examples, too few .*accumulation=8; "):
        make(twelve, resnet, tmp_path, given={"accumulation": 8})


def test_an_epoch_has_every_row_once_and_another_order_each_time(
    review_splits: Splits, bert: Path, tmp_path: Path
) -> None:
    trainer = make(review_splits, bert, tmp_path)
    epochs = [
        [batch.index.tolist() for batches in trainer.steps_of_epoch(stage, epoch, 0) for batch in batches]
        for stage, epoch in ((0, 0), (1, 0), (1, 1), (1, 2))
    ]
    for order in epochs:
        assert sorted(sum(order, [])) == list(range(40))
    assert len({str(order) for order in epochs}) == 4
    rest = [batch.index.tolist() for batches in trainer.steps_of_epoch(1, 1, 3) for batch in batches]
    assert rest == epochs[2][3:]


@pytest.mark.parametrize(("rows", "steps_there"), [(1, 1), (3, 1), (8, 1), (11, 1), (12, 2), (16, 2), (19, 2), (20, 3)])
def test_a_small_remainder_is_no_step(
    twelve: Splits, resnet: Path, tmp_path: Path, rows: int, steps_there: int
) -> None:
    assert steps_per_epoch(rows, 8) == steps_there
    train = twelve.train.select([i % 12 for i in range(rows)])
    splits = Splits(train, twelve.valid, None, twelve.task, twelve.report, "")
    trainer = make(splits, resnet, tmp_path, plan=Plan(Stage(-1, epochs=2)))
    assert len(list(trainer.steps_of_epoch(0, 0, 0))) == steps_there
    trainer.run()
    assert len(steps(tmp_path)) == 2 * steps_there and len(trainer.progress.history) == 2


def test_the_same_seed_is_the_same_run_and_another_is_not(review_splits: Splits, bert: Path, tmp_path: Path) -> None:
    """With dropout, which draws random numbers in every step."""
    runs = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)  # what was drawn before does not matter
        trainer = make(review_splits, bert, tmp_path / str(number), seed=seed)
        trainer.run()
        runs.append(state(trainer))
    assert not differences(runs[0], runs[1])
    assert steps(tmp_path / "0") == steps(tmp_path / "1")
    assert len(differences(runs[0], runs[2])) > len(runs[0]) / 2
    losses = [[line["loss"] for line in steps(tmp_path / str(number))] for number in (0, 2)]
    assert all(one != other for one, other in zip(*losses, strict=True))


def test_gradients_are_clipped(review_splits: Splits, bert: Path, tmp_path: Path) -> None:
    norms = []
    for clip in (1e-3, 0.0):
        trainer = make(review_splits, bert, tmp_path / str(clip), given={"clip": clip}, plan=Plan(Stage(0, steps=1)))
        original = trainer.optimizer.step

        def step(original: Any = original, trainer: Trainer = trainer) -> None:
            gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))
            original()

        trainer.optimizer.step = step  # type: ignore[method-assign, assignment]
        trainer.run()
    logged = [steps(tmp_path / str(clip))[0]["grad_norm"] for clip in (1e-3, 0.0)]
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1] == pytest.approx(logged[0], rel=1e-4) == logged[1] and norms[1] > 0.01


def test_what_is_said_and_kept_of_each_epoch(review_splits: Splits, bert: Path, tmp_path: Path) -> None:
    said: list[str] = []
    trainer = make(review_splits, bert, tmp_path, said=said, plan=Plan(Stage(-1, epochs=1), Stage(0, epochs=1.6)))
    outcome = trainer.run()
    assert [(e["epoch"], e["step"], e["stage"]) for e in outcome.history] == [
        (1, 5, "head"),
        (2, 10, "all"),
        (3, 13, "all"),
    ]
    logged = [line["loss"] for line in steps(tmp_path)]
    means = [sum(part) / len(part) for part in (logged[:5], logged[5:10], logged[10:])]
    assert [entry["train_loss"] for entry in outcome.history] == pytest.approx(means, rel=1e-5)
    assert set(outcome.history[0]["valid"]) == {"accuracy", "f1_macro", "log_loss", "loss"}
    assert [line.split()[:2] for line in said] == [["head", "1/1"], ["all", "1/2"], ["all", "2/2"]]
    assert len(outcome.progress.stage_seconds) == 2 and min(outcome.progress.stage_seconds) > 0.0


# Losses that leave all reason


class Sick:
    """The task's own loss, but for what `change` makes of it in training from step `start` on."""

    def __init__(self, task: Task, start: int, change: Any) -> None:
        self.plain, self.start, self.change, self.calls = default_loss(task), start, change, 0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self.plain(outputs, targets)
        if not outputs.requires_grad:
            return loss
        self.calls += 1
        return self.change(loss, self.calls - 1 - self.start) if self.calls > self.start else loss


def finite(trainer: Trainer) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in trainer.model.state_dict().values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_never_a_number_ends_the_run_with_the_best_weights(
    review_splits: Splits, bert: Path, tmp_path: Path, value: float
) -> None:
    good = make(review_splits, bert, tmp_path / "good", plan=Plan(STAGES[0]), given={"ema": False, "lr": 3e-4})
    good.run()
    sick, said = Sick(review_splits.task, 5, lambda loss, _: loss * value), []
    trainer = make(review_splits, bert, tmp_path / "sick", loss=sick, said=said, given={"lr": 3e-4})
    outcome = trainer.run()
    assert outcome.status == "diverged" and outcome.kept == "epoch 1"
    assert outcome.why == (
        f"step 9: the loss is {value}, and so in 5 steps in a row, 3 times at ever lower rates; try lr=1e-06, or look "
        "at the targets"
    )
    assert [(rewind["stage"], rewind["step"]) for rewind in outcome.progress.rewinds] == [(1, 9)] * 3
    assert len([line for line in said if line.startswith("Back      step ")]) == 3
    assert not differences(state(trainer), state(good)) and finite(trainer)
    assert [line["loss"] is None for line in steps(tmp_path / "sick")] == [False] * 5 + [True] * 5
    assert outcome.valid.metrics["loss"] == pytest.approx(outcome.history[0]["valid"]["loss"])


def test_before_the_first_validation_the_weights_of_the_start_are_kept(
    review_splits: Splits, bert: Path, tmp_path: Path
) -> None:
    trainer = make(review_splits, bert, tmp_path, loss=Sick(review_splits.task, 0, lambda loss, _: loss * float("nan")))
    outcome = trainer.run()
    assert outcome.status == "diverged" and "the loss is nan" in outcome.why and outcome.kept == "start"
    assert finite(trainer)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_without_a_usable_gradient_is_left_out(
    review_splits: Splits, bert: Path, tmp_path: Path, bad: str
) -> None:
    """Weights and moments stay as they are over it, and the run goes on."""
    states: list[Any] = []

    def change(loss: torch.Tensor, step: int) -> torch.Tensor:
        if step <= 1:
            moments = {i: one["exp_avg"].clone() for i, one in trainer.optimizer.state_dict()["state"].items()}
            states.append((state(trainer), moments))
        if step > 0:
            return loss
        if bad == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    trainer = make(review_splits, bert, tmp_path, loss=Sick(review_splits.task, 7, change))
    outcome = trainer.run()
    (before, moments), (after, moments_after) = states
    assert not differences(before, after) and len(moments) > 0
    assert all(torch.equal(moments[i], moments_after[i]) for i in moments)
    assert (outcome.status, outcome.progress.skipped, outcome.progress.rewinds) == ("finished", 1, [])
    logged = steps(tmp_path)
    assert len(logged) == 20 and [line["step"] for line in logged if line["grad_norm"] is None] == [7]
    assert finite(trainer) and math.isfinite(outcome.history[1]["train_loss"])


def rising(review_splits: Splits, times: int, folder: Path, bert: Path, **options: Any) -> tuple[Trainer, list[float]]:
    """A run whose loss runs away from step 6 on, for the first so many times; and the losses up to the first end."""
    losses: list[float] = []

    def change(loss: torch.Tensor, _: int) -> torch.Tensor:
        rewinds = trainer.progress.rewinds
        if len(rewinds) < times and trainer.progress.step >= 6:
            loss = loss * 1.5 ** (trainer.progress.step - 6)
        if not rewinds:
            losses.append(float(loss.detach()))
        return loss

    trainer = make(review_splits, bert, folder, loss=Sick(review_splits.task, 0, change), given={"lr": 3e-4}, **options)
    return trainer, losses


def test_a_loss_that_rises_far_goes_back_with_a_lower_rate(review_splits: Splits, bert: Path, tmp_path: Path) -> None:
    trainer, losses = rising(review_splits, 1, tmp_path, bert)
    outcome = trainer.run()
    smooth = losses[0]
    for loss in losses[1:-1]:
        smooth = 0.9 * smooth + 0.1 * loss
    assert smooth <= 4 * losses[0] < 0.9 * smooth + 0.1 * losses[-1]
    last, end = len(losses) - 1, 0.9 * smooth + 0.1 * losses[-1]
    why = f"step {last}: the loss rose from {losses[0]:.3g} to {end:.3g}"
    assert outcome.progress.rewinds == [{"stage": 1, "step": last, "factor": 0.25, "why": why}]
    assert (outcome.status, outcome.why) == ("finished", "")
    logged, planned = steps(tmp_path), trainer.planned
    assert [line["step"] for line in logged] == list(range(20)), "the log has each step once"
    for line in logged:
        factor = 0.25 if line["stage"] == 1 else 1.0
        assert line["rates"] == pytest.approx([factor * rate for rate in planned.at(line["step"]).rates], rel=1e-4)


def test_a_run_that_went_back_and_was_killed(review_splits: Splits, bert: Path, tmp_path: Path) -> None:
    whole, _ = rising(review_splits, 2, tmp_path / "whole", bert)
    expected = whole.run()
    for stop in (8, 14):  # before it has gone back, and between
        trainer, _ = rising(review_splits, 2, tmp_path / f"cut{stop}", bert, save_steps=3)
        run_killed(trainer, after=stop)
        resumed, _ = rising(review_splits, 2, tmp_path / f"cut{stop}", bert)
        found = resumed.run()
        assert found.progress.rewinds == expected.progress.rewinds and len(expected.progress.rewinds) == 2
        assert steps(tmp_path / f"cut{stop}") == steps(tmp_path / "whole")
        assert not differences(state(resumed), state(whole))


def test_a_single_bad_batch_does_not_end_the_run(review_splits: Splits, bert: Path, tmp_path: Path) -> None:
    sick = Sick(review_splits.task, 6, lambda loss, step: loss * (20.0 if step == 0 else 1.0))
    assert make(review_splits, bert, tmp_path, loss=sick).run().status == "finished"


def test_images_that_vanish_under_way(squares: Path, resnet: Path, tmp_path: Path) -> None:
    """A few are left out and named; more than a few end the run, which goes on once they are back."""
    shutil.copytree(squares, tmp_path / "data")
    whole = load_images(tmp_path / "data" / "train", valid=tmp_path / "data" / "test")
    paths, moved = [Path(cell["path"]) for cell in whole.train["image"]], []

    def run(folder: Path, lost: list[Path], said: list[str]) -> Outcome:
        trainer = make(whole, resnet, folder, said=said, save_steps=1)
        assert trainer.cache is not None
        trainer.cache.close()
        trainer.cache, original = None, trainer.step

        def step(*args: Any) -> None:
            if trainer.progress.step == 1:
                moved.extend(path.rename(path.with_suffix(".gone")) for path in lost)
            original(*args)

        trainer.step = step  # type: ignore[method-assign]
        return trainer.run()

    said: list[str] = []
    outcome = run(tmp_path / "one", paths[:1], said)
    name = whole.train["id"][0]
    assert outcome.progress.unreadable == {name: "file not found"}
    assert said.count(f"Warning   left out, unreadable since the run began: {name}: file not found") >= 3
    with pytest.raises(DataError, match=r"^2 of \d+ training rows have become unreadable since the run began \("):
        run(tmp_path / "two", paths[1:2], said)
    for path in moved:
        path.rename(path.with_suffix(paths[0].suffix))
    assert run(tmp_path / "two", [], said).status == "finished"


def test_a_stage_that_no_longer_improves_comes_to_its_end_in_one_epoch(
    twelve: Splits, resnet: Path, tmp_path: Path
) -> None:
    """The rate still comes down, and a run that is resumed keeps the shorter plan."""
    plan, said = Plan(Stage(0, epochs=12, shape=OneCycle())), []
    trainer = make(twelve, resnet, tmp_path, plan=plan, given={"patience": 2, "lr": 1e-9}, said=said)
    original = trainer.evaluate

    def no_better(*args: Any) -> Any:
        return replace(original(*args), scores=np.ones(12), loss=1.0)

    trainer.evaluate = no_better  # type: ignore[method-assign]
    trainer.run()
    per_epoch = trainer.plan.steps_per_epoch
    assert [entry["step"] for entry in trainer.progress.history] == [per_epoch * epoch for epoch in range(1, 8)]
    logged, whole = steps(tmp_path), plan.resolve(trainer.groups, (1e-9,) * len(trainer.groups), per_epoch)
    assert logged[-1]["rates"][-1] < 1e-3 * max(line["rates"][-1] for line in logged)
    assert logged[-1]["momentum"] == whole.at(whole.steps - 1).momentum
    assert trainer.progress.shortened == [(0, 6 * per_epoch, per_epoch)]
    assert any("no better for" in line for line in said)

    class Killed(Exception):
        """In the epoch that was added."""

    left, loss = [6 * per_epoch + 1], default_loss(twelve.task)

    def dying(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        left[0] -= outputs.requires_grad
        if left[0] < 0:
            raise Killed
        return loss(outputs, targets)

    options: dict[str, Any] = {"plan": plan, "given": {"patience": 2, "lr": 1e-9}, "save_steps": 1}
    killed = make(twelve, resnet, tmp_path / "killed", loss=dying, **options)
    killed.evaluate = no_better  # type: ignore[method-assign]
    with pytest.raises(Killed):
        killed.run()
    again = make(twelve, resnet, tmp_path / "killed", **options)
    again.evaluate = no_better  # type: ignore[method-assign]
    again.run()
    assert steps(tmp_path / "killed") == logged and len(again.progress.shortened) == 1
    plain = make(twelve, resnet, tmp_path / "plain", plan=plan, given={"patience": 0, "lr": 1e-9})
    plain.evaluate = no_better  # type: ignore[method-assign]
    plain.run()
    assert len(plain.progress.history) == 12
