"""One run of the experiment: a cell (network, schedule, rate, decay, seed ...) -> its accuracies along the way."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedules import SHAPES
from .sets import Rows, moved

LOOKS = 12  # at the test set on the way, for the curve
HOPELESS = 1e4  # a loss from which no run came back


@dataclass(frozen=True)
class Cell:
    """What one run is made of.

    Attributes:
        schedule: Name in `SHAPES`.
        steps: Optimizer steps of the whole run.
        peak: Highest rate.
        batch: Pictures a step.
        weight_decay: Of all parameters, coupled for "sgd" (as Smith has it), decoupled for "adamw".
        momentum: Where the schedule does not cycle it; Adam's beta1.
        optimizer: "sgd" or "adamw".
        beta2, eps: Adam's.
        seed: Of the drawn rows, the first weights and the order.
    """

    schedule: str
    steps: int
    peak: float
    batch: int
    weight_decay: float
    momentum: float = 0.9
    optimizer: str = "sgd"
    beta2: float = 0.99
    eps: float = 1e-8
    seed: int = 0

    def key(self) -> dict[str, Any]:
        """What tells this cell from all others, as plain data."""
        return asdict(self)


def make_optimizer(parameters: Any, cell: Cell) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW, as the cell says."""
    if cell.optimizer == "sgd":
        return torch.optim.SGD(parameters, cell.peak, momentum=cell.momentum, weight_decay=cell.weight_decay)
    return torch.optim.AdamW(
        parameters, cell.peak, betas=(cell.momentum, cell.beta2), eps=cell.eps, weight_decay=cell.weight_decay
    )


def train(
    cell: Cell, rows: Rows, model: nn.Module, *, looks: int = LOOKS, until: Callable[[float], bool] | None = None
) -> dict[str, Any]:
    """Train `model` in place and look at the test rows now and then.

    Returns:
        accuracy (share of the test rows, at the end), loss (mean of the last tenth of the steps; None where it ran
        away), curve ([step, accuracy] pairs), seconds (of training, without the looks), steps (that were done; fewer
        where the loss ran away, or `until` said yes to an accuracy on the way).
    """
    torch.manual_seed(cell.seed)
    generator = torch.Generator().manual_seed(cell.seed)
    shape, optimizer = SHAPES[cell.schedule], make_optimizer(model.parameters(), cell)
    stops = {round((look + 1) * cell.steps / looks) for look in range(looks)}
    losses: list[Tensor] = []
    curve: list[tuple[int, float]] = []
    order, seconds, begin = torch.empty(0, dtype=torch.long), 0.0, time.perf_counter()
    for step in range(cell.steps):
        if len(order) < cell.batch:
            order = torch.cat([order, torch.randperm(len(rows.train_y), generator=generator)])
        chosen, order = order[: cell.batch].to(rows.train_y.device), order[cell.batch :]
        _set(optimizer, cell.peak, *shape.at(step, cell.steps))
        model.train()
        loss = F.cross_entropy(model(moved(rows.train_x[chosen], rows, generator)), rows.train_y[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step + 1 in stops:
            away = not losses[-1].item() < HOPELESS  # waits for the device: the clock has it all
            seconds += time.perf_counter() - begin
            curve.append((step + 1, round(accuracy(model, rows), 5)))
            begin = time.perf_counter()
            if away or (until is not None and until(curve[-1][1])):
                break
    last = torch.stack(losses[-max(1, cell.steps // 10) :]).mean().item()
    return {"accuracy": curve[-1][1], "loss": round(last, 5) if math.isfinite(last) else None, "curve": curve,
            "seconds": round(seconds, 2), "steps": len(losses)}  # fmt: skip


def accuracy(model: nn.Module, rows: Rows, batch: int = 500) -> float:
    """Share of the test rows that `model` gets right."""
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in
                 zip(rows.test_x.split(batch), rows.test_y.split(batch), strict=True)]  # fmt: skip
    return int(torch.stack(right).sum()) / len(rows.test_y)


def _set(optimizer: torch.optim.Optimizer, peak: float, share: float, momentum: float | None) -> None:
    for group in optimizer.param_groups:
        group["lr"] = peak * share
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif momentum is not None:
            group["momentum"] = momentum
