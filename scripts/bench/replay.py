"""The frozen part computed once, against every time: seconds a step, memory and equality; a table and JSON.

    python scripts/bench/replay.py            # a convolutional network, a ViT and a text encoder; about 5 minutes

Each network trains the same stages twice in one process, replayed and plain, in turns; images are not augmented, so
that both see the same. Weights of the networks for images are random (what a step takes does not depend on them); the
text encoder is MiniLM (extra [minilm]). Seconds are of the process, so that other programs count less.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from PIL import Image

from finetune.data.sources import load_images, load_table
from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.model.backbones import load_backbone
from finetune.model.groups import layer_groups
from finetune.plan.rates import geometric_rates
from finetune.plan.settings import choose_settings
from finetune.plan.stages import Plan, Stage
from finetune.train.processes import start_processes
from finetune.train.trainer import Trainer, steps_per_epoch

RESULTS = Path(__file__).parent.parent / "results" / "bench_replay.json"
NETWORKS = {"convolutions": "mobilenetv2_100", "vit": "vit_tiny_patch16_224", "text": "minilm"}
ROWS, EPOCHS, BATCH, SIZE = 64, 4, 16, 128
INTENTS = Path(__file__).parent.parent.parent / "finetune" / "assets" / "intents"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.networks:
            splits = images(Path(scratch)) if kind != "text" else texts()
            for stage in ("head", "top half", "all but the stem"):
                rows.append(compare(kind, splits, stage, Path(scratch), options.repeats))
                print(line(rows[-1]), flush=True)
    print("\n| network | open | plain ms/step | replayed ms/step | times faster | fill s | MiB | loss | weights |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(map(line, rows)))
    summary = {
        "script": "scripts/bench/replay.py", "date": date.today().isoformat(), "machine": platform.processor(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "timm": timm.__version__, "transformers": transformers.__version__, "rows": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    return (
        f"| {row['network']} | {row['open']} | {row['plain_ms']:.1f} | {row['replayed_ms']:.1f} | {row['ratio']:.2f} | "
        f"{row['fill_seconds']:.2f} | {row['mib']:.1f} | {row['loss_difference']:.0e} | "
        f"{row['weight_difference']:.0e} |"
    )


def compare(kind: str, splits: Splits, stage: str, scratch: Path, repeats: int) -> dict[str, Any]:
    """Both ways in turns; medians over the repeats."""
    runs: dict[str, list[dict[str, Any]]] = {"auto": [], "off": []}
    for repeat in range(repeats):
        for mode in ("auto", "off"):
            runs[mode].append(one_run(kind, splits, stage, scratch / f"{kind}-{stage}-{mode}-{repeat}", mode))
    replayed, plain = runs["auto"][0], runs["off"][0]
    assert replayed["replayed"], replayed["why"]
    ms = {mode: statistics.median(run["ms"] for run in runs[mode]) for mode in runs}
    pairs = [(replayed["weights"][name], tensor) for name, tensor in plain["weights"].items()]
    return {
        "network": NETWORKS[kind],
        "open": stage,
        "plain_ms": ms["off"],
        "replayed_ms": ms["auto"],
        "ratio": ms["off"] / ms["auto"],
        "fill_seconds": statistics.median(run["fill"] for run in runs["auto"]),
        "mib": replayed["mib"],
        "loss_difference": max(abs(a - b) for a, b in zip(replayed["losses"], plain["losses"], strict=True)),
        "weight_difference": max(float((a - b).abs().max()) for a, b in pairs),
    }


def one_run(kind: str, splits: Splits, stage: str, folder: Path, replay: str) -> dict[str, Any]:
    """A stage from a fresh backbone."""
    torch.manual_seed(0)
    name: Any = NETWORKS[kind] if kind == "text" else timm.create_model(NETWORKS[kind], **(
        {"img_size": SIZE} if kind == "vit" else {}))  # fmt: skip
    pretrained = load_backbone(name, splits.task, image_size=None if kind == "text" else SIZE)
    given = {"batch_size": BATCH, "replay": replay, "augment": "none", "ema": False, "precision": "fp32", "patience": 0}
    settings = choose_settings(splits.task.modality, len(splits.train), given=given)
    groups = layer_groups(pretrained)
    opened = {"head": -1, "top half": len(groups) // 2, "all but the stem": 1}[stage]
    rates = geometric_rates(len(groups), settings.lr, settings.span)
    per_epoch = steps_per_epoch(len(splits.train), BATCH)
    plan = Plan(Stage(opened, epochs=EPOCHS, name=stage)).resolve(groups, rates, per_epoch)
    folder.mkdir()
    trainer = Timed(pretrained, splits, groups, plan, settings, folder=folder, loss=default_loss(splits.task),
                    processes=start_processes(), say=lambda _: None)  # fmt: skip
    trainer.run()
    lines = [json.loads(text) for text in (folder / "steps.jsonl").read_text().splitlines()]
    store = trainer.stored
    return {
        "ms": 1e3 * statistics.median(trainer.step_seconds[1:]),
        "losses": [entry["loss"] for entry in lines],
        "weights": {name: tensor.clone() for name, tensor in pretrained.model.state_dict().items()},
        "replayed": trainer.progress.replayed[0][0],
        "why": trainer.progress.replayed[0][1],
        "fill": trainer.fill_seconds,
        "mib": store / 2**20,
    }


class Timed(Trainer):
    """Notes what steps and the store take."""

    stored, fill_seconds = 0, 0.0

    def open_replay(self, index: int) -> None:
        """And how long it takes."""
        begin = time.process_time()
        super().open_replay(index)
        self.fill_seconds = time.process_time() - begin
        self.stored = self.replay.store.bytes if self.replay is not None else 0
        self.step_seconds: list[float] = []

    def step(self, *args: Any) -> torch.Tensor:
        """And how long it takes."""
        begin = time.process_time()
        loss = super().step(*args)
        self.step_seconds.append(time.process_time() - begin)
        return loss


def images(scratch: Path) -> Splits:
    """Noise of four colours in four class folders."""
    root, rng = scratch / "noise", np.random.default_rng(0)
    if not root.exists():
        for split, count in (("train", ROWS // 4), ("valid", 4)):
            for label in range(4):
                (root / split / str(label)).mkdir(parents=True)
                for i in range(count):
                    pixels = np.clip(rng.normal(50 + 40 * label, 60, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(root / split / str(label) / f"{i}.png")
    return load_images(root)


def texts() -> Splits:
    """The package's own sentences."""
    whole = load_table(INTENTS)
    return Splits(whole.train.select(range(ROWS)), whole.valid.select(range(16)), None, whole.task, whole.report, "")


if __name__ == "__main__":
    main()
