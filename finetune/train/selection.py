"""Evaluations of several weights of one run go in; which of them is kept comes out.

In the middle of a cycle the ranking of weights reverses (Smith's own logs), and a small validation part is noisy: so
the end of the cycle is kept, its average where validation prefers that, and earlier weights only when they are
clearly better.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from finetune.data.task import Task, default_loss
from finetune.model.sharding import local
from finetune.train.evaluate import Evaluation

AVERAGED_SHARE = 0.3  # The end of the last stage over which weights are averaged.
AVERAGE_UPDATES = 30  # Times that the average takes in new weights: each costs a pass over all of them.
AVERAGE_DECAY = 0.9  # Weight of the average so far: it looks back over about a third of the updates.


def standing(valid: Evaluation) -> tuple[float, float]:
    """What decides between weights: the mean score of the rows, then the loss."""
    return (float(valid.scores.mean()) if valid.scores is not None else 0.0, -valid.loss)


def candidate(valid: Evaluation, epoch: int) -> dict[str, Any]:
    """What is remembered of an evaluation, as plain data that a checkpoint can hold."""
    scores = None if valid.scores is None else valid.scores.tolist()
    return {"epoch": epoch, "standing": list(standing(valid)), "scores": scores}


def clearly_better(before: dict[str, Any], last: Evaluation) -> bool:
    """Whether an earlier candidate leads by more than two standard errors of the difference, row by row.

    Two and not one, because it is the best of many: of 25 epochs judged on 20 rows, one leads by luck.

    Where there are no scores of rows (custom heads), the lower loss is better.
    """
    if last.scores is None or before["scores"] is None:
        return bool(before["standing"][1] > -last.loss)
    difference = np.asarray(before["scores"]) - last.scores
    rows = len(difference)
    return bool(difference.mean() > 2.0 * difference.std(ddof=min(1, rows - 1)) / math.sqrt(rows))


def head_is_better(head: Evaluation, last: Evaluation, task: Task, *, clearly: bool = False) -> bool:
    """Whether training has made the model worse than the solved head that it began with.

    Told by the loss of the validation rows, each model at its own best temperature: on few rows accuracy is too coarse,
    and fine-tuning makes a model surer of itself than it should be, which says nothing about what it has learnt.

    Args:
        head: With the solved head.
        last: After training.
        task: What the outputs are.
        clearly: Ask for two standard errors of the difference, row by row.
    """
    if head.scores is None or last.scores is None:
        return head.loss < last.loss
    difference_N = calibrated_losses(last, task) - calibrated_losses(head, task)
    margin = 2.0 * difference_N.std() / math.sqrt(len(difference_N)) if clearly else 0.0
    return bool(difference_N.mean() > margin)


def calibrated_losses(valid: Evaluation, task: Task) -> np.ndarray:
    """Loss of each row with the logits divided by the temperature that makes it smallest (Guo et al. 2017); of values,
    as they are."""
    loss = default_loss(task)
    rows = [
        (torch.from_numpy(np.asarray(output))[None], torch.from_numpy(np.asarray(target))[None])
        for output, target in zip(valid.outputs, valid.targets, strict=True)
    ]
    axis = 1 if isinstance(valid.outputs, list) else 0  # tags of words: rows of different lengths
    logits, targets = (torch.cat(part, dim=axis) for part in zip(*rows, strict=True))
    power = 0.0
    if task.kind != "regression":
        power = minimize_scalar(
            lambda power: float(loss(logits * 2.0**power, targets)), bounds=(-6, 6), method="bounded"
        ).x
    return np.array([float(loss(output * 2.0**power, target)) for output, target in rows])


def averages_at(step: int, steps: int) -> bool:
    """Whether the average takes in the weights after `step` (from 0) of a last stage of `steps`."""
    window = max(1, round(AVERAGED_SHARE * steps))
    left = steps - 1 - step
    return left < window and left % max(1, window // AVERAGE_UPDATES) == 0


class Average:
    """Exponential moving average of a model's weights and buffers, which begins with those of now.

    Attributes:
        tensors: By the names of the state dict; of a spread model, each process has its parts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def update(self, model: nn.Module, share: float = 1.0 - AVERAGE_DECAY) -> None:
        """Take in the weights of now with `share` of the whole; of counts, the last."""
        for name, tensor in model.state_dict().items():
            mine, now = local(self.tensors[name]), local(tensor.detach())
            mine.lerp_(now, share) if mine.is_floating_point() else mine.copy_(now)
