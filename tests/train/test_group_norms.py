"""Norms of gradients and weights by layer group: those of torch, and nothing changes by looking."""

from pathlib import Path

import pytest
import torch

from finetune.data.splits import Splits
from finetune.model.backbones import load_backbone
from finetune.model.groups import LayerGroups, layer_groups
from finetune.train.group_norms import GroupNorms
from tests.train.runs import make


@pytest.fixture
def model(resnet: Path, square_splits: Splits) -> tuple[torch.nn.Module, LayerGroups]:
    pretrained = load_backbone(resnet, square_splits.task)
    return pretrained.model, layer_groups(pretrained)


def give_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("limit", [0.5, 1e9, float("inf")])
def test_clipping_is_torchs_bit_for_bit(model: tuple[torch.nn.Module, LayerGroups], limit: float) -> None:
    network, groups = model
    give_gradients(network, 0)
    expected = torch.nn.utils.clip_grad_norm_(network.parameters(), limit)
    clipped = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    give_gradients(network, 0)
    assert torch.equal(GroupNorms(network, groups, spread=False).clip(limit), expected)
    assert all(torch.equal(p.grad, other) for p, other in zip(network.parameters(), clipped, strict=True))


def test_means_over_steps_and_moves_since_the_start(model: tuple[torch.nn.Module, LayerGroups]) -> None:
    network, groups = model
    norms, named = GroupNorms(network, groups, spread=False), dict(network.named_parameters())
    norms.begin()
    lengths = []
    for seed in (1, 2):
        give_gradients(network, seed)
        lengths.append([sum(float(named[n].grad.square().sum()) for n in g.parameters) ** 0.5 for g in groups])
        norms.clip(1e-3)
    with torch.no_grad():
        for name in groups[1].parameters:
            named[name].mul_(1.25)
    sizes = [sum(float(named[name].detach().square().sum()) for name in group.parameters) ** 0.5 for group in groups]
    found = norms.taken()
    mean = [(a + b) / 2 / size for a, b, size in zip(*lengths, sizes, strict=True)]
    assert found["gradient"] == pytest.approx(mean, rel=1e-3)
    assert found["moved"] == pytest.approx([0.2 if number == 1 else 0.0 for number in range(len(groups))], abs=1e-6)
    assert norms.taken() == {}


def test_a_gradient_that_is_no_number_is_left_out(model: tuple[torch.nn.Module, LayerGroups]) -> None:
    network, groups = model
    norms = GroupNorms(network, groups, spread=False)
    give_gradients(network, 1)
    norms.clip(1.0)
    kept = norms.sums.clone()
    give_gradients(network, 2)
    next(network.parameters()).grad[0] = float("nan")
    assert not torch.isfinite(norms.clip(1.0)) and torch.equal(norms.sums, kept)


def test_what_the_history_says(square_splits: Splits, resnet: Path, tmp_path: Path) -> None:
    trainer = make(square_splits, resnet, tmp_path)
    trainer.run()
    head, *others = trainer.progress.history
    moved = head["groups"]["moved"]
    assert moved[-1] > 0 and not any(moved[:-1])  # only the head was open
    assert all(value > 0 for entry in others for value in entry["groups"]["moved"] + entry["groups"]["gradient"])
    assert others[-1]["groups"]["moved"][0] > others[0]["groups"]["moved"][0]
