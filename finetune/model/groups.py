"""From a pretrained network and one batch to its layer groups, stem first and head last, each parameter in exactly one.

There is no table of architectures. A traced forward pass gives the order in which parameters are used, repeated modules
(stacks of blocks) give the cuts, and the loading report (`new_parameters`) gives the head. The groups follow execution,
not registration: XLM-R registers its classifier first and runs it last.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from finetune.errors import PlanError
from finetune.model.division import Division, by_execution, by_spec, prefixes, weights
from finetune.model.tracing import Trace, trace

if TYPE_CHECKING:
    from finetune.model.pretrained import Pretrained


@dataclass(frozen=True)
class LayerGroup:
    """Parameters that are frozen, opened and given a rate together.

    Attributes:
        name: Where the group lies: "stem", "encoder.layer.5", "neck", "head".
        parameters: Names as in `model.named_parameters()`, in order of first use.
        size: Number of weights.
    """

    name: str
    parameters: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class LayerGroups(Sequence[LayerGroup]):
    """Layer groups in execution order, stem first, head last; every parameter of the network lies in exactly one.

    Attributes:
        groups: The groups.
        notes: Plain sentences about what is unusual in this network.
        modules: For each group the names of the modules that train when it is open (and all after it are).
        batchnorm: Names of the modules with pretrained running statistics.
        fixed: Parameters that never train: switched off by the network itself (sinusoidal tables), or integers.
    """

    groups: tuple[LayerGroup, ...]
    notes: tuple[str, ...] = ()
    modules: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    batchnorm: tuple[str, ...] = field(default=(), repr=False)
    fixed: frozenset[str] = field(default=frozenset(), repr=False)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[LayerGroup]:
        return iter(self.groups)

    @overload
    def __getitem__(self, index: int) -> LayerGroup: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerGroup, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerGroup | tuple[LayerGroup, ...]:
        return self.groups[index]

    @property
    def head(self) -> LayerGroup:
        """The last group."""
        return self.groups[-1]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: i for i, group in enumerate(self.groups) for name in group.parameters}

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """Position of a group, counted from the stem.

        Args:
            value: A group's name; the name of a module ("layer3", "encoder.layer.5"), which means the first group with
                parameters of it; an integer, where -1 is the head; or a `LayerGroup`.
            start: First position that counts, as in `Sequence.index`.
            stop: End of the positions that count.

        Raises:
            PlanError: No such group.
        """
        last = len(self)
        stop = last if stop is None else stop
        if isinstance(value, LayerGroup):
            found = [i for i, group in enumerate(self.groups) if group == value]
        elif isinstance(value, int):
            found = [value % last] if -last <= value < last else []
        else:
            found = [i for i, group in enumerate(self.groups) if group.name == value]
            inside = re.compile(rf"(^|\.){re.escape(str(value))}\.")
            found = found or [i for i, group in enumerate(self.groups) if any(map(inside.search, group.parameters))]
        for i in found:
            if start <= i < stop:
                return i
        names = ", ".join(group.name for group in self.groups)
        raise PlanError(f"{value!r}: no such layer group; take one of {names}, or an index from {-last} to {last - 1}")

    def of_parameter(self, name: str) -> int:
        """Position of the group that holds the parameter of this name (as in `model.named_parameters()`)."""
        if name not in self._position:
            raise PlanError(f"{name}: no parameter of this network; names are those of model.named_parameters()")
        return self._position[name]

    def fold(self, n: int) -> "LayerGroups":
        """At most `n` groups: neighbours joined, as evenly as can be by number of groups, the head kept apart.

        Raises:
            PlanError: `n` is below 2.
        """
        if n < 2:
            raise PlanError(f"max_groups={n}: at least 2 are needed, the body and the head; give a larger number")
        body, parts = len(self) - 1, min(n - 1, len(self) - 1)
        if parts == body:
            return self
        cuts = [round(i * body / parts) for i in range(parts + 1)] + [len(self)]
        groups, modules = [], []
        for lo, hi in zip(cuts, cuts[1:], strict=False):
            part = self.groups[lo:hi]
            name = part[0].name if hi - lo == 1 else f"{part[0].name}..{part[-1].name}"
            groups.append(LayerGroup(name, sum((g.parameters for g in part), ()), sum(g.size for g in part)))
            modules.append(sum(self.modules[lo:hi], ()))
        return replace(self, groups=tuple(groups), modules=tuple(modules))

    def __str__(self) -> str:
        width = max(len(group.name) for group in self.groups)
        lines = [f"{'':>4}  {'group':<{width}}  {'weights':>13}  tensors"]
        for i, group in enumerate(self.groups):
            lines.append(f"{i:>4}  {group.name:<{width}}  {group.size:>13,}  {len(group.parameters):>7}")
        return "\n".join([*lines, *self.notes])


def layer_groups(
    pretrained: "Pretrained",
    inputs: dict[str, Tensor] | None = None,
    *,
    max_groups: int | None = None,
    spec: Sequence[str] | None = None,
) -> LayerGroups:
    """Divide a network into layer groups, in the order in which a forward pass uses them.

    Blocks (elements of the stacks that make up the body) are groups; what runs before the first is the stem; the new
    parameters that run after everything pretrained are the head. Norms behind the last block join it, a large layer
    there (MobileNet's `conv_head`) is a group named "neck". Shared parameters count where they are first used.

    Args:
        pretrained: The network, its processor and which of its parameters are new.
        inputs: One batch as the loader gives it, {"pixel_values": [B, 3, H, W]} or {"input_ids": [B, T], ...}; by
            default a made-up one.
        max_groups: Join neighbours until there are at most so many groups.
        spec: Your own division instead: regular expressions from stem to head; each parameter goes to the first that is
            found in its name (`re.search`).

    Raises:
        PlanError: The network cannot be run on the batch, or `spec` leaves a parameter or an expression over.
    """
    model = pretrained.model
    parameters = dict(model.named_parameters())
    if not parameters:
        raise PlanError(f"{pretrained.name}: the network has no parameters; give one that can be trained")
    device = next(iter(parameters.values())).device
    batch = {name: tensor.to(device) for name, tensor in (inputs or _made_up_batch(pretrained)).items()}
    try:
        seen = trace(model, lambda: pretrained.forward(batch), batch)
    except Exception as error:
        raise PlanError(
            f"{pretrained.name}: a forward pass on {', '.join(batch)} fails ({type(error).__name__}: {error}); "
            "pass a batch that fits as inputs="
        ) from error
    if not seen.used:
        raise PlanError(f"{pretrained.name}: a forward pass uses no parameter; give a network that computes with them")
    new = frozenset(pretrained.new_parameters)
    division = by_spec(list(parameters), spec) if spec is not None else by_execution(model, seen, new)
    groups = _assemble(model, seen, new, division, ordered=spec is None)
    return groups if max_groups is None else groups.fold(max_groups)


def set_trainable(model: nn.Module, groups: LayerGroups, open_from: int | str) -> None:
    """Let the parameters of the groups from `open_from` on take gradients, and the others not.

    Gradients of frozen parameters are dropped, for AdamW moves a parameter whose gradient is zero, but not one without.
    """
    first = groups.index(open_from)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(groups.of_parameter(name) >= first and name not in groups.fixed)
        if not parameter.requires_grad:
            parameter.grad = None


def set_mode(model: nn.Module, groups: LayerGroups, open_from: int | str, freeze_batchnorm: bool = True) -> None:
    """Training mode for the open part of the network, evaluation mode for the frozen part.

    A module trains when everything in it is open. One without parameters (dropout) goes with the module that it lies
    in, and between two groups with the one that runs next. So the frozen part gives the same features each time, and
    the open part has its dropout. A module that holds frozen and open groups evaluates (so no layer drop across them).

    Args:
        model: The network that `groups` divides.
        groups: Its layer groups.
        open_from: First open group: index or name.
        freeze_batchnorm: Keep pretrained running statistics, also in open groups.
    """
    first = groups.index(open_from)
    model.train()
    modules = dict(model.named_modules())
    for name in (name for frozen in groups.modules[:first] for name in frozen):
        modules[name].training = False
    if freeze_batchnorm:
        for name in groups.batchnorm:
            modules[name].training = False


def _assemble(model: nn.Module, seen: Trace, new: frozenset[str], division: Division, ordered: bool) -> LayerGroups:
    """Put together the groups, which modules go with which, and what never trains."""
    parameters = dict(model.named_parameters())
    group = {name: i for i, names in enumerate(division.members) for name in names}
    order = sorted(seen.used, key=lambda name: seen.used[name])
    notes = list(division.notes)
    if not ordered and any(group[a] > group[b] for a, b in zip(order, order[1:], strict=False)):
        notes.append("The groups of spec do not follow the order of execution.")

    modules, statistics = _modules(model, seen, group, new)
    fixed: set[str] = set()
    for names_in in division.members:
        off = {name for name in names_in if not parameters[name].requires_grad}
        # A whole group that is off was frozen by a plan and may open; one tensor among others is off by design.
        if len(off) < len(names_in):
            fixed |= off
        fixed |= {name for name in off if not parameters[name].is_floating_point()}
    if fixed:
        notes.append(f"Switched off by the network itself, and left so: {', '.join(sorted(fixed))}.")
    return LayerGroups(
        groups=tuple(
            LayerGroup(name, tuple(names_in), weights(names_in, parameters))
            for name, names_in in zip(division.names, division.members, strict=True)
        ),
        notes=tuple(notes),
        modules=modules,
        batchnorm=statistics,
        fixed=frozenset(fixed),
    )


def _modules(
    model: nn.Module, seen: Trace, group: dict[str, int], new: frozenset[str]
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The modules that go with each group, and those with pretrained running statistics."""
    names_of = {id(parameter): name for name, parameter in model.named_parameters()}
    own: dict[str, set[str]] = {}
    tied: dict[str, set[str]] = {}  # a tied name counts only where a module has nothing else
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names_of[id(parameter)]
        for prefix in prefixes(name):
            (own if name == first else tied).setdefault(prefix, set()).add(first)
    inside = tied | own
    order = sorted(seen.used, key=lambda name: seen.used[name])
    last = max(group.values())

    def group_of(name: str, around: str) -> int:
        held = {group[parameter] for parameter in inside[around]}
        if name == around or len(held) == 1 or name not in seen.called:
            return min(held)
        at = bisect_right(order, seen.called[name], key=lambda parameter: seen.used[parameter])
        return group[order[at]] if at < len(order) else last

    modules: list[list[str]] = [[] for _ in range(last + 1)]
    statistics = []
    for name, module in model.named_modules():
        around = name if name in inside else next(prefix for prefix in prefixes(name) if prefix in inside)
        modules[group_of(name, around)].append(name)
        buffers = [key for key, _ in module.named_buffers(recurse=False)]
        if any(key.startswith("running_") for key in buffers) and not inside[around] <= new:
            statistics.append(name)
    return tuple(map(tuple, modules)), tuple(statistics)


def _made_up_batch(pretrained: "Pretrained") -> dict[str, Tensor]:
    """Two examples of noise: pixel values [2, C, H, W], or token ids [2, T]."""
    noise = torch.Generator().manual_seed(0)
    processor: Any = pretrained.processor
    if pretrained.modality == "image":
        height, width = processor.size
        return {"pixel_values": torch.randn(2, len(processor.mean), height, width, generator=noise)}
    if callable(processor):
        encoded = processor(["A short example of a text.", "Another one."], padding=True, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded}
    config: Any = pretrained.model.config
    ids = torch.randint(3, config.get_text_config().vocab_size, (2, 8), generator=noise)
    if isinstance(eos := getattr(config, "eos_token_id", None), int):
        ids[:, -1] = eos  # encoder-decoders pool at the end of the sentence
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
