"""Validation logits go in; the temperature that makes their probabilities honest comes out, to be folded into the head.

Dividing the logits by one number changes no answer, only how sure it is (Guo et al. 2017). Divided into the last linear
layer, it comes along wherever the checkpoint is loaded.
"""

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import nn

from finetune.data.task import Task, metrics, softmax
from finetune.train.evaluate import Evaluation

# Standard deviation of log2(temperature) that is thought likely before any row is seen: a few rows that are all right
# would otherwise ask for certainty.
PRIOR = 0.7
BINS = 10


def temperature(valid: Evaluation) -> float:
    """The most likely temperature for logits [N, C] and classes [N], given the rows and `PRIOR`."""
    logits_NC, target_N = np.asarray(valid.outputs, dtype=np.float64), np.asarray(valid.targets)
    rows = np.arange(len(target_N))

    def surprise(power: float) -> float:
        return float(-log_softmax(logits_NC * 2.0**-power, axis=1)[rows, target_N].sum() + (power / PRIOR) ** 2 / 2)

    return float(2.0 ** minimize_scalar(surprise, bounds=(-4, 4), method="bounded").x)


@torch.no_grad()
def fold(layer: nn.Linear, by: float) -> None:
    """Divide what a linear layer answers by a temperature."""
    layer.weight.div_(by)
    if layer.bias is not None:
        layer.bias.div_(by)


def cooled(found: Evaluation, task: Task, by: float) -> Evaluation:
    """The evaluation of the model with its logits divided by a temperature."""
    return with_outputs(found, task, np.asarray(found.outputs) / by)


def with_outputs(found: Evaluation, task: Task, outputs: np.ndarray) -> Evaluation:
    """The evaluation of a model that answers these logits instead."""
    values = metrics(task, outputs, found.targets)
    loss = float(cast(float, values["log_loss"]))
    return replace(found, outputs=outputs, loss=loss, metrics={**values, "loss": loss})


def reliability(found: Evaluation) -> dict[str, Any]:
    """How often answers of some probability are right: {"ece", "log_loss", "bins": [[mean probability, share that is
    right, rows], ...]}. ECE is the mean distance between the first two over the rows, in `BINS` bins of equal width."""
    logits_NC, target_N = np.asarray(found.outputs, dtype=np.float64), np.asarray(found.targets)
    sure_N, right_N = softmax(logits_NC).max(axis=1), logits_NC.argmax(axis=1) == target_N
    which_N = np.minimum((sure_N * BINS).astype(int), BINS - 1)
    bins = [
        [float(sure_N[which_N == b].mean()), float(right_N[which_N == b].mean()), int((which_N == b).sum())]
        for b in range(BINS)
        if (which_N == b).any()
    ]
    ece = sum(rows * abs(sure - right) for sure, right, rows in bins) / len(target_N)
    log_loss = -log_softmax(logits_NC, axis=1)[np.arange(len(target_N)), target_N].mean()
    return {"ece": float(ece), "log_loss": float(log_loss), "bins": bins}


def applies(found: Evaluation, task: Task) -> bool:
    """Whether these are logits of classes, of which one is right."""
    usable = task.kind == "single_label_classification" and isinstance(found.outputs, np.ndarray)
    return usable and found.scores is not None and math.isfinite(found.loss)
