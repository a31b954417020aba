"""The name of a checkpoint (or a module) and a Task go in; the model with its head, and its preprocessing, come out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.errors import BackboneError
from finetune.model.fetch import loading, locate
from finetune.model.heads import Head, TokenLinear
from finetune.model.pretrained import Preprocessing, Pretrained, example_inputs, with_head

if TYPE_CHECKING:
    from finetune.data.task import Task

LARGEST = 4096  # pixels of a side
EXAMPLES = {"image": "timm/convnext_nano.in12k_ft_in1k", "text": "answerdotai/ModernBERT-base"}


def load_backbone(
    name_or_module: str | Path | nn.Module,
    task: Task | None = None,
    *,
    head: Head | None = None,
    image_size: int | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    seed: int = 0,
    modality: str | None = None,
    processor: Any = None,
) -> Pretrained:
    """Load a pretrained backbone, in fp32 on the CPU, with a head for the task.

    Where the checkpoint already has a classifier for exactly these labels, it is kept; otherwise the head is new.

    Args:
        name_or_module: "timm/NAME[.tag]"; a transformers id "owner/name[@revision]"; "hf-hub:owner/name";
            a local folder that timm or transformers saved (also "local-dir:PATH"), or a run folder; "fractals" or
            "minilm", which need no network; or any module that takes images [B, 3, H, W] or named text inputs.
            A module whose output is not [B, task.outputs] wide is taken as giving features, and gets a linear head.
        task: What the head is for; by default the checkpoint's own head stays.
        head: Custom head: class or function from the feature width to a module; see `finetune.model.heads`.
        image_size: Pixels of a side; by default, what the checkpoint was trained for.
        allow_pickle: Accept weights that are not safetensors.
        trust_remote_code: Run Python code from the repository of the model.
        seed: For the new weights.
        modality: "image" or "text", where neither task nor backbone tells.
        processor: Preprocessing or tokenizer for a module; for a checkpoint, instead of its own.

    Raises:
        BackboneError: unknown, unreachable, unsafe, or of the other modality.
    """
    if isinstance(name_or_module, nn.Module):
        return _adapt(
            name_or_module, task, head=head, image_size=image_size, seed=seed, modality=modality, processor=processor
        )
    name = str(name_or_module)
    source = locate(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    wanted = task.modality if task else modality
    # Each family is imported late: timm and transformers cost seconds, and one run needs one of them.
    if source.family == "timm":
        _check_modality(name, ("image",), wanted)
        from finetune.model import from_timm

        loaded = from_timm.load(source, name, task, head=head, image_size=image_size, seed=seed)
    else:
        from finetune.model import from_transformers

        found = from_transformers.modalities(source.config)
        _check_modality(name, found, wanted)
        loaded = from_transformers.load(
            source,
            name,
            task,
            wanted or found[0],
            head=head,
            image_size=image_size,
            trust_remote_code=trust_remote_code,
            seed=seed,
        )
    _check_finite(name, loaded.model)
    if processor is None and isinstance(loaded.processor, Preprocessing):
        _check_preprocessing(name, loaded.processor)
    return loaded if processor is None else replace(loaded, processor=processor)


def _check_finite(name: str, model: nn.Module) -> None:
    odd = next((key for key, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if odd is not None:
        raise BackboneError(
            f"{name}: its weights hold values that are no numbers ({odd}); fetch or save the model again"
        )


def _check_preprocessing(name: str, pre: Preprocessing) -> None:
    """Try what the checkpoint says of its images on a picture, before data is read with it."""
    from PIL import Image

    from finetune.data.images import eval_transform

    with loading(f"{name}: what it says of its images cannot be", "mend its preprocessing, or save the model again"):
        if not all(isinstance(side, int) and 1 <= side <= LARGEST for side in pre.size):
            raise ValueError(f"a size of {pre.size} pixels; at most {LARGEST} a side")
        if not 0.05 <= pre.crop_pct <= 20:
            raise ValueError(f"a crop_pct of {pre.crop_pct}")
        if not len(pre.mean) == len(pre.std) == 3:
            raise ValueError(f"a mean of {pre.mean} and a deviation of {pre.std}, for the three channels of a picture")
        pixels = eval_transform(pre)(Image.new("RGB", (8, 8)))
        if pixels.shape[0] != 3 or not torch.isfinite(pixels).all():
            raise ValueError(f"a picture becomes {tuple(pixels.shape)}, or no numbers")


def _check_modality(name: str, found: tuple[str, ...], wanted: str | None) -> None:
    if not found:
        raise BackboneError(f"{name}: transformers has no classifier for this kind of model; give another backbone")
    if wanted and wanted not in found:
        raise BackboneError(
            f"{name}: works on {found[0]}s, but the task is on {wanted}s; "
            f"give a backbone for {wanted}s, such as {EXAMPLES[wanted]}"
        )


def _adapt(
    module: nn.Module,
    task: Task | None,
    *,
    head: Head | None,
    image_size: int | None,
    seed: int,
    modality: str | None,
    processor: Any,
) -> Pretrained:
    """Take a module that the user has built as the backbone."""
    if hasattr(module, "pretrained_cfg") and hasattr(module, "reset_classifier"):
        from finetune.model import from_timm

        return from_timm.adapt(module, task, head=head, image_size=image_size, seed=seed, processor=processor)
    if hasattr(module, "base_model_prefix") and hasattr(module, "config"):
        from finetune.model import from_transformers

        return from_transformers.adapt(module, task, head=head, processor=processor, seed=seed)  # type: ignore[arg-type]
    name = type(module).__name__
    modality = task.modality if task else modality or ("text" if hasattr(processor, "pad_token") else "image")
    if processor is None and modality == "text":
        raise BackboneError(f"{name}: a text module without a tokenizer; pass the tokenizer as processor=")
    if processor is None:
        processor = Preprocessing(size=(image_size or 224, image_size or 224))
    elif modality == "image" and not isinstance(processor, Preprocessing):
        from finetune.model.from_transformers import from_image_processor

        processor = from_image_processor(processor)
    info: dict[str, Any] = {"architecture": name, "base_model": None, "licence": None}
    loaded = Pretrained(module, processor, "module", name, frozenset(), modality, info)
    if head is None and task is not None and not _fits(loaded, task):
        head, info["linear_head"] = linear_head(task), True
    return loaded if head is None else with_head(loaded, head, seed)


def linear_head(task: Task) -> Head:
    """The head that a module without one gets: one linear layer."""

    def head(features: int) -> nn.Module:
        layer = TokenLinear if task.kind == "token_classification" else nn.Linear
        return layer(features, task.outputs)

    head.pooled = task.kind != "token_classification"  # type: ignore[attr-defined]
    return head


def _fits(pretrained: Pretrained, task: Task) -> bool:
    """Whether a module gives the task's outputs already, and so has its own head."""
    module, training = pretrained.model, pretrained.model.training
    module.eval()
    try:
        with torch.no_grad():
            output = pretrained.forward(example_inputs(pretrained))
    finally:
        module.train(training)
    dimensions = 3 if task.kind == "token_classification" else 2
    return not isinstance(output, Tensor) or (output.ndim == dimensions and output.shape[-1] == task.outputs)
