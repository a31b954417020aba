"""A trained model and its Task go in; a folder that timm or transformers loads without this package comes out."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.data.task import Task
from finetune.errors import RunError
from finetune.model.fetch import quiet
from finetune.model.heads import WithHead
from finetune.model.pretrained import Preprocessing, Pretrained

NOTES = "finetune.json"


def save_pretrained(pretrained: Pretrained, task: Task, folder: str | Path) -> Path:
    """Write the model to `folder`, whole or not at all: it is written beside the folder, then renamed.

    - timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`, and, with equal logits and the same labels,
      transformers' `AutoModelForImageClassification` and `pipeline("image-classification", FOLDER)`.
    - transformers: `AutoModelFor….from_pretrained(FOLDER)` and `pipeline`, with tokenizer or image processor.
    - custom head: the backbone as above, without a head, in `backbone/`; the head in `head.safetensors`.
    - a module of the user: `model.safetensors`.

    `finetune.json`, which the loaders ignore, says which of these it is, and what `finetune.load` needs.

    Returns:
        The folder.

    Raises:
        RunError: the folder holds something other than a model.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / NOTES).is_file())):
        raise RunError(f"{folder}: exists and is not a model folder written by finetune; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        _write(pretrained, task, new)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
            folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old)
        else:
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _write(pretrained: Pretrained, task: Task, folder: Path) -> None:
    writers: dict[str, Callable[[Pretrained, Task | None, Path], None]] = {
        "timm": _write_timm,
        "transformers": _write_transformers,
        "module": _write_module,
    }
    if pretrained.custom_head and pretrained.family != "module":
        whole = cast(WithHead, pretrained.model)
        (folder / "backbone").mkdir()
        writers[pretrained.family](replace(pretrained, model=whole.backbone), None, folder / "backbone")
        _save_tensors(whole.head, folder / "head.safetensors")
    else:
        writers[pretrained.family](pretrained, task, folder)
    write_json(folder / NOTES, _notes(pretrained, task))


def _notes(pretrained: Pretrained, task: Task) -> dict[str, Any]:
    notes: dict[str, Any] = {
        "schema": 1,
        "task": {"kind": task.kind, "modality": task.modality, "labels": list(task.labels)},
        "family": pretrained.family,
        "architecture": pretrained.info.get("architecture"),
        "base_model": pretrained.info.get("base_model"),
        "licence": pretrained.info.get("licence"),
    }
    if pretrained.custom_head:
        head = cast(WithHead, pretrained.model).head
        notes["head"] = {"class": type(head).__name__, "linear": pretrained.info.get("linear_head", False)}
    if isinstance(pretrained.processor, Preprocessing):
        fields = {key: value for key, value in vars(pretrained.processor).items() if key != "processor"}
        notes["preprocessing"] = fields | {"by": "timm" if pretrained.processor.processor is None else "transformers"}
    notes["versions"] = {
        name: found for name in ("finetune-onecycle", "torch", "timm", "transformers") if (found := _version(name))
    }
    return notes


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _write_timm(pretrained: Pretrained, task: Task | None, folder: Path) -> None:
    model, arguments = cast(Any, pretrained.model), dict(pretrained.info["model_args"])
    processor = cast(Preprocessing, pretrained.processor)
    # Sources, and recommendations for another size, are the base checkpoint's; label_offset has been applied.
    left_out = (
        "source",
        "file",
        "url",
        "hf_hub_id",
        "hf_hub_filename",
        "state_dict",
        "custom_load",
        "architecture",
        "label_offset",
        "label_names",
        "label_descriptions",
        "test_input_size",
        "test_crop_pct",
        "test_pool_size",
        "min_input_size",
    )
    cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in left_out}
    if tuple(cfg.get("input_size", ())[1:]) != tuple(processor.size):
        cfg["pool_size"] = None
    cfg |= {
        "input_size": [3, *processor.size],
        "interpolation": processor.interpolation,
        "crop_pct": processor.crop_pct,
        "crop_mode": processor.crop_mode,
        "mean": processor.mean,
        "std": processor.std,
        "num_classes": model.num_classes,
    }
    # transformers builds the architecture with its own default size, so a model of one size must say which. What it
    # must not find there is num_classes: it passes that itself, and would fail on the second.
    arguments.pop("num_classes", None)
    if cfg.get("fixed_input_size"):
        arguments["img_size"] = list(processor.size)
    config = {
        "architecture": pretrained.info["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
    }
    if task is not None:
        config |= {"label_names": list(task.labels), "problem_type": task.kind}  # timm's and transformers' words for it
        config |= {
            "id2label": dict(enumerate(task.labels)),
            "label2id": {name: i for i, name in enumerate(task.labels)},
        }
    config |= {"model_args": arguments} if arguments else {}
    write_json(folder / "config.json", config | {"pretrained_cfg": cfg})
    _save_tensors(model, folder / "model.safetensors")


def _write_transformers(pretrained: Pretrained, task: Task | None, folder: Path) -> None:
    with quiet():
        cast(Any, pretrained.model).save_pretrained(folder)
    _save_processor(pretrained, folder)


def _write_module(pretrained: Pretrained, task: Task | None, folder: Path) -> None:
    _save_tensors(pretrained.model, folder / "model.safetensors")
    _save_processor(pretrained, folder)


def _save_processor(pretrained: Pretrained, folder: Path) -> None:
    processor: Any = pretrained.processor
    if isinstance(processor, Preprocessing):
        processor = processor.processor
    if processor is not None:
        with quiet():
            processor.save_pretrained(folder)


def _save_tensors(module: nn.Module, file: Path) -> None:
    """Save on the CPU, each tensor with memory of its own: safetensors refuses tensors that share theirs."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.detach().to("cpu", memory_format=torch.contiguous_format)
        tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    save_file(tensors, file, metadata={"format": "pt"})


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write readable JSON.

    Raises:
        RunError: something in it cannot be written, and is named.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False)
    except TypeError as error:
        raise RunError(
            f"{file.name}: {error}; build the backbone with plain numbers and strings as arguments"
        ) from error
    file.write_text(text + "\n", encoding="utf-8")
