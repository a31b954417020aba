"""What a run left behind: metrics, history and the trained model, with the verbs to use them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.data.task import Task
from finetune.model.pretrained import Pretrained
from finetune.output.export import save_pretrained
from finetune.output.predict import Prediction, Predictor


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: The run folder; `model/` in it is the plain checkpoint.
        record: The content of `run.json`.
        pretrained: The trained model with its processor.
        task: What it was trained for.
        history: One entry an epoch: "epoch", "step", "stage", "train_loss", and "valid" with its metrics.
        is_main: Whether this process writes files; with several processes one of them does.
    """

    folder: Path
    record: dict[str, Any] = field(repr=False)
    pretrained: Pretrained = field(repr=False)
    task: Task = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    is_main: bool = field(default=True, repr=False)

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """{"valid": {name: value}, "test": {name: value}}; "test" only where there is a test split."""
        return self.record["metrics"]

    @cached_property
    def _predictor(self) -> Predictor:
        return Predictor(self.pretrained, self.task)

    def predict(self, inputs: Any, batch_size: int = 32) -> list[Prediction]:
        """Predictions for files, folders, tables, strings or images, in the order given; see `Predictor.predict`."""
        return self._predictor.predict(inputs, batch_size)

    def steps(self) -> list[dict[str, Any]]:
        """The log of every optimizer step, read from `steps.jsonl`."""
        return [json.loads(line) for line in (self.folder / "steps.jsonl").read_text().splitlines()]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the plain checkpoint to another folder as well; the path of that folder."""
        return save_pretrained(self.pretrained, self.task, folder) if self.is_main else Path(folder)

    def write_report(self, path: str | Path | None = None) -> Path:
        """Write the report page; by default `report.html` in the run folder."""
        from finetune.output.report import write_report

        target = Path(path) if path is not None else self.folder / "report.html"
        return write_report(self.folder, target) if self.is_main else target

    def to_onnx(self, path: str | Path | None = None, *, overwrite: bool = False) -> Path:
        """Write the model as ONNX, if onnxruntime then gives the same outputs; by default `model.onnx` in the run
        folder. See `finetune.output.onnx_export.export_onnx`.
        """
        from finetune.output.onnx_export import export_onnx

        target = Path(path) if path is not None else self.folder / "model.onnx"
        if self.is_main:
            export_onnx(self._predictor, target, run_folder=self.folder, overwrite=overwrite)
        return target

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        commit_message: str = "Add model",
        create_pr: bool = False,
        examples: Sequence[Any] = (),
        dry_run: bool = False,
        adapter: bool = False,
    ) -> str:
        """Upload the plain checkpoint to the Hugging Face Hub, with a card; the URL of the commit or pull request. In
        a dry run, what would be sent; with `adapter`, the adapter of a run that had `lora`. See
        `finetune.output.hub.push_to_hub` for the options.
        """
        from finetune.output.hub import push_to_hub

        if not self.is_main:
            return ""
        return push_to_hub(
            self.folder / ("adapter" if adapter else "model"),
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            examples=examples,
            dry_run=dry_run,
            adapter=adapter,
        )
