"""A backbone and a head (a class, a function of the feature width, or a module) go in; one module comes out.

Shapes: B examples, T tokens or places of the feature map, F features, C channels, H and W height and width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import BackboneError

Head = nn.Module | Callable[[int], nn.Module]


class WithHead(nn.Module):
    """`head` on the features of `backbone`: pooled [B, F], or [B, T, F] where the head says `pooled = False`.

    Called with the named inputs of a batch, as a transformers model is: `model(pixel_values=…)`,
    `model(input_ids=…, attention_mask=…)`. An unpooled head on text gets the mask [B, T] as second argument.
    The output is the head's own: a tensor, or a dictionary of tensors.

    Args:
        backbone: A timm model without classifier, a transformers base model, or any module that gives features.
        head: Module on the features.
        family: "timm", "transformers" or "module": how the backbone is called.
        pooled: Which features; by default, as the head's attribute `pooled` says, and True without one.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, family: str, pooled: bool | None = None) -> None:
        super().__init__()
        self.backbone, self.head, self.family = backbone, head, family
        self.pooled = bool(getattr(head, "pooled", True)) if pooled is None else pooled

    def forward(self, **inputs: Tensor) -> Any:
        mask_BT = inputs.get("attention_mask")
        features = pooled_features if self.pooled else token_features
        x = features(self.backbone, self.family, inputs)
        return self.head(x, mask_BT) if mask_BT is not None and not self.pooled else self.head(x)


def attach(backbone: nn.Module, head: Head, family: str, example: dict[str, Tensor], seed: int = 0) -> WithHead:
    """Put `head` on `backbone`. The feature width is the backbone's int `features`, or measured by one forward pass.

    Args:
        backbone: As for `WithHead`.
        head: Class or function from the feature width to a module; or the module itself.
        family: As for `WithHead`.
        example: Inputs of one example, for the measuring pass.
        seed: For the head's initial weights; the global generator is left as it was.

    Raises:
        BackboneError: The backbone does not give features of the form [B, F], [B, T, F] or [B, C, H, W].
    """
    if isinstance(head, nn.Module):
        return WithHead(backbone, head, family)
    pooled = bool(getattr(head, "pooled", True))  # of the class or function; a module's own is what WithHead reads
    width = getattr(backbone, "features", None)
    if not isinstance(width, int):
        width = measure(backbone, family, example, pooled)
    with seeded(seed):
        return WithHead(backbone, head(width), family, pooled)


class TokenLinear(nn.Linear):
    """A linear layer on each token: [B, T, F] -> [B, T, C]."""

    pooled = False

    def forward(self, x_BTF: Tensor, mask_BT: Tensor | None = None) -> Tensor:  # the mask matters to the loss alone
        return super().forward(x_BTF)


def measure(backbone: nn.Module, family: str, example: dict[str, Tensor], pooled: bool = True) -> int:
    """Feature width F that the backbone gives for `example` (one forward pass, evaluation mode, no gradients)."""
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            features = pooled_features if pooled else token_features
            return int(features(backbone, family, example).shape[-1])
    finally:
        backbone.train(training)


def pooled_features(backbone: nn.Module, family: str, inputs: dict[str, Tensor]) -> Tensor:
    """One vector an example, [B, F]: timm's own pooling; the mean over the tokens of a text; the pooled or the class
    token of a transformers vision model; the mean over the places of whatever else.
    """
    if family == "timm":
        return backbone(inputs["pixel_values"])
    output = _call(backbone, family, inputs)
    if family == "transformers" and "pixel_values" in inputs:
        if getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)
        if any(name.rpartition(".")[2] == "cls_token" for name, _ in backbone.named_parameters()):
            return output.last_hidden_state[:, 0]
    x = as_tokens(_tensor(output), backbone)
    mask_BT = inputs.get("attention_mask")
    if x.ndim == 2:
        return x
    if mask_BT is None:
        return x.mean(1)
    mask_BT1 = mask_BT.unsqueeze(-1).to(x.dtype)
    return (x * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)


def token_features(backbone: nn.Module, family: str, inputs: dict[str, Tensor]) -> Tensor:
    """A vector for each token, patch or place, [B, T, F]."""
    if family == "timm":
        return as_tokens(backbone.forward_features(inputs["pixel_values"]), backbone)  # type: ignore[operator]
    x = as_tokens(_tensor(_call(backbone, family, inputs)), backbone)
    if x.ndim != 3:
        raise BackboneError(
            f"head: asks for unpooled features (pooled = False), but the backbone gives {tuple(x.shape)}; "
            "leave `pooled` out, or give a backbone without its pooling"
        )
    return x


def as_tokens(x: Tensor, backbone: nn.Module) -> Tensor:
    """A feature map, [B, C, H, W] or timm's [B, H, W, C], as [B, T, F]; other shapes as they are."""
    if x.ndim != 4:
        return x
    if str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC"):
        return x.flatten(1, 2)
    return x.flatten(2).transpose(1, 2)


def _call(backbone: nn.Module, family: str, inputs: dict[str, Tensor]) -> Any:
    if family == "module" and "pixel_values" in inputs:
        return backbone(inputs["pixel_values"])
    return backbone(**inputs)


def _tensor(output: Any) -> Tensor:
    for name in ("last_hidden_state", "logits"):
        if isinstance(getattr(output, name, None), Tensor):
            output = getattr(output, name)
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BackboneError(f"backbone: gives {shape}; a head needs features [B, F], [B, T, F] or [B, C, H, W]")
    return output


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """New weights are drawn from `seed`; the global generator of the CPU is put back afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def reset(model: nn.Module, new: Iterable[str], seed: int) -> None:
    """Initialise the linear and convolution layers among the `new` parameters as torch does: small.

    timm starts some classifiers at ±1/√classes, a loss of 4.5 on two classes, which costs a short run dearly.
    """
    with seeded(seed):
        for name in sorted({key.rpartition(".")[0] for key in new}):
            module = model.get_submodule(name)
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
