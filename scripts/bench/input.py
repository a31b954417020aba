"""Images a second with and without the cache of decoded pictures, where their time goes, and the padding of texts.

    OMP_NUM_THREADS=1 python scripts/bench/input.py --data ../shared/data

Prints tables and writes scripts/results/bench_input.json. Times are processor time of this process, one thread and no
loading processes, the least of the repeats; the arms take turns, so that a machine with other work to do disturbs them
alike. "first" is an epoch that fills an empty cache, "later" one that finds it filled. The large photos are made on the
spot: noise of 4000 x 3000 pixels, smoothed, as JPEG.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
import timm
import torch
from PIL import Image

import finetune
from finetune.data.decoded import DecodedCache
from finetune.data.images import normalised, open_for_crops, train_transform
from finetune.data.loaders import epoch_order, make_loader, text_lengths, token_batches
from finetune.data.task import Task
from finetune.model.pretrained import Preprocessing

RESULTS = Path(__file__).parents[1] / "results" / "bench_input.json"
TASK = Task("single_label_classification", "image", ("a", "b"))
SETS = (("hymenoptera", 224, 96, 32), ("dogs_cats", 112, 192, 16), ("large photos", 224, 20, 10),
        ("large photos", 112, 20, 10))  # fmt: skip
TEXTS = ("trec6", "sst2", "ag_news")
ARMS = ("plain", "first", "later")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder), 20)
        speed, stages = [], []
        for name, size, count, batch_size in SETS:
            source = Path(folder) if name == "large photos" else options.data / "vision" / name / "train"
            files = sorted(source.rglob("*.jpg"))
            files = files[:: max(1, len(files) // count)][:count]
            pre = Preprocessing((size, size), interpolation="bicubic", crop_pct=0.875)
            where = {"set": name, "size": size, "images": len(files), "batch": batch_size}
            stages.append(where | {"ms": stage_times(files, pre, batch_size, options.repeats)})
            print(stages[-1], flush=True)
            for train in (True, False):
                rates = measure(files, pre, batch_size, train, options.repeats, Path(folder))
                speed.append(where | {"kind": "train" if train else "eval", "images_per_second": rates})
                print(speed[-1], flush=True)
    machine = {
        "processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "pillow": PIL.__version__,
        "timm": timm.__version__, "numpy": np.__version__, "repeats": options.repeats,
    }  # fmt: skip
    record = {"machine": machine, "speed": speed, "stages": stages, "padding": paddings(options.data)}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    report(record)


def make_photos(folder: Path, count: int) -> None:
    """JPEGs of 12 megapixels; with some detail, as the time of decoding depends on it."""
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (750, 1000, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.jpg", quality=85)


def dataset_of(files: Sequence[Path]) -> datasets.Dataset:
    cells = [{"path": str(path), "bytes": None} for path in files]
    return datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": datasets.Image(decode=False)}))


def measure(
    files: Sequence[Path], pre: Preprocessing, batch_size: int, train: bool, repeats: int, folder: Path
) -> dict[str, float]:
    """Images a second of each arm."""
    data, best = dataset_of(files), dict.fromkeys(ARMS, float("inf"))
    for epoch in range(repeats):
        cache = DecodedCache(folder / "cache")
        order = epoch_order(len(data), batch_size, seed=0, epoch=epoch)
        for arm in ARMS:
            kept = None if arm == "plain" else cache
            begin = time.process_time()
            for _ in make_loader(data, TASK, pre, order, train=train, epoch=epoch, workers=0, cache=kept):
                pass
            best[arm] = min(best[arm], time.process_time() - begin)
        cache.close()
    return {arm: round(len(files) / seconds, 1) for arm, seconds in best.items()}


def stage_times(files: Sequence[Path], pre: Preprocessing, batch_size: int, repeats: int) -> dict[str, float]:
    """Milliseconds an image of what makes a training batch, without a cache: of the batch that was fastest."""
    stages: dict[str, Callable[[Any, torch.Generator], Any]] = {
        "decode": lambda paths, _: [open_for_crops(str(path), pre.size) for path in paths],
        "crop and resize": lambda pictures, generator: [train_transform(one, pre, generator) for one in pictures],
        "to array": lambda crops, _: [np.array(crop) for crop in crops],
        "normalise": lambda arrays, _: normalised(arrays, pre, as_timm=False),
    }
    best = dict.fromkeys(stages, float("inf"))
    for seed in range(repeats):
        # As many at once as a batch has: the memory of a much larger one is new each time, which takes longer.
        for start in range(0, len(files), batch_size):
            passed: Any = files[start : start + batch_size]
            generator = torch.Generator().manual_seed(seed)
            for name, work in stages.items():
                begin = time.process_time()
                passed = work(passed, generator)
                best[name] = min(best[name], (time.process_time() - begin) / len(files[start : start + batch_size]))
    return {name: round(1000 * seconds, 3) for name, seconds in best.items()}


def paddings(folder: Path) -> list[dict[str, Any]]:
    """Share of padding among the tokens of an epoch: mean of five."""
    rows = []
    for name in TEXTS:
        splits = finetune.load_table(folder / "text" / name)
        tokenizer: Any = finetune.load_backbone("minilm", splits.task).processor
        lengths = text_lengths(splits.train, splits.task, tokenizer)
        for batch_size in (16, 32):
            shares = {}
            for how, given in (("shuffled", None), ("pools", lengths)):
                epochs = [epoch_order(len(lengths), batch_size, seed=0, epoch=e, lengths=given) for e in range(5)]
                shares[how] = round(float(np.mean([padding(order, lengths) for order in epochs])), 4)
            rows.append({"set": name, "rows": len(lengths), "batch": batch_size, "padding": shares})
        evaluation = epoch_order(len(lengths), 128, seed=0, epoch=None, lengths=lengths)
        tokens = token_batches(lengths, 128 * int(np.median(lengths)), 1024)
        for how, order in (("128 rows", evaluation), ("token_batches", tokens)):
            largest = max(len(batch) * max(lengths[row] for row in batch) for batch in order)
            figures = {"padding": round(padding(order, lengths), 4), "batches": len(order), "largest": largest}
            rows.append({"set": name, "rows": len(lengths), "evaluation": how} | figures)
    return rows


def padding(order: list[list[int]], lengths: list[int]) -> float:
    """Share of the tokens that only fill up."""
    filled = sum(len(batch) * max(lengths[row] for row in batch) for batch in order)
    return 1 - sum(lengths) / filled


def report(record: dict[str, Any]) -> None:
    print(f"\n{'set':<14}{'px':>5}{'':>7}" + "".join(f"{arm:>9}" for arm in ARMS) + "   later / plain")
    for row in record["speed"]:
        rates = row["images_per_second"]
        print(f"{row['set']:<14}{row['size']:>5}{row['kind']:>7}" + "".join(f"{rates[arm]:>9.0f}" for arm in ARMS)
              + f"{rates['later'] / rates['plain']:>10.1f}")  # fmt: skip
    for row in record["padding"]:
        print(row)


if __name__ == "__main__":
    main()
