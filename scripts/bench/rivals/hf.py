"""A job goes in; the Trainer of transformers runs, with all of its defaults or as its examples set it.

Defaults: 5e-5, 3 epochs, batches of 8, linear decay, fp32. Examples (text and image classification): batches of 16,
weight decay 0.01 (texts), 10 % warm-up (images); and bf16 for texts where the processor has it.
"""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from . import inputs
from .meter import Meter


class ForBatches(Trainer):
    """Trainer on batches of the form (inputs, labels)."""

    def compute_loss(self, model: Any, rows: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch, labels = rows
        return torch.nn.functional.cross_entropy(model(batch), labels)


def settings(job: Any) -> dict[str, Any]:
    if job.rival == "hf_default":
        return {}
    own = {"warmup_steps": 0.1} if job.modality == "image" else {"weight_decay": 0.01}  # below 1: a share of all steps
    return own | {"learning_rate": job.rate, "per_device_train_batch_size": inputs.BATCH_SIZE, "save_strategy": "no",
                  "num_train_epochs": inputs.EPOCHS[job.modality], "bf16": inputs.bf16_pays(job)}  # fmt: skip


def run(job: Any, meter: Meter) -> float:
    torch.manual_seed(job.seed)
    model, train, test, collate = inputs.load(job, smallest_crop=0.08)

    class Curve(TrainerCallback):
        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            meter.point(lambda: inputs.accuracy(model, test, collate))

    arguments = TrainingArguments(
        str(job.out / "run"), seed=job.seed, use_cpu=True, remove_unused_columns=False, **settings(job)
    )
    trainer = ForBatches(model, arguments, train_dataset=train, data_collator=collate, callbacks=[Curve()])
    trainer.train()
    trainer.save_model()
    return meter.curve[-1][2]
