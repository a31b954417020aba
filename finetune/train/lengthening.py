"""A trainer at the end of its plan goes in; whether it goes on for another cycle comes out, by what validation said.

How many epochs a task wants cannot be told beforehand: it depends on how far the data are from the pretraining. So a
run of middling size begins short, and each further cycle is as long as all before it. Cycles are compared at their
ends alone, since in the middle of one the ranking of weights reverses (Smith's own logs).

1,000 rows, of which 850 train, two seeds, test rows (accuracy) after one cycle, two and three: cifar10_small on
MobileNetV2 of ImageNet 70.7, 71.2, 70.8 and 72.6, 71.6, 72.5; of insects 49.9, 50.8, 55.1 and 47.8, 52.9, 53.7; on the
fractals 47.3, 47.0, 50.9 and 46.7, 46.0, 53.1; trec6 on a small Llama 60.4, 65.2 and 57.6, 62.2. Texts on MiniLM, after
one cycle and the average of the ends of two: trec6 93.8, 93.2 and 93.4, 95.0; cr 87.6, 88.2 and 88.1, 88.6; sst2 82.9,
83.7 and 82.0, 81.5. On the first set, validation says to stop after two.
"""

import math
from typing import TYPE_CHECKING

from finetune.data.task import Task
from finetune.train.evaluate import Evaluation
from finetune.train.selection import Average, calibrated_losses

if TYPE_CHECKING:
    from finetune.train.trainer import Trainer


def go_on(trainer: "Trainer") -> bool:
    """Append a cycle as long as all before it, where the settings leave room and validation gains by it."""
    progress = trainer.progress
    if len(progress.added) >= trainer.settings.doublings:
        return False
    valid = trainer.last_valid = trainer.last_valid or trainer.evaluate()  # none yet: taken up again right here
    before, now = progress.cycle_loss, end_loss(valid, trainer.splits.task)
    if not goes_on(before, now, valid):
        return False
    progress.cycle_loss, trainer.average = now, Average(trainer.model) if trainer.settings.ema else None
    progress.added.append(trainer.plan.steps)
    trainer.plan, trainer.settings = progress.applied_to(trainer.planned), progress.applied_to_settings(trainer.chosen)
    gain = "to see whether that helps"
    if before is not None:
        gain = f"for the last cycle helped: calibrated loss {now:.3f} on validation, {before:.3f} before it"
    trainer.say(f"Longer    {trainer.plan.steps} steps in all instead of {progress.added[-1]}, {gain}")
    return True


def end_loss(valid: Evaluation, task: Task) -> float:
    """Mean loss of the validation rows at the best temperature; as it is where the outputs are a custom head's own."""
    return valid.loss if valid.scores is None else float(calibrated_losses(valid, task).mean())


def goes_on(before: float | None, now: float, valid: Evaluation) -> bool:
    """Whether another cycle is worth its time.

    Args:
        before: `end_loss` at the end of the cycle before; None after the first one, of which nothing can be told.
        now: At the end of this one.
        valid: The evaluation at the end of this one; where it has all rows right, there is nothing to gain.
    """
    perfect = valid.scores is not None and float(valid.scores.mean()) == 1.0
    return math.isfinite(now) and not perfect and (before is None or now < before)
