"""The trainer against the barest loop that takes the same steps: milliseconds a step, in turns; a table and JSON.

    python scripts/bench/overhead.py            # about 4 minutes

Both train the same network on the same batches with the same fused AdamW (one parameter group a layer group and kind),
one-cycle rates and clipping; the bare loop logs nothing, checks nothing and keeps nothing. Validation, which the bare
loop has none of, is not counted. Seconds are of the process, so that other programs count less.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from replay import INTENTS, images
from torch.optim.lr_scheduler import OneCycleLR

from finetune.data.loaders import epoch_order, make_loader
from finetune.data.sources import load_table
from finetune.data.splits import Splits
from finetune.data.task import default_loss
from finetune.model.backbones import load_backbone
from finetune.model.groups import layer_groups
from finetune.model.pretrained import Pretrained
from finetune.plan.rates import geometric_rates, param_groups
from finetune.plan.settings import choose_settings
from finetune.plan.stages import Plan, Stage
from finetune.train.processes import start_processes
from finetune.train.trainer import Trainer, steps_per_epoch, without_remainder

RESULTS = Path(__file__).parent.parent / "results" / "bench_overhead.json"
EPOCHS, BATCH = 4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        whole = load_table(INTENTS)
        texts = Splits(whole.train.select(range(96)), whole.valid.select(range(8)), None, whole.task, whole.report, "")
        for name, backbone, splits in (
            ("mobilenetv2_100, 128 px", "mobilenetv2_100", images(Path(scratch))), ("MiniLM", "minilm", texts)
        ):  # fmt: skip
            times: dict[str, list[float]] = {"trainer": [], "bare": []}
            for repeat in range(options.repeats):
                times["trainer"].append(by_trainer(backbone, splits, Path(scratch) / f"{backbone}{repeat}"))
                times["bare"].append(by_hand(backbone, splits))
            ratios = [ours / bare for ours, bare in zip(times["trainer"], times["bare"], strict=True)]
            rows.append({"network": name, **{key: statistics.median(values) for key, values in times.items()},
                         "ratio": statistics.median(ratios), "ratios": ratios})  # fmt: skip
    print("| network | trainer, ms/step | bare loop, ms/step | ratio (median of pairs) |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['network']} | {row['trainer']:.1f} | {row['bare']:.1f} | {row['ratio']:.3f} |")
    summary = {"script": "scripts/bench/overhead.py", "date": date.today().isoformat(), "cores": os.cpu_count(),
               "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}  # fmt: skip
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")


def prepared(backbone: str, splits: Splits) -> tuple[Pretrained, Any, Any, Any]:
    """A fresh network with groups, settings and plan: everything open, one cycle."""
    torch.manual_seed(0)
    module: Any = backbone if backbone == "minilm" else timm.create_model(backbone)
    pretrained = load_backbone(module, splits.task, image_size=None if backbone == "minilm" else 128)
    given = {"batch_size": BATCH, "ema": False, "augment": "none", "precision": "fp32", "patience": 0}
    settings = choose_settings(splits.task.modality, len(splits.train), given=given)
    groups = layer_groups(pretrained)
    rates = geometric_rates(len(groups), settings.lr, settings.span)
    plan = Plan(Stage(0, epochs=EPOCHS)).resolve(groups, rates, steps_per_epoch(len(splits.train), BATCH))
    return pretrained, groups, settings, plan


def by_trainer(backbone: str, splits: Splits, folder: Path) -> float:
    """Milliseconds a step, of everything that `Trainer.run` does but evaluate."""
    pretrained, groups, settings, plan = prepared(backbone, splits)
    folder.mkdir()
    trainer = Trainer(pretrained, splits, groups, plan, settings, folder=folder, loss=default_loss(splits.task),
                      processes=start_processes(), say=lambda _: None)  # fmt: skip
    evaluating, evaluate = 0.0, trainer.evaluate

    def timed(*args: Any) -> Any:
        nonlocal evaluating
        begin = time.process_time()
        result = evaluate(*args)
        evaluating += time.process_time() - begin
        return result

    trainer.evaluate = timed  # type: ignore[method-assign]
    begin = time.process_time()
    trainer.run_stage(0)
    return 1e3 * (time.process_time() - begin - evaluating) / plan.steps


def by_hand(backbone: str, splits: Splits) -> float:
    """Milliseconds a step of a loop with nothing in it."""
    pretrained, groups, settings, plan = prepared(backbone, splits)
    model, task, loss = pretrained.model, splits.task, default_loss(splits.task)
    if task.modality == "image":
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        param_groups(model, groups, plan.stages[0].rates, settings.weight_decay),
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    peaks = [plan.stages[0].rates[group["layer_group"]] for group in optimizer.param_groups]
    schedule = OneCycleLR(optimizer, peaks, total_steps=plan.steps)
    lengths = None
    if task.modality == "text":
        from finetune.data.loaders import text_lengths

        lengths = text_lengths(splits.train, task, pretrained.processor)  # type: ignore[arg-type]
    model.train()
    for name in groups.batchnorm:
        model.get_submodule(name).eval()
    begin = time.process_time()
    for epoch in range(EPOCHS):
        order = without_remainder(epoch_order(len(splits.train), BATCH, seed=0, epoch=epoch, lengths=lengths), BATCH)
        for batch in make_loader(splits.train, task, pretrained.processor, order, train=True, augment="none"):
            value = loss(pretrained.forward(batch.inputs), batch.targets)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    return 1e3 * (time.process_time() - begin) / plan.steps


if __name__ == "__main__":
    main()
