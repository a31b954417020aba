"""The frozen part computed once, in a loop of one's own: no `finetune.fit`.

    python recipes/elsewhere/replay_context.py

While the head and the last block train, what the blocks below give is the same in every epoch. `finetune.replay`
computes it once for each row and gives forward passes that start above; it is checked against the plain pass first, and
says why where that cannot be done.
"""

import time
from importlib.resources import files

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate

import finetune

EPOCHS, BATCH = 6, 32


def main() -> None:
    torch.manual_seed(0)
    data = load_digits()  # handwritten digits, scaled up: 400 to train on, 400 for the test
    x = interpolate(torch.tensor(data.images[:800], dtype=torch.float32)[:, None] / 4 - 2, size=64).repeat(1, 3, 1, 1)
    y = torch.tensor(data.target[:800])
    model = timm.create_model(f"local-dir:{files('finetune') / 'assets/fractals'}", pretrained=True, num_classes=10)
    pretrained = finetune.load_backbone(model)
    groups = finetune.layer_groups(pretrained)
    rates = finetune.geometric_rates(len(groups), lr=1e-2, span=10)
    optimizer = torch.optim.AdamW(finetune.param_groups(model, groups, rates, weight_decay=0.01))
    cycle, steps, step, begin = finetune.OneCycle(), EPOCHS * -(-400 // BATCH), 0, time.monotonic()

    with finetune.replay(pretrained, groups, "layer4.0", lambda rows: {"pixel_values": x[rows]}, rows=400) as forward:
        print(f"replayed, {forward.bytes / 2**20:.0f} MiB" if not forward.why else f"computed: {forward.why}")
        for _ in range(EPOCHS):
            for rows in torch.randperm(400).split(BATCH):
                share, momentum = cycle.at(step, steps)
                for group in optimizer.param_groups:
                    group["lr"], group["betas"] = share * rates[group["layer_group"]], (momentum, 0.99)
                loss = cross_entropy(forward(rows), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
    print(f"{steps} steps in {time.monotonic() - begin:.1f} s")
    with torch.no_grad():
        print(f"test accuracy {(model.eval()(x[400:]).argmax(1) == y[400:]).float().mean():.3f}")


if __name__ == "__main__":
    main()
