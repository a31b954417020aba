"""The range test finds where a known problem runs away, and leaves everything as it was."""

import math

import pytest
import torch
from torch import nn

from finetune.errors import PlanError
from finetune.plan.range_test import range_test

BATCHES = [torch.randn(16, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
TRUTH = torch.tensor([[1.0], [-2.0], [0.5], [3.0]])


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1, bias=False)


def squared(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch @ TRUTH).square().mean()


def sgd(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0)


def test_plain_descent_runs_away_at_two_over_the_curvature() -> None:
    curvature = float(torch.linalg.eigvalsh(2 * sum(batch.T @ batch for batch in BATCHES) / (16 * len(BATCHES))).max())
    found = range_test(linear(), BATCHES, squared, lowest=1e-4, highest=100.0, steps=200, optimizer=sgd)  # type: ignore[arg-type]
    assert found.runs_away is not None
    assert 1.0 < found.runs_away / (2 / curvature) < 5.0  # some steps pass before the average shows it
    assert found.suggested == found.runs_away / 10 and 1e-4 < found.steepest < found.runs_away
    assert len(found.rates) < 200 and str(found).startswith(f"{len(found.rates)} steps from 0.0001 to ")


def test_a_loss_that_never_runs_away() -> None:
    found = range_test(linear(), BATCHES, squared, lowest=1e-5, highest=1e-2, steps=50, optimizer=sgd)  # type: ignore[arg-type]
    assert found.runs_away is None and found.suggested == found.steepest and len(found.rates) == 50
    assert "never runs away" in str(found)
    ratio = found.rates[1] / found.rates[0]
    assert all(math.isclose(b / a, ratio, rel_tol=1e-9) for a, b in zip(found.rates, found.rates[1:], strict=False))


def test_everything_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[0].weight.grad = torch.ones(4, 4)
    before, gradient, state = (
        {k: v.clone() for k, v in model.state_dict().items()},
        model[0].weight.grad,
        torch.get_rng_state(),
    )
    range_test(model, BATCHES, squared, highest=1e6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is gradient and torch.equal(gradient, torch.ones(4, 4)) and model[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_keep_their_ratios() -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), []

    def watched(groups: list[dict[str, object]]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(groups)  # type: ignore[arg-type]
        optimizer.register_step_pre_hook(lambda o, *_: seen.append([group["lr"] for group in o.param_groups]))
        return optimizer

    groups = [{"params": model[0].parameters(), "lr": 1e-5}, {"params": model[1].parameters(), "lr": 1e-3}]
    found = range_test(model, BATCHES, squared, highest=1e-3, steps=10, groups=groups, optimizer=watched)  # type: ignore[arg-type]
    assert [head for _, head in seen] == list(found.rates) and all(math.isclose(100 * a, b) for a, b in seen)


@pytest.mark.parametrize(
    ("batches", "options", "said"),
    [
        ([], {}, "there is no batch"),
        (BATCHES, {"lowest": 1.0, "highest": 0.1}, "do not climb"),
        (BATCHES, {"steps": 1}, "climb"),
    ],
)
def test_what_cannot_be_tested(batches: list[torch.Tensor], options: dict[str, float], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        range_test(linear(), batches, squared, **options)  # type: ignore[arg-type]
    frozen = linear().requires_grad_(False)
    with pytest.raises(PlanError, match="no parameter of the model is trainable"):
        range_test(frozen, BATCHES, squared)
