"""A model, its layer groups and a few batches go in; what the gradients say about each group comes out.

Shapes: B batches. Nothing is trained; weights, buffers, gradients and random numbers are as before afterwards.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import PlanError
from finetune.model.groups import LayerGroups
from finetune.model.tracing import unchanged

NUDGE = 1e-3  # of the size of the group's weights: far enough for fp32, near enough for a slope


@dataclass(frozen=True)
class GroupGradient:
    """What the gradients of one layer group say.

    Attributes:
        name: Of the group.
        norm: Of the mean gradient.
        noise: Variance of a batch's gradient over the squared norm of the true one: about so many batches together
            would halve its error (the simple noise scale of McCandlish et al. 2018, in batches). Infinite where the
            batches do not agree at all.
        relative: Norm of the mean gradient over the norm of the weights.
        slope: Fall of the loss for each unit that the weights move along the sign of the gradient, which is Adam's
            first step.
        curvature: Change of that slope for each unit, from the gradients of another point.
        step: slope / curvature: the rate at which a quadratic would be at its lowest. Infinite where it bends down.
            It looks one step ahead, and such rates are too small for a whole training (Wu et al. 2018).
    """

    name: str
    norm: float
    noise: float
    relative: float
    slope: float
    curvature: float
    step: float


class GradientReport(tuple[GroupGradient, ...]):
    """One `GroupGradient` a group, stem first; prints as a table."""

    def __str__(self) -> str:
        width = max(len(group.name) for group in self)
        lines = [
            f"{'group':<{width}}  {'norm':>9} {'noise':>9} {'relative':>9} {'slope':>9} {'curvature':>9} {'step':>9}"
        ]
        for group in self:
            numbers = (group.norm, group.noise, group.relative, group.slope, group.curvature, group.step)
            lines.append(f"{group.name:<{width}}  " + " ".join(f"{number:>9.2g}" for number in numbers))
        return "\n".join(lines)


def gradient_report(
    model: nn.Module, groups: LayerGroups, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> GradientReport:
    """Measure each group's gradient: size, noise, slope and curvature along its own direction.

    Costs B passes forward and backward, and one more for each group.

    Args:
        model: The network that `groups` divides; in the mode it is in, all parameters that are trainable now.
        groups: Its layer groups.
        batches: At least two.
        loss: Function of (model, batch) giving a scalar.

    Raises:
        PlanError: Fewer than two batches, or nothing to train.
    """
    rows = list(batches)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(rows) < 2 or not named:
        raise PlanError("gradient report: give at least two batches and a model with trainable parameters")
    kept = {name: parameter.grad for name, parameter in named.items()}
    with unchanged(model):
        try:
            sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in named.items()}
            squares = dict.fromkeys(named, 0.0)
            for batch in rows:
                for name, gradient in _gradients(model, named, batch, loss).items():
                    sums[name] += gradient
                    squares[name] += float(gradient.square().sum())
            means = {name: total / len(rows) for name, total in sums.items()}
            return GradientReport(
                _of_group(
                    model, group.name, [n for n in group.parameters if n in named], named, means, squares, rows, loss
                )
                for group in groups
            )
        finally:
            for name, parameter in named.items():
                parameter.grad = kept[name]


def _gradients(
    model: nn.Module, named: dict[str, nn.Parameter], batch: Any, loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss(model, batch), list(named.values()), allow_unused=True)
    return {name: gradient.float() for name, gradient in zip(named, found, strict=True) if gradient is not None}


def _of_group(
    model: nn.Module,
    group: str,
    names: list[str],
    named: dict[str, nn.Parameter],
    means: dict[str, Tensor],
    squares: dict[str, float],
    batches: list[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> GroupGradient:
    count = len(batches)
    squared = sum(float(means[name].square().sum()) for name in names)
    # Unbiased: the mean of B gradients is longer than the true one by a B-th of their variance.
    variance = max(0.0, (sum(squares[name] for name in names) / count - squared) * count / (count - 1))
    true = squared - variance / count
    size = math.sqrt(sum(float(named[name].detach().float().square().sum()) for name in names))
    norm = math.sqrt(squared)
    slope = sum(float(means[name].abs().sum()) for name in names)
    weights = sum(means[name].numel() for name in names)
    if not norm or not weights:
        return GroupGradient(group, norm, math.inf, 0.0, slope, 0.0, math.inf)
    nudge = NUDGE * (size or 1.0) / math.sqrt(weights)
    before = {name: named[name].detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            named[name].sub_(nudge * means[name].sign().to(named[name].dtype))
    try:
        there: dict[str, Tensor] = {}
        for batch in batches[:2]:
            for name, gradient in _gradients(model, {name: named[name] for name in names}, batch, loss).items():
                there[name] = there.get(name, torch.zeros_like(gradient)) + gradient / 2
        here: dict[str, Tensor] = {}
    finally:
        with torch.no_grad():
            for name in names:
                named[name].copy_(before[name])
    for batch in batches[:2]:
        for name, gradient in _gradients(model, {name: named[name] for name in names}, batch, loss).items():
            here[name] = here.get(name, torch.zeros_like(gradient)) + gradient / 2
    fall = sum(float(((here[name] - there[name]) * means[name].sign()).sum()) for name in here)
    curvature = fall / nudge
    return GroupGradient(
        group,
        norm,
        variance / true if true > 0 else math.inf,
        norm / size if size else math.inf,
        slope,
        curvature,
        slope / curvature if curvature > 0 else math.inf,
    )
