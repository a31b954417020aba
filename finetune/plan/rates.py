"""Layer groups and the head's peak rate go in; one peak rate a group, and optimizer groups, come out.

Discriminative rates (Howard & Ruder 2018, section 3.2) with the decay given as one total span from head to stem: a
network of 6 groups and one of 60 decay to the same rate at the stem, where a factor per layer would not.
"""

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from finetune.errors import PlanError
from finetune.model.groups import LayerGroups


def geometric_rates(groups: int, lr: float, span: float) -> tuple[float, ...]:
    """Peak rate of each of `groups` layer groups, stem first: `lr * span ** -depth`, depth 0 at the head and 1 at the
    stem.

    Raises:
        PlanError: `groups` below 1, `lr` not above 0, or `span` below 1.

    >>> geometric_rates(3, lr=1e-3, span=100)
    (1e-05, 0.0001, 0.001)
    """
    if groups < 1:
        raise PlanError(f"groups={groups}: a network has at least one layer group")
    if not lr > 0.0:
        raise PlanError(f"lr={lr}: the peak rate of the head must be above 0")
    if span < 1.0:
        raise PlanError(f"span={span}: the head's rate over the stem's must be at least 1")
    return tuple(lr * span ** -((groups - 1 - group) / max(1, groups - 1)) for group in range(groups))


def exempt_from_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone: norms, biases and scalars (one dimension or none), and
    what the model itself exempts (timm's `no_weight_decay()`, whose names may hold wildcards)."""
    exempt = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1}
    for prefix, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        if not callable(listed):
            continue
        patterns = [f"{prefix}.{pattern}" if prefix else pattern for pattern in listed()]
        exempt |= {
            name for name, _ in model.named_parameters() for pattern in patterns if fnmatch.fnmatchcase(name, pattern)
        }
    return exempt


def param_groups(
    model: nn.Module, groups: LayerGroups, rates: Sequence[float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups, stem first, for any torch, timm or transformers optimizer: two a layer group, with and
    without decay.

    Every parameter of the network is in exactly one, also what a first stage keeps frozen: later stages then need no
    new optimizer groups. Each dict holds `params`, `lr`, `weight_decay`, `layer_group` (index) and `name`.

    Raises:
        PlanError: `rates` does not give one rate a layer group.
    """
    if len(rates) != len(groups):
        raise PlanError(f"rates: {len(rates)} given for {len(groups)} layer groups; give one a group, stem first")
    parameters = dict(model.named_parameters())
    exempt = exempt_from_decay(model)
    result: list[dict[str, Any]] = []
    for index, (group, rate) in enumerate(zip(groups, rates, strict=True)):
        for suffix, decay, names in _by_decay(group.parameters, exempt, weight_decay):
            result.append(
                {
                    "params": [parameters[name] for name in names],
                    "lr": rate,
                    "weight_decay": decay,
                    "layer_group": index,
                    "name": f"{group.name}{suffix}",
                }
            )
    return result


def _by_decay(names: Iterable[str], exempt: set[str], weight_decay: float) -> list[tuple[str, float, list[str]]]:
    names = list(names)
    decayed = [name for name in names if name not in exempt]
    spared = [name for name in names if name in exempt]
    return [part for part in (("", weight_decay, decayed), (" (no decay)", 0.0, spared)) if part[2]]
