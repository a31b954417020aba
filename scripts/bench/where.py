"""Where the time of a default run goes: CPU seconds of each part, on the sets of peers.py; a table and JSON.

    python scripts/bench/where.py --data ../shared/data

A process each. "network" is the least that the same steps, features and validations cost: forward and backward passes
of the bare network on batches that are ready, in the same precision, timed in the same process afterwards. What is left
of the parts above it is the toolkit's own: reading, decoding, augmentation, optimizer, checks, checkpoints.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results" / "bench_where.json"
PARTS = ("imports", "data", "setup", "head", "train", "evaluate", "export", "total", "network")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return job(**json.loads(options.job))
    sys.path.insert(0, str(Path(__file__).parent))
    import peers

    peers.SCRATCH.mkdir(exist_ok=True)
    table = {}
    for name, (modality, _) in peers.SETS.items():
        with tempfile.TemporaryDirectory() as out:
            wanted = {"data": str(peers.drawn_rows(name, options.data)), "out": out, "modality": modality,
                      "backbone": peers.backbone(modality, options.data), "size": peers.IMAGE_SIZE}  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, __file__, "--job", json.dumps(wanted)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            table[name] = json.loads((Path(out) / "where.json").read_text())
        print(name, table[name], flush=True)
    print("| set | " + " | ".join(PARTS) + " |\n" + "|---" * (len(PARTS) + 1) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(f"{row[part]:.1f}" for part in PARTS) + " |")
    kept = {"script": "scripts/bench/where.py", "date": date.today().isoformat(), "clock": "CPU", "rows": table}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def job(data: str, out: str, modality: str, backbone: str, size: int) -> None:
    """One run, and the bare network's share of it."""
    time.monotonic = time.process_time  # what the run says of its seconds is then CPU time
    import torch

    torch.set_num_threads(1)
    import timm  # noqa: F401
    import transformers  # noqa: F401

    import finetune
    import finetune.fitting
    from finetune.data.loaders import epoch_order, make_loader
    from finetune.data.task import default_loss
    from finetune.model.groups import set_mode, set_trainable
    from finetune.train.processes import start_processes
    from finetune.train.trainer import Trainer

    trainers: list[Any] = []
    run_plan = Trainer.run

    def noted(self: Trainer) -> Any:
        trainers.append(self)
        return run_plan(self)

    Trainer.run = noted  # type: ignore[method-assign]
    imports = time.process_time()
    splits = finetune.load_dataset(data)
    looked = time.process_time()
    image = {"image_size": size} if modality == "image" else {}
    run = finetune.fit(splits, backbone, out=Path(out) / "run", **image)
    total = time.process_time()
    [trainer] = trainers
    size_of_step, lengths = trainer.settings.batch_size, trainer.lengths["train"]
    order = epoch_order(len(splits.train), size_of_step, seed=0, epoch=1, lengths=lengths)[:8]
    processor = trainer.pretrained.processor
    batches = list(make_loader(splits.train, splits.task, processor, order, train=True, workers=0))
    groups, first = trainer.groups, trainer.plan.stages[-1].open_from
    set_trainable(trainer.model, groups, first)
    set_mode(trainer.model, groups, first)
    loss, autocast = default_loss(splits.task), start_processes().autocast
    if trainer.settings.precision == "bf16":
        from dataclasses import replace

        autocast = replace(start_processes(), precision="bf16").autocast
    forward, both = (
        sum(timed(trainer, batch, loss, autocast, backward) for batch in batches) / len(batches)
        for backward in (False, True)
    )
    rows = len(splits.train) + len(splits.valid) * (len(run.history) + 1) + (len(splits.test) if splits.test else 0)
    network = both * trainer.plan.steps + forward * rows / size_of_step
    seconds = run.record["seconds"]
    found = {
        "imports": imports, "data": looked - imports, "setup": seconds["setup"] + seconds["probes"],
        "head": seconds["head"], "train": seconds["train"], "evaluate": seconds["evaluate"],
        "export": seconds["export"], "total": total, "network": network,
    }  # fmt: skip
    (Path(out) / "where.json").write_text(json.dumps({name: round(value, 2) for name, value in found.items()}))


def timed(trainer: Any, batch: Any, loss: Any, autocast: Any, backward: bool) -> float:
    """Least CPU seconds of a pass on the batch of one step."""
    import torch

    best = float("inf")
    for _ in range(3):
        begin = time.process_time()
        with torch.set_grad_enabled(backward), autocast():
            value = loss(trainer.pretrained.forward(batch.inputs).float(), batch.targets)
        if backward:
            value.backward()
            trainer.pretrained.model.zero_grad(set_to_none=True)
        best = min(best, time.process_time() - begin)
    return best


if __name__ == "__main__":
    main()
