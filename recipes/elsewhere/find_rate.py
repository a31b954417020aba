"""The range test on any model and any loader: at which rate does the loss run away?

    python recipes/elsewhere/find_rate.py

Smith's range test trains for a few steps at a rate that climbs, looks at the loss, and undoes it all: weights, buffers
and random numbers are as before. With `groups`, the rates of the layer groups keep their relation to each other.
"""

from importlib.resources import files

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

import finetune


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:500] / 8 - 1, torch.tensor(data.target[:500])
    small = DataLoader(TensorDataset(x.flatten(1), y), batch_size=32, shuffle=True)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    print("any module     ", finetune.range_test(network, small, loss))

    pictures = interpolate(x[:, None] * 2, size=64).expand(-1, 3, -1, -1)
    large = DataLoader(TensorDataset(pictures, y), batch_size=32, shuffle=True)
    model = timm.create_model(f"local-dir:{files('finetune') / 'assets/fractals'}", pretrained=True, num_classes=10)
    groups = finetune.layer_groups(finetune.load_backbone(model))
    rates = finetune.geometric_rates(len(groups), lr=1.0, span=10)
    parts = finetune.param_groups(model, groups, rates, weight_decay=0.0)
    found = finetune.range_test(model, large, loss, steps=60, lowest=1e-5, groups=parts)
    print("a rate a group ", found)
    print(f"peak rate of the head {found.suggested:.2g}, of the stem {found.suggested * rates[0]:.2g}")


if __name__ == "__main__":
    main()
