"""Two small runs, started by a test as one process and as two: `python two_processes.py IMAGES BACKBONE OUT`.

One begins with a solved head, the other has stages whose frozen part is kept. Writes their losses as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import finetune
from finetune.train import replaying

torch.set_num_threads(1)
replaying.LEAST_SHARE = 0.0  # in a network this small, the clock says little about what pays
images, backbone, out = sys.argv[1:]
stages = ((-1, 3), (2, 2), (0, 1))
kinds: dict[str, dict[str, Any]] = {
    "solved": {"epochs": 2},
    "replayed": {"plan": finetune.Plan(*(finetune.Stage(first, epochs=epochs) for first, epochs in stages))},
}
found = {}
for kind, options in kinds.items():
    settings = {"precision": "fp32", "augment": "none"}
    run = finetune.fit(images, backbone, out=Path(out) / kind, batch_size=8, settings=settings, **options)
    found[kind] = {
        "losses": [entry["valid"]["loss"] for entry in run.history] + [run.metrics["test"]["loss"]],
        "replayed": [stage["replayed"] for stage in run.record["stages"]],
        "processes": run.record["processes"],
    }
if run.is_main:
    (Path(out) / "found.json").write_text(json.dumps(found))
