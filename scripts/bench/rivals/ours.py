"""A job goes in; `finetune.fit` runs on data and backbone with no dial set."""

from typing import Any

import finetune
from finetune.train.trainer import Trainer

from .meter import Meter


def run(job: Any, meter: Meter) -> float:
    """Final test accuracy. Each validation of the training is a point of the curve."""
    evaluate = Trainer.evaluate

    def measured(self: Trainer, dataset: Any = None) -> Any:
        if dataset is not None:
            with meter.pause():
                return evaluate(self, dataset)
        result = evaluate(self)
        meter.point(lambda: evaluate(self, self.splits.test).metrics["accuracy"])
        return result

    Trainer.evaluate = measured  # type: ignore[method-assign]
    size = {"image_size": job.image_size} if job.modality == "image" else {}
    result = finetune.fit(job.data, job.backbone, out=job.out / "run", seed=job.seed, **size)
    return float(result.metrics["test"]["accuracy"])
