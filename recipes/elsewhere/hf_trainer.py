"""Layer groups, one rate a group and one-cycle in Hugging Face's `Trainer`: no `finetune.fit`.

    python recipes/elsewhere/hf_trainer.py

The optimizer has one rate a group; a `LambdaLR` multiplies each of them by the share that `OneCycle.at` gives, and a
callback sets the momentum. Both follow from the step, so that `Trainer` resumes them as it resumes its own.
"""

import tempfile
from importlib.resources import files

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import interpolate
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

import finetune

STEPS, CYCLE = 60, finetune.OneCycle(pct_start=0.3)


class Momentum(TrainerCallback):
    """AdamW's beta1 goes the other way than the rate."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["betas"] = (CYCLE.at(state.global_step, STEPS)[1], 0.99)


def main() -> None:
    torch.manual_seed(0)
    data = load_digits()  # 300 handwritten digits for training and 300 for the test, scaled up to [3, 64, 64]
    x = interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 4 - 2, size=64).expand(-1, 3, -1, -1)
    parts = train_test_split(range(len(x)), train_size=300, test_size=300, stratify=data.target, random_state=0)
    train, test = [[{"pixel_values": x[row], "labels": int(data.target[row])} for row in rows] for rows in parts]

    folder = str(files("finetune") / "assets/fractals")
    model = AutoModelForImageClassification.from_pretrained(  # transformers keeps the checkpoint's half precision
        folder, num_labels=10, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    groups = finetune.layer_groups(finetune.load_backbone(model, processor=finetune.Preprocessing((64, 64))))
    rates = finetune.geometric_rates(len(groups), lr=1e-2, span=10)
    optimizer = torch.optim.AdamW(finetune.param_groups(model, groups, rates, weight_decay=0.01))
    schedule = LambdaLR(optimizer, lambda step: CYCLE.at(min(step, STEPS - 1), STEPS)[0])
    with tempfile.TemporaryDirectory() as out:
        options = TrainingArguments(
            out, max_steps=STEPS, per_device_train_batch_size=32, logging_steps=10, save_strategy="no"
        )
        trainer = Trainer(model, options, train_dataset=train, optimizers=(optimizer, schedule), callbacks=[Momentum()])
        trainer.train()
        found = trainer.predict(test)
    print(f"test accuracy {(found.predictions.argmax(1) == found.label_ids).mean():.3f}")


if __name__ == "__main__":
    main()
