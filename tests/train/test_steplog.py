"""The log of the steps, where its file fails."""

from pathlib import Path

import pytest
import torch

from finetune.plan.stages import Point
from finetune.train.progress import Progress
from finetune.train.steplog import StepLog, cut


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the file of Linux that is always full")
def test_a_log_that_can_no_longer_be_written_does_not_end_training() -> None:
    said: list[str] = []
    log, progress, none = StepLog(Path("/dev/full"), said.append), Progress(), torch.zeros(())
    for number in range(3):
        log.add(progress, Point(0, 0, (0.1,), 0.9), torch.tensor(1.0 + number), torch.tensor(2.0), none, 0.1)
    assert said == ["Warning   /dev/full: cannot be written (No space left on device); training goes on without it"]
    assert progress.epoch_losses == [1.0, 2.0, 3.0] and log.file is None
    log.back_to(0)
    log.close()


def test_a_folder_in_the_place_of_the_log(tmp_path: Path) -> None:
    said: list[str] = []
    cut(tmp_path, 3)
    log, none = StepLog(tmp_path, said.append), torch.zeros(())
    log.add(Progress(), Point(0, 0, (0.1,), 0.9), torch.tensor(1.0), torch.tensor(2.0), none, 0.1)
    log.close()
    assert said == [f"Warning   {tmp_path}: cannot be written (Is a directory); training goes on without it"]
