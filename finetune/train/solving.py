"""A model whose head is one new linear layer and the training rows go in; that layer, solved to its optimum, comes out.

Linear probing, then fine-tuning (Kumar et al. 2022): a head that fits the frozen features spares the body the large and
wrong gradients of a random one.
"""

from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from finetune.data.loaders import make_loader
from finetune.data.task import IGNORED, Task
from finetune.model.convex import SolvedHead, capture_calls, features_of, set_head, solve_head
from finetune.model.outputs import target_scale
from finetune.model.pretrained import Pretrained
from finetune.train.evaluate import ordered_batches
from finetune.train.processes import Processes

BATCH = 32


def solve(
    pretrained: Pretrained,
    layer_name: str,
    data: Dataset,
    task: Task,
    processes: Processes,
    *,
    lengths: list[int] | None = None,
    seed: int = 0,
    **loader: Any,
) -> SolvedHead:
    """Run the frozen network once over every row, as in evaluation, and set its last layer to the optimum.

    Args:
        pretrained: Its model gets the head, on every process.
        layer_name: The linear layer, from `linear_head`.
        data: Training rows.
        task: The task; its own loss is what is minimised.
        processes: Each runs its share of the rows.
        lengths: Tokens of each row.
        seed: Of the cross-validation.
        **loader: Options of `make_loader`.
    """
    layer = cast(nn.Linear, pretrained.model.get_submodule(layer_name))
    batches, counted = processes.shares(ordered_batches(len(data), BATCH, lengths))
    pretrained.model.eval()
    found: list[tuple[int, np.ndarray, np.ndarray]] = []
    with torch.no_grad(), capture_calls(layer) as calls:
        for number, batch in enumerate(make_loader(data, task, pretrained.processor, batches, train=False, **loader)):
            assert batch.targets is not None
            with processes.autocast():
                output = pretrained.forward(batch.to(processes.device).inputs)
            call = calls.pop()
            if number >= counted:
                continue
            features, targets = features_of(call, output).numpy(), batch.targets.numpy()
            for i, row in enumerate(batch.index.tolist()):
                if task.kind == "token_classification":
                    labelled = targets[i] != IGNORED
                    found.append((row, features[i][labelled], targets[i][labelled]))
                else:
                    found.append((row, features[i : i + 1], targets[i : i + 1]))
    rows = sorted(processes.gather(found), key=lambda row: row[0])
    features_NF, targets = (np.concatenate([row[part] for row in rows]) for part in (1, 2))
    if task.kind == "regression" and layer.bias is not None:  # else `outputs.scale_outputs` leaves the layer alone
        mean_K, std_K = target_scale(targets.tolist())
        targets = (targets - mean_K.numpy()) / std_K.numpy()
    # One process solves: the others could differ from it in the last digit.
    solved: SolvedHead = processes.first(
        lambda: solve_head(features_NF, targets, task, bias=layer.bias is not None, seed=seed)
    )
    set_head(layer, solved)
    return solved
