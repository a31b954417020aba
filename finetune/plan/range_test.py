"""A model, batches and a loss go in; the loss over a rate that climbs comes out, and what it says about a peak rate.

Smith's range test (2017, section 3.3): the rate grows by the same factor each step, until the loss runs away. Any
module and any loader will do; weights, buffers, gradients and random numbers are as before afterwards.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune.errors import PlanError
from finetune.model.tracing import unchanged

SMOOTH = 0.9  # weight of the losses so far, with the start's bias taken out
RUNAWAY = 1.5  # times the lowest smoothed loss
SAFE = 10.0  # the peak is an order of magnitude below the rate at which the loss runs away (Smith 2018, section 4)


@dataclass(frozen=True)
class RangeTest:
    """Losses of a range test.

    Attributes:
        rates: Of each step.
        losses: Of each step, as they were.
        smooth: Their exponential average.
        runs_away: Rate at which the average has left its lowest value for good; None where it never did.
        steepest: Rate at which the average falls fastest, over the logarithm of the rate.
        suggested: `runs_away` / 10, or the steepest point where nothing ran away.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smooth: tuple[float, ...]
    runs_away: float | None
    steepest: float
    suggested: float

    def __str__(self) -> str:
        end = f"the loss runs away at {self.runs_away:.2g}" if self.runs_away else "the loss never runs away"
        return (
            f"{len(self.rates)} steps from {self.rates[0]:.2g} to {self.rates[-1]:.2g}: {end}, falls fastest at "
            f"{self.steepest:.2g}; a peak rate of {self.suggested:.2g}"
        )


def range_test(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor],
    *,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    groups: Sequence[dict[str, Any]] | None = None,
    optimizer: Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer] | None = None,
) -> RangeTest:
    """Train for a hundred steps at a climbing rate, look at the loss, and undo it all.

    Args:
        model: Any module; its trainable parameters are tested, in the mode it is in.
        batches: Whatever `loss` takes; begun again when they end.
        loss: Function of (model, batch) giving a scalar.
        lowest: First rate.
        highest: Last rate, where the loss does not run away before.
        steps: Of the whole way.
        groups: Optimizer groups whose "lr" say how the rates of the groups relate (from `param_groups`); the largest
            gets the rate, the others their share of it.
        optimizer: Function of the groups; by default AdamW with betas (0.9, 0.99) and no decay.

    Raises:
        PlanError: Nothing to train, no batch, or rates that do not climb.
    """
    if not 0.0 < lowest < highest or steps < 2:
        raise PlanError(f"range test: {steps} steps from {lowest:g} to {highest:g} do not climb; give lowest < highest")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise PlanError("range test: no parameter of the model is trainable; open some of them")
    parts: list[dict[str, Any]] = [{"params": trained, "lr": 1.0}]
    if groups is not None:
        parts = [dict(group) for group in groups]
    top = max(part["lr"] for part in parts)
    shares = [part["lr"] / top for part in parts]
    make = optimizer or (lambda found: torch.optim.AdamW(found, betas=(0.9, 0.99), weight_decay=0.0))
    weights = [(parameter, parameter.detach().clone(), parameter.grad) for parameter in model.parameters()]
    rates, losses, smooth = [], [], []
    average, low = 0.0, math.inf
    source = iter(_again(batches))
    with unchanged(model):
        try:
            climbing = make(parts)
            for step in range(steps):
                rate = lowest * (highest / lowest) ** (step / (steps - 1))
                for group, share in zip(climbing.param_groups, shares, strict=True):
                    group["lr"] = rate * share
                climbing.zero_grad(set_to_none=True)
                value = loss(model, next(source))
                value.backward()
                climbing.step()
                average = SMOOTH * average + (1 - SMOOTH) * float(value.detach())
                rates.append(rate)
                losses.append(float(value.detach()))
                smooth.append(average / (1 - SMOOTH ** (step + 1)))
                low = min(low, smooth[-1])
                if not math.isfinite(losses[-1]) or smooth[-1] > 2 * RUNAWAY * low + 1e-3:
                    break
        finally:
            with torch.no_grad():
                for parameter, before, gradient in weights:
                    parameter.copy_(before)
                    parameter.grad = gradient
    return _read(rates, losses, smooth)


def _again(batches: Iterable[Any]) -> Iterable[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise PlanError("range test: there is no batch; give a loader that can be gone through again")


def _read(rates: list[float], losses: list[float], smooth: list[float]) -> RangeTest:
    finite = [value if math.isfinite(value) else math.inf for value in smooth]
    low = min(finite)
    bound = RUNAWAY * low + 1e-3
    # For good: what comes down again was noise.
    start = len(finite)
    while start > 0 and finite[start - 1] > bound:
        start -= 1
    runs_away = rates[start] if start < len(finite) else None
    until = min(start, len(finite) - 1)
    wide = max(1, len(finite) // 10)  # over one step, most of what falls is noise
    slopes = [finite[i] - finite[i - wide] for i in range(wide, until + 1)]
    steepest = rates[slopes.index(min(slopes)) + wide] if slopes and min(slopes) < 0 else rates[0]
    suggested = runs_away / SAFE if runs_away is not None else steepest
    return RangeTest(tuple(rates), tuple(losses), tuple(smooth), runs_away, steepest, suggested)
