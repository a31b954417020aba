"""A model whose lower groups are frozen and a few batches go in; what crosses from the frozen part comes out.

A traced forward pass follows every tensor. What has met an open parameter, or a random number, is alive; all else is
the same for the same example, every epoch. A call of a module inside of which nothing is alive can be skipped. Of the
outputs of skipped calls, those that something alive reads, directly or through operators between modules, have to be
stored; for the others any tensor of the same shape will do, because nothing that counts is computed from it.

Shapes: B examples of a batch, T tokens of the longest of them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from finetune.model.tracing import reads_shape_only, storage_of, unchanged

Call = tuple[str, int]  # name of a module, and which of its calls in a forward pass
ROUNDS = 12  # Each round gives up skipping some calls; networks of this day need one to four.
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class NoBoundary(Exception):
    """The frozen part cannot be told apart from the rest; the text says why."""


@dataclass(frozen=True)
class Size:
    """A dimension as a function of B and T: (B if `batch` else 1) * (scale * T + offset if `tokens` else scale)."""

    scale: int
    offset: int = 0
    batch: bool = False
    tokens: bool = False

    def of_row(self, tokens: int) -> int:
        """Its share of one example with so many tokens."""
        return self.scale * tokens + self.offset if self.tokens else self.scale

    def at(self, batch: int, tokens: int) -> int:
        """Its size in a batch."""
        return (batch if self.batch else 1) * self.of_row(tokens)


@dataclass(frozen=True)
class Leaf:
    """A tensor that a call returns, or (dtype None) a value that is the same every time.

    `channels_last`: it lies in memory as [B, H, W, C]; dropout draws its numbers in the order of the memory.
    """

    sizes: tuple[Size, ...] = ()
    dtype: torch.dtype | None = None
    value: Any = None
    channels_last: bool = False

    @property
    def by_row(self) -> bool:
        """Whether it can be taken apart into one piece an example."""
        return self.dtype is not None and bool(self.sizes) and self.sizes[0].batch and not any(
            size.batch for size in self.sizes[1:]
        )  # fmt: skip


@dataclass(frozen=True)
class Skipped:
    """A call that need not be made: the form of what it returns."""

    spec: TreeSpec
    leaves: tuple[Leaf, ...]
    inside: dict[str, int]  # how often it calls modules that are called outside of it too


@dataclass(frozen=True)
class Boundary:
    """Between a frozen prefix and the rest of a network.

    Attributes:
        skipped: The calls that replay does not make, none of them inside another.
        stored: (call, number of the leaf) of what has to be kept of each example, in order of execution.
        inputs: Names of the batch's inputs that the rest of the network reads itself.
    """

    skipped: dict[Call, Skipped]
    stored: tuple[tuple[Call, int], ...]
    inputs: frozenset[str]


def find_boundary(
    model: nn.Module, forward: Callable[[dict[str, Tensor]], Any], batches: Sequence[dict[str, Tensor]]
) -> Boundary:
    """Trace `model` on `batches` and find what crosses.

    Args:
        model: In the mode in which it trains, `requires_grad` telling which parameters are open.
        forward: Calls the model on one batch's inputs.
        batches: At least two, of different numbers of examples, and of tokens, by which shapes are told.

    Raises:
        NoBoundary: Nothing can be skipped, or shapes do not follow the batch.
    """
    opened = [parameter.requires_grad for parameter in model.parameters()]
    if all(opened) or not any(opened):
        raise NoBoundary("nothing is frozen" if any(opened) else "nothing trains")
    forced: set[Call] = set()
    for _ in range(ROUNDS):
        passes = [_traced(model, forward, batch, forced) for batch in batches]
        first = passes[0]
        if any(other.skippable.keys() != first.skippable.keys() for other in passes):
            raise NoBoundary("which modules run depends on the batch")
        outer = first.outermost()
        skipped = {
            call: Skipped(first.skippable[call].spec, _leaves(passes, batches, call), first.inside(call))
            for call in outer
        }
        refused = {call for call, skip in skipped.items() if any(leaf is None for leaf in skip.leaves)}
        stored: list[tuple[Call, int]] = []
        for call, number in sorted(set().union(*(p.needed for p in passes)), key=first.moment):
            if call not in outer:  # it left its value elsewhere than in what the call around it returns
                refused.add(first.around(call))
            elif call not in refused and not skipped[call].leaves[number].by_row:
                refused.add(call)
            stored.append((call, number))
        if not refused:
            inputs = set().union(*(p.inputs for p in passes))
            if not stored:
                raise NoBoundary("nothing that the frozen part computes is read by the rest")
            return Boundary(skipped, tuple(stored), frozenset(inputs))
        forced |= refused
    raise NoBoundary("what crosses cannot be kept by example")


@dataclass
class _Call:
    """A call inside of which nothing is alive."""

    call: Call
    begin: int
    end: int
    spec: TreeSpec
    leaves: list[Any]  # tensors as their (shape, dtype, whether channels come last in memory)


@dataclass
class _Known:
    """What is known of a storage: computed from which leaves and inputs (bits), whether alive, and since when."""

    sources: int
    live: bool
    born: int


class _Pass(TorchDispatchMode):
    """One traced forward pass.

    What is known is kept by storage. One that is freed and used again is known anew by the operator that fills it.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], forced: set[Call]):
        super().__init__()
        self.forced, self.clock, self.last_live = forced, 0, -1
        self.known: dict[int, _Known] = {}
        self.open = {storage_of(p) for p in model.parameters() if p.requires_grad}
        self.bits: list[tuple[Call, int] | str] = list(inputs)
        for bit, tensor in enumerate(inputs.values()):
            self.known[storage_of(tensor)] = _Known(1 << bit, False, -1)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.skippable: dict[Call, _Call] = {}
        self.spans: list[tuple[int, str]] = []  # when a call began, and of which module
        self.read = 0  # bits of what something alive has read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.clock += 1
        name = func.overloadpacket.__name__
        entering = [] if reads_shape_only(name) else [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        keys = {storage_of(tensor) for tensor in entering}
        known = [self.known[key] for key in keys if key in self.known]
        sources = 0
        for entry in known:
            sources |= entry.sources
        live = _random(func, args, kwargs) or bool(keys & self.open) or any(entry.live for entry in known)
        if live:
            self.last_live = self.clock
            self.read |= sources
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                key = storage_of(tensor)
                born = self.known[key].born if key in keys and key in self.known else -1 if key in keys else self.clock
                self.known[key] = _Known(0 if live else sources, live, born)
        return out

    def enter(self, name: str) -> tuple[Call, int]:
        """A module is called."""
        call = (name, self.calls[name])
        self.calls[name] += 1
        self.clock += 1
        self.spans.append((self.clock, name))
        return call, self.clock

    def leave(self, call: Call, begin: int, output: Any) -> None:
        """It returns; its outputs now come from this call if nothing in it was alive."""
        self.clock += 1
        if self.last_live > begin or call in self.forced:
            return
        leaves, spec = tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = [self.known.get(storage_of(tensor)) for tensor in tensors]
        # What was there before the call (an identity, a view, an operation in place) is handed on by making the call.
        if not tensors or any(entry is None or entry.born < begin for entry in known):
            return
        if not all(isinstance(leaf, Tensor) or type(leaf) in PLAIN for leaf in leaves):
            return
        for entry in known:
            assert entry is not None
            entry.sources = 0
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self.known[storage_of(leaf)].sources |= 1 << len(self.bits)
                self.bits.append((call, number))
        forms = [
            (leaf.shape, leaf.dtype, _channels_last(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        self.skippable[call] = _Call(call, begin, self.clock, spec, forms)

    def finish(self, output: Any) -> None:
        """The model's own output is read by the loss."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (entry := self.known.get(storage_of(tensor))) is not None:
                self.read |= entry.sources
        if self.last_live < 0:
            raise NoBoundary("nothing that trains takes part in a forward pass")

    @property
    def needed(self) -> set[tuple[Call, int]]:
        """(call, leaf) that something alive has read."""
        return {bit for i, bit in enumerate(self.bits) if self.read >> i & 1 and not isinstance(bit, str)}

    @property
    def inputs(self) -> set[str]:
        """Names of inputs that something alive has read."""
        return {bit for i, bit in enumerate(self.bits) if self.read >> i & 1 and isinstance(bit, str)}

    def outermost(self) -> list[Call]:
        """The calls that can be skipped and lie in no other such call, in order."""
        found: list[_Call] = []
        for call in sorted(self.skippable.values(), key=lambda call: call.begin):
            if not found or call.begin > found[-1].end:
                found.append(call)
        return [call.call for call in found]

    def inside(self, call: Call) -> dict[str, int]:
        """How often the modules that are called outside of a call are called inside of it."""
        span = self.skippable[call]
        counts = Counter(name for begin, name in self.spans if span.begin < begin <= span.end)
        return {name: count for name, count in counts.items() if self.calls[name] > count}

    def around(self, call: Call) -> Call:
        """The outermost call that can be skipped around one."""
        inner = self.skippable[call]
        return next(c for c in self.outermost() if self.skippable[c].begin < inner.begin <= self.skippable[c].end)

    def moment(self, item: tuple[Call, int]) -> tuple[int, int]:
        """For sorting: when a call began, and the leaf."""
        return self.skippable[item[0]].begin, item[1]


def _traced(
    model: nn.Module, forward: Callable[[dict[str, Tensor]], Any], batch: dict[str, Tensor], forced: set[Call]
) -> _Pass:
    """Run one pass; buffers and random numbers are as before afterwards."""
    watch = _Pass(model, batch, forced)
    handlers: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {}
    for name, module in model.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):
            handlers[name] = _noting(watch, name)
    with unchanged(model), torch.no_grad(), patched(model, handlers), watch:
        output = forward(batch)
    watch.finish(output)
    return watch


def _noting(watch: _Pass, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, begin = watch.enter(name)
            output = original(*args, **kwargs)
            watch.leave(call, begin, output)
            return output

        return forward

    return around


@contextmanager
def patched(
    model: nn.Module, handlers: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]]
) -> Iterator[None]:
    """Inside, `forward` of the named modules is what their handler makes of it.

    Only for the length of a call: a copy of the model taken meanwhile would hold the original's functions.
    """
    before: list[tuple[nn.Module, Any]] = []
    try:
        for name, handler in handlers.items():
            module = model.get_submodule(name)
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = handler(module.forward)
        yield
    finally:
        for module, original in before:
            if original is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = original


def tokens_in(inputs: dict[str, Tensor]) -> int:
    """Length of a batch of texts; 0 for images."""
    return int(inputs["input_ids"].shape[1]) if "input_ids" in inputs else 0


def _leaves(passes: list[_Pass], batches: Sequence[dict[str, Tensor]], call: Call) -> tuple[Any, ...]:
    """The leaves of a call; None where the batches do not tell its form."""
    extents = [(next(iter(batch.values())).shape[0], tokens_in(batch)) for batch in batches]
    found: list[Leaf | None] = []
    for forms in zip(*(p.skippable[call].leaves for p in passes), strict=False):
        if not isinstance(forms[0], tuple):
            found.append(Leaf(value=forms[0]) if all(form == forms[0] for form in forms) else None)
            continue
        shapes, dtypes = [form[0] for form in forms], {form[1] for form in forms}
        if len(dtypes) > 1 or len({len(shape) for shape in shapes}) > 1:
            found.append(None)
            continue
        sizes = [_size(list(values), extents) for values in zip(*shapes, strict=True)]
        known = tuple(size for size in sizes if size is not None)
        last = forms[0][2] and not any(size.tokens for size in known)
        found.append(None if len(known) < len(sizes) else Leaf(known, dtypes.pop(), channels_last=last))
    if len({len(p.skippable[call].leaves) for p in passes}) > 1:
        return (None,)
    return tuple(found)


def _size(values: list[int], extents: list[tuple[int, int]]) -> Size | None:
    """The simplest function of B and T that gives a dimension in every batch; None where there is none."""
    batch, tokens = extents[0]
    candidates = [Size(values[0]), Size(values[0] // batch, batch=True)]
    if tokens:
        candidates += [
            Size(1, values[0] - tokens, tokens=True),
            Size(values[0] // tokens, tokens=True),
            Size(1, values[0] // batch - tokens, batch=True, tokens=True),
            Size(values[0] // (batch * tokens), batch=True, tokens=True),
        ]
    for size in candidates:
        if all(size.at(*extent) == value for extent, value in zip(extents, values, strict=True)):
            return size
    return None


def _channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _random(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator draws random numbers; attention kernels are marked so even when they drop nothing."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "p"):
            value = (kwargs or {}).get(argument.name, args[i] if i < len(args) else argument.default_value)
            return bool(value)
    return True
