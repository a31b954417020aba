"""A trained model goes in; batches as it is used on come out, of the run's own data where that can be found: what an
export is checked on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from finetune.data.sources import read
from finetune.data.tables import Part
from finetune.data.task import Task
from finetune.errors import FinetuneError
from finetune.model.pretrained import Pretrained
from finetune.output.inputs import rows
from finetune.output.predict import Predictor

Inputs = dict[str, Tensor]

SAMPLE = 32  # rows of the data among which those of the check are chosen


@dataclass(frozen=True)
class _Recording(Pretrained):
    """A model that keeps what it is given."""

    kept: list[Inputs] = field(default_factory=list)

    def forward(self, batch_inputs: Inputs, model: nn.Module | None = None) -> Any:
        self.kept.append(batch_inputs)
        return super().forward(batch_inputs, model)


def example_batches(predictor: Predictor, run_folder: Path | None = None) -> tuple[list[Inputs], str]:
    """Batches as `predict` makes them, of two examples, one, and three; of texts, of different lengths, padded; and in
    words what they are.
    """
    items, where = own_rows(predictor.task, run_folder)
    recording = _Recording(**vars(predictor.pretrained))
    recorder = replace(predictor, pretrained=recording)

    def batches(items: Sequence[Any]) -> list[Inputs]:
        recording.kept.clear()
        recorder.predict(list(items), len(items))
        return [batch for batch in recording.kept if len(next(iter(batch.values()))) == len(items)]

    def lengths(items: Sequence[Any]) -> list[tuple[int, Any]]:
        sizes = [(found[0]["input_ids"].shape[1], i) for i, item in enumerate(items) if (found := batches([item]))]
        return [(size, items[i]) for size, i in sorted(sizes)]

    if predictor.task.modality == "image":
        items = list(islice((item for item in items if batches([item])), 3))
        if len(items) < 3:
            items, where = made_up_images(), "made-up images"
    else:
        sized = lengths(items)
        if len(sized) < 3 or sized[0][0] == sized[-1][0]:  # the file has to take texts of any length
            sized, where = lengths(made_up_texts(predictor)), "made-up texts"
        items = [sized[0][1], sized[len(sized) // 2][1], sized[-1][1]]
    return [batch for chosen in (items[1:], items[:1], items) for batch in batches(chosen)], where


def own_rows(task: Task, run_folder: Path | None) -> tuple[list[Any], str]:
    """Items of the data that the run was trained on, for `predict`, and where they are; none where that is not told,
    or not on this machine."""
    for folder in (run_folder, run_folder.parent) if run_folder is not None else ():
        if not (folder / "run.json").is_file():
            continue
        try:
            told = json.loads((folder / "run.json").read_text(encoding="utf-8"))["data"]
            source = Path(told["source"]).expanduser()
            if not source.exists():
                return [], ""
            parts = read(source)
            part = parts.get("test") or parts.get("valid") or parts["train"]
            chosen = np.unique(np.linspace(0, len(part.data) - 1, SAMPLE).astype(int)).tolist()
            columns = {column: role for role, column in told["columns"].items() if role != "label"}
            data = part.data.select(chosen).select_columns(list(columns)).rename_columns(columns)
            sample = Part(data, [part.ids[i] for i in chosen], part.where, part.root)
            return [one.item for one in rows(sample, task, None) if one.error is None], f"rows of {part.where}"
        except (FinetuneError, OSError, KeyError, ValueError, TypeError):
            return [], ""  # the data may have changed since
    return [], ""


def made_up_images() -> list[Image.Image]:
    """Three pictures of coloured noise."""
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 255, (12, 16, 3), dtype=np.uint8) for _ in range(3)]
    return [Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC) for pixels in small]


def made_up_texts(predictor: Predictor) -> list[str]:
    """Texts of some 4, 9 and 20 tokens of the tokenizer's own."""
    tokenizer: Any = predictor.pretrained.processor
    special = set(tokenizer.all_special_ids)
    usable = [i for i in range(len(tokenizer)) if i not in special]
    rng = np.random.default_rng(0)
    return [tokenizer.decode(rng.choice(usable, count).tolist()) for count in (4, 9, 20)]
