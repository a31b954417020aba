"""Layer groups, one rate a group, stages and one-cycle in a bare loop: no `finetune.fit`.

    python recipes/elsewhere/torch_loop.py

`plan.at(step)` is a pure function: it gives the stage, the rate of every group and the momentum. There is no scheduler
to step, and to resume takes the weights, the optimizer's state and one integer.
"""

from importlib.resources import files

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy, interpolate

import finetune
from finetune.model.groups import set_mode, set_trainable

BATCH = 32


def digits() -> tuple[torch.Tensor, ...]:
    """Handwritten digits, scaled up: x [N, 3, 64, 64] and y [N] for training (300 rows), and for the test."""
    data = load_digits()
    x = interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 4 - 2, size=64).expand(-1, 3, -1, -1)
    rows = train_test_split(range(len(x)), train_size=300, test_size=300, stratify=data.target, random_state=0)
    y = torch.tensor(data.target)
    return x[rows[0]], y[rows[0]], x[rows[1]], y[rows[1]]


def main() -> None:
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    model = timm.create_model(f"local-dir:{files('finetune') / 'assets/fractals'}", pretrained=True, num_classes=10)
    groups = finetune.layer_groups(finetune.load_backbone(model))
    rates = finetune.geometric_rates(len(groups), lr=1e-2, span=10)
    plan = finetune.gradual_unfreezing(len(groups), epochs=6).resolve(groups, rates, steps_per_epoch=len(x) // BATCH)
    print(plan)
    optimizer = torch.optim.AdamW(finetune.param_groups(model, groups, rates, weight_decay=0.01))
    for step in range(plan.steps):
        point = plan.at(step)
        set_trainable(model, groups, point.open_from)
        set_mode(model, groups, point.open_from)
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = point.rates[group["layer_group"]], (point.momentum, 0.99)
        if step % plan.steps_per_epoch == 0:
            order = torch.randperm(len(x)).split(BATCH)
        rows = order[step % plan.steps_per_epoch]
        loss = cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        print(f"test accuracy {(model.eval()(x_test).argmax(1) == y_test).float().mean():.3f}")


if __name__ == "__main__":
    main()
