"""A job goes in; a loop runs as one writes it by hand: AdamW, one rate, 10 % warm-up, linear decay, all open.

It has what a careful writer gives it: fused AdamW, channels last for images, bf16 for texts where the processor has it,
and crops of a third of the area or more (ours takes the same).
"""

from typing import Any

import torch
from torch.utils.data import DataLoader

from . import inputs
from .meter import Meter


def run(job: Any, meter: Meter) -> float:
    torch.manual_seed(job.seed)
    model, train, test, collate = inputs.load(job, smallest_crop=0.35)
    model.to(memory_format=torch.channels_last if job.modality == "image" else torch.preserve_format)
    loader = DataLoader(train, batch_size=inputs.BATCH_SIZE, shuffle=True, collate_fn=collate)
    epochs = inputs.EPOCHS[job.modality]
    steps = epochs * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    model.train()
    for _ in range(epochs):
        for batch, labels in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=inputs.bf16_pays(job)):
                logits = model(batch)
            torch.nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        meter.point(lambda: inputs.accuracy(model, test, collate))
    torch.save(model.state_dict(), job.out / "model.pt")
    return meter.curve[-1][2]
