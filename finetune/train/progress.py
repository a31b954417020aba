"""Where training stands, what it left, and the word for its failure: plain data that goes in and out of the trainer."""

from dataclasses import dataclass, field
from typing import Any

from finetune.plan.settings import Settings
from finetune.plan.stages import ResolvedPlan
from finetune.train.evaluate import Evaluation


class Diverged(Exception):
    """The loss left the region where training makes sense; holds the plain sentence that says so."""


@dataclass
class Progress:
    """Where training stands: all that a checkpoint holds besides weights and optimizer.

    Attributes:
        step: Optimizer steps done.
        history: One entry for each validation.
        stage_seconds: Time spent, by stage.
        replayed: For each stage begun, whether its frozen part was computed once, and what that took or why not.
        added: Steps of each cycle that training went on for.
        cycle_loss: Calibrated loss of the validation rows at the end of the cycle before.
        shortened: Stages brought to an early end: (stage, step of it, steps left).
        rewinds: Each time that training went back: stage, step, factor on all rates from this stage on, why.
        stale: Validations in a row without a gain in this stage.
        stage_best: Best standing in this stage.
        best: The best candidate, see `selection`.
        first_loss: Loss of the first step since the start or the last rewind.
        smooth_loss: Exponential average of the losses.
        epoch_losses: Losses of this epoch's steps.
        skipped: Steps whose gradient was not a number.
        skipped_in_a_row: How many of them since the last good one.
        accumulation: Micro-batches a step, where the memory asked for more than the settings have.
        recompute: Whether activations are computed again in the backward pass, because the memory asked for it.
        unreadable: Rows that could not be read in training, and why.
        misleading_views: Why training pictures are taken as they are, if the toolkit found that, see `views`.
        gradients: Norms of this epoch's gradients so far, see `GroupNorms`.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    stage_seconds: list[float] = field(default_factory=list)
    replayed: list[tuple[bool, str]] = field(default_factory=list)
    added: list[int] = field(default_factory=list)
    cycle_loss: float | None = None
    shortened: list[tuple[int, int, int]] = field(default_factory=list)
    rewinds: list[dict[str, Any]] = field(default_factory=list)
    stale: int = 0
    stage_best: list[float] | None = None
    best: dict[str, Any] | None = None
    first_loss: float | None = None
    smooth_loss: float | None = None
    epoch_losses: list[float] = field(default_factory=list)
    skipped: int = 0
    skipped_in_a_row: int = 0
    accumulation: int = 1
    recompute: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)
    misleading_views: str = ""
    gradients: dict[str, Any] = field(default_factory=dict)

    def applied_to_settings(self, settings: Settings) -> Settings:
        """Settings as training has changed them so far."""
        if self.misleading_views:
            settings = settings.changed(self.misleading_views, augment="none")
        if self.added:
            times = "once" if len(self.added) == 1 else f"{len(self.added)} times"
            reason = f"{settings.epochs:g}, and as long again {times}, as far as validation called for it"
            settings = settings.changed(reason, epochs=settings.epochs * 2.0 ** len(self.added))
        return settings

    def applied_to(self, plan: ResolvedPlan) -> ResolvedPlan:
        """A plan as training has changed it so far."""
        for steps in self.added:
            plan = plan.lengthened(steps)
        for cut in self.shortened:
            plan = plan.shortened(*cut)
        for rewind in self.rewinds:
            plan = plan.slowed(rewind["stage"], rewind["factor"])
        return plan


@dataclass(frozen=True)
class Outcome:
    """What training left: `kept` says which weights the model now holds ("last", "average", "last two", or "epoch N"),
    `status` is "finished" or "diverged", `why` the sentence to show for it; `progress` is where it stood at its end."""

    progress: Progress
    valid: Evaluation
    kept: str
    status: str
    why: str
    evaluate_seconds: float

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry for each validation."""
        return self.progress.history
