"""A step of a stage goes in; the share of the peak rate and the momentum at that step come out.

Schedules are pure functions of the step: any step can be asked for, and resuming needs no history. `OneCycle` is
Smith's 1cycle policy (Smith & Topin 2017; Smith 2018, section 4) with the turning points of
`torch.optim.lr_scheduler.OneCycleLR`.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from finetune.errors import PlanError

Anneal = Literal["cos", "linear"]


class Shape(Protocol):
    """What a stage asks of its schedule."""

    def at(self, step: int, steps: int) -> tuple[float, float | None]:
        """Share of the peak rate, and momentum (None: leave it as it is), at `step` of `steps` (0 <= step < steps)."""


def anneal(start: float, end: float, position: float, form: Anneal = "cos") -> float:
    """Value between `start` and `end` at `position` in [0, 1], along half a cosine or a straight line."""
    if form == "linear":
        return start + (end - start) * position
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * position))


@dataclass(frozen=True)
class OneCycle:
    """Rate low -> peak -> almost nothing; momentum (Adam's beta1) the other way.

    The names, the defaults and the turning points are those of `torch.optim.lr_scheduler.OneCycleLR`: the peak lies
    at step `pct_start * steps - 1`, the last step is `steps - 1`. As a share of the peak, the rate starts at `1 /
    div_factor` and ends at `1 / (div_factor * final_div_factor)`. With `three_phase`, the way down mirrors the way up
    and a third part anneals to the end (Smith's own form).

    Attributes:
        pct_start: Share of the steps spent climbing, above 0 and below 1 (at most 0.5 with `three_phase`).
        div_factor: Peak rate over first rate, at least 1.
        final_div_factor: First rate over last rate, at least 1.
        momentum: (lowest, at the peak; highest, at both ends), or None to leave the optimizer's own alone.
        form: "cos" or "linear".
        three_phase: Symmetric cycle followed by a separate annealing.

    Raises:
        PlanError: A value is outside its range, named.
    """

    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    momentum: tuple[float, float] | None = (0.85, 0.95)
    form: Anneal = "cos"
    three_phase: bool = False

    def __post_init__(self) -> None:
        highest = 0.5 if self.three_phase else 1.0
        if not 0.0 < self.pct_start < highest:
            raise PlanError(
                f"pct_start={self.pct_start}: must lie above 0 and below {highest:g}; the rate has to rise and to fall"
            )
        for name in ("div_factor", "final_div_factor"):
            if getattr(self, name) < 1.0:
                raise PlanError(f"{name}={getattr(self, name)}: must be at least 1; it divides the rate")
        if self.momentum is not None and not 0.0 <= self.momentum[0] <= self.momentum[1] < 1.0:
            raise PlanError(f"momentum={self.momentum}: give (lowest, highest), both at least 0 and below 1")
        if self.form not in ("cos", "linear"):
            raise PlanError(f"form={self.form!r}: must be 'cos' or 'linear'")

    def at(self, step: int, steps: int) -> tuple[float, float | None]:
        """Share of the peak rate in (0, 1] and momentum at `step` (from 0) of `steps`.

        Raises:
            PlanError: `step` lies outside the stage.
        """
        _check_step(step, steps)
        first = 1.0 / self.div_factor
        last = first / self.final_div_factor
        low, high = self.momentum if self.momentum is not None else (0.0, 0.0)
        rise_end = self.pct_start * steps - 1.0
        if self.three_phase:
            phases = [
                (rise_end, first, 1.0, high, low),
                (2.0 * rise_end, 1.0, first, low, high),
                (steps - 1.0, first, last, high, high),
            ]
        else:
            phases = [(rise_end, first, 1.0, high, low), (steps - 1.0, 1.0, last, low, high)]
        begin = 0.0
        share, momentum = first, high
        for index, (end, share_0, share_1, momentum_0, momentum_1) in enumerate(phases):
            if step <= end or index == len(phases) - 1:
                # A rise shorter than one step has its end before its begin: the stage then starts on the way down.
                position = (step - begin) / (end - begin) if end > begin else 1.0
                share, momentum = (
                    anneal(share_0, share_1, position, self.form),
                    anneal(momentum_0, momentum_1, position, self.form),
                )
                break
            begin = end
        return share, momentum if self.momentum is not None else None


@dataclass(frozen=True)
class Flat:
    """The peak rate from the first step to the last."""

    def at(self, step: int, steps: int) -> tuple[float, float | None]:
        """(1, None) at every step of the stage."""
        _check_step(step, steps)
        return 1.0, None


@dataclass(frozen=True)
class LinearDecay:
    """From the peak down to 0 along a line, after a linear warm-up over `warmup` (share of the steps).

    The usual schedule of text fine-tuning (Devlin et al. 2019; the default of transformers' `Trainer` with `warmup=0`).
    """

    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup < 1.0:
            raise PlanError(f"warmup={self.warmup}: must be at least 0 and below 1, a share of the steps")

    def at(self, step: int, steps: int) -> tuple[float, float | None]:
        """Share of the peak rate in [0, 1], and None, at `step` (from 0) of `steps`."""
        _check_step(step, steps)
        rise = self.warmup * steps
        if step < rise:
            return step / rise, None
        return (steps - step) / max(1.0, steps - rise), None


@dataclass(frozen=True)
class Shortened:
    """A shape that runs as it was until `begin`, and what was left of it in fewer steps: it still comes to its end.

    Attributes:
        shape: As it was.
        begin: The first step that comes sooner.
        length: Steps that it was made for.
    """

    shape: Shape
    begin: int
    length: int

    def at(self, step: int, steps: int) -> tuple[float, float | None]:
        """Share and momentum of the shape at `step` (from 0) of now `steps`."""
        _check_step(step, steps)
        if step < self.begin:
            return self.shape.at(step, self.length)
        share = (step - self.begin + 1) / (steps - self.begin)
        return self.shape.at(round(self.begin - 1 + share * (self.length - self.begin)), self.length)


def _check_step(step: int, steps: int) -> None:
    if not 0 <= step < steps:
        raise PlanError(f"step {step}: outside a stage of {steps} steps")
