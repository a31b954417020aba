"""The state of training goes in and comes back: weights, optimizer, best and averaged weights, step and history.

A checkpoint is a folder `checkpoints/step-N`, written beside its place, forced to the disk and renamed, so that one
that is there is whole; checksums tell when the disk has lost some of it since. Random numbers are a function of the
step and need not be kept. Nothing in it needs unpickling of code: weights are safetensors, the rest is read with
`weights_only`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune.model.sharding import is_spread, spread, whole

Weights = dict[str, torch.Tensor]
CHECKSUMS = "checksums.json"


def snapshot(model: nn.Module) -> Weights:
    """A copy of the state dict on the CPU; tensors that share memory are copied once each."""
    return gathered(model.state_dict())


def gathered(state: Mapping[str, torch.Tensor]) -> Weights:
    """Whole copies of tensors on the CPU.

    Of those that are spread over the processes, the first process has all and the others have none; every process has
    to ask for them.
    """
    found = {}
    for name, tensor in state.items():
        copied = whole(tensor.detach())
        if not is_spread(tensor) or torch.distributed.get_rank() == 0:
            found[name] = copied.to("cpu", copy=True).contiguous()
    return found


def restore(model: nn.Module, weights: Weights) -> None:
    """Load what `snapshot` took."""
    model.load_state_dict(scattered(weights, model.state_dict()))


def scattered(weights: Weights, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `gathered` took, spread over the processes as the tensors of `like` are.

    Raises:
        KeyError: It lacks one of them.
    """
    for name, tensor in like.items():
        if name not in weights and (not is_spread(tensor) or torch.distributed.get_rank() == 0):
            raise KeyError(f"{name} is not in it")
    return {name: spread(weights.get(name), tensor) for name, tensor in like.items()}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with whole tensors."""
    found = optimizer.state_dict()
    state = {
        index: {name: whole(value) if isinstance(value, torch.Tensor) else value for name, value in entries.items()}
        for index, entries in found["state"].items()
    }
    return {**found, "state": state}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` took, on every process."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {
            name: spread(value, parameters[index]) if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def save(
    folder: Path, step: int, *, weights: dict[str, Weights], optimizer: dict[str, Any], progress: dict[str, Any]
) -> Path:
    """Write `folder/step-N` and drop all but it and the one before.

    Args:
        folder: The run's `checkpoints` folder.
        step: Optimizer steps done.
        weights: {"model": …, and "best", "average" or "head" where they exist}.
        optimizer: From `optimizer_state`.
        progress: Plain data (history, best score, timings).

    Raises:
        OSError: No space, or no permission; what was written of it is gone again, earlier checkpoints are as they were.
    """
    target = folder / f"step-{step:07d}"
    beside = folder / f".{target.name}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name, tensors in weights.items():
            save_file(tensors, beside / f"{name}.safetensors")
        torch.save(optimizer, beside / "optimizer.pt")
        (beside / "progress.json").write_text(json.dumps({"step": step, **progress}))
        (beside / CHECKSUMS).write_text(json.dumps({file.name: _checksum(file) for file in sorted(beside.iterdir())}))
        for path in (*beside.iterdir(), beside):
            to_disk(path)
        if target.exists():
            shutil.rmtree(target)
        beside.rename(target)
        to_disk(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        shutil.rmtree(beside, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from None
    # After a rewind those of later steps belong to what was given up.
    kept = sorted(path for path in folder.glob("step-*") if path <= target)[-2:]
    for path in folder.glob("step-*"):
        if path not in kept:
            shutil.rmtree(path)
    return target


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The last whole checkpoint in a run's `checkpoints` folder, if there is one; damaged ones are said and removed."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        damage = _damage(path)
        if not damage:
            return path
        say(f"Damaged   {path}: {damage}; going back to the one before")
        shutil.rmtree(path, ignore_errors=True)
    return None


def load(path: Path) -> tuple[dict[str, Weights], dict[str, Any], dict[str, Any]]:
    """(weights, optimizer state, progress) of a checkpoint."""
    weights = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    optimizer = torch.load(path / "optimizer.pt", weights_only=True)
    return weights, optimizer, json.loads((path / "progress.json").read_text())


def to_disk(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
    try:
        expected = json.loads((path / CHECKSUMS).read_text())
        for name, checksum in expected.items():
            # A name is joined to the folder, so it must be a name.
            if Path(name).name != name or _checksum(path / name) != checksum:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"it cannot be read ({error})"
    return ""


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
