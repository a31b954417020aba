"""Stages, peak rates and the length of an epoch go in; stage, open groups, a rate a group and momentum at any step
come out.

Gradual unfreezing (Howard & Ruder 2018, section 3.3) as data: a `Plan` is a tuple of `Stage`s, printable, editable
and kept as JSON. It speaks of layer groups by index (0 = stem, -1 = head) or by name, never of parameters.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from finetune.errors import PlanError
from finetune.model.groups import LayerGroups
from finetune.plan.onecycle import Flat, LinearDecay, OneCycle, Shape, Shortened

Unfreezing = Literal["none", "head_then_all", "all_but_stem", "three_stages", "one_at_a_time"]
_SHAPES: dict[str, type] = {shape.__name__: shape for shape in (OneCycle, Flat, LinearDecay)}


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one set of open groups and one schedule.

    Attributes:
        open_from: First layer group that trains: index from the stem, negative from the head (-1: the head alone), or
            a group's name.
        epochs: Length in passes over the training rows; a fraction is allowed.
        steps: Length in optimizer steps, in place of `epochs`.
        shape: Schedule of rate and momentum over the stage.
        lr_scale: The stage's peaks over the run's.
        anew: Whether it begins from the weights with which the first such stage began. The ends of such stages are
            averaged: a model soup (Wortsman et al. 2022, section 3).
        name: What logs call it; by default "head", "all" or the name of the lowest open group.

    Raises:
        PlanError: Neither or both of `epochs` and `steps` given, or one that is not above 0.
    """

    open_from: int | str
    epochs: float | None = None
    steps: int | None = None
    shape: Shape = field(default_factory=OneCycle)
    lr_scale: float = 1.0
    anew: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise PlanError("Stage: give its length as epochs or as steps, one of the two")
        length = self.epochs if self.epochs is not None else self.steps
        if length is None or not length > 0:
            raise PlanError(f"Stage: its length must be above 0, not {length}")
        if self.steps is not None and self.steps != int(self.steps):
            raise PlanError(f"Stage: steps={self.steps} must be a whole number; epochs may be a fraction")
        if not self.lr_scale > 0.0:
            raise PlanError(f"Stage: lr_scale={self.lr_scale} must be above 0; freeze groups with open_from instead")


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its groups, length and peak rates known: `rates` one a layer group, stem first, 0 where frozen."""

    name: str
    open_from: int
    steps: int
    rates: tuple[float, ...]
    shape: Shape
    anew: bool = False


@dataclass(frozen=True)
class Point:
    """What holds at one step: index of the stage, first open group, rate of every group (stem first), momentum (None:
    as it is)."""

    stage: int
    open_from: int
    rates: tuple[float, ...]
    momentum: float | None


class Plan(tuple[Stage, ...]):
    """Stages in order: `Plan(Stage(...), Stage(...))`."""

    def __new__(cls, *stages: Stage) -> "Plan":
        if not stages:
            raise PlanError("Plan: give at least one Stage")
        if not all(isinstance(stage, Stage) for stage in stages):
            raise PlanError("Plan: give stages one by one, as Plan(Stage(...), Stage(...))")
        return super().__new__(cls, stages)

    def __getnewargs__(self) -> tuple[Stage, ...]:
        """The stages one by one, for copies and pickles."""
        return tuple(self)

    def resolve(
        self, groups: LayerGroups, rates: Sequence[float] | None = None, steps_per_epoch: int = 1
    ) -> "ResolvedPlan":
        """The plan for these layer groups, with `rates` as peaks (one a group, stem first; by default 1 each, for a
        look at the shares).

        Raises:
            PlanError: A stage names a group that does not exist, or `rates` does not give one rate a group.
        """
        peaks = tuple(rates) if rates is not None else (1.0,) * len(groups)
        if len(peaks) != len(groups):
            raise PlanError(f"rates: {len(peaks)} given for {len(groups)} layer groups; give one a group, stem first")
        planned = []
        for stage in self:
            first = groups.index(stage.open_from)
            steps = stage.steps if stage.steps is not None else max(1, round((stage.epochs or 0) * steps_per_epoch))
            name = stage.name or (
                "all" if first == 0 else "head" if first == len(groups) - 1 else f"from {groups[first].name}"
            )
            opened = tuple(stage.lr_scale * peak if index >= first else 0.0 for index, peak in enumerate(peaks))
            planned.append(PlannedStage(name, first, steps, opened, stage.shape, stage.anew))
        return ResolvedPlan(tuple(planned), tuple(group.name for group in groups), steps_per_epoch)

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data that `Plan.from_json` reads back; a shape of one's own is named only."""
        return [{**asdict(stage), "shape": {"kind": type(stage.shape).__name__, **vars(stage.shape)}} for stage in self]

    @classmethod
    def from_json(cls, data: Sequence[dict[str, Any]]) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            PlanError: A shape that this package does not have.
        """
        stages = []
        for entry in data:
            shape = dict(entry["shape"])
            kind = shape.pop("kind")
            if kind not in _SHAPES:
                raise PlanError(f"shape {kind!r}: not one of {', '.join(_SHAPES)}")
            if isinstance(shape.get("momentum"), list):
                shape["momentum"] = tuple(shape["momentum"])
            stages.append(Stage(**{**entry, "shape": _SHAPES[kind](**shape)}))
        return cls(*stages)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan over known layer groups: a pure function of the step."""

    stages: tuple[PlannedStage, ...]
    group_names: tuple[str, ...]
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return sum(stage.steps for stage in self.stages)

    def cycles(self, stage: int | None = None) -> int:
        """Stages that begin anew, up to and with `stage`, or in all."""
        return sum(planned.anew for planned in self.stages[: None if stage is None else stage + 1])

    def start(self, stage: int) -> int:
        """First step of a stage."""
        return sum(planned.steps for planned in self.stages[:stage])

    def shortened(self, stage: int, begin: int, steps: int) -> "ResolvedPlan":
        """The plan with what is left of a stage from its step `begin` on taken in `steps` steps."""
        before = self.stages[stage]
        shape = Shortened(before.shape, begin, before.steps)
        changed = replace(before, steps=begin + steps, shape=shape)
        return replace(self, stages=(*self.stages[:stage], changed, *self.stages[stage + 1 :]))

    def lengthened(self, steps: int) -> "ResolvedPlan":
        """The plan with its last stage again behind it, in `steps` steps."""
        last = self.stages[-1]
        number = 1 + sum(stage.open_from == last.open_from for stage in self.stages)
        return replace(self, stages=(*self.stages, replace(last, steps=steps, name=f"cycle {number}")))

    def slowed(self, stage: int, factor: float) -> "ResolvedPlan":
        """The plan with the peak rates of a stage and of all after it times `factor`."""
        changed = tuple(
            replace(planned, rates=tuple(factor * rate for rate in planned.rates)) for planned in self.stages[stage:]
        )
        return replace(self, stages=self.stages[:stage] + changed)

    def at(self, step: int) -> Point:
        """Stage, open groups, rates and momentum at `step` (from 0).

        Raises:
            PlanError: `step` lies outside the plan.
        """
        begin = 0
        for index, stage in enumerate(self.stages):
            if 0 <= step - begin < stage.steps:
                share, momentum = stage.shape.at(step - begin, stage.steps)
                return Point(index, stage.open_from, tuple(share * rate for rate in stage.rates), momentum)
            begin += stage.steps
        raise PlanError(f"step {step}: outside a plan of {self.steps} steps")

    def __str__(self) -> str:
        lines = [f"{'stage':<16} {'steps':>7} {'epochs':>7}  open groups"]
        for stage in self.stages:
            opened = len(self.group_names) - stage.open_from
            lowest, head = stage.rates[stage.open_from], stage.rates[-1]
            rates = f"{self.group_names[stage.open_from]} {lowest:.2g} -> {self.group_names[-1]} {head:.2g}"
            epochs = stage.steps / self.steps_per_epoch
            share = f"{opened} of {len(self.group_names)}"
            lines.append(f"{stage.name:<16} {stage.steps:>7} {epochs:>7.2g}  {share}: {rates}")
        return "\n".join(lines)


def gradual_unfreezing(
    groups: int,
    epochs: float,
    *,
    style: Unfreezing = "head_then_all",
    head_epochs: float = 1.0,
    shape: Shape | None = None,
    head_lr_scale: float = 1.0,
    cycles: int = 1,
) -> Plan:
    """A plan for `groups` layer groups and `epochs` in all: the head first, then from the top down.

    Args:
        groups: Number of layer groups.
        epochs: Passes over the training rows, all stages together.
        style: "none": everything from the start. "head_then_all": the head, then everything (fastai's `fine_tune`).
            "all_but_stem": the head, then everything above the first group, the table of a text encoder's embeddings.
            "three_stages": the head, the upper half, everything. "one_at_a_time": an equal share for the head and for
            each further group, everything for the last half (ULMFiT).
        head_epochs: Length of the head's stage, at most half of `epochs`.
        shape: Schedule of every stage; by default `OneCycle()`.
        head_lr_scale: Peak of the head's own stage over the run's.
        cycles: Parts of equal length into which the last stage is divided; each begins anew from the same weights.

    Raises:
        PlanError: An unknown style.
    """
    shape = shape if shape is not None else OneCycle()
    head = min(head_epochs, epochs / 2.0)
    rest = epochs - head
    if style == "none" or groups == 1:
        return Plan(*_in_cycles(Stage(open_from=0, epochs=epochs, shape=shape), cycles))
    first = (Stage(open_from=-1, epochs=head, shape=shape, lr_scale=head_lr_scale),) if head > 0 else ()
    if style == "head_then_all":
        return Plan(*first, *_in_cycles(Stage(open_from=0, epochs=rest, shape=shape), cycles))
    if style == "all_but_stem":
        last = Stage(open_from=min(1, groups - 1), epochs=rest, shape=shape, name="all but stem")
        return Plan(*first, *_in_cycles(last, cycles))
    if style == "three_stages":
        return Plan(
            *first,
            Stage(open_from=groups // 2, epochs=rest / 3.0, shape=shape, name="top half"),
            *_in_cycles(Stage(open_from=0, epochs=rest * 2.0 / 3.0, shape=shape), cycles),
        )
    if style == "one_at_a_time":
        share = epochs / 2.0 / (groups - 1)
        scale = head_lr_scale if head > 0 else 1.0
        return Plan(
            Stage(open_from=-1, epochs=share, shape=shape, lr_scale=scale),
            *(Stage(open_from=-1 - opened, epochs=share, shape=shape) for opened in range(1, groups - 1)),
            *_in_cycles(Stage(open_from=0, epochs=epochs / 2.0, shape=shape), cycles),
        )
    raise PlanError(
        f"unfreezing={style!r}: must be one of none, head_then_all, all_but_stem, three_stages, one_at_a_time"
    )


def _in_cycles(stage: Stage, cycles: int) -> list[Stage]:
    """A stage in parts of equal length that each begin anew."""
    if cycles == 1:
        return [stage]
    part = replace(stage, epochs=(stage.epochs or 0.0) / cycles, anew=True)
    return [replace(part, name=f"cycle {number}") for number in range(1, cycles + 1)]
