"""Evaluations of several weights of one run go in; which of them is kept comes out.

In the middle of a cycle the ranking of weights reverses (Smith's own logs), and a small validation part is noisy: so
the end of the cycle is kept, its average where validation prefers that, and earlier weights only when they are
clearly better.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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


def averages_at(step: int, steps: int) -> bool:
    """Whether the average takes in the weights after `step` (from 0) of a last stage of `steps`."""
    window = max(1, round(AVERAGED_SHARE * steps))
    left = steps - 1 - step
    return left < window and left % max(1, window // AVERAGE_UPDATES) == 0


def new_average(model: nn.Module) -> AveragedModel:
    """An exponential moving average of the weights, which holds those of now."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY), use_buffers=True)


def averaged_weights(average: AveragedModel) -> dict[str, torch.Tensor]:
    """State dict of the average, by the names of the model's own."""
    return average.module.state_dict()
