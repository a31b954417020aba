"""The largest step of a stage goes in; how many micro-batches it takes to fit the memory of every device comes out.

Out of memory on one process must change all of them, and the global batch stays as it is, for the other dials were set
for it (transformers' own search changes the batch of one process alone: pull request 33281).
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from finetune.data.loaders import Batch
from finetune.errors import RunError
from finetune.model.pretrained import Pretrained
from finetune.model.tracing import unchanged
from finetune.train.processes import Processes

PROBED = ("cuda", "xpu", "mps")  # A CPU out of memory raises nothing that could be caught: the system ends the process.
HELD = 3  # Times the size of what trains: two moments of Adam, and the buckets in which gradients are averaged.


def micro_batches(attempt: Callable[[int], None], begin: int, most: int, processes: Processes) -> int | None:
    """The fewest micro-batches, `begin` times a power of two and at most `most`, with which `attempt` runs on every
    process; None where even `most` are too few."""
    count = min(begin, most)
    while True:
        failed = 0.0
        try:
            attempt(count)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failed = 1.0
        if failed:
            empty()
        if processes.total(failed) == 0:
            return count
        if count == most:
            return None
        count = min(2 * count, most)


def largest_step(
    pretrained: Pretrained,
    batch: Callable[[int], Batch],
    loss: Callable[[Any, Any], torch.Tensor],
    processes: Processes,
) -> Callable[[int], None]:
    """An attempt for `micro_batches`: forward and backward pass of one of so many micro-batches, beside memory held for
    what the optimizer will need. Weights, statistics and gradients are left as they were."""

    def attempt(count: int) -> None:
        model = pretrained.model
        open_ = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            held = [torch.empty_like(parameter) for parameter in open_ for _ in range(HELD)]
            rows = batch(count).to(processes.device)
            with unchanged(model):
                with processes.autocast():
                    outputs = pretrained.forward(rows.inputs)
                loss(outputs.float() if isinstance(outputs, torch.Tensor) else outputs, rows.targets).backward()
            del held
        finally:
            for parameter in open_:
                parameter.grad = None

    return attempt


def save_activations(model: nn.Module) -> bool:
    """Have a network compute its activations again in the backward pass, where it knows how; whether it does."""
    network: Any = model
    if getattr(
        network, "supports_gradient_checkpointing", False
    ):  # transformers; its method has a new name from 5.24 on
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable()
        return True
    if hasattr(network, "set_grad_checkpointing"):
        try:
            network.set_grad_checkpointing(True)
        except (AssertionError, NotImplementedError):  # timm's way of saying no
            return False
        return True
    return False


def does_not_fit(rows: Sequence[int]) -> RunError:
    """The error for a step that does not fit with one example at a time."""
    return RunError(
        f"out of memory with {len(rows)} example a step on each device: take a smaller backbone or image size, free "
        "memory on the device, or spread the model over several with recipes/configs/fsdp2.yaml"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so, in any of the ways of torch."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "can't allocate memory" in words


def empty() -> None:
    """Give back to the device what only caches and a dead stack still hold."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
