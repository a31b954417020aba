"""How many rows each class has, and validation logits go in; what it is worth to weigh all classes alike comes out.

A model answers what is likely where classes are as frequent as in training. Less the logarithm of its class's share, a
logit says what is likely where all are equally frequent (Menon et al. 2021, equation 9): that needs no other training,
and fits into the bias of the last linear layer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from finetune.data.task import Task
from finetune.model.sharding import spread
from finetune.train.calibration import with_outputs
from finetune.train.evaluate import Evaluation

UNEVEN = 5.0  # rows of the commonest class over those of the rarest, from where on it is looked at


@dataclass(frozen=True)
class Balance:
    """What weighing all classes alike does.

    Attributes:
        ratio: Training rows of the commonest class over those of the rarest that has any.
        log_share_C: Logarithm of each class's share of the training rows; a class without rows counts as one row.
        f1_before: Macro-F1 on the validation rows as the model is.
        f1_after: The same with all classes weighed alike.
    """

    ratio: float
    log_share_C: np.ndarray
    f1_before: float
    f1_after: float

    def line(self, applied: bool) -> str:
        """What a run says of it."""
        said = f"Uneven    {self.ratio:.3g} rows of the commonest class to one of the rarest: macro-F1 on validation "
        if applied:
            return (
                f"{said}{100 * self.f1_before:.1f} %, and {100 * self.f1_after:.1f} % as saved, with all weighed alike"
            )
        return (
            f"{said}{100 * self.f1_before:.1f} %, with all weighed alike {100 * self.f1_after:.1f} % "
            'settings={"balance": True}'
        )

    def to_json(self, applied: bool) -> dict[str, Any]:
        """For `run.json`."""
        return {
            "ratio": self.ratio, "f1_macro": {"as_trained": self.f1_before, "weighed_alike": self.f1_after},
            "applied": applied,
        }  # fmt: skip


def measure(targets: list[int], valid: Evaluation, task: Task) -> Balance:
    """The balance of classes of single labels."""
    rows_C = np.bincount(targets, minlength=len(task.labels))
    share_C = np.maximum(rows_C, 1) / np.maximum(rows_C, 1).sum()
    after = evened(valid, task, np.log(share_C))
    return Balance(
        float(rows_C.max() / rows_C[rows_C > 0].min()),
        np.log(share_C),
        float(valid.metrics["f1_macro"]),
        float(after.metrics["f1_macro"]),
    )


def evened(found: Evaluation, task: Task, log_share_C: np.ndarray) -> Evaluation:
    """The evaluation of the model with all classes weighed alike."""
    return with_outputs(found, task, np.asarray(found.outputs) - log_share_C.astype(np.float32))


@torch.no_grad()
def fold_shares(layer: nn.Linear, log_share_C: np.ndarray) -> None:
    """Take the logarithms of the shares off a linear layer's bias, in place."""
    assert layer.bias is not None
    shares_C = spread(torch.from_numpy(log_share_C).to(layer.bias.dtype), layer.bias)
    layer.bias.sub_(shares_C.to(layer.bias.device))
