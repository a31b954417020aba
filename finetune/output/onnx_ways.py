"""A model and a batch go in; an `onnx_ir.Model` comes out, by one of several ways, or None where the model has no such
way."""

import re
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune.model.pretrained import Pretrained
from finetune.output.onnx_rows import Inputs

OPSET = 20


class NotExported(Exception):
    """The model has no ONNX file with its outputs; the text says why."""


def by_torch(pretrained: Pretrained, batch: Inputs, outputs: list[str], *, optimize: bool = True) -> Any:
    """torch.onnx's exporter.

    Raises:
        NotExported: It failed.
    """
    shapes = {name: dict(enumerate(_dynamic(x))) for name, x in batch.items()}
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                _Named(pretrained),
                kwargs=batch,
                dynamic_shapes={"inputs": shapes},
                input_names=list(batch),
                output_names=outputs,
                opset_version=OPSET,
                dynamo=True,
                optimize=optimize,
                verbose=False,
            )
    except Exception as error:  # exporters raise about everything
        raise NotExported(f"torch.onnx cannot express it ({reason(error)})") from error
    return cast(Any, program).model


class _Named(nn.Module):
    """A model as a function of its inputs by name that gives a tensor, or tensors by name."""

    def __init__(self, pretrained: Pretrained) -> None:
        super().__init__()
        self.model = pretrained.model
        self.of = [pretrained]  # in a list, so that its model is no second submodule

    def forward(self, **inputs: Tensor) -> Any:
        return self.of[0].forward(inputs, self.model)


def by_transformers(pretrained: Pretrained, batch: Inputs, outputs: list[str]) -> Any:
    """transformers' exporter, which calls torch.onnx with patches for what that cannot express: mixtures of experts,
    complex numbers, and more. Older versions have none.

    Raises:
        NotExported: It failed.
    """
    if pretrained.family != "transformers" or pretrained.custom_head:
        return None
    try:
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter
    except ImportError:
        return None
    shapes = {name: dict.fromkeys(range(len(_dynamic(x))), torch.export.Dim.DYNAMIC) for name, x in batch.items()}
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=OPSET)
    try:
        graph = (model := OnnxExporter().export(cast(Any, pretrained.model), {**batch}, config).program).graph
        for value in [value for value in graph.outputs if value.name not in outputs]:  # caches and hidden states
            graph.outputs.remove(value)
        names = {
            str(value.shape[i]): name for value in graph.inputs for i, name in enumerate(_dynamic(batch[value.name]))
        }
        for value in [*graph.inputs, *graph.outputs]:
            for i, size in enumerate(value.shape):
                value.shape[i] = names.get(str(size), size)
    except Exception as error:
        raise NotExported(f"transformers' exporter cannot express it ({reason(error)})") from error
    return model


def by_torch_plainly(pretrained: Pretrained, batch: Inputs, outputs: list[str]) -> Any:
    """torch.onnx's exporter without its optimiser, which takes an epsilon of 1e-8 for zero, and with attention in steps
    instead of in one fused operation. The model stays changed.

    Raises:
        NotExported: It failed.
    """
    for module in pretrained.model.modules():
        if getattr(module, "fused_attn", False):  # timm's
            module.fused_attn = False  # type: ignore[assignment]
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
        if implementation != "eager" and hasattr(module, "set_attn_implementation"):
            cast(Any, module).set_attn_implementation("eager")
    return by_torch(pretrained, batch, outputs, optimize=False)


WAYS = (by_torch, by_transformers, by_torch_plainly)  # the first whose file passes the check is kept


def reason(error: BaseException) -> str:
    """What an exporter's error comes down to, in a line: the deepest cause, or the operator that ONNX lacks."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for one in chain:
        operator = str(one).partition("No ONNX function found for <OpOverload(op='")[2].partition("'")[0]
        if operator:
            return f"no ONNX operator for {operator}"
    fixed = re.search(r"(?:static shape of|to be a constant) \(?(\d+)", str(chain[-1]))
    if fixed:
        return f"its code fixes a size that has to vary to the {fixed[1]} of the example"
    lines = [" ".join(line.split()) for line in str(chain[-1]).splitlines() if line.strip()]
    return f"{type(chain[-1]).__name__}: {''.join(lines[:1])}"[:240].rstrip(": ")


def _dynamic(x: Tensor) -> tuple[str, ...]:
    """Names of the first dimensions of an input, which may have any size."""
    return ("batch", "sequence") if x.ndim == 2 and not x.is_floating_point() else ("batch",)
