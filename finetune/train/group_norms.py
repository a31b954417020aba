"""Gradients of each step go in; their clipped selves, and how large they and the weights were in each layer group, come
out.

What is reported of a group: the mean norm of its gradient over the steps of an epoch, and how far its weights have
moved since the start, both over the norm of its weights (You et al. 2017, LARS, section 4: their ratio tells what a
rate does to a layer).
"""

from typing import Any, cast

import torch
from torch import nn

from finetune.model.groups import LayerGroups

MOST_BYTES = 2**31  # of weights whose start is remembered


class GroupNorms:
    """Norms of the gradients of each layer group, summed over steps on the device: nothing waits for it.

    Args:
        model: Its weights of now are the start.
        groups: Its layer groups.
        spread: Whether it is spread over several processes, each of which has a part: then only the whole norm is told.
    """

    def __init__(self, model: nn.Module, groups: LayerGroups, *, spread: bool) -> None:
        self.model, self.count, self.spread = model, len(groups), spread
        place = {name: number for number, group in enumerate(groups) for name in group.parameters}
        self.group_of = {parameter: place[name] for name, parameter in model.named_parameters() if name in place}
        device = next(model.parameters()).device
        self.sums, self.steps = torch.zeros(self.count, device=device, dtype=torch.float64), 0
        self.start: list[torch.Tensor] | None = None

    def begin(self) -> None:
        """Remember the weights of now, which those of later are measured against."""
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.group_of)
        if not self.spread and size <= MOST_BYTES:
            self.start = [parameter.detach().clone() for parameter in self.group_of]

    def clip(self, limit: float) -> torch.Tensor:
        """Scale all gradients down to the norm `limit` where it is larger; the norm before. As torch's
        `clip_grad_norm_`, whose own norms of each tensor are used for the groups too."""
        open_ = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        if self.spread:
            return torch.nn.utils.clip_grad_norm_(open_, limit)
        norms = torch.stack(torch._foreach_norm([cast(torch.Tensor, parameter.grad) for parameter in open_]))
        total = torch.linalg.vector_norm(norms)
        torch.nn.utils.clip_grads_with_norm_(open_, limit, total)
        which = torch.tensor([self.group_of.get(parameter, self.count - 1) for parameter in open_], device=norms.device)
        squares = torch.zeros_like(self.sums).index_add_(0, which, norms.double().square())
        self.sums += torch.where(torch.isfinite(total), squares.sqrt(), torch.zeros_like(squares))
        self.steps += 1
        return total

    def taken(self) -> dict[str, list[float]]:
        """{"gradient", "moved"} of each group over the norm of its weights, since the last time; begins anew."""
        if self.spread or self.steps == 0:
            return {}
        squares = torch.zeros(2, self.count, dtype=torch.float64)
        weights = [parameter.detach() for parameter in self.group_of]
        lengths = [torch.stack(torch._foreach_norm(weights))]
        if self.start is not None:
            lengths.append(torch.stack(torch._foreach_norm(torch._foreach_sub(weights, self.start))))
        for row, each in zip(squares, lengths, strict=False):
            row.index_add_(0, torch.tensor(list(self.group_of.values())), each.double().cpu().square())
        size, moved = squares.sqrt()
        found = {"gradient": _over(self.sums.cpu() / self.steps, size)}
        if self.start is not None:
            found["moved"] = _over(moved, size)
        self.sums.zero_()
        self.steps = 0
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"sums": self.sums.tolist(), "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        if state:
            self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
            self.steps = state["steps"]


def _over(values: torch.Tensor, size: torch.Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in (values / size.clamp(min=1e-12)).tolist()]
