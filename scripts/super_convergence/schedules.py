"""The schedules that are compared, as shapes of `finetune.plan.onecycle`: step -> share of the peak, momentum."""

from dataclasses import dataclass

from finetune.plan.onecycle import Flat, OneCycle, Shape, anneal


@dataclass(frozen=True)
class PiecewiseConstant:
    """The peak rate, divided by 10 at each of `drops` (shares of the steps), as torch's `MultiStepLR` does."""

    drops: tuple[float, ...] = (0.5, 0.75)

    def at(self, step: int, steps: int) -> tuple[float, float | None]:
        """(share of the peak, None) at `step` (from 0) of `steps`."""
        return 0.1 ** sum(step >= int(drop * steps) for drop in self.drops), None


@dataclass(frozen=True)
class Cosine:
    """From the peak to 0 along half a cosine, as torch's `CosineAnnealingLR` with `T_max=steps`."""

    def at(self, step: int, steps: int) -> tuple[float, float | None]:
        """(share of the peak, None) at `step` (from 0) of `steps`."""
        return anneal(1.0, 0.0, step / steps), None


@dataclass(frozen=True)
class Climb:
    """From next to nothing to the peak along a line: Smith's range test, which reads the accuracy on the way."""

    def at(self, step: int, steps: int) -> tuple[float, float | None]:
        """(share of the peak, None) at `step` (from 0) of `steps`."""
        return (step + 1) / steps, None


SHAPES: dict[str, Shape] = {
    "flat": Flat(),
    "piecewise": PiecewiseConstant(),
    "cosine": Cosine(),
    "climb": Climb(),
    # Momentum 0.95 -> 0.85 -> 0.95 against the rate (Smith 2018), or left as it is given.
    "onecycle": OneCycle(),
    "onecycle, fixed momentum": OneCycle(momentum=None),
    # 0.1 -> 3 -> 0.1 in straight lines, and 0.35 with drops at 50k and 70k of 80k: Smith & Topin 2017.
    "triangle": OneCycle(0.5, div_factor=30.0, final_div_factor=1.0, momentum=None, form="linear"),
    "piecewise, Smith": PiecewiseConstant((0.625, 0.875)),
}
