"""A model that is spread over the processes (FSDP2): a plain one goes in, its parts come out, and whole tensors again.

Each layer group that is one block is a unit of its own: its weights are gathered when it runs and given back after it.
Which of them train may change from stage to stage; nothing is wrapped anew.
"""

import copy
import sys
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.model.groups import LayerGroups
from finetune.model.pretrained import Pretrained


def shard(pretrained: Pretrained, groups: LayerGroups, device: torch.device, *, offload: bool) -> Pretrained:
    """A copy of the model on `device` whose parameters are spread over all processes; the model itself stays as it is.

    Args:
        pretrained: The model, whole, on the CPU.
        groups: Its layer groups.
        device: Of this process.
        offload: Keep the parts in the memory of the CPU.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard  # half a second, for few

    model = copy.deepcopy(pretrained.model).to(device)
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for name in _units(model, groups):
        fully_shard(cast(Any, model.get_submodule(name)), offload_policy=policy)
    # By default the outermost unit would stay whole after a forward pass, and what is done to its parameters between
    # two passes (a head that is set, a stage that opens it) would be done to a copy.
    fully_shard(cast(Any, model), offload_policy=policy, reshard_after_forward=True)
    return replace(pretrained, model=model)


def _units(model: nn.Module, groups: LayerGroups) -> list[str]:
    """Modules that are called, and that hold exactly one of the groups between the stem and the head."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name for same in names.values() if len(same) > 1 for name in same}
    found = []
    for group in groups[1:-1]:
        parts = [name.split(".")[:-1] for name in group.parameters]
        depth = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), len(min(parts)))
        name = ".".join(parts[0][:depth])
        if not name or tied & set(group.parameters):
            continue
        module = model.get_submodule(name)
        inside = {f"{name}.{inner}" for inner, _ in module.named_parameters()}
        if inside == set(group.parameters) and type(module).forward is not nn.Module.forward:
            found.append(name)
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` made it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor lies in parts on the processes. Where none does, what makes such tensors was never imported."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process, gathered from its parts; every process has to ask for it."""
    return cast(Any, tensor).full_tensor() if is_spread(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory; all of one that is not spread."""
    return cast(Any, tensor).to_local() if is_spread(tensor) else tensor


def spread(tensor: Tensor | None, like: Tensor) -> Tensor:
    """A whole tensor as a tensor like `like`: where that is spread, each process gets its part from the first one, and
    the others need not have it."""
    if not is_spread(like):
        assert tensor is not None
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    tensor = torch.empty(like.shape, dtype=like.dtype) if tensor is None else tensor
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements)


def put_back(sharded: nn.Module, plain: nn.Module) -> None:
    """Give a whole model, on every process, the weights of its spread copy."""
    target = plain.state_dict()
    with torch.no_grad():
        for name, tensor in sharded.state_dict().items():
            target[name].copy_(whole(tensor))
