"""How long a step takes, and how many epochs fit into a given time."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune.data.loaders import make_loader
from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.model.backbones import load_backbone
from finetune.model.groups import layer_groups
from finetune.plan.probes import epochs_in, seconds_per_step


def normed_head(features: int) -> nn.Module:
    """A head with statistics of its own, which are new and so never frozen."""
    return nn.Sequential(nn.BatchNorm1d(features), nn.Linear(features, 3))


@pytest.mark.parametrize("head", [None, normed_head])
def test_measuring_leaves_everything_as_it_was(square_splits: Splits, resnet: Path, head: Any) -> None:
    pretrained = load_backbone(resnet, square_splits.task, head=head)
    groups = layer_groups(pretrained)
    rows = [list(range(6))]
    batch = next(iter(make_loader(square_splits.train, square_splits.task, pretrained.processor, rows, train=True)))
    before = {name: tensor.clone() for name, tensor in pretrained.model.state_dict().items()}
    state, trained = torch.get_rng_state(), []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        trained.append(sum(p.requires_grad for p in pretrained.model.parameters()))
        return default_loss(square_splits.task)(outputs, targets) + torch.rand(())

    for first in (0, len(groups) - 1):
        seconds = seconds_per_step(pretrained, groups, batch, loss, open_from=first, autocast=nullcontext, repeats=2)
        assert 0.0 < seconds < 10.0
    assert trained == [len(list(pretrained.model.parameters()))] * 2 + [2 if head is None else 4] * 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in pretrained.model.parameters())
    for name, tensor in pretrained.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


COSTS = {"steps_per_epoch": 100, "step_seconds": 0.2, "head_step_seconds": 0.04, "head_share": 0.25}


@pytest.mark.parametrize("seconds", [60.0, 100.0, 400.0])
def test_the_epochs_take_the_time(seconds: float) -> None:
    epochs = epochs_in(seconds, evaluate_seconds=4.0, **COSTS)  # type: ignore[arg-type]
    assert epochs > 2.0
    assert epochs * (100 * (0.25 * 0.04 + 0.75 * 0.2) + 4.0) == pytest.approx(seconds)


def test_a_short_time_still_has_two_validations() -> None:
    epochs = epochs_in(20.0, evaluate_seconds=4.0, **COSTS)  # type: ignore[arg-type]
    assert 0.0 < epochs < 2.0
    assert epochs * 100 * (0.25 * 0.04 + 0.75 * 0.2) + 2 * 4.0 == pytest.approx(20.0)


@pytest.mark.parametrize("seconds", [-5.0, 0.0, 1.0])
def test_no_time_is_two_steps(seconds: float) -> None:
    assert epochs_in(seconds, evaluate_seconds=4.0, **COSTS) == 2.0 / 100  # type: ignore[arg-type]


def test_all_the_time_has_an_end() -> None:
    assert epochs_in(1e6, evaluate_seconds=4.0, **COSTS) == 30.0  # type: ignore[arg-type]
