"""What loading a backbone gives: the model with its head, its preprocessing, and what loading found out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune.model.heads import Head, attach

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How the backbone wants its images: size (height, width) in pixels, mean and std of the channels in 0..1.

    `processor`, where there is one, is transformers' own and does the evaluation; otherwise timm's
    `create_transform` of these values does.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    processor: Any = None


@dataclass(frozen=True)
class Pretrained:
    """A model with its head, its preprocessing, and what loading it found out.

    Attributes:
        model: The module that trains.
        processor: Preprocessing of images, or the tokenizer of texts.
        family: "timm", "transformers" or "module".
        name: As the user gave it.
        new_parameters: Names of the parameters that loading did not find in the checkpoint.
        modality: "image" or "text".
        info: architecture, base_model (Hub id), revision, licence, labels of the checkpoint, and more of a family.
        custom_head: Whether `model` is a `WithHead`.
    """

    model: nn.Module
    processor: Preprocessing | PreTrainedTokenizerBase
    family: str
    name: str
    new_parameters: frozenset[str]
    modality: str
    info: dict[str, Any] = field(default_factory=dict)
    custom_head: bool = False

    def forward(self, batch_inputs: dict[str, Tensor], model: nn.Module | None = None) -> Any:
        """Logits [B, C], [B, K] or [B, T, C], or the custom head's own output. `model`: a wrapped one (DDP), to use
        in place of `self.model`.
        """
        model = self.model if model is None else model
        if not self.custom_head and self.family != "transformers" and "pixel_values" in batch_inputs:
            output = model(batch_inputs["pixel_values"])
        else:
            output = model(**batch_inputs)
        return output if isinstance(output, Tensor) or self.custom_head else getattr(output, "logits", output)


def with_head(pretrained: Pretrained, head: Head, seed: int = 0) -> Pretrained:
    """Put a custom head on a model without one; the head's parameters join the new ones."""
    model = attach(pretrained.model, head, pretrained.family, example_inputs(pretrained), seed)
    new = {f"backbone.{name}" for name in pretrained.new_parameters}
    new |= {f"head.{name}" for name, _ in model.head.named_parameters()}
    return replace(pretrained, model=model, new_parameters=frozenset(new), custom_head=True)


def example_inputs(pretrained: Pretrained) -> dict[str, Tensor]:
    """Inputs of one example, for measuring shapes: a black image [1, 3, H, W], or four equal tokens [1, 4]."""
    if isinstance(pretrained.processor, Preprocessing):
        return {"pixel_values": torch.zeros(1, 3, *pretrained.processor.size)}
    return {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
