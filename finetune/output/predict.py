"""A saved model's folder, and images, texts or a table of them, go in; one `Prediction` for each input comes out."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from finetune.data.images import BadImage, check_size, eval_transform, open_image, to_rgb
from finetune.data.task import KINDS, Task, predictions
from finetune.data.texts import tokenize
from finetune.errors import BackboneError, RunError
from finetune.model.backbones import linear_head, load_backbone
from finetune.model.calls import in_a_line
from finetune.model.fetch import Source, locate, read_notes
from finetune.model.heads import Head
from finetune.model.pretrained import Preprocessing, Pretrained
from finetune.output.inputs import named_inputs, pair, words

THRESHOLD = 0.5  # of a label's probability, where several labels can be right


@dataclass(frozen=True)
class Prediction:
    """What the model says of one input. Also readable as a dictionary of the fields that apply: `dict(prediction)`.

    Attributes:
        input: The path, text, pair of texts or list of words; "image 3" for a picture that came without a path.
        label: The most probable class.
        labels: The classes of at least even odds, where several can be right.
        value: The number, where there is one target.
        values: The numbers of all targets by name; or the outputs of a custom head by name.
        tags: A tag for each word; None for words beyond the length that the model reads.
        score: Probability of `label`; mean probability of `tags`; the largest probability of any of `labels`.
        probabilities: Of each label.
        error: Why there is no prediction.
    """

    input: Any
    label: str | None = None
    labels: tuple[str, ...] | None = None
    value: float | None = None
    values: dict[str, Any] | None = None
    tags: tuple[str | None, ...] | None = None
    score: float | None = None
    probabilities: dict[str, float] | None = None
    error: str | None = None

    def keys(self) -> list[str]:
        """Names of the fields that apply."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


@dataclass(frozen=True)
class Predictor:
    """A trained model that is ready for use. It predicts on the device where the model is."""

    pretrained: Pretrained
    task: Task

    def predict(self, inputs: Any, batch_size: int = 32, *, column: str | None = None) -> list[Prediction]:
        """Predict for each input, in order. What cannot be read gets a Prediction with `error`, and stops nothing.

        Args:
            inputs: For images: a path, a folder (searched through), a PIL image. For texts: a string; a pair of
                strings as tuple or as {"text", "text_pair"}; for tags also a list of words. For both: a table
                (.csv, .tsv, .jsonl, .json, .parquet; paths in it are relative to it), a datasets.Dataset, or a list
                of any of the single ones.
            batch_size: Examples at once.
            column: Column of a table that holds the images or texts; by default found as in training.

        Raises:
            DataError: A table without rows, or without a column of images or texts.
        """
        if batch_size < 1:
            raise RunError(f"batch_size: {batch_size}; give a whole number of at least 1")
        found = list(named_inputs(inputs, self.task, column))
        out = [Prediction(one.name, error=one.error) for one in found]
        training = self.pretrained.model.training
        self.pretrained.model.eval()
        try:
            work = self._images if self.task.modality == "image" else self._texts
            ready = [(i, one.name, one.item) for i, one in enumerate(found) if one.error is None]
            for i, prediction in work(ready, batch_size):
                out[i] = prediction
        finally:
            self.pretrained.model.train(training)
        return out

    def _images(self, items: list[tuple[int, Any, Any]], batch_size: int) -> Iterator[tuple[int, Prediction]]:
        transform = eval_transform(cast(Preprocessing, self.pretrained.processor))
        for start in range(0, len(items), batch_size):
            good: list[tuple[int, Any, torch.Tensor]] = []
            for i, name, item in items[start : start + batch_size]:
                try:
                    if isinstance(item, Image.Image):
                        check_size(item)
                    image = to_rgb(item) if isinstance(item, Image.Image) else open_image(item)
                    good.append((i, name, transform(image)))
                except (BadImage, TypeError, ValueError, OSError) as error:
                    reason = str(error) if isinstance(error, BadImage) else f"not an image ({error})"
                    yield i, Prediction(name, error=reason)
            if good:
                outputs = self._forward({"pixel_values": torch.stack([tensor for _, _, tensor in good])})
                for j, (i, name, _) in enumerate(good):
                    yield i, self._prediction(name, _one(outputs, j))

    def _texts(self, items: list[tuple[int, Any, Any]], batch_size: int) -> Iterator[tuple[int, Prediction]]:
        if not items:
            return
        tags = self.task.kind == "token_classification"
        if tags:
            split = [words(item) for _, _, item in items]
            # The number of the word in place of its label: each first piece then says which word it begins.
            columns: dict[str, list[Any]] = {"tokens": split, "target": [list(range(len(w))) for w in split]}
        else:
            pairs = [pair(item) for _, _, item in items]
            columns = {"text": [first for first, _ in pairs]}
            if any(second is not None for _, second in pairs):
                columns["text_pair"] = [second or "" for _, second in pairs]
        tokens = tokenize(datasets.Dataset.from_dict(columns), self.task, cast(Any, self.pretrained.processor))
        order = np.argsort(tokens.lengths, kind="stable")
        for start in range(0, len(items), batch_size):
            rows = order[start : start + batch_size].tolist()
            inputs = tokens.batch(rows)
            places = inputs.pop("targets", None)
            outputs = self._forward(inputs)
            for j, row in enumerate(rows):
                i, name, _ = items[row]
                output = _one(outputs, j)
                if tags and places is not None and not isinstance(output, dict):
                    first = places[j].numpy() >= 0
                    yield i, self._tagged(name, output[first], places[j].numpy()[first], len(columns["tokens"][row]))
                else:
                    yield i, self._prediction(name, output)

    def _forward(self, inputs: dict[str, torch.Tensor]) -> Any:
        device = next(self.pretrained.model.parameters()).device
        try:
            with torch.inference_mode():
                outputs = self.pretrained.forward({name: tensor.to(device) for name, tensor in inputs.items()})
        except (RuntimeError, ValueError, IndexError) as error:  # its configuration may be wrong in any way
            raise RunError(
                f"{self.pretrained.name}: the model cannot be run ({in_a_line(error)}); check its files, or give a "
                "smaller batch size where memory is short"
            ) from error
        if isinstance(outputs, dict):
            return {name: tensor.float().cpu().numpy() for name, tensor in outputs.items()}
        return outputs.float().cpu().numpy()

    def _prediction(self, name: Any, output: Any) -> Prediction:
        labels = self.task.labels
        if isinstance(output, dict) or output.shape != (len(labels),):  # a custom head's own
            values = output if isinstance(output, dict) else {"output": output}
            return Prediction(name, values={key: np.asarray(value).tolist() for key, value in values.items()})
        numbers = [float(number) for number in predictions(self.task, output[None])[0]]
        named = dict(zip(labels, numbers, strict=True))
        if self.task.kind == "regression":
            return Prediction(name, value=numbers[0] if len(numbers) == 1 else None, values=named)
        best = max(named, key=lambda label: named[label])
        if self.task.kind == "multi_label_classification":
            chosen = tuple(label for label, p in named.items() if p >= THRESHOLD)
            return Prediction(name, labels=chosen, score=named[best], probabilities=named)
        return Prediction(name, label=best, score=named[best], probabilities=named)

    def _tagged(self, name: Any, logits_WC: np.ndarray, words: np.ndarray, count: int) -> Prediction:
        tags: list[str | None] = [None] * count
        probabilities = predictions(self.task, [logits_WC])[0]
        for word, p in zip(words.tolist(), probabilities, strict=True):
            tags[word] = self.task.labels[int(p.argmax())]
        score = float(probabilities.max(-1).mean()) if len(words) else None
        return Prediction(name, tags=tuple(tags), score=score)


def load(
    folder: str | Path,
    head: Head | None = None,
    *,
    module: nn.Module | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Predictor:
    """Load a trained model: a run folder, its `model/`, any classifier that timm or transformers saved, or a Hub id.

    Args:
        folder: Where the model is.
        head: The custom head that it was trained with: class, function or module, as given to `fit`.
        module: The module that it was trained from, where that was neither timm's nor transformers'.
        device: By default the accelerator, where there is one.
        trust_remote_code: Run Python code from the folder.

    Raises:
        RunError: No model there, or `head` or `module` are needed and missing.
        BackboneError: The files cannot be loaded.
    """
    path = Path(os.path.expanduser(folder))
    if os.path.isdir(path / "model") and not os.path.exists(path / "config.json"):
        path = path / "model"
    notes = read_notes(path) if os.path.isdir(path) else {}
    task, own_head = _task(notes, path), notes.get("head")
    if own_head and own_head["linear"] and task is not None:
        head = head or linear_head(task)
    if own_head and head is None:
        raise RunError(f"{path}: was trained with a head of your own; give it: load(folder, head={own_head['class']})")
    if notes.get("family") == "module":
        pretrained = _load_module(path, notes, module, head)
    elif own_head:
        pretrained = load_backbone(
            path / "backbone", head=head, modality=cast(Task, task).modality, trust_remote_code=trust_remote_code
        )
        _load_tensors(cast(Any, pretrained.model).head, path / "head.safetensors")
    else:
        source = _locate(path, str(folder), trust_remote_code)
        task = task or task_of(source)
        pretrained = load_backbone(source.folder, task, trust_remote_code=trust_remote_code)
        if pretrained.new_parameters:
            missing = ", ".join(sorted(pretrained.new_parameters)[:3])
            raise BackboneError(f"{folder}: its weights lack {missing}; give the folder of a trained model")
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pretrained.model.to(device).eval()
    return Predictor(pretrained, cast(Task, task))


def _task(notes: dict[str, Any], path: Path) -> Task | None:
    """The task in a finetune.json; None where there is no such file."""
    if not notes:
        return None
    try:
        told, head = notes["task"], notes.get("head")
        task = Task(told["kind"], told["modality"], tuple(told["labels"]))
        good = (
            task.kind in KINDS and task.modality in ("image", "text") and all(isinstance(x, str) for x in task.labels)
        )
        good = good and len(set(task.labels)) == len(task.labels) > 0 and isinstance(notes["family"], str)
        if good and (head is None or (isinstance(head["class"], str) and isinstance(head["linear"], bool))):
            return task
    except (KeyError, TypeError):
        pass
    raise RunError(
        f"{path / 'finetune.json'}: is not as finetune writes it; give a whole model folder, or save it again"
    )


def _locate(path: Path, name: str, trust_remote_code: bool) -> Source:
    if os.path.isdir(path):
        return locate(str(path), trust_remote_code=trust_remote_code)
    try:
        return locate(name, trust_remote_code=trust_remote_code)
    except BackboneError as error:
        raise RunError(f"{name[:200]}: no such folder, and no model of this name on the Hub; check the path") from error


def _load_module(path: Path, notes: dict[str, Any], module: nn.Module | None, head: Head | None) -> Pretrained:
    if module is None:
        raise RunError(
            f"{path}: holds weights of a module of your own; give it: load(folder, module={notes['architecture']}())"
        )
    processor: Any  # not asked whether to run code of the folder: what is not given leads to a question at the console
    if notes.get("preprocessing", {}).get("by") == "transformers":
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    elif "preprocessing" in notes:
        given: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in notes["preprocessing"].items() if key != "by"
        }
        processor = Preprocessing(**given)
    else:
        from transformers import AutoTokenizer

        processor = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    pretrained = load_backbone(module, head=head, modality=notes["task"]["modality"], processor=processor)
    _load_tensors(pretrained.model, path / "model.safetensors")
    return pretrained


def _load_tensors(module: nn.Module, file: Path) -> None:
    try:
        module.load_state_dict(load_file(file))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise RunError(
            f"{file}: does not fit {type(module).__name__} ({' '.join(str(error).split())}); "
            "give the module that was trained"
        ) from None


def task_of(source: Source) -> Task:
    """The task of a plain timm or transformers classifier, by its config alone.

    Raises:
        BackboneError: It has no classifier.
    """
    config = source.config
    if source.family == "timm":
        from finetune.model.from_timm import checkpoint_labels

        classes = config.get("num_classes", (config.get("pretrained_cfg") or {}).get("num_classes", 0))
        if not isinstance(classes, int):
            raise BackboneError(f"{source.folder}/config.json: num_classes is {classes!r}; save the model again")
        labels = checkpoint_labels(source) or tuple(str(i) for i in range(classes))
        if not classes or len(labels) != classes:
            raise BackboneError(f"{source.folder}: a backbone without a classifier; give the folder of a trained model")
        return Task(config.get("problem_type") or "single_label_classification", "image", labels)
    architecture = str((config.get("architectures") or [""])[0])
    kinds = {"ForImageClassification": "image", "ForSequenceClassification": "text", "ForTokenClassification": "text"}
    modality = next((kinds[ending] for ending in kinds if architecture.endswith(ending)), None)
    if modality is None:
        raise BackboneError(
            f"{source.folder}: {architecture or 'a model'} has no classifier; give the folder of a trained model"
        )
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves its default out
    try:
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
    except ValueError:
        raise BackboneError(f"{source.folder}/config.json: id2label is not numbered; save the model again") from None
    if architecture.endswith("ForTokenClassification"):
        return Task("token_classification", modality, labels)
    kind = config.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
    return Task(kind, modality, labels)


def _one(outputs: Any, j: int) -> Any:
    return {name: array[j] for name, array in outputs.items()} if isinstance(outputs, dict) else outputs[j]
