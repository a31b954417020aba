"""Schedules, compared step by step with those of torch and transformers."""

import itertools
import math
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from transformers import get_linear_schedule_with_warmup

from finetune.errors import PlanError
from finetune.plan.onecycle import Flat, LinearDecay, OneCycle, anneal

PEAK = 0.02


def optimizer(kind: str) -> torch.optim.Optimizer:
    weight = torch.nn.Parameter(torch.zeros(1))
    if kind == "adam":
        return torch.optim.AdamW([weight], lr=PEAK, betas=(0.9, 0.99))
    return torch.optim.SGD([weight], lr=PEAK, momentum=0.9)


def torchs(kind: str, steps: int, **options: object) -> list[tuple[float, float]]:
    """(rate, momentum) of torch's own scheduler at every step."""
    used = optimizer(kind)
    schedule = OneCycleLR(used, max_lr=PEAK, total_steps=steps, **options)
    found = []
    for step in range(steps):
        group = used.param_groups[0]
        found.append((group["lr"], group["betas"][0] if kind == "adam" else group["momentum"]))
        if step < steps - 1:
            used.step()
            schedule.step()
    return found


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("steps", [4, 5, 7, 11, 50, 200])
def test_one_cycle_is_torchs_step_for_step(steps: int, kind: str) -> None:
    compared = 0
    for pct_start, form, three_phase, (div, final) in itertools.product(
        (0.1, 0.25, 0.3, 0.45, 0.7), ("cos", "linear"), (False, True), ((25.0, 1e4), (4.0, 10.0), (1.0, 1.0))
    ):
        if pct_start * steps == 1 or (three_phase and pct_start > 0.5):
            continue  # torch divides by zero; a symmetric cycle does not fit
        options = dict(pct_start=pct_start, three_phase=three_phase, div_factor=div, final_div_factor=final)
        theirs = torchs(kind, steps, anneal_strategy=form, base_momentum=0.8, max_momentum=0.97, **options)
        shape = OneCycle(momentum=(0.8, 0.97), form=form, **options)  # type: ignore[arg-type]
        ours = [shape.at(step, steps) for step in range(steps)]
        assert [PEAK * share for share, _ in ours] == pytest.approx([rate for rate, _ in theirs], rel=1e-12), options
        assert [momentum for _, momentum in ours] == pytest.approx([m for _, m in theirs], rel=1e-12), options
        compared += 1
    assert compared >= 40


def test_the_defaults_are_torchs() -> None:
    ours = [OneCycle().at(step, 60) for step in range(60)]
    assert [(PEAK * share, momentum) for share, momentum in ours] == [
        pytest.approx(pair, rel=1e-12) for pair in torchs("adam", 60)
    ]


@pytest.mark.parametrize(("pct_start", "steps"), [(0.25, 4), (0.1, 10), (0.5, 2), (0.01, 100)])
def test_a_climb_of_no_length_starts_at_the_peak(pct_start: float, steps: int) -> None:
    with pytest.raises(ZeroDivisionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchs("adam", steps, pct_start=pct_start)
    shares, momenta = zip(*(OneCycle(pct_start=pct_start).at(step, steps) for step in range(steps)), strict=True)
    assert shares[0] == 1.0 and momenta[0] == 0.85
    assert all(a > b for a, b in itertools.pairwise(shares))
    assert shares[-1] == pytest.approx(1 / (25 * 1e4)) and momenta[-1] == pytest.approx(0.95)


@pytest.mark.parametrize("steps", [1, 2, 3, 17])
@pytest.mark.parametrize("shape", [OneCycle(), OneCycle(three_phase=True), OneCycle(pct_start=0.05), LinearDecay(0.3)])
def test_every_step_of_a_stage_however_short(shape: OneCycle | LinearDecay, steps: int) -> None:
    points = [shape.at(step, steps) for step in range(steps)]
    assert all(math.isfinite(share) and 0.0 <= share <= 1.0 for share, _ in points)
    assert all(momentum is None or 0.85 <= momentum <= 0.95 for _, momentum in points)


def test_momentum_moves_against_the_rate_or_not_at_all() -> None:
    points = [OneCycle(pct_start=0.3).at(step, 100) for step in range(100)]
    assert max(points) == (1.0, 0.85) and points.index(max(points)) == 29
    assert points[0] == pytest.approx((1 / 25, 0.95))
    for (share, momentum), (later_share, later_momentum) in itertools.pairwise(points):
        assert (later_share > share) == (later_momentum < momentum)
    left = [OneCycle(pct_start=0.3, momentum=None).at(step, 100) for step in range(100)]
    assert left == [(share, None) for share, _ in points]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pct_start": 0.0}, "pct_start=0.0: must lie above 0 and below 1"),
        ({"pct_start": 1.0}, "pct_start=1.0: must lie above 0 and below 1"),
        ({"pct_start": math.nan}, "pct_start=nan: must lie"),
        ({"pct_start": 0.5, "three_phase": True}, "pct_start=0.5: must lie above 0 and below 0.5"),
        ({"div_factor": 0.5}, "div_factor=0.5: must be at least 1"),
        ({"final_div_factor": 0.0}, "final_div_factor=0.0: must be at least 1"),
        ({"momentum": (0.95, 0.85)}, r"momentum=\(0.95, 0.85\): give \(lowest, highest\)"),
        ({"momentum": (0.9, 1.0)}, r"momentum=\(0.9, 1.0\): give"),
        ({"momentum": (-0.1, 0.9)}, r"momentum=\(-0.1, 0.9\): give"),
        ({"form": "exp"}, "form='exp': must be 'cos' or 'linear'"),
    ],
)
def test_errors_name_the_option(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        OneCycle(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [OneCycle(), Flat(), LinearDecay()])
@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_stage(shape: OneCycle | Flat | LinearDecay, step: int) -> None:
    with pytest.raises(PlanError, match=f"^step {step}: outside a stage of 10 steps$"):
        shape.at(step, 10)


def test_flat() -> None:
    assert [Flat().at(step, 5) for step in range(5)] == [(1.0, None)] * 5


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25, 0.5])
def test_linear_decay_is_transformers(warmup: float) -> None:
    used, steps = optimizer("adam"), 40
    schedule = get_linear_schedule_with_warmup(used, round(warmup * steps), steps)
    for step in range(steps):
        share, momentum = LinearDecay(warmup).at(step, steps)
        assert PEAK * share == pytest.approx(used.param_groups[0]["lr"], rel=1e-12)
        assert momentum is None
        used.step()
        schedule.step()


@pytest.mark.parametrize("warmup", [-0.1, 1.0])
def test_linear_decay_errors(warmup: float) -> None:
    with pytest.raises(PlanError, match=f"^warmup={warmup}: must be at least 0 and below 1"):
        LinearDecay(warmup)


def test_anneal_ends_where_it_should() -> None:
    assert [anneal(2.0, 6.0, x, "linear") for x in (0.0, 0.25, 1.0)] == [2.0, 3.0, 6.0]
    assert [anneal(2.0, 6.0, x) for x in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 4.0, 6.0])
    assert anneal(2.0, 6.0, 0.25) == pytest.approx(4.0 - 2.0 * math.cos(math.pi / 4))
