"""The frozen prefix computed once: a model, its open groups and rows go in; batches that start above it come out.

For a stage whose lower groups are frozen, what crosses from them to the rest (see `boundary`) is the same for the same
example every epoch. It is computed once, kept in a store, and given back in place of the frozen modules' calls. The
first batches are computed both ways; where outputs or gradients differ, the stage trains plainly and says why.

Shapes: B examples of a batch, T tokens of the longest of them.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from finetune.model.boundary import Boundary, Call, Skipped, patched, tokens_in
from finetune.model.pretrained import Pretrained
from finetune.model.store import Store
from finetune.model.tracing import unchanged

# Norm of the difference over the norm of what is computed. Rounding moves gradients further than outputs: where a ReLU
# is all but 0, it decides whether there is a gradient at all.
TOLERANCE = {torch.float32: (1e-3, 3e-2), torch.bfloat16: (1e-1, 2e-1)}  # of outputs, of gradients


class NotEqual(Exception):
    """Replayed and computed differ; the text says where and by how much."""


class _Enough(Exception):
    """Everything that crosses has been computed: the rest of the forward pass is not needed."""


@dataclass
class Replay:
    """Forward passes of a network that start above its frozen prefix.

    Attributes:
        pretrained: The network.
        boundary: What is skipped and what is stored.
        store: What crossed, by row.
        left: Whether texts are padded on the left.
    """

    pretrained: Pretrained
    boundary: Boundary
    store: Store
    left: bool = False
    _zeros: dict[tuple[Call | str, int], Tensor] = field(default_factory=dict, repr=False)

    def fill(self, inputs: dict[str, Tensor], rows: Sequence[int], lengths: Sequence[int] | None = None) -> None:
        """Run the prefix on one batch and keep what crosses.

        Args:
            inputs: The batch, on the model's device.
            rows: Where in the store each example goes.
            lengths: Tokens of each example.
        """
        kept = crossing(self.pretrained, self.boundary, inputs)
        for number, (item, tensor) in enumerate(zip(self.boundary.stored, kept, strict=True)):
            leaf = self.boundary.skipped[item[0]].leaves[item[1]]
            head, *rest = leaf.sizes
            pieces = tensor.unflatten(0, (len(rows), -1))
            for i, row in enumerate(rows):
                piece = pieces[i]
                if lengths is not None:
                    for axis, size in enumerate((head, *rest)):
                        if size.tokens:
                            own, padded = size.of_row(lengths[i]), piece.shape[axis]
                            piece = piece.narrow(axis, padded - own if self.left else 0, own)
                if leaf.channels_last:
                    piece = piece.permute(0, 2, 3, 1)
                self.store.put(number, row, piece)

    def forward(self, inputs: dict[str, Tensor], rows: Sequence[int], model: nn.Module | None = None) -> Any:
        """What `Pretrained.forward` gives for the rows, without running the prefix.

        Args:
            inputs: The batch's inputs that the rest needs itself (texts: all of them; images: none).
            rows: Rows of the store.
            model: A wrapped model (DDP) in place of the network's own.
        """
        own = self.pretrained.model
        parameter = next(own.parameters())
        batch, tokens = len(rows), tokens_in(inputs)
        values = {
            item: self._restored(number, item, rows, tokens, parameter.device)
            for number, item in enumerate(self.boundary.stored)
        }
        if not inputs:
            height, width = self.pretrained.processor.size  # type: ignore[union-attr]
            channels = len(self.pretrained.processor.mean)  # type: ignore[union-attr]
            inputs = {"pixel_values": self._zero(("pixel_values", 0), (batch, channels, height, width), parameter)}
        calls: defaultdict[str, int] = defaultdict(int)

        def handler(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
            def around(original: Callable[..., Any]) -> Callable[..., Any]:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    call = (name, calls[name])
                    calls[name] += 1
                    if call not in self.boundary.skipped:
                        return original(*args, **kwargs)
                    skipped = self.boundary.skipped[call]
                    for inner, count in skipped.inside.items():  # calls that are not made count all the same
                        calls[inner] += count
                    return self._output(call, skipped, values, batch, tokens, parameter)

                return forward

            return around

        names = {name for name, _ in self.boundary.skipped}
        with patched(own, {name: handler(name) for name in names}):
            return self.pretrained.forward(inputs, model=model)

    def _output(
        self, call: Call, skipped: Skipped, values: dict[Any, Tensor], batch: int, tokens: int, like: Tensor
    ) -> Any:
        leaves = []
        for number, leaf in enumerate(skipped.leaves):
            if leaf.dtype is None:
                leaves.append(leaf.value)
            elif (call, number) in values:
                leaves.append(values[call, number])
            else:
                shape = tuple(size.at(batch, tokens) for size in leaf.sizes)
                leaves.append(self._zero((call, number), shape, like, leaf.dtype))
        return tree_unflatten(leaves, skipped.spec)

    def _restored(
        self, number: int, item: tuple[Call, int], rows: Sequence[int], tokens: int, device: torch.device
    ) -> Tensor:
        """A stored leaf as a batch: pieces put side by side, texts filled up with zeros to the longest."""
        leaf = self.boundary.skipped[item[0]].leaves[item[1]]
        shape = [size.of_row(tokens) for size in leaf.sizes]
        if not any(size.tokens for size in leaf.sizes):
            batch = self.store.rows(number, rows)
            if leaf.channels_last:
                batch = batch.permute(0, 1, 4, 2, 3)
        else:
            batch = torch.zeros(len(rows), *shape, dtype=self.store.dtypes[number])
            for i, row in enumerate(rows):
                piece = self.store.get(number, row)
                place = batch[i]
                for axis, own in enumerate(piece.shape):
                    if own != shape[axis]:
                        place = place.narrow(axis, shape[axis] - own if self.left else 0, own)
                place.copy_(piece)
        assert leaf.dtype is not None
        return batch.to(device, leaf.dtype, non_blocking=True).reshape(
            tuple(size.at(len(rows), tokens) for size in leaf.sizes)
        )

    def _zero(self, key: Any, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros that nothing which counts is computed from. Real memory, for some networks write into it."""
        size = 1
        for extent in shape:
            size *= extent
        flat = self._zeros.get(key)
        if flat is None or len(flat) < size:
            flat = self._zeros[key] = torch.zeros(size, dtype=dtype or like.dtype, device=like.device)
        return flat[:size].view(shape)


def crossing(pretrained: Pretrained, boundary: Boundary, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Run the prefix on a batch: the leaves of `boundary.stored`; the pass ends once all have been computed."""
    calls: defaultdict[str, int] = defaultdict(int)
    found: dict[Call, list[Any]] = {}
    wanted = {call for call, _ in boundary.stored}

    def handler(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def around(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                call = (name, calls[name])
                calls[name] += 1
                output = original(*args, **kwargs)
                if call in wanted:
                    # Copied at once: what comes after may write into it.
                    found[call] = tree_flatten(tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output))[0]
                    if len(found) == len(wanted):
                        raise _Enough
                return output

            return forward

        return around

    with torch.no_grad(), patched(pretrained.model, {name: handler(name) for name, _ in wanted}):
        try:
            pretrained.forward(inputs)
        except _Enough:
            pass
    return [found[call][number] for call, number in boundary.stored]


def check(
    replay: Replay,
    batches: Iterable[tuple[dict[str, Tensor], dict[str, Tensor], Sequence[int], Tensor]],
    loss: Callable[[Any, Any], Tensor],
    autocast: Callable[[], Any],
) -> None:
    """Compute batches both ways and compare outputs and the gradients of everything open.

    Args:
        replay: With a store that holds the rows.
        batches: (all inputs, the inputs that replay is given, rows in the store, targets), on the model's device.
        loss: As in training.
        autocast: As in training.

    Raises:
        NotEqual: They differ by more than rounding.
    """
    model = replay.pretrained.model
    opened = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for inputs, rest, rows, targets in batches:
        results = []
        for forward in (lambda i=inputs: replay.pretrained.forward(i), lambda r=rest, k=rows: replay.forward(r, k)):
            with unchanged(model):
                torch.manual_seed(0)  # the same dropout in both
                with autocast():
                    outputs = forward()
                    low = any(t.dtype in (torch.bfloat16, torch.float16) for t in _tensors(outputs))
                    value = loss(tree_map(lambda t: t.float() if isinstance(t, Tensor) else t, outputs), targets)
                gradients = torch.autograd.grad(value, list(opened.values()), allow_unused=True)
            results.append(([tensor.detach() for tensor in _tensors(outputs)], gradients))
        (plain, plain_gradients), (replayed, replayed_gradients) = results
        low = low or any(dtype == torch.bfloat16 for dtype in replay.store.dtypes)
        tolerance, tolerance_of_gradients = TOLERANCE[torch.bfloat16 if low else torch.float32]
        for a, b in zip(plain, replayed, strict=True):
            _compare("outputs", a, b, tolerance)
        # Beside large gradients, those that are zero but for rounding (a bias before a norm) say nothing.
        least = 1e-2 * max((float(g.norm()) for g in plain_gradients if g is not None), default=0.0)
        for name, a, b in zip(opened, plain_gradients, replayed_gradients, strict=True):
            if (a is None) != (b is None):
                raise NotEqual(f"only one way gives {name} a gradient")
            if a is not None and b is not None:
                _compare(f"gradients of {name}", a, b, tolerance_of_gradients, least)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _compare(what: str, plain: Tensor, replayed: Tensor, tolerance: float, least: float = 0.0) -> None:
    if plain.shape != replayed.shape:
        raise NotEqual(f"{what} have shape {tuple(replayed.shape)} replayed and {tuple(plain.shape)} computed")
    difference = float((plain - replayed).float().norm()) / max(float(plain.float().norm()), least, 1e-12)
    if not difference <= tolerance:
        raise NotEqual(f"{what} differ by {difference:.1e} of their size between replayed and computed")
