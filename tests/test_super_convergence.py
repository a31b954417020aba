"""The super-convergence experiment: its schedules are torch's, its network is the published one, its cells repeat."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

pytest.importorskip("scripts.super_convergence", reason="no scripts here")
from scripts.super_convergence import pictures, study, summary  # noqa: E402
from scripts.super_convergence.cells import Cell, train  # noqa: E402
from scripts.super_convergence.networks import ResNet  # noqa: E402
from scripts.super_convergence.schedules import SHAPES  # noqa: E402
from scripts.super_convergence.sets import Rows, digits, moved  # noqa: E402
from scripts.super_convergence.sizes import DIGITS, SIZES, Size, all_cells  # noqa: E402

WEIGHTS = Path(os.environ.get("FINETUNE_DATA", "../shared/data")) / "weights" / "cifar_resnet56"
SMITHS: dict[str, Any] = {
    "pct_start": 0.5, "div_factor": 30.0, "final_div_factor": 1.0, "anneal_strategy": "linear", "cycle_momentum": False
}  # fmt: skip


@pytest.mark.parametrize("steps", [8, 50, 333])
@pytest.mark.parametrize(
    "name, scheduler",
    [
        ("piecewise", lambda o, n: MultiStepLR(o, [int(0.5 * n), int(0.75 * n)], gamma=0.1)),
        ("piecewise, Smith", lambda o, n: MultiStepLR(o, [int(0.625 * n), int(0.875 * n)], gamma=0.1)),
        ("cosine", lambda o, n: CosineAnnealingLR(o, T_max=n)),
        ("onecycle", lambda o, n: OneCycleLR(o, 0.2, total_steps=n)),
        ("triangle", lambda o, n: OneCycleLR(o, 0.2, total_steps=n, **SMITHS)),
    ],
)
def test_schedules_are_torchs(name: str, scheduler: type[LRScheduler], steps: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2, momentum=0.9)
    theirs = scheduler(optimizer, steps)  # type: ignore[arg-type]
    for step in range(steps):
        group = optimizer.param_groups[0]
        share, momentum = SHAPES[name].at(step, steps)
        assert 0.2 * share == pytest.approx(group["lr"], rel=1e-9, abs=1e-12), step
        assert (0.9 if momentum is None else momentum) == pytest.approx(group["momentum"]), step
        optimizer.step()
        theirs.step()


def test_smiths_rates() -> None:
    """0.1 -> 3 -> 0.1 in 10,000 steps; 0.35, 0.035 from step 50,000, 0.0035 from step 70,000."""
    triangle, drops = SHAPES["triangle"], SHAPES["piecewise, Smith"]
    rates = [3.0 * triangle.at(step, 10_000)[0] for step in (0, 4_999, 9_999)]
    assert rates == pytest.approx([0.1, 3.0, 0.1])
    rates = [0.35 * drops.at(step, 80_000)[0] for step in (49_999, 50_000, 69_999, 70_000)]
    assert rates == pytest.approx([0.35, 0.035, 0.035, 0.0035])


def test_resnet56_is_the_published_one() -> None:
    network = ResNet(3, 10, blocks=9, width=16)
    assert sum(parameter.numel() for parameter in network.parameters()) == 853_018  # 0.85 M: He et al. 2015, table 6
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.data
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"no {WEIGHTS} here")
def test_resnet56_takes_a_published_checkpoint() -> None:
    from safetensors.torch import load_file

    ResNet(3, 10, blocks=9, width=16).load_state_dict(load_file(next(WEIGHTS.glob("*.safetensors"))))


def some_rows(shift: int = 1, mirror: bool = True) -> Rows:
    x_NCHW = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8)
    return Rows(x_NCHW, torch.tensor([0, 1]), x_NCHW, torch.tensor([0, 1]), shift=shift, mirror=mirror)


def test_pictures_are_moved_whole() -> None:
    """Each is one of the shifts, mirrored or not, all channels alike; without shift and mirror it stays."""
    rows = some_rows()
    x_NCHW = rows.train_x
    padded = nn.functional.pad(x_NCHW, [1] * 4, mode="replicate")
    allowed = [padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    allowed += [picture.flip(3) for picture in allowed]
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        out = moved(x_NCHW, rows, generator)
        for row in range(2):
            found = [number for number, picture in enumerate(allowed) if torch.equal(out[row], picture[row])]
            assert len(found) == 1
            seen.add(found[0])
    assert seen == set(range(18))
    assert torch.equal(moved(x_NCHW, some_rows(0, False), generator), x_NCHW)


def test_digits_are_drawn_by_seed() -> None:
    one, again, other = (digits(100, seed) for seed in (0, 0, 1))
    assert torch.equal(one.train_x, again.train_x) and not torch.equal(one.train_x, other.train_x)
    assert len(one.train_y) == 100 and len(one.test_y) == 1697 and one.classes == 10


def few_digits() -> Rows:
    rows = digits(500, 0)
    return replace(rows, test_x=rows.test_x[:200], test_y=rows.test_y[:200])


def test_a_cell_repeats_and_learns() -> None:
    rows, device = few_digits(), torch.device("cpu")
    cell = Cell("onecycle", 40, 0.1, 64, 5e-3)
    first, again = (train(cell, rows, study.new_network(DIGITS, rows, 0, device)) for _ in range(2))
    assert first["curve"] == again["curve"] and first["curve"][-1] == (40, first["accuracy"])
    assert first["accuracy"] > 0.5 and first["steps"] == 40


def test_a_cell_that_runs_away_ends() -> None:
    rows = few_digits()
    network = study.new_network(DIGITS, rows, 0, torch.device("cpu"))
    found = train(Cell("flat", 600, 1e6, 64, 1.0), rows, network)
    assert found["steps"] < 600 and found["loss"] is None or found["loss"] > 1e4


def test_a_target_ends_a_run() -> None:
    rows = few_digits()
    network = study.new_network(DIGITS, rows, 0, torch.device("cpu"))
    found = train(Cell("flat", 120, 0.05, 64, 5e-3), rows, network, until=lambda accuracy: accuracy > 0.3)
    assert found["steps"] < 120 and found["accuracy"] > 0.3


def test_results_are_kept_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RANGE", (1e-3, 1.0, 10))
    size, kept = replace(DIGITS.shortened(400.0), rows=lambda data, seed: few_digits()), tmp_path / "kept.json"
    cells = all_cells(size, 1)[:4]
    study.carry_out(size, cells[:2], kept)
    first = json.loads(kept.read_text())
    study.carry_out(size, cells, kept)
    second = json.loads(kept.read_text())
    assert (
        second["cells"][:2] == first["cells"] and len(second["cells"]) == 4
    )  # not trained again: seconds are the same
    study.carry_out(size, all_cells(size, 1), kept, minutes=0.0)
    assert len(json.loads(kept.read_text())["cells"]) == 4
    assert first["range_test"]["rates"] and first["hardware"]


def made_up(size: Size) -> dict[str, object]:
    """Results in which one-cycle wins by a point at 10 times the rate in the two longer lengths, else loses by one."""
    entries = []
    for cell in all_cells(size, 3):
        value = 0.90 + 0.001 * cell.seed
        if cell.schedule == "onecycle":
            value += 0.01 if cell.peak >= 0.3 and cell.steps > size.lengths[1] else -0.01
        if cell.schedule == "piecewise":
            value -= 0.02 * (cell.peak != 0.03)
        entries.append({"cell": cell.key(), "accuracy": value, "loss": 0.1, "curve": [(cell.steps, value)]})
    return {"hardware": "none", "cells": entries}


def test_the_verdict_is_what_the_figures_say() -> None:
    results = made_up(DIGITS)
    text = summary.verdict(results, DIGITS, DIGITS.decay)
    assert "best of 4: 90.10 ± 0.10 (n=3) at 0.03" in text
    assert "At 10 times its rate or more, one-cycle is level or ahead after 800 steps (1/5), at 33.3 times" in text
    assert "In a tenth of its steps or fewer, one-cycle is not level" in text
    assert "+1.00 ± 0.00 points" in text
    assert "| 0.005, 0.3 (10x) | -1.00 ± 0.00 | -1.00 ± 0.00 | +1.00 ± 0.00 | +1.00 ± 0.00 |" in (
        summary.factors_table(results, DIGITS)
    )
    assert (
        "| 90.10 ± 0.10 (n=3) at 0.03, decay 0.005 | 800 steps (1/5): 91.10 ± 0.10 (n=3) at 0.3, decay 0.005, "
        "+1.00 ± 0.00 |\n| 88.10 ± 0.10 (n=3) at 0.1, decay 0.005 | 200 steps (1/20): 89.10"
    ) in summary.tenfold_table(results, DIGITS)


def test_plots_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    names = {path.name for path in pictures.draw_all(made_up(DIGITS), DIGITS, tmp_path)}
    assert names == {"super_convergence_digits_iterations.png", "super_convergence_digits_maps.png"}  # no range test
    assert pictures.draw_all({"cells": []}, DIGITS, tmp_path) == []


def test_every_size_has_its_figures() -> None:
    for size in SIZES.values():
        cells = all_cells(size, 3)
        assert len(cells) == len(set(cells))
        assert size.full >= 2 * max(size.lengths) and size.map_steps in size.lengths, size.name
        assert size.decay in size.map_decays and set(size.cycle[1]) <= set(size.map_peaks), size.name
