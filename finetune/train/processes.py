"""One or many processes go in; a device, a wrapped model and gathered results come out. All of accelerate that is
used is here."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from finetune.errors import FinetuneError, RunError
from finetune.model.groups import LayerGroups
from finetune.model.pretrained import Pretrained
from finetune.model.sharding import shard


@dataclass(frozen=True)
class Processes:
    """The processes of this run, as one of them sees them."""

    accelerator: Accelerator
    precision: str = "fp32"
    sharded: bool = False  # the model is spread over the processes

    def autocast(self) -> torch.autocast:
        """Context of a forward pass: bf16 where that is the precision. bf16 has the range of fp32 and needs no
        scaler."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def count(self) -> int:
        """Processes in all."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model ready for backward passes with the parameters that are trainable now.

        Wrapped anew at every stage: a parameter that is unfrozen after the wrap would never be averaged between
        processes.
        """
        if self.count == 1 or self.sharded:
            return model
        bare = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator._models.clear()
        return self.accelerator.prepare_model(bare)

    def shard(self, pretrained: Pretrained, groups: LayerGroups) -> Pretrained:
        """The model as it trains: itself, or a copy that is spread over the processes."""
        if not self.sharded:
            return pretrained
        return shard(pretrained, groups, self.device, offload=_flag("FSDP_OFFLOAD_PARAMS"))

    def sync_gradients(self, model: nn.Module, now: bool) -> AbstractContextManager[None]:
        """For a backward pass: whether processes average their gradients in it, or leave that to a later
        micro-batch."""
        if self.sharded:
            cast(Any, model).set_requires_gradient_sync(now)
        return nullcontext() if now or self.count == 1 or self.sharded else self.accelerator.no_sync(model)

    def shares(self, batches: list[list[int]]) -> tuple[list[list[int]], int]:
        """This process's part of the batches of a pass without gradients, and how many of them count.

        Where the model is spread, all processes run it equally often: one that has fewer batches runs the first again.
        """
        mine = batches[self.rank :: self.count]
        counted = len(mine)
        if self.sharded and counted < -(-len(batches) // self.count):
            mine = [*mine, batches[0]]
        return mine, counted

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in order of their rank, on every process."""
        return gather_object(items) if self.count > 1 else items

    def check_same(self, model: nn.Module, stage: str) -> None:
        """Make sure that every process has the same weights.

        Raises:
            RunError: They have drifted apart, and what they have learnt since is worth nothing.
        """
        if self.count == 1 or self.sharded:
            return
        sums = torch.stack([parameter.detach().double().sum() for parameter in model.parameters()]).cpu()
        for rank, other in enumerate(self.gather([sums])):
            if not torch.allclose(other, sums, rtol=1e-6, atol=1e-6):
                raise RunError(
                    f"{stage}: the weights of process {rank} differ from those of process {self.rank}; a device or a "
                    "link between them computes wrongly. Give the same command again to go on from the last checkpoint"
                )

    def total(self, value: float) -> float:
        """Sum of a number over the processes."""
        if self.count == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(float(value), device=self.device), reduction="sum"))

    def first(self, action: Callable[[], Any]) -> Any:
        """Do something on the main process alone; its result on every process, or its error raised on every one."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except FinetuneError as error:
                outcome[1] = error
        if self.count > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def wait(self) -> None:
        """Return once every process is here."""
        self.accelerator.wait_for_everyone()


def start_processes() -> Processes:
    """Join the processes that `accelerate launch` or torchrun started; without them, this one alone.

    Raises:
        RunError: The launcher asked for several processes, and this one was not joined to them.
    """
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        raise RunError("accelerate's configuration: DeepSpeed is not supported; take FSDP2, recipes/configs/fsdp2.yaml")
    sharded = _flag("ACCELERATE_USE_FSDP")
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise RunError("accelerate's configuration: fsdp_version must be 2, see recipes/configs/fsdp2.yaml")
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1 and (launched := _processes_of_launcher()) > 1:
        raise RunError(
            f"accelerate launch --num_processes {launched}: one process was started, not {launched}; start them with "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {launched}` or torchrun"
        )
    # Autocast is ours: accelerate fixes the precision of its first Accelerator for the life of the process.
    accelerator = Accelerator(cpu=cpu)
    if asked != accelerator.num_processes:
        raise RunError(
            f"WORLD_SIZE={asked}: the launcher started {asked} processes, and each would train alone; start them "
            f"with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked}` or torchrun"
        )
    return Processes(accelerator, sharded=sharded and asked > 1)


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def _processes_of_launcher() -> int:
    """What `accelerate launch` was asked for, where it is this process's parent: with --cpu it starts one process,
    whatever the number, and says nothing (accelerate #2741)."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return 1
    if not ("launch" in words and any(Path(word).name in ("accelerate", "accelerate-launch") for word in words[:3])):
        return 1
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes" or name == "-n":
            number = value or following
            return int(number) if number.isdigit() else 1
        if word.endswith(".py"):  # the options behind it are the program's own
            break
    return 1


def native_precision(model: nn.Module) -> tuple[str, str]:
    """("bf16" | "fp32", reason): the precision in which this machine trains this model fastest."""
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{torch.cuda.get_device_name()} computes in bf16"
        return "fp32", f"{torch.cuda.get_device_name()} has no bf16"
    if torch.backends.mps.is_available():
        return "fp32", "bf16 is not used on this device"
    # oneDNN emulates bf16 where the processor lacks the instructions, and is then slower than fp32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if not any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check)):
        return "fp32", "the processor has no bf16 instructions"
    # A step of MobileNetV2 takes 0.30 s in bf16 and 0.29 s in fp32; one of MiniLM 0.16 s and 0.25 s.
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    if 2 * linear < sum(parameter.numel() for name, parameter in model.named_parameters() if "embed" not in name):
        return "fp32", "the model is mostly convolutions, which gain nothing from bf16 on this processor"
    return "bf16", "the processor has bf16 instructions"
