"""Adapters that were trained and merged, and the saved model, go in; a folder that `peft` loads comes out.

Beside peft's two files there are the model's small ones, which say how inputs are prepared and what the labels are
called: tokenizer or image processor, and config.json, with which the backbone is loaded.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.data.task import Task
from finetune.model.lora import HEADS, Adapter, adapted_part
from finetune.model.pretrained import Pretrained

WEIGHTS = "adapter_model.safetensors"
TASK_TYPES = {
    "single_label_classification": "SEQ_CLS",
    "multi_label_classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
}  # peft has none for images


def save_adapter(adapter: Adapter, pretrained: Pretrained, task: Task, model: Path, folder: Path) -> Path:
    """Write a repository for `PeftModel.from_pretrained(BACKBONE, folder)`, whole or not at all.

    BACKBONE is the base model with a fresh head of as many outputs: `AutoModelFor….from_pretrained(base, config=…)`,
    `timm.create_model(base, pretrained=True, num_classes=…)`; with a custom head, the base model without one.

    Args:
        adapter: After training, merged.
        pretrained: The merged model.
        task: The task.
        model: The folder that `save_pretrained` wrote it to.
        folder: Where to write; an adapter that is there is replaced.

    Returns:
        The folder.
    """
    new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        _write(adapter, pretrained, task, model, new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _write(adapter: Adapter, pretrained: Pretrained, task: Task, model: Path, folder: Path) -> None:
    inner = model / "backbone" if (model / "backbone").is_dir() else model
    for file in (*inner.iterdir(), model / "finetune.json", model / "head.safetensors"):
        if file.is_file() and not file.name.startswith("model"):  # the weights, in one file or several
            shutil.copyfile(file, folder / file.name)
    text = pretrained.family == "transformers" and pretrained.modality == "text" and not pretrained.custom_head
    config = replace(
        adapter.config,
        base_model_name_or_path=adapter.base,
        revision=pretrained.info.get("revision"),
        task_type=TASK_TYPES.get(task.kind) if text else None,
        modules_to_save=list(adapter.whole) or None,
        inference_mode=True,
    )
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules or ())  # a set would be written in any order
    config.save_pretrained(str(folder))
    whole = _whole(adapted_part(pretrained), [*adapter.whole, *(HEADS if text else ())])
    save_file(adapter.tensors | whole, folder / WEIGHTS, metadata={"format": "pt"})


def _whole(part: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Weights and buffers of the modules that train whole, and of all that peft takes for one of them by its name."""
    return {
        f"base_model.model.{name}.{key}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, module in part.named_modules()
        if any(name.endswith(one) for one in names)
        for key, tensor in module.state_dict().items()
    }


def write_card(folder: Path) -> None:
    """The adapter's README.md, as far as the run folder around it tells; without pictures, which come with a push."""
    from finetune.output.card import make_card  # with matplotlib, which takes a second
    from finetune.output.card_facts import Facts

    card = make_card(Facts.of(folder), f"your-name/{folder.resolve().parent.name}", draw=False)
    (folder / "README.md").write_text(card.text, encoding="utf-8")
