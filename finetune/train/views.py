"""What the solved head makes of validation pictures as they are, and of random views of them, goes in; whether to train
on such views comes out.

A view is a random crop, mirrored half the time. Of most photos it still shows what the photo shows; of a digit, a
letter or an arrow it may show another, or none.
"""

import math
from collections.abc import Callable

import numpy as np

from finetune.data.task import Task
from finetune.train.evaluate import Evaluation

# Of the head's lead over one answer for all. Test rows, 200 to train on, two seeds: photos keep .87 and more
# (hymenoptera, dogs_cats, face_mask) or .73 to .83 (cifar10_small on two backbones), digits .32 to .40. Digits end at
# 93.0 and 97.3 without views, at 89.2 and 95.8 with them (MobileNetV2, fractals); cifar10_small at 60.5 without, at
# 62.3 with them.
KEPT = 0.65
ERRORS = 3.0  # standard errors that the loss must have: 30 rows of cifar10_small on the fractals kept .50, at 2.0
FEWEST = 5  # rows
VIEWS, MOST = 100, 10  # of all rows together at least, and of one row


def views_a_row(rows: int) -> int:
    """Views of each of so many validation rows: the fewer there are, the more of each."""
    return min(MOST, math.ceil(VIEWS / max(1, rows)))


def mislead(plain: Evaluation, view: Callable[[int], Evaluation], task: Task) -> str:
    """Why the rows' pictures should be taken as they are: their views keep less than `KEPT` of the head's lead over one
    answer for all of them, and that is no chance; else "".

    Args:
        plain: The validation rows as they are.
        view: Evaluates a random view of each of the same rows, by its number; asked only where it can tell something.
        task: Only single labels are looked at.
    """
    if task.kind != "single_label_classification" or plain.scores is None or len(plain.scores) < FEWEST:
        return ""
    found = [view(number).scores for number in range(views_a_row(len(plain.scores)))]
    seen = [scores for scores in found if scores is not None and len(scores) == len(plain.scores)]
    if not seen:  # in each, some have become unreadable
        return ""
    scores = np.mean(seen, axis=0)
    before, after = float(plain.scores.mean()), float(scores.mean())
    commonest = float(np.bincount(np.asarray(plain.targets)).max() / len(plain.targets))
    lost = plain.scores - scores
    error = float(lost.std(ddof=min(1, len(lost) - 1))) / math.sqrt(len(lost))
    if before <= commonest or after - commonest >= KEPT * (before - commonest) or lost.mean() <= ERRORS * error:
        return ""
    return (
        f"random crops and mirror images mislead: the solved head gets {100 * after:.0f} % of them right, "
        f"{100 * before:.0f} % as they are"
    )
