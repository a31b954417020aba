"""What each optimizer step was goes in; lines of `steps.jsonl` come out, or the word that training has diverged."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from finetune.plan.stages import Point
from finetune.train.progress import Diverged, Progress

READ_BACK = 20  # On a GPU, losses are read back once in so many steps: reading one waits for the device.
UNINFORMED = 0.5  # A solved head begins near 0, and random crops alone cost a multiple of that: no harm below a guess.
RISE = 4.0


class StepLog:
    """Losses of the steps, in order; those of a GPU are read back some steps later.

    Args:
        path: The file; None on processes that write none.
        lr: Peak rate of the head, for the advice when training diverges.
    """

    def __init__(self, path: Path | None, lr: float) -> None:
        self.file = path.open("a") if path is not None else None
        self.lr = lr
        self.pending: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor]] = []

    def add(self, progress: Progress, point: Point, loss: torch.Tensor, norm: torch.Tensor, seconds: float) -> None:
        """Note a step.

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
        self.pending.append((record, loss, norm))
        if loss.device.type == "cpu" or len(self.pending) >= READ_BACK:
            self.flush(progress)

    def flush(self, progress: Progress) -> None:
        """Read back and write the losses of the last steps.

        Raises:
            Diverged: A loss that is not a number, or one far above where training began.
        """
        pending, self.pending = self.pending, []
        for record, loss_tensor, norm_tensor in pending:
            loss, norm = float(loss_tensor), float(norm_tensor)
            record["loss"] = loss if math.isfinite(loss) else None
            record["grad_norm"] = norm if math.isfinite(norm) else None
            if self.file is not None:
                self.file.write(json.dumps(record) + "\n")
            advice = f"try a lower rate (lr={self.lr / 3:.1g})"
            if not math.isfinite(loss):
                raise Diverged(f"step {record['step']}: the loss is {loss}; {advice}")
            progress.first_loss = loss if progress.first_loss is None else progress.first_loss
            progress.smooth_loss = loss if progress.smooth_loss is None else 0.9 * progress.smooth_loss + 0.1 * loss
            if progress.smooth_loss > RISE * max(progress.first_loss, UNINFORMED):
                raise Diverged(
                    f"step {record['step']}: the loss rose from {progress.first_loss:.3g} to "
                    f"{progress.smooth_loss:.3g}; {advice}"
                )
        if self.file is not None:
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()
