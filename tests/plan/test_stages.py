"""Stages, plans and named ways of unfreezing."""

import copy
import json
import pickle
from typing import Any

import pytest

from finetune.errors import PlanError
from finetune.model.groups import LayerGroup, LayerGroups
from finetune.plan.onecycle import Flat, LinearDecay, OneCycle
from finetune.plan.stages import Plan, PlannedStage, Stage, gradual_unfreezing

NAMES = ("stem", "blocks.0", "blocks.1", "blocks.2", "head")
GROUPS = LayerGroups(tuple(LayerGroup(name, (f"{name}.weight",), 1) for name in NAMES))
PEAKS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Stage: give its length as epochs or as steps, one of the two"),
        ({"epochs": 1, "steps": 10}, "Stage: give its length as epochs or as steps, one of the two"),
        ({"epochs": 0}, "Stage: its length must be above 0, not 0"),
        ({"epochs": float("nan")}, "Stage: its length must be above 0, not nan"),
        ({"steps": -3}, "Stage: its length must be above 0, not -3"),
        ({"epochs": 1, "lr_scale": 0.0}, "Stage: lr_scale=0.0 must be above 0; freeze groups with open_from instead"),
    ],
)
def test_stage_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}$"):
        Stage(open_from=0, **options)


def test_a_plan_needs_a_stage() -> None:
    with pytest.raises(PlanError, match="^Plan: give at least one Stage$"):
        Plan()


@pytest.mark.parametrize(
    ("given", "index"), [(0, 0), (4, 4), (-1, 4), (-5, 0), ("stem", 0), ("blocks.1", 2), ("head", 4), ("blocks", 1)]
)
def test_groups_by_index_and_by_name(given: int | str, index: int) -> None:
    stage = Plan(Stage(given, steps=1)).resolve(GROUPS, PEAKS).stages[0]
    assert stage.open_from == index
    assert stage.rates == (0.0,) * index + PEAKS[index:]


@pytest.mark.parametrize("given", [5, -6, "blocks.7", "layer"])
def test_a_group_that_is_not_there(given: int | str) -> None:
    with pytest.raises(PlanError, match="no such layer group; take one of stem, blocks.0"):
        Plan(Stage(given, steps=1)).resolve(GROUPS)


def test_resolve() -> None:
    plan = Plan(
        Stage("head", epochs=1, lr_scale=5.0, shape=Flat()),
        Stage("blocks.1", steps=7),
        Stage(1, epochs=0.25),
        Stage(0, epochs=0.001, name="short"),
        Stage(0, epochs=2.5),
    )
    resolved = plan.resolve(GROUPS, PEAKS, steps_per_epoch=10)
    assert [stage.name for stage in resolved.stages] == ["head", "from blocks.1", "from blocks.0", "short", "all"]
    assert [stage.steps for stage in resolved.stages] == [10, 7, 2, 1, 25]
    assert resolved.stages[0] == PlannedStage("head", 4, 10, (0.0,) * 4 + (0.5,), Flat())
    assert resolved.stages[1].rates == (0.0, 0.0, 1e-3, 1e-2, 1e-1)
    assert resolved.stages[4].rates == PEAKS
    assert resolved.steps == 45
    assert [resolved.start(index) for index in range(5)] == [0, 10, 17, 19, 20]
    assert resolved.group_names == NAMES and resolved.steps_per_epoch == 10


def test_peaks_are_one_unless_given_and_one_a_group() -> None:
    assert Plan(Stage(-2, steps=3)).resolve(GROUPS).stages[0].rates == (0.0, 0.0, 0.0, 1.0, 1.0)
    with pytest.raises(PlanError, match="^rates: 2 given for 5 layer groups; give one a group, stem first$"):
        Plan(Stage(0, steps=3)).resolve(GROUPS, (1e-3, 1e-2))


def test_at() -> None:
    cycle = OneCycle(pct_start=0.4)
    plan = Plan(Stage(-1, steps=5, shape=Flat()), Stage(1, steps=10, shape=cycle), Stage(0, steps=2, shape=cycle))
    resolved = plan.resolve(GROUPS, PEAKS)
    points = [resolved.at(step) for step in range(17)]
    assert [point.stage for point in points] == [0] * 5 + [1] * 10 + [2] * 2
    assert [point.open_from for point in points] == [4] * 5 + [1] * 10 + [0] * 2
    assert points[4].rates == (0.0, 0.0, 0.0, 0.0, 1e-1) and points[4].momentum is None
    for step in range(10):
        share, momentum = cycle.at(step, 10)
        assert points[5 + step].rates == (0.0, *(share * peak for peak in PEAKS[1:]))
        assert points[5 + step].momentum == momentum
    assert points[5 + 3].rates == (0.0, *PEAKS[1:])  # the peak of 10 steps, 0.4 of them up
    assert points[15].rates[0] == PEAKS[0] * cycle.at(0, 2)[0]


@pytest.mark.parametrize("step", [-1, 17, 1000])
def test_a_step_outside_the_plan(step: int) -> None:
    resolved = Plan(Stage(-1, steps=5), Stage(0, steps=12)).resolve(GROUPS)
    with pytest.raises(PlanError, match=f"^step {step}: outside a plan of 17 steps$"):
        resolved.at(step)


PLANS = [
    Plan(Stage(-1, epochs=1)),
    Plan(
        Stage("blocks.1", epochs=0.5, shape=OneCycle(0.1, 10.0, 100.0, (0.8, 0.9), "linear", True), lr_scale=2.0),
        Stage(1, steps=30, shape=LinearDecay(0.1), name="middle"),
        Stage(0, epochs=2, shape=OneCycle(momentum=None)),
        Stage(0, epochs=1, shape=Flat()),
    ),
]


@pytest.mark.parametrize("plan", PLANS)
def test_there_and_back_through_json(plan: Plan) -> None:
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and type(again) is Plan
    assert again.resolve(GROUPS, PEAKS, 10) == plan.resolve(GROUPS, PEAKS, 10)


def test_a_shape_that_json_cannot_bring_back() -> None:
    written = Plan(Stage(0, epochs=1)).to_json()
    written[0]["shape"]["kind"] = "Sawtooth"
    with pytest.raises(PlanError, match="^shape 'Sawtooth': not one of OneCycle, Flat, LinearDecay$"):
        Plan.from_json(written)


@pytest.mark.parametrize("plan", PLANS)
def test_copies_are_equal(plan: Plan) -> None:
    for again in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert type(again) is Plan and again == plan
        assert all(isinstance(stage, Stage) for stage in again)


# Named plans


@pytest.mark.parametrize("style", ["none", "head_then_all", "three_stages", "one_at_a_time"])
@pytest.mark.parametrize(("groups", "epochs"), [(1, 3.0), (2, 4.0), (5, 6.0), (14, 0.8), (60, 10.0)])
def test_stages_add_up_and_end_with_everything_open(style: Any, groups: int, epochs: float) -> None:
    plan = gradual_unfreezing(groups, epochs, style=style)
    assert sum(stage.epochs or 0.0 for stage in plan) == pytest.approx(epochs)
    opened = [int(stage.open_from) % groups for stage in plan]
    assert opened == sorted(opened, reverse=True) and opened[-1] == 0


def test_styles() -> None:
    def stages(style: Any, **options: Any) -> list[tuple[int | str, float | None, float]]:
        plan = gradual_unfreezing(6, 8.0, style=style, **options)
        return [(stage.open_from, stage.epochs, stage.lr_scale) for stage in plan]

    assert stages("none") == [(0, 8.0, 1.0)]
    assert stages("head_then_all") == [(-1, 1.0, 1.0), (0, 7.0, 1.0)]
    assert stages("head_then_all", head_epochs=3.0, head_lr_scale=5.0) == [(-1, 3.0, 5.0), (0, 5.0, 1.0)]
    assert stages("head_then_all", head_epochs=7.0) == [(-1, 4.0, 1.0), (0, 4.0, 1.0)]
    assert stages("three_stages", head_epochs=2.0) == [(-1, 2.0, 1.0), (3, 2.0, 1.0), (0, 4.0, 1.0)]
    rest = [(-1 - i, 0.8, 1.0) for i in range(1, 5)] + [(0, 4.0, 1.0)]
    assert stages("one_at_a_time") == [(-1, 0.8, 1.0), *rest]
    assert stages("one_at_a_time", head_lr_scale=5.0) == [(-1, 0.8, 5.0), *rest]
    assert stages("one_at_a_time", head_lr_scale=5.0, head_epochs=0.0) == [(-1, 0.8, 1.0), *rest]  # it is solved


def test_all_but_stem_leaves_the_first_group_frozen() -> None:
    plan = gradual_unfreezing(5, 8.0, style="all_but_stem", head_epochs=0.0)
    assert [(stage.open_from, stage.epochs) for stage in plan] == [(1, 8.0)]
    assert plan.resolve(GROUPS, PEAKS, 10).at(5).rates[0] == 0.0


def test_a_shortened_stage_still_comes_to_its_end() -> None:
    whole = Plan(Stage(0, steps=100), Stage(0, steps=10)).resolve(GROUPS, PEAKS, 10)
    cut = whole.shortened(0, 40, 10)
    assert cut.steps == 60 and cut.start(1) == 50
    assert [cut.at(step) for step in range(40)] == [whole.at(step) for step in range(40)]
    assert cut.at(49).rates == whole.at(99).rates and cut.at(50).rates == whole.at(100).rates
    rates = [cut.at(step).rates[-1] for step in range(39, 50)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 11


def test_one_at_a_time_opens_every_group_once() -> None:
    resolved = gradual_unfreezing(5, 8.0, style="one_at_a_time").resolve(GROUPS, PEAKS, 10)
    assert [stage.open_from for stage in resolved.stages] == [4, 3, 2, 1, 0]
    assert [stage.steps for stage in resolved.stages] == [10, 10, 10, 10, 40]


def test_the_shape_is_that_of_every_stage() -> None:
    shape = OneCycle(pct_start=0.1)
    for style in ("none", "head_then_all", "three_stages", "one_at_a_time"):
        plan = gradual_unfreezing(4, 4.0, style=style, shape=shape)  # type: ignore[arg-type]
        assert all(stage.shape is shape for stage in plan)
    assert all(stage.shape == OneCycle() for stage in gradual_unfreezing(4, 4.0))


def test_an_unknown_style() -> None:
    with pytest.raises(PlanError, match="^unfreezing='all': must be one of none, head_then_all, all_but_stem, three"):
        gradual_unfreezing(4, 4.0, style="all")  # type: ignore[arg-type]


def test_printing() -> None:
    plan = gradual_unfreezing(5, 4.0, head_lr_scale=5.0)
    lines = [line.split() for line in str(plan.resolve(GROUPS, PEAKS, 10)).splitlines()]
    assert lines == [
        ["stage", "steps", "epochs", "open", "groups"],
        ["head", "10", "1", "1", "of", "5:", "head", "0.5", "->", "head", "0.5"],
        ["all", "30", "3", "5", "of", "5:", "stem", "1e-05", "->", "head", "0.1"],
    ]


def test_stages_are_given_one_by_one() -> None:
    with pytest.raises(PlanError, match=r"^Plan: give stages one by one, as Plan\(Stage\(...\), Stage\(...\)\)$"):
        Plan([Stage(0, epochs=1)])  # type: ignore[arg-type]


def test_steps_are_whole() -> None:
    with pytest.raises(PlanError, match="^Stage: steps=2.5 must be a whole number; epochs may be a fraction$"):
        Stage(0, steps=2.5)  # type: ignore[arg-type]
