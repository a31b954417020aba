"""What the gradients of a known problem say, group by group."""

import math

import pytest
import torch
from torch import nn

from finetune.data.task import Task
from finetune.errors import PlanError
from finetune.model.groups import LayerGroup, LayerGroups
from finetune.plan.gradients import gradient_report


class Two(nn.Module):
    """A quadratic in two groups: the loss is sum((a - target) ** 2 * bend) + ... of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Parameter(torch.tensor([3.0, -1.0])), nn.Parameter(torch.tensor([2.0]))


GROUPS = LayerGroups((LayerGroup("stem", ("stem",), 2), LayerGroup("head", ("head",), 1)))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    assert isinstance(model, Two)
    return 0.5 * (4.0 * (model.stem - batch).square().sum() + 10.0 * model.head.square().sum())


def test_a_quadratic_is_read_exactly() -> None:
    model = Two()
    batches = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])]  # the mean gradient is that of 0
    model.stem.grad = torch.ones(2)
    stem, head = gradient_report(model, GROUPS, batches, loss)
    assert stem.name == "stem" and stem.norm == pytest.approx(4 * math.sqrt(10)) and head.norm == pytest.approx(20.0)
    assert stem.relative == pytest.approx(4.0) and head.relative == pytest.approx(10.0)
    # Each batch's gradient is 4 away from the mean on one axis: variance 2 * 16 for two batches, 16 of it in the mean.
    assert stem.noise == pytest.approx(32 / (160 - 16)) and head.noise == pytest.approx(0.0, abs=1e-6)
    assert stem.slope == pytest.approx(16.0) and stem.curvature == pytest.approx(8.0, rel=1e-2)
    assert head.slope == pytest.approx(20.0) and head.step == pytest.approx(2.0, rel=1e-2)
    assert torch.equal(model.stem.detach(), torch.tensor([3.0, -1.0])) and torch.equal(model.stem.grad, torch.ones(2))
    assert "curvature" in str(gradient_report(model, GROUPS, batches, loss)).splitlines()[0]


def test_batches_that_contradict_each_other_are_all_noise() -> None:
    model = Two()
    with torch.no_grad():
        model.stem.zero_()
        model.head.zero_()
    batches = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])]
    stem, head = gradient_report(model, GROUPS, batches, loss)
    assert stem.noise == math.inf and stem.norm == 0.0 and head.norm == 0.0


def test_one_batch_is_too_few() -> None:
    with pytest.raises(PlanError, match="at least two batches"):
        gradient_report(Two(), GROUPS, [torch.zeros(2)], loss)


def test_a_real_network(resnet: object) -> None:
    from finetune.model.backbones import load_backbone
    from finetune.model.groups import layer_groups

    task = Task("single_label_classification", "image", ("a", "b", "c"))
    pretrained = load_backbone(resnet, task)  # type: ignore[arg-type]
    groups = layer_groups(pretrained)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(3)]
    before = {name: value.clone() for name, value in pretrained.model.state_dict().items()}

    def of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch), torch.tensor([0, 1, 2, 0]))

    found = gradient_report(pretrained.model, groups, batches, of)
    assert [one.name for one in found] == [group.name for group in groups]
    assert all(one.norm > 0 and one.slope > 0 and math.isfinite(one.relative) for one in found)
    assert all(torch.equal(value, before[name]) for name, value in pretrained.model.state_dict().items())
