"""From a traced network to its division: runs of parameters in the order of their first use, block by block, head last.

Blocks are the elements of the stacks (`Sequential`, `ModuleList`, `ModuleDict`) that make up the body. Everything else
goes with the block that it runs beside, or before, or after.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from torch import Tensor, nn

from finetune.errors import PlanError
from finetune.model.tracing import Trace

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
STRAGGLERS = 0.2  # a block's parameters used apart from the rest of it stay loose below this share of its weights
NECK = 0.5  # what follows the last block is a group of its own from this share of that block's weights


@dataclass
class Division:
    """Group names and, by group, parameter names in order."""

    names: list[str]
    members: list[list[str]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Unit:
    """A part of the network that is not divided further: a module, or a parameter owned by a module that is divided."""

    name: str
    stacked: bool  # element of a stack
    composite: bool  # has layers of its own inside
    parameters: tuple[str, ...]


def by_spec(parameters: list[str], spec: Sequence[str]) -> Division:
    members: list[list[str]] = [[] for _ in spec]
    lost = []
    for name in parameters:
        for i, expression in enumerate(spec):
            if re.search(expression, name):
                members[i].append(name)
                break
        else:
            lost.append(name)
    if lost:
        more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
        raise PlanError(f"spec: no expression matches {', '.join(lost[:8])}{more}; add one that does")
    if empty := [expression for expression, names in zip(spec, members, strict=True) if not names]:
        raise PlanError(f"spec: nothing is left for {', '.join(map(repr, empty))}; remove it or put it earlier")
    return Division(list(spec), members)


def by_execution(model: nn.Module, seen: Trace, new: frozenset[str]) -> Division:
    parameters = dict(model.named_parameters())
    order = sorted(seen.used, key=lambda name: seen.used[name])
    kept = [i for i, name in enumerate(order) if name not in new]
    notes = []
    head: list[str] = []
    if kept:
        # New parameters are the head only behind all pretrained ones: a resized position table is new and runs first.
        body, head = order[: kept[-1] + 1], order[kept[-1] + 1 :]
        head += [name for name in seen.asleep if name in new]
        if early := [name for name in body if name in new]:
            notes.append(f"Newly initialised, but used before pretrained layers, so not head: {', '.join(early)}.")
    else:
        body = order
    blocks, loose = _blocks_and_loose(model, {name: parameters[name] for name in body})
    spans, loose = _spans(blocks, loose, parameters, seen)
    spans = _sequential(spans, seen)
    members = [[name for unit in span for name in unit.parameters] for span in spans]
    ends = [(_moment(span, seen, min), _moment(span, seen, max)) for span in spans]

    # Loose units: inside a block's span they belong to it; the others fill the gaps around the blocks.
    gaps: list[list[tuple[str, Unit]]] = [[] for _ in range(len(spans) + 1)]
    for name, unit in sorted(((n, u) for u in loose for n in u.parameters), key=lambda item: seen.used[item[0]]):
        at = bisect_right([lo for lo, _ in ends], seen.used[name])
        if at and seen.used[name] <= ends[at - 1][1]:
            members[at - 1].append(name)
        else:
            gaps[at].append((name, unit))
    for at in range(1, len(spans)):
        # A norm closes the block before it; from the first layer on (patch merging, a transition) it opens the next.
        joined_next = False
        for name, unit in gaps[at]:
            joined_next = joined_next or any(parameters[n].ndim > 1 for n in unit.parameters)
            members[at if joined_next else at - 1].append(name)

    names = _block_names(model, spans)
    stem, tail = ([name for name, _ in gaps[0]], gaps[-1]) if spans else ([], gaps[0])
    if not head and tail:
        last = tail[-1][1]
        head, tail = [n for n, u in tail if u is last], [(n, u) for n, u in tail if u is not last]
    elif not head:
        head = members.pop()
        names.pop()
    if after := [name for name, _ in tail]:
        if not members:
            stem += after
        elif weights(after, parameters) >= NECK * weights(members[-1], parameters):
            names, members = [*names, "neck"], [*members, after]
        else:
            members[-1] += after
    if stem:
        names, members = ["stem", *names], [stem, *members]
    division = Division([*names, "head"], [*members, head], notes)
    _place_asleep(division, seen)
    for group in division.members:
        group.sort(key=seen.moment)
    return division


def _blocks_and_loose(model: nn.Module, live: dict[str, nn.Parameter]) -> tuple[list[Unit], list[Unit]]:
    """The blocks of the body, and everything else in it."""
    total = sum(map(_is_layer, live.values()))
    strict, relaxed = _units(model, live, least=2), _units(model, live, least=1)
    stacked = [unit for unit in strict if unit.stacked]
    covered = sum(_is_layer(live[name]) for unit in stacked for name in unit.parameters)
    composite = [unit for unit in strict if unit.composite]
    flat = [unit for unit in relaxed if unit.stacked]
    # Stacks of blocks; else composite parts side by side (Inception); else layers in a row (VGG); else what there is.
    if len(stacked) >= 2 and 2 * covered >= total:
        return stacked, [unit for unit in strict if not unit.stacked]
    if len(composite) >= 4:
        return composite, [unit for unit in strict if not unit.composite]
    if len(flat) >= 2:
        return flat, [unit for unit in relaxed if not unit.stacked]
    if stacked:
        return stacked, [unit for unit in strict if not unit.stacked]
    return composite, [unit for unit in strict if not unit.composite]


def _units(model: nn.Module, live: dict[str, nn.Parameter], least: int) -> list[Unit]:
    """Divide the network down to the elements of its stacks.

    A stack is a container whose elements hold at least `least` layers each. A module is divided when stacks hold half
    of its layers, or when it is no element of a stack itself and holds half of the network's. An element is divided
    only when it is a stage in its turn (Swin, ConvNeXt, ResNet): a stack with two of a kind, unlike attention and
    feed-forward listed in a block of T5. Layers are counted rather than weights, for a vocabulary or a wide classifier
    would outweigh any stack.
    """
    layers: dict[str, int] = {}
    under: dict[str, list[str]] = {}
    for name, parameter in live.items():
        for prefix in prefixes(name):
            layers[prefix] = layers.get(prefix, 0) + _is_layer(parameter)
            under.setdefault(prefix, []).append(name)

    def children(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        found = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
        return [(key, child) for key, child in found if key in under]

    def elements(name: str, module: nn.Module, needed: int) -> list[str]:
        if not isinstance(module, CONTAINERS):
            return []
        found = {key: type(child) for key, child in children(name, module) if layers[key] >= least}
        alike = max(Counter(found.values()).values(), default=0)
        return list(found) if alike >= needed else []

    def in_stacks(name: str, module: nn.Module, needed: int) -> int:
        found = elements(name, module, needed)
        if found:
            return sum(layers[key] for key in found)
        return sum(in_stacks(key, child, needed) for key, child in children(name, module))

    def divides(name: str, module: nn.Module, needed: int) -> bool:
        held = in_stacks(name, module, needed)
        return held > 0 and 2 * held >= layers[name]

    def divide(name: str, module: nn.Module, element: bool, inside: bool, needed: int) -> Iterator[Unit]:
        parts = children(name, module)
        large = not inside and 2 * layers[name] >= layers[""]
        if not parts or not (name == "" or large or divides(name, module, needed)):
            yield Unit(name, element, bool(parts) and layers[name] >= 2, tuple(under[name]))
            return
        stack = elements(name, module, needed)
        # A stage of one block is a stage like its neighbours.
        stages = {type(child) for key, child in parts if key in stack and divides(key, child, 2)}
        for key, child in parts:
            if key in stack:
                yield from divide(key, child, True, True, 1 if type(child) in stages else 2)
            else:
                yield from divide(key, child, False, inside, needed)
        for key in under[name]:
            if key.rpartition(".")[0] == name:
                yield Unit(key, False, False, (key,))

    return list(divide("", model, False, False, 1)) if live else []


def _is_layer(parameter: Tensor) -> bool:
    """A weight that mixes channels; depth-wise filters, class tokens, scales and shifts do not."""
    return parameter.ndim >= 2 and parameter.shape[1] > 1


def weights(names: Iterable[str], parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameters[name].numel() for name in names)


def _moment(span: list[Unit], seen: Trace, end: Callable[[Iterable[int]], int]) -> int:
    return end(seen.used[name] for unit in span for name in unit.parameters)


def _spans(
    blocks: list[Unit], loose: list[Unit], parameters: dict[str, nn.Parameter], seen: Trace
) -> tuple[list[list[Unit]], list[Unit]]:
    """Blocks in order of use, those that overlap in time together; a block's few stragglers turn loose."""
    members = [(name, i) for i, unit in enumerate(blocks) for name in unit.parameters]
    order = sorted(members, key=lambda member: seen.used[member[0]])
    runs: list[list[list[str]]] = [[] for _ in blocks]
    for i, run in groupby(order, key=lambda x: x[1]):
        runs[i].append([name for name, _ in run])
    whole, loose = [], list(loose)
    for unit, parts in zip(blocks, runs, strict=True):
        main = max(parts, key=lambda part: weights(part, parameters))
        small = STRAGGLERS * weights(unit.parameters, parameters)
        stay = [part for part in parts if part is main or weights(part, parameters) >= small]
        loose += [Unit(unit.name, False, False, tuple(part)) for part in parts if part not in stay]
        whole.append(replace(unit, parameters=tuple(name for part in stay for name in part)))
    spans: list[list[Unit]] = []
    for unit in sorted(whole, key=lambda unit: _moment([unit], seen, min)):
        if spans and _moment([unit], seen, min) <= _moment(spans[-1], seen, max):
            spans[-1].append(unit)
        else:
            spans.append([unit])
    return spans, loose


def _sequential(spans: list[list[Unit]], seen: Trace) -> list[list[Unit]]:
    """Join what runs one after the other but side by side in the data flow: each group builds on the one before it.

    A span's level is one more than the highest level that it needs; a cut is right where all before it lies lower than
    all behind it.
    """
    bits = [sum(seen.bit[name] for unit in span for name in unit.parameters) for span in spans]
    levels: list[int] = []
    for i, span in enumerate(spans):
        needs = 0
        for unit in span:
            for name in unit.parameters:
                needs |= seen.needs[name]
        levels.append(1 + max((levels[j] for j in range(i) if needs & bits[j]), default=0))
    joined: list[list[Unit]] = []
    for i, span in enumerate(spans):
        if joined and max(levels[:i]) >= min(levels[i:]):
            joined[-1] = joined[-1] + span
        else:
            joined.append(span)
    return joined


def _block_names(model: nn.Module, spans: list[list[Unit]]) -> list[str]:
    """Names of modules, without the wrapper (`bert.`, `backbone.`) that all blocks lie in."""
    units = [unit.name for span in spans for unit in span]
    roots = {name.split(".")[0] for name in units}
    wrapper = roots.pop() if len(roots) == 1 else ""
    strip = wrapper + "." if wrapper and not isinstance(model.get_submodule(wrapper), CONTAINERS) else ""
    names = []
    for span in spans:
        own = [unit.name for unit in span]
        paths = [name.split(".") for name in own]
        shared = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
        common = ".".join(shared)
        alone = common and not any(n == common or n.startswith(common + ".") for n in units if n not in own)
        name = common if alone else f"{own[0]}..{own[-1].removeprefix(strip)}"
        names.append(name.removeprefix(strip) or name)
    return names


def _place_asleep(division: Division, seen: Trace) -> None:
    """Parameters that took no part lie with the earliest group of the nearest module around them that did."""
    earliest: dict[str, int] = {}
    for i, names in enumerate(division.members):
        for name in names:
            for prefix in prefixes(name) if name in seen.used else ():
                earliest.setdefault(prefix, i)
    placed = {name for names in division.members for name in names}
    for name in seen.asleep:
        if name not in placed:
            division.members[next(earliest[p] for p in prefixes(name) if p in earliest)].append(name)


def prefixes(parameter: str) -> Iterator[str]:
    """The modules that a parameter lies in, from its owner out to the root ("")."""
    while parameter:
        parameter = parameter.rpartition(".")[0]
        yield parameter
