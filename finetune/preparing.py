"""Data, a backbone and choices go in; what is decided before the first step comes out. Nothing is trained."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.data.loaders import epoch_order, make_loader
from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.errors import PlanError
from finetune.model.backbones import load_backbone
from finetune.model.convex import LinearHead, linear_head
from finetune.model.groups import LayerGroups, layer_groups
from finetune.model.heads import Head
from finetune.model.lora import Adapter, adapters
from finetune.model.outputs import scaled_loss, target_scale
from finetune.model.pretrained import Pretrained
from finetune.plan.probes import epochs_in, seconds_per_step
from finetune.plan.rates import geometric_rates
from finetune.plan.settings import (
    OPTIONS,
    PATIENT_ROWS,
    Settings,
    choose_settings,
    for_network,
    from_solved_head,
    open_ended,
)
from finetune.plan.stages import Plan, ResolvedPlan
from finetune.train.evaluate import Loss
from finetune.train.processes import Processes, native_precision
from finetune.train.trainer import steps_per_epoch


@dataclass(frozen=True)
class Prepared:
    """What is decided before training.

    Attributes:
        pretrained: The backbone with its head, on its device.
        groups: Its layer groups, adapters in them.
        adapter: These adapters, if there are any.
        loss: Function of (outputs, targets).
        scale: Mean and deviation of regression targets, out of which the model is trained.
        settings: Every dial.
        linear: Name of the linear layer that is the whole new head, if it is one.
        solvable: The same where training starts from its optimum.
        plan: Stages with their steps and peak rates.
        processes: Those of this run, with their precision.
        setup_seconds: To load and divide the backbone.
        probe_seconds: To measure.
    """

    pretrained: Pretrained
    groups: LayerGroups
    adapter: Adapter | None
    loss: Loss
    scale: tuple[Any, Any] | None
    settings: Settings
    linear: str | None
    solvable: str | None
    plan: ResolvedPlan
    processes: Processes
    setup_seconds: float
    probe_seconds: float


def prepare(
    splits: Splits,
    backbone: str | Path | nn.Module | Pretrained,
    processes: Processes,
    stack: ExitStack,
    *,
    given: Mapping[str, Any],
    head: Head | None = None,
    loss: Loss | None = None,
    plan: Plan | None = None,
    groups: LayerGroups | None = None,
    minutes: float | None = None,
    image_size: int | None = None,
    seed: int = 0,
    before: dict[str, Any] | None = None,
    started: float | None = None,
    say: Callable[[str], None] = print,
) -> Prepared:
    """Load and divide the backbone, choose the settings, and lay out the stages; options as those of `fit`.

    Args:
        splits: The data.
        backbone: What `load_backbone` takes, or what it gave.
        processes: Those of this run.
        stack: Takes adapters out again when it closes.
        given: Dials that the user gives.
        before: Dials of the run that this one goes on with, as its `run.json` has them.
        started: When the run began, by `time.monotonic`: `minutes` count from there.
        say: Told what was found and chosen.
    """
    began = time.monotonic()
    if not isinstance(backbone, Pretrained):
        backbone = load_backbone(backbone, splits.task, head=head, image_size=image_size, seed=seed)
    pretrained = backbone
    if not processes.sharded:  # the parts of one that is go to the device instead
        pretrained.model.to(processes.device)
    groups = groups if groups is not None else layer_groups(pretrained)
    weights = sum(group.size for group in groups)
    say(f"Backbone  {pretrained.name}, {weights / 1e6:.3g} M parameters, {len(groups)} layer groups")

    loss_function = loss if loss is not None else default_loss(splits.task)
    scale = target_scale(splits.train["target"][:]) if loss is None and splits.task.kind == "regression" else None
    if scale is not None:
        loss_function = scaled_loss(scale[1])
    chosen = choose_settings(
        splits.task.modality, len(splits.train), precision=native_precision(pretrained.model), given=given
    )
    processes = replace(processes, precision=chosen.precision)
    sample = _sample(pretrained, splits)
    found = linear_head(pretrained, groups, sample)
    linear = found.name
    if chosen.balance and (
        linear is None
        or loss is not None
        or splits.task.kind != "single_label_classification"
        or pretrained.model.get_submodule(linear).bias is None
    ):
        raise PlanError(
            "balance=True: is folded into the bias of a new linear head for one class out of several, with the task's "
            f"own loss; {found.why_not or 'this run has no such head'}; leave it out"
        )
    layer, reason = _solvable(found, chosen, loss, plan, len(splits.train))
    if layer is None:
        chosen = chosen.changed(reason, by="rule", solve_head=False)
    else:
        chosen = from_solved_head(chosen, splits.task.modality, len(splits.train), planned=plan is not None)
    chosen = for_network(
        chosen, splits.task.modality, len(splits.train), width=_head_width(pretrained, groups), groups=len(groups)
    )
    if plan is None and minutes is None:
        chosen = open_ended(chosen, len(splits.train))
    elif chosen.doublings and (minutes is not None or any(stage.anew for stage in plan or ())):
        why = "minutes sets the length" if minutes is not None else "the plan has stages that begin anew"
        raise PlanError(f"doublings={chosen.doublings}: {why}; leave it out")
    groups, adapter = stack.enter_context(adapters(pretrained, groups, chosen.lora, sample, seed=seed))
    if adapter is not None:
        say(f"Adapters  {adapter}")
    setup_seconds = time.monotonic() - began
    if minutes is not None and before is not None:  # a run that goes on keeps the length that it began with
        dials = {
            dial: before[dial]["value"]
            for dial in ("epochs", "head_epochs", "cycles")
            if before[dial]["by"] == "measured"
        }
        chosen = chosen.changed("measured when the run began", **dials)
    elif minutes is not None:
        left = 60.0 * minutes - (time.monotonic() - (began if started is None else started))
        chosen = _fit_into(left, chosen, pretrained, splits, groups, loss_function, processes)
    per_epoch = steps_per_epoch(len(splits.train), chosen.batch_size)
    rates = geometric_rates(len(groups), chosen.lr, chosen.span)
    resolved = (plan if plan is not None else chosen.default_plan(len(groups))).resolve(groups, rates, per_epoch)
    probe_seconds = time.monotonic() - began - setup_seconds
    for line in (*chosen_lines(chosen, rates, processes), *_labelled("Plan", str(resolved).splitlines())):
        say(line)
    return Prepared(
        pretrained, groups, adapter, loss_function, scale, chosen, linear, layer, resolved, processes, setup_seconds,
        probe_seconds,
    )  # fmt: skip


def chosen_lines(settings: Settings, rates: Sequence[float], processes: Processes) -> list[str]:
    """The dials that matter most, each with its reason, and the option that sets it otherwise."""
    most = settings.epochs * 2**settings.doublings
    said = {
        "lr": f"peak rate {settings.lr:.2g} head -> {rates[0]:.2g} stem",
        "epochs": f"{settings.epochs:g} epochs" + (f", up to {most:g} while they help" if settings.doublings else ""),
        "batch_size": f"batch of {settings.batch_size}",
        "precision": f"{settings.precision} on {processes.device.type}",
    }
    lines = []
    for dial, words in said.items():
        reason, by = settings.reasons[dial]
        reason = "as asked for" if by == "user" else reason if len(reason) <= 84 else f"{reason[:83].rstrip()}…"
        lines.append(f"{words:<40} {reason}" + (f"  ({OPTIONS[dial]})" if dial in OPTIONS else ""))
    return _labelled("Chosen", lines)


def stage_seconds(prepared: Prepared, splits: Splits) -> list[float]:
    """Time that each stage will take, from a few steps of each, validations aside. Nothing is changed by it."""
    batch = _batch(prepared.pretrained, splits, prepared.settings)
    found = []
    for stage in prepared.plan.stages:
        seconds = seconds_per_step(
            prepared.pretrained, prepared.groups, batch, prepared.loss, open_from=stage.open_from,
            autocast=prepared.processes.autocast,
        )  # fmt: skip
        found.append(seconds * stage.steps / prepared.processes.count)
    return found


def data_lines(splits: Splits) -> list[str]:
    """What the data is, and what is wrong with it."""
    return _labelled("Data", splits.report.lines())


def _labelled(label: str, lines: list[str]) -> list[str]:
    return [f"{label if number == 0 else '':<9} {line}" for number, line in enumerate(lines)]


# Decoders begin with a solved head from `PATIENT_ROWS` rows on. A Llama of 260 k parameters, test accuracy solved and
# trained by gradients: 200 rows, seven runs on trec6, cr and sst2, 55.0 and 56.0, for 2.4 times the time; 1,000 rows,
# trec6 (three seeds) 67.1 and 63.4, cr 68.5 and 65.5, sst2 57.5 and 53.3, in the same time.


def _solvable(
    found: LinearHead, settings: Settings, loss: Loss | None, plan: Plan | None, rows: int
) -> tuple[str | None, str]:
    """The linear layer whose optimum training starts from, or None and why it does not."""
    asked = settings.reasons["solve_head"][1] == "user"
    if not settings.solve_head:
        return None, settings.reasons["solve_head"][0]
    if loss is not None:
        return None, "a loss of one's own is trained by gradients"
    if not asked and (plan is not None or settings.reasons["head_epochs"][1] == "user"):
        return None, "the user gives the head a stage of its own"
    if not asked and found.of_tokens and rows < PATIENT_ROWS:
        return None, f"{rows} rows: of so few, the optimum on one token's features is no better a start"
    return found.name, found.why_not


def _head_width(pretrained: Pretrained, groups: LayerGroups) -> int:
    """Features that enter the head: the columns of its first matrix."""
    named = dict(pretrained.model.named_parameters())
    matrices = [named[name] for name in groups.head.parameters if named[name].ndim > 1]
    return int(matrices[0].shape[1]) if matrices else 1


def _sample(pretrained: Pretrained, splits: Splits) -> dict[str, torch.Tensor]:
    """Inputs of two training rows, on the model's device."""
    loader = make_loader(splits.train, splits.task, pretrained.processor, [[0, len(splits.train) - 1]], train=False)
    return next(iter(loader)).to(next(pretrained.model.parameters()).device).inputs


def _batch(pretrained: Pretrained, splits: Splits, settings: Settings) -> Any:
    """The rows of one step, to be timed."""
    rows = epoch_order(len(splits.train), settings.batch_size, seed=0, epoch=0)[0]
    return next(iter(make_loader(splits.train, splits.task, pretrained.processor, [rows], train=True, workers=0)))


def _fit_into(
    seconds: float,
    settings: Settings,
    pretrained: Pretrained,
    splits: Splits,
    groups: LayerGroups,
    loss: Loss,
    processes: Processes,
) -> Settings:
    """Settings whose epochs fill the time, a quarter of them for the head unless the user gave its length."""
    batch = _batch(pretrained, splits, settings)
    full, head = (
        seconds_per_step(pretrained, groups, batch, loss, open_from=first, autocast=processes.autocast)
        for first in (0, len(groups) - 1)
    )
    per_epoch = steps_per_epoch(len(splits.train), settings.batch_size)
    validation = head * len(splits.valid) / settings.batch_size / processes.count
    solving = head * len(splits.train) / settings.batch_size / processes.count if settings.solve_head else 0.0
    epochs = epochs_in(
        0.9 * (seconds - solving - validation),
        steps_per_epoch=per_epoch,
        step_seconds=full / processes.count,
        head_step_seconds=head / processes.count,
        evaluate_seconds=validation,
        head_share=0.0 if settings.solve_head else 0.25,
    )
    epochs = float(torch.tensor(processes.gather([epochs])).min())
    reason = f"{full:.3g} s a step, {seconds / 60:.2g} minutes left for training"
    dials: dict[str, Any] = {"epochs": round(epochs, 3)}
    if settings.reasons["head_epochs"][1] != "user" and not settings.solve_head:
        dials["head_epochs"] = round(epochs / 4.0, 3)
    if settings.reasons["cycles"][1] != "user" and epochs < settings.epochs:
        dials["cycles"] = 1  # one long training, not several short ones
    return settings.changed(reason, **dials)
