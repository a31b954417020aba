"""A model, its groups and a batch go in; what was measured on them comes out. Weights are left as they were."""

import time
from collections.abc import Callable
from typing import Any

import torch

from finetune.data.loaders import Batch
from finetune.model.groups import LayerGroups, set_mode, set_trainable
from finetune.model.pretrained import Pretrained
from finetune.model.tracing import unchanged


def seconds_per_step(
    pretrained: Pretrained,
    groups: LayerGroups,
    batch: Batch,
    loss: Callable[[Any, Any], torch.Tensor],
    *,
    open_from: int,
    autocast: Callable[[], Any],
    repeats: int = 3,
) -> float:
    """Seconds of forward and backward pass on `batch` with the groups from `open_from` on open: the least of
    `repeats`."""
    device = next(pretrained.model.parameters()).device
    batch = batch.to(device)
    set_trainable(pretrained.model, groups, open_from)
    set_mode(pretrained.model, groups, open_from)
    with unchanged(pretrained.model):  # a new BatchNorm takes the batch into its statistics
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            with autocast():
                value = loss(pretrained.forward(batch.inputs), batch.targets)
            value.backward()
            times.append(time.perf_counter() - begin + 0.0 * float(value.detach()))
    pretrained.model.zero_grad(set_to_none=True)
    return min(times)


def epochs_in(
    seconds: float,
    *,
    steps_per_epoch: int,
    step_seconds: float,
    head_step_seconds: float,
    evaluate_seconds: float,
    head_share: float,
    most: float = 30.0,
) -> float:
    """Epochs that fit into `seconds`, a share of them with the head alone, each followed by a validation."""
    step = head_share * head_step_seconds + (1.0 - head_share) * step_seconds
    epochs = seconds / (steps_per_epoch * step + evaluate_seconds)
    # Below one epoch there is a validation after each of the two stages all the same.
    if epochs < 2.0:
        epochs = max(0.0, seconds - 2.0 * evaluate_seconds) / (steps_per_epoch * step)
    return min(most, max(2.0 / steps_per_epoch, epochs))
