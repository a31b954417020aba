"""Layer groups, one rate a group and one-cycle in a `LightningModule`: no `finetune.fit`.

    python recipes/elsewhere/lightning_module.py

A `LambdaLR` gives the groups their rates, a hook their momentum, both from the step alone. Needs `lightning`.
"""

from importlib.resources import files

import lightning
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy, interpolate
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import finetune

STEPS, CYCLE = 60, finetune.OneCycle(pct_start=0.3)


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        folder = files("finetune") / "assets/fractals"
        self.net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10)
        self.groups = finetune.layer_groups(finetune.load_backbone(self.net))

    def configure_optimizers(self):
        rates = finetune.geometric_rates(len(self.groups), lr=1e-2, span=10)
        optimizer = torch.optim.AdamW(finetune.param_groups(self.net, self.groups, rates, weight_decay=0.01))
        schedule = LambdaLR(optimizer, lambda step: CYCLE.at(min(step, STEPS - 1), STEPS)[0])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch, batch_idx):
        for group in self.optimizers().param_groups:
            group["betas"] = (CYCLE.at(self.global_step, STEPS)[1], 0.99)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def main() -> None:
    lightning.seed_everything(0)
    data = load_digits()  # 300 handwritten digits for training and 300 for the test, scaled up to [3, 64, 64]
    x = interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 4 - 2, size=64).expand(-1, 3, -1, -1)
    parts = train_test_split(range(len(x)), train_size=300, test_size=300, stratify=data.target, random_state=0)
    train, test = [TensorDataset(x[rows], torch.tensor(data.target[rows])) for rows in parts]
    trainer = lightning.Trainer(max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module := Digits(), DataLoader(train, batch_size=32, shuffle=True))
    print(f"test accuracy {trainer.test(module, DataLoader(test, batch_size=300))[0]['test accuracy']:.3f}")


if __name__ == "__main__":
    main()
