"""One process and several, at the same global batch: the same losses step by step, and the same model at the end.

    python scripts/equivalence.py                                 # DDP and FSDP2, 2 and 4 processes against one
    python scripts/equivalence.py --processes 2 --ways ddp

Three small runs each, made here: pictures from a solved head, pictures in three stages whose frozen part is kept (under
DDP; a spread model is not replayed), texts of many lengths with two micro-batches a step. The table has the largest
relative difference of a step's loss, of a validation, of a test metric, and of a weight. Ends with 1 if one is above
--tolerance.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WAYS = {"ddp": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
LOCAL = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--gpu", action="store_true", help="one GPU a process, in place of the CPU")
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.into:
        train(Path(options.rows), Path(options.into))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        make_data(data)
        one = launched(data, Path(scratch) / "one", 1, {}, options.gpu)
        table = []
        for way in options.ways:
            for count in options.processes:
                found = launched(data, Path(scratch) / f"{way}{count}", count, WAYS[way], options.gpu)
                for kind in one:
                    table.append({"way": way, "processes": count, "run": kind, **compared(one[kind], found[kind])})
    names = list(table[0])
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for row in table:
        print("| " + " | ".join(f"{v:.1e}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    worst = max(value for row in table for value in row.values() if isinstance(value, float))
    print(f"\nlargest relative difference {worst:.1e}, tolerance {options.tolerance:.1e}")
    return int(worst > options.tolerance)


def launched(data: Path, out: Path, count: int, way: dict[str, str], gpu: bool) -> dict[str, Any]:
    """Start the runs in so many processes; what they found."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, __file__, "--into", str(out), "--rows", str(data)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({} if gpu else LOCAL), **way}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{count} processes: {done.stdout[-2000:]}\n{done.stderr[-9000:]}")
    return json.loads((out / "found.json").read_text())


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Largest relative differences; whether both replayed."""

    def largest(name: str) -> float:
        pairs = zip(one[name], other[name], strict=True)
        return max(abs(a - b) / max(abs(a), 1e-2) for a, b in pairs)

    return {"replayed": other["replayed"]} | {name: largest(name) for name in ("steps", "valid", "test", "weights")}


def make_data(folder: Path) -> None:
    """Pictures of three kinds of noise, sentences of 4 to 30 words, and two small networks without dropout."""
    import csv

    import numpy as np
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    for part, number in (("train", 14), ("valid", 5), ("test", 5)):
        for label in range(3):
            place = folder / "pictures" / part / str(label)
            place.mkdir(parents=True)
            for i in range(number):
                pixels = np.clip(rng.normal(90 + 30 * label, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    words = [f"word{i}" for i in range(60)]
    for part, number in (("train", 42), ("valid", 13), ("test", 13)):
        (folder / "texts").mkdir(exist_ok=True)
        with (folder / "texts" / f"{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(number):
                drawn = rng.integers(0, 60, rng.integers(4, 30))
                writer.writerow([" ".join(words[i] for i in drawn), ("low", "high")[int(drawn.mean() > 29.5)]])
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=3)
    (folder / "vit").mkdir()
    config = {"architecture": "test_vit", "num_classes": 3, "model_args": {"img_size": 32},
              "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 3, "mean": [0.5] * 3, "std": [0.5] * 3,
                                 "interpolation": "bilinear", "crop_pct": 1.0, "fixed_input_size": True,
                                 "first_conv": "patch_embed.proj", "classifier": "head"}}  # fmt: skip
    vit = timm.create_model("test_vit", num_classes=3, img_size=32)
    save_file(vit.state_dict(), folder / "vit" / "model.safetensors")
    (folder / "vit" / "config.json").write_text(json.dumps(config))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]", model_max_length=64)  # fmt: skip
    bert = BertModel(BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip
    bert.save_pretrained(folder / "bert")
    fast.save_pretrained(folder / "bert")


def train(data: Path, out: Path) -> None:
    """In each process: the runs, and what they found."""
    import torch
    from safetensors.torch import load_file

    import finetune

    torch.set_num_threads(1)
    stages = finetune.Plan(*(finetune.Stage(first, epochs=epochs) for first, epochs in ((-1, 3), (3, 2), (0, 2))))
    exact = {"precision": "fp32", "augment": "none"}
    runs: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "solved head": (data / "pictures", "vit", {"epochs": 3, "settings": exact}),
        "three stages": (data / "pictures", "vit", {"plan": stages, "settings": exact}),
        "texts": (data / "texts", "bert", {"epochs": 4, "settings": {"precision": "fp32", "accumulation": 2}}),
    }
    found = {}
    for kind, (rows, backbone, options) in runs.items():
        run = finetune.fit(str(rows), data / backbone, out=out / kind, batch_size=8, save_steps=4, **options)
        steps = [json.loads(line) for line in (out / kind / "steps.jsonl").read_text().splitlines()]
        weights = load_file(out / kind / "model" / "model.safetensors") if run.is_main else {}
        found[kind] = {
            "replayed": sum(stage["replayed"] for stage in run.record["stages"]),
            "steps": [step["loss"] for step in steps],
            "valid": [entry["valid"]["loss"] for entry in run.history],
            "test": [value for value in run.metrics["test"].values() if isinstance(value, float)],
            "weights": [float(tensor.double().norm()) for tensor in weights.values()],
        }
        if run.is_main:
            (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
