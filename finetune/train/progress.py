"""Where training stands, what it left, and the word for its failure: plain data that goes in and out of the trainer."""

from dataclasses import dataclass, field
from typing import Any

from finetune.train.evaluate import Evaluation


class Diverged(Exception):
    """The loss left the region where training makes sense; holds the plain sentence that says so."""


@dataclass
class Progress:
    """Where training stands: all that a checkpoint holds besides weights, optimizer and random numbers."""

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    stage_seconds: list[float] = field(default_factory=list)
    replayed: list[tuple[bool, str]] = field(default_factory=list)
    shortened: list[tuple[int, int, int]] = field(default_factory=list)
    stale: int = 0
    stage_best: list[float] | None = None
    best: dict[str, Any] | None = None
    first_loss: float | None = None
    smooth_loss: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What training left: `kept` says which weights the model now holds ("last", "average", or "epoch N"), `status` is
    "finished" or "diverged", `why` the sentence to show for it; `replayed` says of each stage whether its frozen part
    was computed once, and what that took or why not."""

    history: list[dict[str, Any]]
    stage_seconds: list[float]
    valid: Evaluation
    kept: str
    status: str
    why: str
    evaluate_seconds: float
    replayed: list[tuple[bool, str]]
