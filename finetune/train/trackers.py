"""Names of experiment trackers and what a run logs go in; curves in TensorBoard, trackio, Weights & Biases and the
others that accelerate knows come out.

Steps arrive when `steps.jsonl` is written, so nothing waits for a GPU because of them. A tracker that fails is let go
with a warning: training is worth more than its curves.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from finetune.errors import PlanError, without_secrets

PROJECT = "finetune"


def check_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """The trackers that are asked for, each once.

    Raises:
        PlanError: One that accelerate does not know, or whose package is not installed.
    """
    asked = tuple(dict.fromkeys([names] if isinstance(names, str) else names or ()))
    here = [str(name) for name in get_available_trackers()]
    for name in asked:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise PlanError(f"trackers: {name!r} is not one of {', '.join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))}")
        if name not in here and LOGGER_TYPE_TO_CLASS[name].__module__.startswith("accelerate."):
            found = f", or take one of {', '.join(sorted(here))}" if here else ""
            raise PlanError(f"trackers: {name} is not installed; pip install {name.replace('_', '-')}{found}")
    return asked


class Trackers:
    """The trackers of a run: none before `start`, and none on processes other than the first.

    What is kept in files is in a folder of the tracker's name in the run folder, such as `tensorboard/`; the others get
    the project "finetune" and, where they can, the run folder's name.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, say: Callable[[str], None], config: Mapping[str, Any] | None = None
    ) -> None:
        self.names, self.folder, self.say, self.config = tuple(names), folder, say, config or {}
        self.running: dict[str, GeneralTracker] = {}

    def start(self, step: int) -> None:
        """Begin, or go on at `step` of an interrupted run: what TensorBoard had beyond it is dropped."""
        for name in self.names:
            self.attempt(name, self.begin, name, step)

    def begin(self, name: str, step: int) -> None:
        """Start a tracker and tell it what the run is."""
        self.running[name] = tracker = self.opened(name, step)
        tracker.store_init_configuration({key: _plain(value) for key, value in self.config.items()})

    def opened(self, name: str, step: int) -> GeneralTracker:
        """A tracker that takes values."""
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        options: dict[str, Any] = {}
        if name == "tensorboard":
            options = {"purge_step": step}
        elif name in ("wandb", "trackio"):
            options = {"name": self.folder.resolve().name}
        if name == "trackio":
            options["resume"] = "allow" if step else "never"
        where = [self.folder] if kind.requires_logging_directory else []
        tracker = kind(name if where else PROJECT, *where, **options)
        tracker.start()
        return tracker

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of `steps.jsonl`: its loss, the rates of head and stem, momentum and gradient norm."""
        values = {
            "loss": record["loss"], "lr_head": record["rates"][-1], "lr_stem": record["rates"][0],
            "momentum": record["momentum"], "grad_norm": record["grad_norm"],
        }  # fmt: skip
        self.log("train", values, record["step"] + 1)

    def log(self, part: str, values: Mapping[str, Any], done: int) -> None:
        """Numbers of a part ("train", "valid", "test") after so many steps, beside the last of them; what is no number
        is left out."""
        if not self.running:
            return
        numbers = {
            f"{part}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        for name, tracker in list(self.running.items()):
            self.attempt(name, tracker.log, numbers, max(0, done - 1))

    def close(self) -> None:
        """Write what is left."""
        for name, tracker in list(self.running.items()):
            self.attempt(name, tracker.finish)
        self.running = {}

    def attempt(self, name: str, action: Callable[..., Any], *args: Any) -> None:
        """Do something with a tracker; where it fails, go on without it."""
        try:
            action(*args)
        except Exception as error:
            self.running.pop(name, None)
            why = without_secrets(str(error)).strip().splitlines()
            self.say(f"Warning   {name}: {why[0] if why else type(error).__name__}; training goes on without it")


def described(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is, for a tracker's table of runs: its settings by name, data, backbone, task and seed."""
    settings = {name: entry["value"] for name, entry in record["settings"].items()}
    return {
        "data": record["data"]["source"], "backbone": record["backbone"]["name"], "task": record["task"]["kind"],
        "seed": record["seed"], **settings,
    }  # fmt: skip


def _plain(value: Any) -> bool | int | float | str:
    """A value as all trackers take it."""
    return value if isinstance(value, bool | int | float) else without_secrets(str(value))
