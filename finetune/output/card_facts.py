"""A model folder, and the run folder around it, go in; what its card is to say comes out, as plain values.

Nothing here is Markdown. Paths of the machine that trained, and names of single rows, stay out.
"""

import csv
import json
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.task import MAIN
from finetune.errors import RunError, without_secrets
from finetune.model.fetch import read_notes
from finetune.output.interval import Interval, of_test_rows, wilson
from finetune.output.report import BASELINE, read_run
from finetune.output.tally import Tally, Tested, baseline

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PIPELINES = {
    ("single_label_classification", "image"): "image-classification",
    ("multi_label_classification", "image"): "image-classification",
    ("regression", "image"): "image-classification",
    ("single_label_classification", "text"): "text-classification",
    ("multi_label_classification", "text"): "text-classification",
    ("regression", "text"): "text-classification",
    ("token_classification", "text"): "token-classification",
}


@dataclass(frozen=True)
class Facts:
    """What is known of a trained model.

    Attributes:
        folder: The folder of the model, or of its adapter.
        notes: Its finetune.json.
        record: The run.json in the folder above it, {} without one.
        local_data: Whether the data is known not to be on the Hub, though its name looks like it.
    """

    folder: Path
    notes: dict[str, Any]
    record: dict[str, Any]
    local_data: bool = False

    @classmethod
    def of(cls, folder: Path) -> "Facts":
        """Read a model folder, and, where it is that of a run, run.json in the folder above it."""
        file = folder.parent / "run.json"
        of_a_run = folder.resolve().name in ("model", "adapter") and file.is_file()
        record = read_run(folder.parent) if of_a_run else {}
        return cls(folder, read_notes(folder), record)

    @property
    def kind(self) -> str:
        """One of the kinds of task."""
        return str(self.notes["task"]["kind"])

    @property
    def modality(self) -> str:
        """ "image" or "text"."""
        return str(self.notes["task"]["modality"])

    @property
    def labels(self) -> list[str]:
        """Names of the classes, tags or targets, in the order of the outputs."""
        return [str(label) for label in self.notes["task"]["labels"]]

    @property
    def plain(self) -> bool:
        """Whether timm or transformers loads the whole model."""
        return "head" not in self.notes and self.notes["family"] in ("timm", "transformers")

    @cached_property
    def adapter(self) -> dict[str, Any]:
        """Base and rank by its adapter_config.json; {} where the folder holds a whole model."""
        file = self.folder / "adapter_config.json"
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return {"base": found["base_model_name_or_path"], "rank": found["r"]}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise RunError(f"{file}: is not as peft writes it; put it back from a copy") from None

    @property
    def adapter_base(self) -> str | None:
        """Hub id of just the weights that an adapter was trained on; None where they are a folder of that machine."""
        base = self.adapter.get("base")
        return base if isinstance(base, str) and base and not Path(base).is_absolute() else None

    @property
    def whole(self) -> Path:
        """Folder of the whole model; for an adapter, the merged one beside it."""
        return self.folder.parent / "model" if self.adapter else self.folder

    @property
    def pipeline(self) -> str | None:
        """The Hub's name of what the model does."""
        return PIPELINES.get((self.kind, self.modality)) if self.plain else None

    @property
    def base_model(self) -> str | None:
        """Hub id of the backbone."""
        base = self.adapter_base if self.adapter else self.notes.get("base_model")
        return base if base and HUB_ID.fullmatch(base) else None

    @property
    def data(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return self.record.get("data", {})

    @property
    def data_name(self) -> str:
        """What the data is called: its id on the Hub, or the name of the file or folder; "" where it had none."""
        source = str(self.data.get("source", ""))
        in_memory = re.match(r"Dataset(Dict)? of ", source)
        return "" if in_memory else self.hub_data or Path(source).resolve().name

    @property
    def hub_data(self) -> str | None:
        """Id of the data set on the Hub, where the data came from there: as far as its name tells."""
        source = str(self.data.get("source", ""))
        name = source.partition(":")[0].partition("@")[0]
        return name if not self.local_data and HUB_ID.fullmatch(name) and not Path(source).exists() else None

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Numbers by split, "test" first; lists such as the confusion matrix are left out."""
        given = self.record.get("metrics", {})
        return {
            split: {name: value for name, value in given[split].items() if isinstance(value, int | float)}
            for split in ("test", "valid")
            if given.get(split)
        }

    @property
    def split(self) -> str:
        """The split that the result is told of."""
        return next(iter(self.metrics), "valid")

    @property
    def main(self) -> str | None:
        """The metric that the result is told in."""
        names = list(self.metrics.get(self.split, {}))
        wanted = MAIN.get(self.kind, (None, 0))[0]
        return wanted if wanted in names else next((name for name in names if name != "loss"), None)

    @cached_property
    def tested(self) -> Tested:
        """The predictions on the test rows."""
        return Tested.read(self.folder.parent / "predictions" / "test.csv", self.kind, self.labels)

    @cached_property
    def tally(self) -> Tally | None:
        """Counts of each class on the split that the result is told of."""
        if self.split == "test":
            return self.tested.tally
        confusion = self.record.get("metrics", {}).get("valid", {}).get("confusion")
        single = self.kind == "single_label_classification"
        return Tally.of_confusion("validation", np.array(confusion)) if confusion and single else None

    @cached_property
    def train_counts(self) -> np.ndarray:
        """Training rows (tags: words) of each class [C]."""
        return np.array([self.data.get("classes", {}).get(label, 0) for label in self.labels])

    @cached_property
    def trivial(self) -> dict[str, float]:
        """Metrics of giving every row the same answer."""
        if not self.record:
            return {}
        tested = self.tested if self.split == "test" else Tested()
        return baseline(self.kind, self.tally, tested, self.train_counts, self.data["counts"]["train"])

    @property
    def trivial_name(self) -> str:
        """What that answer is."""
        return BASELINE[self.kind]

    @cached_property
    def interval(self) -> Interval | None:
        """95 % interval of the main metric over rows: Wilson's for a share of them, else by drawing them again."""
        value = self.metrics.get(self.split, {}).get(self.main or "")
        if value is None:
            return None
        if self.main == "accuracy" and self.kind == "single_label_classification" and 0 <= value <= 1:
            return wilson(value, self.data["counts"][self.split])
        rows = self.folder.parent / "predictions" / "test.csv"
        return of_test_rows(rows, self.kind, self.labels, str(self.main), value) if self.split == "test" else None

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The log of every optimizer step; of one that was cut off, the last line may be half a line."""
        path, steps = self.folder.parent / "steps.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if self.record and path.is_file() else []:
            try:
                steps.append(json.loads(line))
            except ValueError:
                break
        return steps

    @cached_property
    def left_out(self) -> list[tuple[str, int]]:
        """Reasons why rows were not used, and how many."""
        path = self.folder.parent / "left_out.csv"
        if not self.record or not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            reasons = [row[2].partition(": ")[0] for row in list(csv.reader(file))[1:]]
        return Counter(reasons).most_common()

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a text that the model was trained on; None for images."""
        file = self.folder / "tokenizer_config.json"
        if self.modality != "text" or not file.is_file():
            return None
        from finetune.data.texts import MOST_TOKENS  # transformers comes along, which takes seconds

        given = json.loads(file.read_text(encoding="utf-8")).get("model_max_length")
        return min(MOST_TOKENS, int(given or MOST_TOKENS))

    @property
    def command(self) -> str | None:
        """The command that makes the run again, without the folders of the machine that it ran on."""
        words = str(self.record.get("command", "")).split()
        if not words or not words[0].endswith(".py") or "ipykernel" in words[0]:
            return None
        return " ".join(["python", *(shlex.quote(_without_folders(word)) for word in words)])


def _without_folders(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    value = without_secrets(value)
    away = value.startswith(("/", "~", "..")) or re.match(r"[A-Za-z]:[\\/]", value)
    return option + equals + (re.split(r"[\\/]", value.rstrip("\\/"))[-1] if away else value)
