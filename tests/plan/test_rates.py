"""Peak rates from stem to head, and the optimizer groups that carry them."""

import doctest
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import timm.optim
import torch
import transformers
from torch import nn

from finetune.errors import PlanError
from finetune.model.groups import LayerGroup, LayerGroups
from finetune.plan import rates
from finetune.plan.rates import exempt_from_decay, geometric_rates, param_groups


@dataclass(frozen=True)
class Case:
    """A network, its groups and what optimizers get for them."""

    model: nn.Module
    groups: LayerGroups
    params: list[dict[str, Any]]

    def holders(self) -> dict[str, list[dict[str, Any]]]:
        """The optimizer groups that each parameter is in, by name."""
        return {
            name: [group for group in self.params if any(p is one for one in group["params"])]
            for name, p in self.model.named_parameters()
        }


def by_prefix(model: nn.Module, **prefixes: tuple[str, ...]) -> LayerGroups:
    """Groups by the beginnings of names; the last gets the rest."""
    names, groups = [name for name, _ in model.named_parameters()], []
    for group, starts in prefixes.items():
        mine = tuple(name for name in names if name.startswith(starts))
        names = [name for name in names if name not in mine]
        groups.append(LayerGroup(group, mine, 0))
    assert not names
    return LayerGroups(tuple(groups))


@pytest.fixture
def vit() -> Case:
    """A tiny ViT whose `no_weight_decay` names two tensors of three dimensions."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}
    groups = by_prefix(model, stem=("cls_token", "pos_embed", "patch_embed", "reg"), blocks=("blocks",), head=("",))
    return Case(model, groups, param_groups(model, groups, (1e-4, 1e-3, 1e-2), 0.05))


def test_documentation() -> None:
    assert doctest.testmod(rates).attempted >= 1 and doctest.testmod(rates).failed == 0


def test_rates_fall_geometrically_from_head_to_stem() -> None:
    found = geometric_rates(6, lr=1e-3, span=32.0)
    assert found == pytest.approx([1e-3 / 2**k for k in (5, 4, 3, 2, 1, 0)], rel=1e-12)
    assert found[-1] == 1e-3


def test_the_depth_of_a_network_does_not_change_the_span() -> None:
    short, long = geometric_rates(6, 1e-3, 10.0), geometric_rates(60, 1e-3, 10.0)
    assert short[0] == long[0] == pytest.approx(1e-4) and short[-1] == long[-1] == 1e-3
    assert list(long) == sorted(long) and len(set(long)) == 60


def test_one_group_and_no_span() -> None:
    assert geometric_rates(1, 1e-3, 100.0) == (1e-3,)
    assert geometric_rates(4, 1e-3, 1.0) == (1e-3,) * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1e-3, 10.0), "groups=0: a network has at least one layer group"),
        ((3, 0.0, 10.0), "lr=0.0: the peak rate of the head must be above 0"),
        ((3, float("nan"), 10.0), "lr=nan: the peak rate"),
        ((3, 1e-3, 0.5), "span=0.5: the head's rate over the stem's must be at least 1"),
    ],
)
def test_errors_name_the_option(arguments: tuple[int, float, float], message: str) -> None:
    with pytest.raises(PlanError, match=f"^{message}"):
        geometric_rates(*arguments)


def test_every_parameter_is_in_one_group_with_its_rate(vit: Case) -> None:
    peaks = (1e-4, 1e-3, 1e-2)
    for name, holders in vit.holders().items():
        assert len(holders) == 1, name
        index = vit.groups.of_parameter(name)
        assert (holders[0]["layer_group"], holders[0]["lr"]) == (index, peaks[index]), name
        assert holders[0]["name"].startswith(vit.groups[index].name)
    assert [group["layer_group"] for group in vit.params] == sorted(group["layer_group"] for group in vit.params)
    assert all(group["params"] for group in vit.params)


def test_what_decays_and_what_does_not(vit: Case) -> None:
    decay = {name: holders[0]["weight_decay"] for name, holders in vit.holders().items()}
    for name, parameter in vit.model.named_parameters():
        spared = parameter.ndim <= 1 or name in ("pos_embed", "cls_token")
        assert decay[name] == (0.0 if spared else 0.05), name
    assert vit.model.pos_embed.ndim == 3 and decay["pos_embed"] == 0.0
    assert decay["head.weight"] == decay["blocks.0.attn.qkv.weight"] == 0.05


def test_exemptions_of_an_inner_model_and_with_wildcards() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 3))
            self.tables = nn.ParameterList([nn.Parameter(torch.zeros(2, 2)) for _ in range(2)])
            self.linear = nn.Linear(3, 3)

        def no_weight_decay(self) -> set[str]:
            return {"table", "tables.*"}

    model = nn.ModuleDict({"backbone": Inner(), "head": nn.Linear(3, 2), "table": nn.Linear(2, 2)})
    assert exempt_from_decay(model) == {
        "backbone.table", "backbone.tables.0", "backbone.tables.1", "backbone.linear.bias", "head.bias", "table.bias",
    }  # fmt: skip


def test_tied_weights_count_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "decode": nn.Linear(4, 5)})
    model["decode"].weight = model["embed"].weight
    groups = by_prefix(model, stem=("embed",), body=("body",), head=("",))
    held = [p for group in param_groups(model, groups, (1.0, 2.0, 3.0), 0.1) for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters())) == 4
    torch.optim.AdamW(param_groups(model, groups, (1.0, 2.0, 3.0), 0.1))  # warns and fails on doubles


def test_one_rate_a_group(vit: Case) -> None:
    with pytest.raises(PlanError, match="^rates: 2 given for 3 layer groups; give one a group"):
        param_groups(vit.model, vit.groups, (1e-3, 1e-3), 0.0)


OPTIMIZERS = {
    "torch SGD": lambda params: torch.optim.SGD(params, momentum=0.9),
    "torch AdamW": lambda params: torch.optim.AdamW(params, fused=True),
    "timm AdamP": timm.optim.AdamP,
    "timm Lamb": timm.optim.Lamb,
    "transformers Adafactor": lambda params: transformers.Adafactor(
        params, relative_step=False, scale_parameter=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_takes_the_groups(vit: Case, kind: str) -> None:
    """One step at one rate everywhere but for the stem, whose rate is a hundred thousandth: it hardly moves."""
    params = param_groups(vit.model, vit.groups, (1e-8, 1e-3, 1e-3), 0.05)
    optimizer = OPTIMIZERS[kind](params)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in params]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [group["weight_decay"] for group in params]
    before = {name: p.detach().clone() for name, p in vit.model.named_parameters()}
    vit.model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = {
        name: float((p.detach() - before[name]).abs().max())
        for name, p in vit.model.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }
    by_group = [max(m for name, m in moved.items() if vit.groups.of_parameter(name) == index) for index in range(3)]
    assert by_group[0] < 1e-3 * by_group[1] and by_group[0] < 1e-3 * by_group[2]
    assert min(by_group[1:]) > 1e-6
