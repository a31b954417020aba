"""A trained model goes in; an ONNX file that gives the same logits without PyTorch comes out, or why there is none.

Before the file gets its name, onnxruntime answers rows that the export has not seen, in batches of other sizes and
lengths, and its answers have to be PyTorch's.
"""

import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import finetune
from finetune.data.texts import MOST_TOKENS
from finetune.errors import RunError
from finetune.model.fetch import quiet
from finetune.model.pretrained import Preprocessing, Pretrained
from finetune.output.onnx_rows import Inputs, example_batches
from finetune.output.onnx_ways import WAYS, NotExported, reason
from finetune.output.predict import Predictor

TOLERANCE = 1e-4
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INPUTS = ("pixel_values", "input_ids", "attention_mask", "token_type_ids")  # in the order of the file
SINGLE_FILE = 2 * 10**9  # bytes of weights; the format ends at 2 GiB


@dataclass(frozen=True)
class Exported:
    """An ONNX file that passed its check.

    Attributes:
        path: The file; more than 2 GB of weights lie beside it in `NAME.data`.
        difference: Largest difference from PyTorch, in the units that `difference` says.
        rows: What it was checked on.
    """

    path: Path
    difference: float
    rows: str

    def __str__(self) -> str:
        size = sum(file.stat().st_size for file in _files(self.path)) / 1e6
        return f"{self.path}: {size:.1f} MB, within {self.difference:.1g} of PyTorch on {self.rows}"


def export_onnx(
    predictor: Predictor, path: str | Path, *, run_folder: Path | None = None, overwrite: bool = False
) -> Exported:
    """Write a model as ONNX, whole and checked or not at all.

    Inputs are the model's, with any number of examples and, for texts, of tokens: pixel_values [B, 3, H, W], or
    input_ids, attention_mask and maybe token_type_ids [B, T], int64. The output is `logits` [B, C], [B, K] or
    [B, T, C], before softmax or sigmoid; the outputs of a custom head by its own names. `facts` says what is kept as
    metadata_props.

    Args:
        predictor: A loaded model. It stays as it is.
        path: File to write.
        run_folder: Where `run.json` may tell of the data: rows of it are checked, made-up ones otherwise.
        overwrite: Replace a file that is there.

    Raises:
        RunError: A package is missing, the file is there, or ONNX cannot say what the model does.
    """
    path = Path(path)
    refuse_early(path, overwrite)
    pretrained = replace(predictor.pretrained, model=deepcopy(predictor.pretrained.model).cpu().eval())
    batches, where = example_batches(replace(predictor, pretrained=pretrained), run_folder)
    try:
        found = save_checked(pretrained, batches, path, facts(predictor), kind=predictor.task.kind)
    except NotExported as error:
        raise RunError(f"{path}: not written, because {error}; use the model in PyTorch") from error
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); give another file with --out") from error
    return Exported(path, found, where)


def refuse_early(path: Path, overwrite: bool) -> None:
    """Find what would forbid the file before a model is loaded for it.

    Raises:
        RunError: A package is missing, or something is there.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise RunError(f'onnx: needs {", ".join(missing)}; install with: pip install "finetune-onecycle[onnx]"')
    if path.is_dir():
        raise RunError(f"{path}: is a folder; give the name of a file, such as {path / 'model.onnx'}")
    if path.exists() and not overwrite:
        raise RunError(f"{path}: is there already; give another file with --out, or replace it with --overwrite")


def save_checked(
    pretrained: Pretrained, batches: Sequence[Inputs], path: Path, metadata: dict[str, str], *, kind: str
) -> float:
    """Write `path` if onnxruntime answers as the model does; the largest difference.

    Args:
        pretrained: A model on the CPU in evaluation mode; the way in which its attention is computed may be changed.
        batches: The first is traced, and should be of two examples; all are checked.
        path: File to write.
        metadata: What else the file should say.
        kind: Of task, for the units of the difference.

    Raises:
        NotExported: As it says.
    """
    batches = [{name: batch[name] for name in sorted(batch, key=_place)} for batch in batches]
    with torch.no_grad():
        expected = [named_outputs(pretrained.forward(batch)) for batch in batches]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.new-{os.getpid()}"
    reasons: list[NotExported] = []
    try:
        for way in WAYS:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            try:
                with _silent():
                    model = way(pretrained, batches[0], list(expected[0]))
                    if model is None:
                        continue
                    model.metadata_props.update(metadata)
                    _write(model, beside / path.name)
                    answers = _answers(beside / path.name, batches, list(expected[0]))
                found = difference(batches, expected, answers, kind)
            except NotExported as error:
                reasons.append(error)
                continue
            new = _files(beside / path.name)
            for file in reversed(new):  # the weights first: whoever finds the file finds them
                file.replace(path.with_name(file.name))
            if len(new) == 1:
                path.with_name(f"{path.name}.data").unlink(missing_ok=True)
            return found
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    raise reasons[0]


def _write(model: Any, file: Path) -> None:
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    onnx_ir.save(model, file, external_data=f"{file.name}.data" if size > SINGLE_FILE else None)


def _answers(file: Path, batches: Sequence[Inputs], outputs: list[str]) -> list[dict[str, np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    on, answers = "loading", []
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for batch in batches:
            on = f"inputs of {_shape(batch)}"
            found = session.run(outputs, {name: tensor.numpy() for name, tensor in batch.items()})
            answers.append(dict(zip(outputs, found, strict=True)))
    except Exception as error:
        raise NotExported(f"onnxruntime fails on {on} ({reason(error)})") from error
    return answers


def named_outputs(outputs: Any) -> dict[str, np.ndarray]:
    """{"logits": array} of a tensor, or the arrays of a custom head's dictionary.

    Raises:
        NotExported: The outputs are neither.
    """
    named = {"logits": outputs} if isinstance(outputs, Tensor) else outputs
    if not (isinstance(named, dict) and all(isinstance(x, Tensor) for x in named.values())):
        raise NotExported(f"its output is a {type(outputs).__name__}, neither a tensor nor tensors by name")
    return {name: (x.float() if x.is_floating_point() else x).numpy() for name, x in named.items()}


def difference(
    batches: Sequence[Inputs],
    expected: Sequence[dict[str, np.ndarray]],
    answers: Sequence[dict[str, np.ndarray]],
    kind: str,
) -> float:
    """The largest difference from PyTorch, padding left aside: of logits in units of max(1, |logit|), of values in
    units of their spread over the rows, at least a hundredth of their size.

    Raises:
        NotExported: It is above `TOLERANCE`.
    """
    worst, at = 0.0, 0
    for name in expected[0]:
        spread = None
        if kind == "regression" and name == "logits":  # prices and shares are of any size
            values_NK = np.concatenate([outputs[name].reshape(len(outputs[name]), -1) for outputs in expected])
            spread = np.maximum(np.ptp(values_NK, axis=0), 0.01 * np.abs(values_NK).max(axis=0)) + 1e-30
        for i, (batch, outputs, answer) in enumerate(zip(batches, expected, answers, strict=True)):
            a, b = outputs[name], answer[name]
            if a.shape != b.shape:
                raise NotExported(f"under onnxruntime {name} are of shape {list(b.shape)} instead of {list(a.shape)}")
            unit = np.maximum(1.0, np.abs(a)) if spread is None else spread.reshape(a.shape[1:])
            far = np.abs(a.astype(np.float64) - b) / unit
            mask = batch.get("attention_mask")
            if mask is not None and a.shape[:2] == tuple(mask.shape) and a.ndim == 3:
                far = far[mask.numpy() > 0]
            largest = float(np.max(np.where(np.isnan(far), np.inf, far), initial=0.0))
            if largest > worst:
                worst, at = largest, i
    if worst > TOLERANCE:
        raise NotExported(
            f"under onnxruntime its outputs for inputs of {_shape(batches[at])} are {worst:.2g} from PyTorch's, and "
            f"{TOLERANCE:.0e} is allowed"
        )
    return worst


@contextmanager
def _silent() -> Iterator[None]:
    """No warnings and no chatter of the exporters: what matters of it, the check says."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        nowhere = io.StringIO()  # torch prints whole graphs where it fails
        with warnings.catch_warnings(), quiet(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _files(path: Path) -> list[Path]:
    """An ONNX file, and the file of its weights where they are apart; those that are there."""
    return [file for file in (path, path.with_name(f"{path.name}.data")) if file.exists()]


def _place(name: str) -> int:
    return INPUTS.index(name) if name in INPUTS else len(INPUTS)


def _shape(batch: Inputs) -> str:
    return "x".join(map(str, next(iter(batch.values())).shape))


# What the file says of itself


def facts(predictor: Predictor) -> dict[str, str]:
    """What somebody needs who has only the file: each value a string, structured ones as JSON.

    `task`, `id2label`; of images `preprocessing` (size [H, W], mean, std, interpolation, crop_pct, crop_mode, as timm
    names them); of texts `tokenizer`, the whole tokenizer.json with its padding and cut, for
    `tokenizers.Tokenizer.from_str`; `base_model` and `producer`.
    """
    pretrained, task = predictor.pretrained, predictor.task
    found = {
        "task": task.kind,
        "id2label": json.dumps({str(i): label for i, label in enumerate(task.labels)}, ensure_ascii=False),
        "base_model": pretrained.info.get("base_model") or "",
        "producer": f"finetune-onecycle {finetune.__version__}",
    }
    processor: Any = pretrained.processor
    if isinstance(processor, Preprocessing):
        found["preprocessing"] = json.dumps(
            {key: value for key, value in vars(processor).items() if key != "processor"}
        )
    elif getattr(processor, "is_fast", False):
        from tokenizers import Tokenizer

        alone = Tokenizer.from_str(processor.backend_tokenizer.to_str())
        alone.enable_truncation(min(processor.model_max_length, MOST_TOKENS))
        alone.enable_padding(
            direction=processor.padding_side,
            pad_id=processor.pad_token_id or 0,
            pad_type_id=processor.pad_token_type_id,
            pad_token=processor.pad_token or "",
        )
        found["tokenizer"] = alone.to_str()
    return {name: value for name, value in found.items() if value}
