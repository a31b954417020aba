"""A model that predicts numbers and the scale of its targets go in; one that trains as if they had mean 0 and deviation
1 comes out, and a plain one again at the end."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from finetune.model.pretrained import Pretrained
from finetune.model.sharding import spread


def scale_outputs(pretrained: Pretrained, mean_K: Tensor, std_K: Tensor) -> Callable[[], None] | None:
    """Let the last new linear layer start at the targets' mean and answer in units of their deviation.

    A fresh layer answers about 0 and moves by about the rate a step: prices in the hundred thousands would take longer
    than any run. The layer's output is scaled by a hook while it trains; the function returned folds the scale into its
    weights, after which the model is a plain one with the same outputs. None where there is no such layer (custom heads
    see the targets as they are).

    Args:
        pretrained: Its model is changed in place.
        mean_K: Mean of each of the K targets.
        std_K: Deviation of each, above 0.
    """
    if pretrained.custom_head and not pretrained.info.get("linear_head"):
        return None
    new = [
        name
        for name, module in pretrained.model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == len(mean_K) and module.bias is not None
        and f"{name}.weight" in pretrained.new_parameters
    ]  # fmt: skip
    if not new:
        return None
    layer = pretrained.model.get_submodule(new[-1])
    assert isinstance(layer, nn.Linear)

    def scale(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        # In fp32: bf16 has three digits, too few beside a large mean.
        return output.float() * std_K.to(output.device) + mean_K.to(output.device)

    hook = layer.register_forward_hook(scale)

    def as_its(parameter: Tensor, values: Tensor) -> Tensor:
        return spread(values.to(parameter.dtype), parameter).to(parameter.device)

    def fold() -> None:
        hook.remove()
        with torch.no_grad():
            scale_KF = std_K.to(layer.weight.dtype)[:, None].repeat(1, layer.in_features)
            layer.weight.mul_(as_its(layer.weight, scale_KF))
            layer.bias.mul_(as_its(layer.bias, std_K)).add_(as_its(layer.bias, mean_K))

    return fold


def target_scale(targets: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Mean and deviation [K] of targets [N][K]; a target that never changes has deviation 1."""
    values_NK = torch.tensor(targets, dtype=torch.float64)
    std_K = values_NK.std(dim=0, correction=0)
    return values_NK.mean(dim=0).float(), torch.where(std_K > 0, std_K, 1.0).float()


def scaled_loss(std_K: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean squared error in units of the targets' deviation, of values and targets [B, K]."""

    def loss(values_BK: Tensor, targets_BK: Tensor) -> Tensor:
        return (((values_BK - targets_BK) / std_K.to(values_BK)) ** 2).mean()

    return loss
