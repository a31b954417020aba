"""Evaluations and the rows they are of go in; the surest mistakes, each with its picture or text, are kept in the run
folder, and come out for the report."""

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from finetune.data.images import BadImage, open_image, quiet
from finetune.data.task import Task, softmax
from finetune.train.evaluate import Evaluation

MOST = 12
SIDE = 160  # pixels of a small picture
LETTERS = 280  # of a text
FILE = "mistakes.json"


def keep_mistakes(folder: Path, task: Task, found: Mapping[str, tuple[Dataset, Evaluation | None]]) -> None:
    """Write `folder`/mistakes.json: the held-out rows on which the model is wrong and most sure, pictures beside it.

    Args:
        folder: `predictions` of a run folder.
        task: The task; of others than single-label classification nothing is kept.
        found: Split -> (its rows, what the model made of them).
    """
    if task.kind != "single_label_classification":
        return
    wrong: list[tuple[float, str, int, int, float]] = []
    for split, (_, evaluation) in found.items():
        if evaluation is None or not isinstance(evaluation.outputs, np.ndarray) or evaluation.outputs.ndim != 2:
            continue
        share_NC, target_N = softmax(evaluation.outputs.astype(np.float64)), np.asarray(evaluation.targets)
        guess_N = share_NC.argmax(axis=1)
        for row in np.flatnonzero(guess_N != target_N):
            wrong.append(
                (share_NC[row, guess_N[row]], split, int(row), int(guess_N[row]), share_NC[row, target_N[row]])
            )
    wrong.sort(key=lambda each: -each[0])
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for number, (sure, split, at, answer, given) in enumerate(wrong[:MOST]):
        cells = found[split][0][at]
        entry: dict[str, Any] = {
            "split": split, "id": cells["id"], "label": task.labels[cells["target"]], "prediction": task.labels[answer],
            "probability": round(float(sure), 4), "probability_of_label": round(float(given), 4),
        }  # fmt: skip
        texts = [str(cells[name]) for name in ("text", "text_pair") if cells.get(name)]
        if texts:
            entry["text"] = _cut(" — ".join(texts))
        elif cells.get("image"):
            source = cells["image"]["bytes"] if cells["image"]["bytes"] is not None else cells["image"]["path"]
            with suppress(BadImage, OSError), quiet():
                image = open_image(source, (SIDE, SIDE))
                image.thumbnail((SIDE, SIDE))
                image.save(folder / f"mistake{number:02}.jpg", quality=80)
                entry["picture"] = f"mistake{number:02}.jpg"
        kept.append(entry)
    (folder / FILE).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def read_mistakes(folder: Path) -> list[dict[str, Any]]:
    """What `keep_mistakes` wrote, pictures as addresses with the data in them; empty where there is nothing."""
    if not (folder / FILE).is_file():
        return []
    kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
    for entry in kept:
        name = entry.pop("picture", None)
        if name is not None and Path(name).name == name and (folder / name).is_file():  # it must be a name
            content = base64.b64encode((folder / name).read_bytes()).decode()
            entry["picture"] = f"data:image/jpeg;base64,{content}"
    return kept


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
