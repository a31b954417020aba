"""What each optimizer step was goes in; lines of `steps.jsonl` come out, the word that training has diverged, and what
the processes together wish."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from finetune.plan.stages import Point
from finetune.train.progress import Diverged, Progress

READ_BACK = 20  # On a GPU, losses are read back once in so many steps: reading one waits for the device.
UNINFORMED = 0.5  # A solved head begins near 0, and random crops alone cost a multiple of that: no harm below a guess.
RISE = 4.0
SKIPS = 5  # Steps in a row without a usable gradient that are let pass.


class StepLog:
    """Losses of the steps, in order; those of a GPU are read back some steps later.

    Attributes:
        asked: The largest wish among the steps read back since it was last set to 0, see `Trainer.wish`.

    Args:
        path: The file; None on processes that write none.
        say: Told once when the file can no longer be written.
        also: Given each line that is written, as data.
    """

    def __init__(
        self,
        path: Path | None,
        say: Callable[[str], None] = print,
        also: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self.path, self.say, self.also = path, say, also
        self.file: IO[str] | None = None
        self.open()
        self.asked = 0.0
        self.pending: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def open(self) -> None:
        """Go on at the end of the file, where there can be one."""
        if self.path is not None:
            try:
                self.file = self.path.open("a")
            except OSError as error:
                self.say(f"Warning   {self.path}: cannot be written ({error.strerror}); training goes on without it")

    def add(
        self,
        progress: Progress,
        point: Point,
        loss: torch.Tensor,
        norm: torch.Tensor,
        asked: torch.Tensor,
        seconds: float,
    ) -> None:
        """Note a step: its loss, gradient norm and wish, each a tensor of one number that may still be on its way.

        Raises:
            Diverged: As `flush`.
        """
        record = {
            "step": progress.step,
            "stage": point.stage,
            "loss": None,
            "rates": [float(f"{rate:.6g}") for rate in point.rates],
            "momentum": point.momentum,
            "grad_norm": None,
            "seconds": round(seconds, 4),
        }
        self.pending.append((record, loss, norm, asked))
        if loss.device.type == "cpu" or len(self.pending) >= READ_BACK:
            self.flush(progress)

    def flush(self, progress: Progress) -> None:
        """Read back and write the losses of the last steps.

        Raises:
            Diverged: A loss far above where training began, or several steps in a row whose gradient is not a number.
        """
        pending, self.pending = self.pending, []
        for record, loss_tensor, norm_tensor, asked in pending:
            self.asked = max(self.asked, float(asked))
            loss, norm = float(loss_tensor), float(norm_tensor)
            record["loss"] = loss if math.isfinite(loss) else None
            record["grad_norm"] = norm if math.isfinite(norm) else None
            self.write(json.dumps(record) + "\n")
            self.also(record)
            if not (math.isfinite(loss) and math.isfinite(norm)):  # the optimizer has left this step out
                progress.skipped += 1
                progress.skipped_in_a_row += 1
                if progress.skipped_in_a_row >= SKIPS:
                    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
                    raise Diverged(f"step {record['step']}: {what}, and so in {SKIPS} steps in a row")
                continue
            progress.skipped_in_a_row = 0
            progress.epoch_losses.append(loss)
            progress.first_loss = loss if progress.first_loss is None else progress.first_loss
            progress.smooth_loss = loss if progress.smooth_loss is None else 0.9 * progress.smooth_loss + 0.1 * loss
            if progress.smooth_loss > RISE * max(progress.first_loss, UNINFORMED):
                raise Diverged(
                    f"step {record['step']}: the loss rose from {progress.first_loss:.3g} to {progress.smooth_loss:.3g}"
                )
        self.write("")

    def write(self, text: str) -> None:
        """Append to the file; no more of it once that has failed: training is worth more than its log."""
        if self.file is None:
            return
        try:
            self.file.write(text)
            if not text:
                self.file.flush()
        except OSError as error:
            self.say(f"Warning   {self.path}: cannot be written ({error.strerror}); training goes on without it")
            with suppress(OSError):  # what could not be written is still in its buffer
                self.file.close()
            self.file = None

    def back_to(self, step: int) -> None:
        """Drop the lines from a step on."""
        self.pending = []
        if self.file is not None and self.path is not None:
            self.file.close()
            cut(self.path, step)
            self.open()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def cut(path: Path, steps: int) -> None:
    """Keep the first lines of a log, one a step; what lies behind was never part of a checkpoint."""
    if path.is_file():
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:steps]))  # also where it is damaged
