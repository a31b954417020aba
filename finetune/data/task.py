"""What is learned: a kind, a modality and labels go in, a `Task` comes out, with its loss and its metrics.

Shapes: B examples of a batch, N examples of a split, C classes, K regression targets, T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from sklearn import metrics as sk
from torch import Tensor

from finetune.errors import DataError

KINDS = ("single_label_classification", "multi_label_classification", "regression", "token_classification")
SHORT = {"single_label": KINDS[0], "multi_label": KINDS[1], "regression": KINDS[2], "tokens": KINDS[3]}
IGNORED = -100  # target of a position that is not scored: padding, special tokens, later pieces of a word

Metrics = dict[str, float | list[Any]]


@dataclass(frozen=True)
class Task:
    """What the head learns: one of `KINDS`, on "image" or "text", and its labels in the order of the outputs.

    For regression, `labels` holds the names of the target columns.
    """

    kind: str
    modality: str
    labels: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Width of the head: C classes, or K regression targets."""
        return len(self.labels)


def full_kind(name: str) -> str:
    """Return transformers' name of a kind given in full or short.

    Raises:
        DataError: No such kind.
    """
    kind = SHORT.get(name, name)
    if kind not in KINDS:
        raise DataError(f"task: {name!r} is not a kind of task; give one of {', '.join(SHORT)}")
    return kind


def default_loss(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of (outputs in fp32, targets), a mean over `units`.

    Outputs are [B, C] (tokens: [B, T, C]); targets are int64 [B], float [B, C], float [B, K], or int64 [B, T] in
    which -100 is skipped.
    """
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "single_label_classification": F.cross_entropy,
        "multi_label_classification": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
        "token_classification": token_loss,
    }
    return losses[task.kind]


def token_loss(logits_BTC: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy over the labelled positions; zero, not NaN, where a batch has none."""
    total = F.cross_entropy(logits_BTC.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets_BT != IGNORED).sum().clamp(min=1)


def units(task: Task, targets: Tensor) -> int:
    """Number of terms that the loss is a mean over, up to a constant: examples, or labelled tokens."""
    if task.kind == "token_classification":
        return int((targets != IGNORED).sum())
    return len(targets)


# What the scores say. Everything below is numpy, [N, C]; for tokens a list of N arrays [T, C]


def predictions(task: Task, logits: Any) -> Any:
    """Turn logits [N, C] into probabilities (softmax, sigmoid), or values [N, K] as they are."""
    if task.kind == "token_classification":
        return [softmax(np.asarray(logits_TC)) for logits_TC in logits]
    z = np.asarray(logits)
    if task.kind == "multi_label_classification":
        return np.exp(-np.logaddexp(0, -z.astype(np.float64))).astype(z.dtype)
    return softmax(z) if task.kind == "single_label_classification" else z


def softmax(z: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


MAIN = {
    "single_label_classification": ("accuracy", 1),
    "multi_label_classification": ("f1_macro", 1),
    "regression": ("rmse", -1),
    "token_classification": ("f1", 1),
}


def main_metric(task: Task) -> tuple[str, int]:
    """Return the metric that decides, and +1 where higher is better, -1 where lower is."""
    return MAIN[task.kind]


def metrics(task: Task, logits: Any, targets: Any) -> Metrics:
    """Score a whole split, under scikit-learn's names.

    Args:
        task: The task.
        logits: [N, C] or [N, K]; for tokens a list of N arrays [T, C].
        targets: [N], [N, C] or [N, K]; for tokens a list of N arrays [T], -100 where there is nothing to score.
    """
    if task.kind == "token_classification":
        return token_metrics(task, logits, targets)
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    if task.kind == "regression":
        return regression_metrics(z.reshape(len(y), -1), y.reshape(len(y), -1).astype(np.float64))
    finite = bool(np.isfinite(z).all())
    if task.kind == "multi_label_classification":
        y, chosen = y.astype(int), (z > 0).astype(int)
        return {
            "accuracy": float(sk.accuracy_score(y, chosen)),  # every label of the example right
            "f1_macro": float(sk.f1_score(y, chosen, average="macro", zero_division=0)),
            "f1_micro": float(sk.f1_score(y, chosen, average="micro", zero_division=0)),
            "log_loss": float((np.logaddexp(0, z) - y * z).mean()) if finite else math.nan,
        }
    chosen, classes = z.argmax(axis=1), np.arange(task.outputs)
    return {
        "accuracy": float(sk.accuracy_score(y, chosen)),
        "f1_macro": float(sk.f1_score(y, chosen, average="macro", zero_division=0)),
        "log_loss": float(sk.log_loss(y, softmax(z), labels=classes)) if finite else math.nan,
        "confusion": sk.confusion_matrix(y, chosen, labels=classes).tolist(),
    }


def regression_metrics(values_NK: np.ndarray, targets_NK: np.ndarray) -> Metrics:
    """Mean absolute error, root mean squared error, rank correlation and R², each a plain mean over the K targets."""
    from scipy.stats import spearmanr

    def rank_correlation(k: int) -> float:
        value, target = values_NK[:, k], targets_NK[:, k]
        if len(value) < 2 or np.ptp(value) == 0 or np.ptp(target) == 0:
            return 0.0  # not defined for a constant
        return float(spearmanr(value, target).statistic)

    return {
        "mae": float(sk.mean_absolute_error(targets_NK, values_NK)),
        "rmse": float(sk.root_mean_squared_error(targets_NK, values_NK)),
        "spearman": float(np.mean([rank_correlation(k) for k in range(values_NK.shape[1])])),
        "r2": float(sk.r2_score(targets_NK, values_NK)) if len(targets_NK) > 1 else 0.0,
    }


def token_metrics(task: Task, logits: Any, targets: Any) -> Metrics:
    """Precision, recall and F1 of whole entities (type and both ends right), and the accuracy of tokens.

    Tags without B-/I- are scored one token at a time, as a macro mean over tags.
    """
    true, chosen = [], []
    for logits_TC, target_T in zip(logits, targets, strict=True):
        scored = np.asarray(target_T) != IGNORED
        true.append(np.asarray(target_T)[scored])
        chosen.append(np.asarray(logits_TC).argmax(axis=-1)[scored])
    flat_true, flat_chosen = np.concatenate(true), np.concatenate(chosen)
    accuracy = float(sk.accuracy_score(flat_true, flat_chosen))
    if any(name.startswith(("B-", "I-")) for name in task.labels):
        f1, precision, recall = entity_scores(
            [[task.labels[i] for i in row] for row in true], [[task.labels[i] for i in row] for row in chosen]
        )
    else:
        options = {"average": "macro", "zero_division": 0}
        f1 = float(sk.f1_score(flat_true, flat_chosen, **options))
        precision = float(sk.precision_score(flat_true, flat_chosen, **options))
        recall = float(sk.recall_score(flat_true, flat_chosen, **options))
    return {"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy}


def entity_scores(true: list[list[str]], chosen: list[list[str]]) -> tuple[float, float, float]:
    """Micro F1, precision and recall of entities under nervaluate's strict matching."""
    from nervaluate.loaders import ListLoader
    from nervaluate.strategies import StrictEvaluation

    right = found = present = 0
    for true_row, chosen_row in zip(ListLoader().load(true), ListLoader().load(chosen), strict=True):
        kinds = sorted({entity.label for entity in true_row + chosen_row})
        result, _ = StrictEvaluation().evaluate(true_row, chosen_row, kinds)
        right += result.correct
        found += len(chosen_row)
        present += len(true_row)
    precision, recall = right / max(1, found), right / max(1, present)
    return 2 * right / max(1, found + present), precision, recall


def per_example_score(task: Task, logits: Any, targets: Any) -> np.ndarray:
    """One score an example [N], higher is better.

    Right or not (0/1), share of right labels, minus the squared error, or share of right tokens.
    """
    if task.kind == "token_classification":
        pairs = [(np.asarray(z).argmax(axis=-1), np.asarray(y)) for z, y in zip(logits, targets, strict=True)]
        return np.array([(z == y)[y != IGNORED].mean() if (y != IGNORED).any() else 1.0 for z, y in pairs])
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    if task.kind == "single_label_classification":
        return (z.argmax(axis=1) == y).astype(np.float64)
    if task.kind == "multi_label_classification":
        return ((z > 0) == (y > 0.5)).mean(axis=1)
    return -((z.reshape(len(y), -1) - y.reshape(len(y), -1)) ** 2).mean(axis=1)
