"""A trainer goes in; its checkpoint lies in the run folder, or it stands where its newest checkpoint was taken."""

import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from finetune.errors import RunError
from finetune.train import checkpoint, memory
from finetune.train.progress import Progress
from finetune.train.selection import Average
from finetune.train.steplog import cut

if TYPE_CHECKING:
    from finetune.train.trainer import Trainer


def save(trainer: "Trainer") -> bool:
    """Write a checkpoint; whether that worked, as the main process sees it. Every process has to ask for it."""
    # What is spread over the processes is gathered by all of them, before the first one writes it.
    weights = {"model": checkpoint.snapshot(trainer.model), "best": trainer.best_weights}
    optimizer = checkpoint.optimizer_state(trainer.optimizer)
    if trainer.average is not None:
        weights["average"] = checkpoint.gathered(trainer.average.tensors)
    if trainer.start_weights is not trainer.head_weights and trainer.start_weights:
        weights["start"] = trainer.start_weights
    if not trainer.processes.is_main:
        return True
    if trainer.head is not None:
        names = [f"{trainer.solvable}.{name}" for name in ("weight", "bias")]
        weights["head"] = {name: trainer.head_weights[name] for name in names if name in trainer.head_weights}
    folder, progress = trainer.folder / "checkpoints", trainer.progress
    try:
        checkpoint.save(folder, progress.step, weights=weights, optimizer=optimizer, progress=vars(progress))
    except OSError as error:
        trainer.say(f"Warning   no checkpoint ({error.strerror or error}); training goes on, unsaved")
        return False
    return True


def resume(trainer: "Trainer") -> None:
    """Go on from the newest whole checkpoint of the folder; lines of `steps.jsonl` beyond it are dropped.

    Raises:
        RunError: It is of another run, or holds more than numbers.
    """
    path = trainer.processes.first(lambda: checkpoint.newest(trainer.folder / "checkpoints", trainer.say))
    if path is not None:
        try:
            take_up(trainer, *checkpoint.load(path))
        except UnpicklingError:
            raise RunError(
                f"{path}: its optimizer.pt holds more than numbers, which loading it would run; start anew with "
                "--overwrite, and do not use what came with it"
            ) from None
        # After --resume-anyway
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, OSError, SafetensorError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise RunError(
                f"{path}: does not fit this run ({why}); start anew with --overwrite, or take the backbone and the "
                "labels that it was begun with"
            ) from None
        trainer.say(f"Resumed   from step {trainer.progress.step} of {trainer.plan.steps}")
    if trainer.processes.is_main:
        cut(trainer.folder / "steps.jsonl", trainer.progress.step)


def take_up(
    trainer: "Trainer", weights: dict[str, checkpoint.Weights], optimizer: dict[str, Any], progress: dict[str, Any]
) -> None:
    """Be where a checkpoint was."""
    if "head" in weights:  # the model is still as it was loaded
        like = {name: tensor for name, tensor in trainer.model.state_dict().items() if name in weights["head"]}
        trainer.model.load_state_dict(checkpoint.scattered(weights["head"], like), strict=False)
        trainer.head, trainer.head_weights = trainer.evaluate(), checkpoint.snapshot(trainer.model)
    trainer.norms.begin()
    trainer.norms.restore(progress["gradients"])
    checkpoint.restore(trainer.model, weights["model"])
    trainer.best_weights, trainer.start_weights = weights["best"], weights.get("start") or trainer.head_weights
    if "average" in weights:
        trainer.average = Average(trainer.model)
        trainer.average.tensors = checkpoint.scattered(weights["average"], trainer.average.tensors)
    checkpoint.restore_optimizer(trainer.optimizer, optimizer)
    trainer.progress = Progress(**progress)
    trainer.plan = trainer.progress.applied_to(trainer.planned)
    trainer.settings = trainer.progress.applied_to_settings(trainer.chosen)
    if trainer.progress.recompute:
        memory.save_activations(trainer.model)


def drop_checkpoints(folder: Path) -> None:
    """Delete what only an unfinished run needs of a run folder."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
