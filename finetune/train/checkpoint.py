"""The state of training goes in and comes back: weights, optimizer, random numbers, best and averaged weights, step
and history.

A checkpoint is a folder `checkpoints/step-N`, written beside its place and renamed, so that one that is there is
whole. Nothing in it needs unpickling of code: weights are safetensors, the rest is read with `weights_only`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Weights = dict[str, torch.Tensor]


def snapshot(model: nn.Module) -> Weights:
    """A copy of the state dict on the CPU; tensors that share memory are copied once each."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}


def restore(model: nn.Module, weights: Weights) -> None:
    """Load what `snapshot` took."""
    model.load_state_dict(weights)


def save(
    folder: Path,
    step: int,
    *,
    weights: dict[str, Weights],
    optimizer: dict[str, Any],
    progress: dict[str, Any],
    rng: list[torch.Tensor],
) -> Path:
    """Write `folder/step-N` and drop all but the newest two.

    Args:
        folder: The run's `checkpoints` folder.
        step: Optimizer steps done.
        weights: {"model": …, and "best" or "average" where they exist}.
        optimizer: The optimizer's state dict.
        progress: Plain data (history, best score, timings).
        rng: State of torch's generator on each process, in order of rank.
    """
    target = folder / f"step-{step:07d}"
    beside = folder / f".{target.name}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name, tensors in weights.items():
        save_file(tensors, beside / f"{name}.safetensors")
    torch.save({"optimizer": optimizer, "rng": rng}, beside / "state.pt")
    (beside / "progress.json").write_text(json.dumps({"step": step, **progress}))
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint in a run's `checkpoints` folder, if there is one."""
    return max(folder.glob("step-*"), default=None)


def load(path: Path) -> tuple[dict[str, Weights], dict[str, Any], list[torch.Tensor], dict[str, Any]]:
    """(weights, optimizer state, generator states, progress) of a checkpoint."""
    weights = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    state = torch.load(path / "state.pt", weights_only=True)
    return weights, state["optimizer"], state["rng"], json.loads((path / "progress.json").read_text())
