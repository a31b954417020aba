"""A network, its open groups and a function that gives the inputs of rows go in; forward passes for a loop of one's own
come out, which start above the frozen part.

What `fit` does in its stages (see `replay`), for any loop. It is checked the same way, and gives plain passes, and the
reason, wherever it cannot be done.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from finetune.errors import DataError
from finetune.model.boundary import NoBoundary, find_boundary
from finetune.model.groups import LayerGroups, set_mode, set_trainable
from finetune.model.pretrained import Pretrained
from finetune.model.replay import NotEqual, Replay, check
from finetune.model.store import make_store, plan_store
from finetune.model.tracing import unchanged

Inputs = Callable[[list[int]], dict[str, Tensor]]
MEMORY = 0.5  # of what is available
FILL, CHECKED = 32, 8  # rows of a batch


@dataclass
class RowForward:
    """Gives the model's outputs for rows.

    Attributes:
        why: "" where the frozen part is replayed; otherwise why every pass is a plain one.
        bytes: What is kept in memory.
    """

    pretrained: Pretrained
    groups: LayerGroups
    open_from: int
    inputs: Inputs
    freeze_batchnorm: bool
    why: str = ""
    replay: Replay | None = None
    _blank: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of what is kept."""
        return 0 if self.replay is None else self.replay.store.bytes

    def __call__(self, rows: Iterable[int] | Tensor, model: nn.Module | None = None) -> Any:
        """Outputs for some rows, as `Pretrained.forward` gives them; `model`: a wrapped one (DDP) to call instead."""
        rows = rows.tolist() if isinstance(rows, Tensor) else list(map(int, rows))  # of a GPU in one piece
        own = self.pretrained.model
        if own.training:  # somebody has called model.train(): frozen dropout and statistics do not come back
            set_mode(own, self.groups, self.open_from, self.freeze_batchnorm)
        if self.replay is None:
            return self.pretrained.forward(self.batch(rows), model=model)
        return self.replay.forward(self.rest(rows), rows, model)

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """The inputs of rows, on the model's device."""
        device = next(self.pretrained.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in self.inputs(rows).items()}

    def rest(self, rows: list[int]) -> dict[str, Tensor]:
        """What the part above the frozen one is given: texts, for their masks; of images, blanks of the same size."""
        assert self.replay is not None
        if self.pretrained.modality == "text" or self.replay.boundary.inputs:
            return self.batch(rows)
        if len(rows) not in self._blank:
            like = self.batch(rows[:1])
            self._blank[len(rows)] = {name: x.new_zeros(len(rows), *x.shape[1:]) for name, x in like.items()}
        return self._blank[len(rows)]


@contextmanager
def replay(
    pretrained: Pretrained,
    groups: LayerGroups,
    open_from: int | str,
    inputs: Inputs,
    rows: int,
    *,
    freeze_batchnorm: bool = True,
) -> Iterator[RowForward]:
    """Freeze the groups below `open_from`, compute them once for every row, and give forward passes above them.

        with finetune.replay(pretrained, groups, -1, inputs, rows=len(x)) as forward:
            for chosen in torch.randperm(len(x)).split(32):
                loss = cross_entropy(forward(chosen), y[chosen])

    Before it is used, two batches are computed both ways: outputs and gradients have to agree. Where they do not, where
    the network cannot be run in parts, or where memory is short, `forward` computes plainly, and `forward.why` says
    why. Inside, frozen parameters have `requires_grad` off and their modules evaluate, which also holds after
    `model.train()`; afterwards all is as before. An autocast around it holds for what is kept, too.

    Args:
        pretrained: The network, from `load_backbone`.
        groups: Its layer groups.
        open_from: First open group: index or name.
        inputs: Function of a list of row numbers giving the batch, {"pixel_values": [B, 3, H, W]}, all of one size, or
            {"input_ids": [B, T], "attention_mask": [B, T], ...}, T the longest of them. The same row, the same values:
            no random augmentation.
        rows: How many there are, from 0.
        freeze_batchnorm: Keep pretrained running statistics, also in open groups.

    Raises:
        PlanError: No such group.
        DataError: No rows.
    """
    if rows < 1:
        raise DataError(f"replay: rows={rows}, and there is nothing to compute; give the number of rows")
    model, first = pretrained.model, groups.index(open_from)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    forward = RowForward(pretrained, groups, first, inputs, freeze_batchnorm)
    try:
        set_trainable(model, groups, first)
        set_mode(model, groups, first, freeze_batchnorm)
        if first == 0:
            forward.why = "everything trains"
        else:
            with unchanged(model):
                _prepare(forward, rows)
        yield forward
    finally:
        forward.replay = None
        for parameter, before in trained:
            parameter.requires_grad_(before)
        for module, mode in modes:
            module.training = mode


def _prepare(forward: RowForward, rows: int) -> None:
    """Fill the store and check it, or leave the reason in `why`."""
    try:
        made = _filled(forward, rows)
        forward.replay = made
        order = [row * 7919 % rows for row in range(min(rows, 2 * CHECKED))]  # neighbours that were not so when filled
        chosen = [order[begin : begin + CHECKED] for begin in range(0, len(order), CHECKED)]
        check(
            made,
            ((forward.batch(part), forward.rest(part), part, torch.empty(0)) for part in chosen),
            _any_loss,
            nullcontext,
        )
    except (NoBoundary, NotEqual) as error:
        forward.replay, forward.why = None, str(error)
    except MemoryError:
        forward.replay, forward.why = None, "memory is short"
    except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        # A network that cannot be run in parts shows itself in any of these; computing plainly is always right.
        forward.replay = None
        forward.why = f"the network cannot be run from its boundary ({type(error).__name__}: {str(error)[:120]})"


def _filled(forward: RowForward, rows: int) -> Replay:
    """What crosses the boundary, of every row."""
    pretrained, lengths = forward.pretrained, None
    parts = [list(range(begin, min(rows, begin + FILL))) for begin in range(0, rows, FILL)]
    if pretrained.modality == "text":
        lengths = [length for part in parts for length in _lengths(forward.inputs(part))]
    order = sorted(range(rows), key=lambda row: 0 if lengths is None else lengths[row])
    cut = [order[:2], order[rows // 2 :][:3], order[-5:]]  # of different sizes and lengths, by which shapes are told
    samples = [[part[i % len(part)] for i in range(size)] for part, size in zip(cut, (2, 3, 5), strict=True)]
    boundary = find_boundary(pretrained.model, pretrained.forward, [forward.batch(sample) for sample in samples])
    shapes, dtypes, size = plan_store(boundary, rows, lengths)
    free = psutil.virtual_memory().available
    if size > MEMORY * free:
        raise NoBoundary(f"what crosses takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are free")
    left = getattr(pretrained.processor, "padding_side", "") == "left"
    made = Replay(pretrained, boundary, make_store(shapes, dtypes, rows), left)
    for part in parts:
        made.fill(forward.batch(part), part, None if lengths is None else [lengths[row] for row in part])
    return made


def _lengths(inputs: dict[str, Tensor]) -> list[int]:
    """Tokens of each text of a batch."""
    mask = inputs.get("attention_mask")
    return [inputs["input_ids"].shape[1]] * len(inputs["input_ids"]) if mask is None else mask.sum(1).tolist()


def _any_loss(outputs: Any, _: Tensor) -> Tensor:
    """A number that depends on every output, and on each differently."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    weights = [torch.arange(tensor.numel(), device=tensor.device).cos().view_as(tensor) for tensor in tensors]
    return torch.stack([(tensor * weight).sum() for tensor, weight in zip(tensors, weights, strict=True)]).sum()
