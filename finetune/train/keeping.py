"""A trainer goes in; its model holds the weights that the run leaves: the last, an average, earlier or the head's."""

from typing import TYPE_CHECKING, Any

from finetune.train import checkpoint
from finetune.train.evaluate import Evaluation
from finetune.train.lengthening import end_loss
from finetune.train.selection import Average, averages_at, candidate, clearly_better, head_is_better, standing

if TYPE_CHECKING:
    from finetune.train.trainer import Trainer


def update_average(trainer: "Trainer", stage: int) -> None:
    """Take the weights into their average: at the end of each cycle, of those that go on from each other the last
    two, or, where there is but one, now and then over the end of the last stage."""
    step, steps = trainer.progress.step - trainer.plan.start(stage), trainer.plan.stages[stage].steps
    if trainer.plan.cycles() > 1:
        if trainer.plan.stages[stage].anew and step == steps - 1:
            trainer.average = trainer.average if trainer.average is not None else Average(trainer.model)
            trainer.average.update(trainer.model, 1.0 / trainer.plan.cycles(stage))
    elif trainer.progress.added:
        if trainer.average is not None and step == steps - 1:
            trainer.average.update(trainer.model, 0.5)
    elif trainer.settings.ema and stage == len(trainer.plan.stages) - 1 and averages_at(step, steps):
        trainer.average = trainer.average if trainer.average is not None else Average(trainer.model)
        trainer.average.update(trainer.model)


def keep_best(trainer: "Trainer", *, diverged: bool) -> tuple[Evaluation, str]:
    """Leave the best weights in the model; their evaluation, and which they are ("last", "average", "last two",
    "epoch N")."""
    best = trainer.progress.best
    if diverged:
        checkpoint.restore(trainer.model, trainer.best_weights)
        return trainer.evaluate(), kept_name(best) if best else "start"
    valid, kept = trainer.last_valid or trainer.evaluate(), "last"
    if trainer.average is not None:
        last, task = checkpoint.snapshot(trainer.model), trainer.splits.task
        trainer.model.load_state_dict(trainer.average.tensors)
        averaged = trainer.evaluate()
        # The average of several trainings is as a rule better than each of them, that of one is so now and then.
        if trainer.plan.cycles() > 1:
            worse = clearly_better(candidate(valid, 0), averaged)
        elif trainer.progress.added:
            worse = end_loss(averaged, task) >= end_loss(valid, task)
        else:
            worse = standing(averaged) <= standing(valid)
        if worse:
            checkpoint.restore(trainer.model, last)
        else:
            valid, kept = averaged, "last two" if trainer.progress.added else "average"
    if trainer.head is not None and head_is_better(trainer.head, valid, trainer.splits.task):
        return back_to_head(trainer)
    if best is not None and clearly_better(best, valid):
        checkpoint.restore(trainer.model, trainer.best_weights)
        valid, kept = trainer.evaluate(), kept_name(best)
    return valid, kept


def back_to_head(trainer: "Trainer") -> tuple[Evaluation, str]:
    """Go half of the way from the weights of now to those of the solved head, or, where that is clearly better, all
    of it (WiSE-FT, Wortsman et al. 2022)."""
    assert trainer.head is not None
    middle = Average(trainer.model)
    checkpoint.restore(trainer.model, trainer.head_weights)
    middle.update(trainer.model, 0.5)
    trainer.model.load_state_dict(middle.tensors)
    valid = trainer.evaluate()
    if head_is_better(trainer.head, valid, trainer.splits.task, clearly=True):
        checkpoint.restore(trainer.model, trainer.head_weights)
        return trainer.head, "solved head"
    return valid, "half-way"


def kept_name(best: dict[str, Any]) -> str:
    """Which weights a candidate has, as the record and the terminal call them."""
    return f"epoch {best['epoch']}" if best["epoch"] else "solved head"
