"""A model and a data set go in; outputs and targets of every row, once each and in order, come out, with loss and
scores."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset

from finetune.data.loaders import Batch, epoch_order, make_loader, token_batches
from finetune.data.task import Task, metrics, per_example_score, units
from finetune.model.pretrained import Pretrained
from finetune.train.processes import Processes

Loss = Callable[[Any, torch.Tensor], torch.Tensor]
Metrics = Callable[[Any, Any], dict[str, float]]


class Source(Protocol):
    """Batches of rows and the model's outputs for them, however they are come by."""

    def loader(self, batches: list[list[int]]) -> Iterable[Batch]:
        """One batch for each list of rows."""

    def forward(self, batch: Batch) -> Any:
        """Outputs for one of them."""


@dataclass(frozen=True)
class Evaluation:
    """What the model made of a data set.

    Attributes:
        outputs: Logits or values: array [N, C], for tags a list of [T_i, C]; for a head with several outputs a dict
            of arrays.
        targets: Array [N] or [N, K]; for tags a list of [T_i].
        loss: Mean of the training loss over the rows.
        metrics: By name, the loss among them.
        scores: One per row [N], higher is better; None where the outputs are a custom head's own.
    """

    outputs: Any
    targets: Any
    loss: float
    metrics: dict[str, Any]
    scores: np.ndarray | None


def evaluate(
    pretrained: Pretrained,
    dataset: Dataset,
    task: Task,
    processes: Processes,
    *,
    loss: Loss,
    batch_size: int,
    lengths: Sequence[int] | None = None,
    own_metrics: Metrics | None = None,
    replayed: Source | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate every row once, spread over the processes; the model is in eval mode for it.

    `replayed` gives batches and outputs instead of the data set and the whole model; `options` are the loader's.
    """
    batches, counted = processes.shares(ordered_batches(len(dataset), batch_size, lengths))
    pretrained.model.eval()
    rows: list[tuple[int, Any, np.ndarray]] = []
    sums: list[tuple[float, int]] = []
    with torch.no_grad():
        loader = make_loader(dataset, task, pretrained.processor, batches, **{"train": False} | options) if (
            replayed is None
        ) else replayed.loader(batches)  # fmt: skip
        for number, batch in enumerate(loader):
            batch = batch.to(processes.device)
            assert batch.targets is not None
            with processes.autocast():
                outputs = as_float(pretrained.forward(batch.inputs) if replayed is None else replayed.forward(batch))
            if number >= counted:
                continue
            count = units(task, batch.targets)
            sums.append((float(loss(outputs, batch.targets)) * count, count))
            rows += _by_row(task, batch.index, outputs, batch.targets)
    rows = sorted(processes.gather(rows), key=lambda row: row[0])
    sums = processes.gather(sums)
    mean_loss = sum(value for value, _ in sums) / max(1, sum(count for _, count in sums))
    outputs, targets = _stack(task, [row[1] for row in rows]), _stack(task, [row[2] for row in rows])
    if own_metrics is not None:
        return Evaluation(outputs, targets, mean_loss, {**own_metrics(outputs, targets), "loss": mean_loss}, None)
    if isinstance(outputs, dict):
        return Evaluation(outputs, targets, mean_loss, {"loss": mean_loss}, None)
    return Evaluation(
        outputs,
        targets,
        mean_loss,
        {**metrics(task, outputs, targets), "loss": mean_loss},
        per_example_score(task, outputs, targets),
    )


def ordered_batches(rows: int, batch_size: int, lengths: Sequence[int] | None) -> list[list[int]]:
    """Batches for a pass without gradients: of images in order, of texts by length, so many as fit the tokens that
    `batch_size` texts of the middle length have."""
    if lengths is None:
        return epoch_order(rows, batch_size, seed=0, epoch=None)
    return token_batches(lengths, batch_size * max(1, int(np.median(lengths))), 8 * batch_size)


def as_float(outputs: Any) -> Any:
    """Outputs in fp32, whatever autocast computed in: losses and metrics need its range."""
    if isinstance(outputs, dict):
        return {name: tensor.float() for name, tensor in outputs.items()}
    return outputs.float()


def _by_row(task: Task, index: torch.Tensor, outputs: Any, targets: torch.Tensor) -> list[tuple[int, Any, np.ndarray]]:
    targets_np = targets.cpu().numpy()
    if isinstance(outputs, dict):
        arrays = {name: tensor.cpu().numpy() for name, tensor in outputs.items()}
        return [
            (int(row), {name: array[i] for name, array in arrays.items()}, targets_np[i]) for i, row in enumerate(index)
        ]
    array = outputs.cpu().numpy()
    if task.kind != "token_classification":
        return [(int(row), array[i], targets_np[i]) for i, row in enumerate(index)]
    # Only the first piece of each word carries a label; the rest and the padding say nothing.
    return [
        (int(row), array[i][targets_np[i] != -100], targets_np[i][targets_np[i] != -100]) for i, row in enumerate(index)
    ]


def _stack(task: Task, rows: list[Any]) -> Any:
    if rows and isinstance(rows[0], dict):
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return rows if task.kind == "token_classification" else np.stack(rows)
