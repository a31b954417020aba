"""From a model and one batch to the order in which its parameters and modules are first used.

One forward pass runs under a dispatch mode, which sees every operator with the tensors that enter it, also those inside
scripted functions, fused kernels and recurrent layers. That gives the first use of every parameter, and, carried along
from tensor to tensor, on which earlier parameters that use depends: blocks that run in turn but side by side in the
data flow (the branches of HRNet, experts of a mixture) are told apart from blocks that follow each other.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Trace:
    """What one forward pass of a model did.

    Attributes:
        used: Parameter name -> moment of its first use, for the parameters that took part.
        asleep: Parameter name -> moment at which the nearest called module around it was first called, for the others.
        called: Module name -> moment of its first call.
        bit: Parameter name -> its bit in `needs`.
        needs: Parameter name -> bits of the parameters from which the data that it first met had been computed.
    """

    used: dict[str, int]
    asleep: dict[str, int]
    called: dict[str, int]
    bit: dict[str, int]
    needs: dict[str, int]

    def moment(self, parameter: str) -> int:
        """Moment of the first use, or the nearest thing to it."""
        return self.used[parameter] if parameter in self.used else self.asleep[parameter]


def trace(model: nn.Module, forward: Callable[[], Any], inputs: dict[str, Tensor]) -> Trace:
    """Run `forward()` once in evaluation mode, without gradients; training flags and random state stay as they were.

    Args:
        model: The network whose parameters are watched. Names are those of `model.named_parameters()`.
        forward: Calls the network on `inputs`.
        inputs: The tensors of the batch, to recognise what is computed from data.
    """
    names = [name for name, _ in model.named_parameters()]
    watch = _Watch(list(model.parameters()), inputs)
    module_names = {id(module): name for name, module in model.named_modules()}
    called: dict[str, int] = {}

    def note_call(module: nn.Module, _args: Any) -> None:
        name = module_names.get(id(module))
        if name is not None:
            called.setdefault(name, watch.tick())

    handle = register_module_forward_pre_hook(note_call)
    try:
        with _undisturbed(model), torch.no_grad(), watch:
            forward()
    finally:
        handle.remove()

    used = {names[i]: moment for i, moment in watch.first.items()}
    owners_seen = {_owner(name) for name in used}
    for name in names:
        # Kernels outside the dispatcher show no operator; that the owning module was called has to do.
        if _owner(name) in called and _owner(name) not in owners_seen:
            used[name] = called[_owner(name)]
    asleep = {name: _nearest_call(name, called) for name in names if name not in used}
    bit = {name: 1 << i for i, name in enumerate(names)}
    needs = {name: watch.needs.get(i, 0) & ~watch.data_bit for i, name in enumerate(names)}
    return Trace(used, asleep, called, bit, needs)


class _Watch(TorchDispatchMode):
    """Notes at every operator which parameters enter it, and hands on what its outputs were computed from.

    Provenance is a bit set (one bit a parameter, one for the data) kept by storage, so that views and in-place writes
    are followed. A storage that is freed and used again without an operator keeps stale bits; that can only make
    blocks look more dependent than they are, which is the harmless side.
    """

    def __init__(self, parameters: list[nn.Parameter], inputs: dict[str, Tensor]):
        super().__init__()
        self.clock = 0
        self.data_bit = 1 << len(parameters)
        self.index = {id(p): i for i, p in enumerate(parameters)}
        self.first: dict[int, int] = {}
        self.needs: dict[int, int] = {}
        self.provenance: dict[int, int] = {}
        keys = [storage_of(p) for p in parameters]
        # Code that reads `weight.data` brings another tensor object: its storage tells whose it is, if not shared.
        shares = Counter(keys)
        self.owner = {key: i for i, key in enumerate(keys) if shares[key] == 1}
        for value in inputs.values():
            self.provenance[storage_of(value)] = self.data_bit

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        entering = [] if reads_shape_only(name) else [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        moment = self.tick()
        seen: set[int] = set()
        met, constant = 0, 0
        for tensor in entering:
            key = storage_of(tensor)
            seen.add(key)
            i = self.index.get(id(tensor), self.owner.get(key))
            if i is not None:
                self.first.setdefault(i, moment)
                bits = 1 << i
            else:
                bits = self.provenance.get(key, 0)
            if bits & self.data_bit:
                met |= bits
            else:
                constant |= bits
        if met:
            # What was computed from parameters alone (a transposed weight, a table of positions) enters the data here.
            for i in _bits(constant):
                self.needs.setdefault(i, met)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                key = storage_of(tensor)
                old = self.provenance.get(key, 0) if key in seen else 0
                self.provenance[key] = old | met | constant
        return out


def reads_shape_only(name: str) -> bool:
    """True for operators that take shape, dtype and device from a tensor, but not its values (`ones_like`)."""
    return name.startswith("new_") or name.endswith("_like") or name == "lift_fresh"


def storage_of(tensor: Tensor) -> int:
    """What tells whether two tensors share their memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
        return -id(tensor)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _nearest_call(parameter: str, called: dict[str, int]) -> int:
    name = _owner(parameter)
    while name and name not in called:
        name = _owner(name)
    return called.get(name, 0)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers (statistics of batch norms) and random numbers are as before afterwards, whatever happened inside."""
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; training flags and the random state of CPU and model devices as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for module, training in flags:
            module.training = training
