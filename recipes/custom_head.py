"""Heads and losses of one's own: attention pooling with two outputs, which blood cells are there and how many of each.

    python recipes/custom_head.py --data bccd/train.csv --test bccd/test.csv --backbone timm/convnext_nano.in12k_ft_in1k

The tables have columns file, RBC, WBC, Platelets (0 or 1) and n_RBC, n_WBC, n_Platelets (counts). Any module will do
as a head and any function as a loss: nothing to subclass, to register or to patch.
"""

from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

import finetune

CELLS = ["RBC", "WBC", "Platelets"]


class PresentAndCounted(nn.Module):
    """Features of every place [B, T, F] -> {"present": logits [B, 3], "count": log of the expected number [B, 3]}."""

    pooled = False  # asks for the features before pooling

    def __init__(self, features: int) -> None:
        super().__init__()
        self.attention = nn.Linear(features, 1)
        self.present, self.count = nn.Linear(features, 3), nn.Linear(features, 3)

    def forward(self, x_BTF: Tensor) -> dict[str, Tensor]:
        pooled_BF = (self.attention(x_BTF).softmax(dim=1) * x_BTF).sum(dim=1)
        return {"present": self.present(pooled_BF), "count": self.count(pooled_BF)}


def loss(outputs: dict[str, Tensor], targets_BK: Tensor) -> Tensor:
    """Cross-entropy for the three cells, Poisson for their three counts."""
    present, count = targets_BK.split(3, dim=1)
    return F.binary_cross_entropy_with_logits(outputs["present"], present) + 0.1 * F.poisson_nll_loss(
        outputs["count"], count
    )


def metrics(outputs: dict[str, np.ndarray], targets_NK: np.ndarray) -> dict[str, float]:
    """Share of right yes-or-no answers, and mean absolute error of the counts."""
    present, count = np.split(targets_NK, 2, axis=1)
    return {
        "accuracy": float(((outputs["present"] > 0) == (present > 0.5)).mean()),
        "mae_count": float(np.abs(np.exp(outputs["count"]) - count).mean()),
    }


def main(
    data: str, backbone: str = "timm/convnext_nano.in12k_ft_in1k", *, out: Path = Path("runs/custom_head"),
    minutes: float | None = None, epochs: float | None = None, lr: float | None = None, batch_size: int | None = None,
    seed: int = 0, test: str | None = None, save_minutes: float = 1.0, overwrite: bool = False,
    resume_anyway: bool = False,
) -> None:  # fmt: skip
    """Fine-tune a backbone under a head with two outputs; write the run to `out`."""
    columns = CELLS + [f"n_{cell}" for cell in CELLS]
    splits = finetune.load_table(data, image="file", label=columns, task="regression", test=test, seed=seed)
    run = finetune.fit(
        splits, backbone, head=PresentAndCounted, loss=loss, metrics=metrics, out=out, minutes=minutes, epochs=epochs,
        lr=lr, batch_size=batch_size, seed=seed, save_minutes=save_minutes, overwrite=overwrite,
        resume_anyway=resume_anyway,
    )  # fmt: skip
    run.write_report()
    again = finetune.load(run.folder, head=PresentAndCounted)
    print(f"loaded again: {sum(p.numel() for p in again.pretrained.model.parameters()):,} weights")


if __name__ == "__main__":
    finetune.cli(main)
