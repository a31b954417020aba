"""Whether a loss weighted by the classes' frequencies is worth it: macro-F1 and accuracy with and without, and JSON.

    python scripts/bench/class_weights.py --data ../shared/data       # about fifteen minutes of a core

Uneven training rows of real sets (at ratios of 6 to 20 between the commonest and the rarest class), the test rows as
they are. Four arms: the default; the same with log(n_c / n) taken off each class's logit, so as if classes were equally
frequent (Menon et al. 2021), which needs no training and fits into the head's bias; the same by gradients alone with
plain cross-entropy; and with cross-entropy weighted by n / (C n_c), as scikit-learn's "balanced" does. The last two
differ in nothing else.
"""

import argparse
import contextlib
import io
import json
import random
import tempfile
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "bench_class_weights.json"
SETS = {  # name: (rows of the commonest class, ratio to the rarest)
    "sms_spam": (260, 6.5),
    "trec6": (120, 15),
    "cr": (240, 12),
    "hymenoptera": (100, 10),
    "dogs_cats": (160, 20),
}
ARMS = ("default", "adjusted", "plain", "balanced")
SEEDS = 2
TEST_ROWS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    done = {(row["set"], row["seed"], row["arm"]) for row in rows}
    for seed in range(SEEDS):
        for name in SETS:
            splits = uneven(name, options.data, seed)
            for arm in ("default", "plain", "balanced"):
                if (name, seed, arm) not in done:
                    for said, figures in measured(splits, arm, options.data, seed).items():
                        rows.append({"set": name, "seed": seed, "arm": said, **figures})
                        print(rows[-1], flush=True)
                    found = {"script": "scripts/bench/class_weights.py", "date": date.today().isoformat(), "rows": rows}
                    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    scores: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        scores[row["set"], row["arm"]].append(100 * row["f1_macro"])
    print("| macro-F1 | default | adjusted | plain | balanced |\n|---|---|---|---|---|")
    for name in SETS:
        means = [sum(found) / max(1, len(found)) for found in (scores[name, arm] for arm in ARMS)]
        print(f"| {name} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")


def uneven(name: str, data: Path, seed: int) -> Any:
    """Splits whose training rows are uneven, the later classes by name the rarer."""
    import datasets

    import finetune

    rng, folder = random.Random(seed), data / ("text" if (data / "text" / name).exists() else "vision") / name
    most, ratio = SETS[name]
    if folder.parent.name == "text":
        parts = datasets.load_dataset("csv", data_files={k: str(folder / f"{k}.csv") for k in ("train", "test")})
        labels = [str(label) for label in parts["train"]["label"]]
    else:
        parts = datasets.load_dataset("imagefolder", data_dir=str(folder)).cast_column(
            "image", datasets.Image(decode=False)
        )
        labels = [str(label) for label in parts["train"]["label"]]
    names = sorted(Counter(labels), key=lambda label: (-Counter(labels)[label], label))
    chosen: list[int] = []
    for number, label in enumerate(names):
        rows = [row for row, each in enumerate(labels) if each == label]
        wanted = round(most * ratio ** (-number / (len(names) - 1)))
        chosen += rng.sample(rows, min(wanted, len(rows)))
    parts["train"] = parts["train"].select(sorted(chosen))
    parts["test"] = parts["test"].shuffle(seed=0).select(range(min(TEST_ROWS, len(parts["test"]))))
    return finetune.load_dataset(parts, seed=seed)


def measured(splits: Any, arm: str, data: Path, seed: int) -> dict[str, dict[str, float]]:
    """Test scores of one run; of the default, also with the adjusted logits."""
    import torch

    import finetune

    counts = torch.bincount(torch.tensor(splits.train["target"][:]), minlength=len(splits.task.labels)).clamp(min=1)
    weight = counts.sum() / (len(counts) * counts) if arm == "balanced" else None

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets, weight=weight)

    image = splits.task.modality == "image"
    backbone = str(data / "weights" / "mobilenetv2_100_torch") if image else "minilm"
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        run = finetune.fit(
            splits, backbone, out=Path(out) / "run", seed=seed, loss=None if arm == "default" else loss,
            **({"image_size": 112} if image else {}),
        )  # fmt: skip
    found = {arm: {name: round(run.metrics["test"][name], 4) for name in ("f1_macro", "accuracy", "log_loss")}}
    if arm == "default":
        from sklearn.metrics import accuracy_score, f1_score

        from finetune.data.loaders import make_loader
        from finetune.train.evaluate import ordered_batches

        logits, truth = [], []
        run.pretrained.model.eval()
        batches = ordered_batches(len(splits.test), 64, None)
        with torch.no_grad():
            for batch in make_loader(splits.test, splits.task, run.pretrained.processor, batches, train=False):
                logits.append(run.pretrained.forward(batch.inputs).float() - (counts / counts.sum()).log())
                truth.append(batch.targets)
        guess, true = torch.cat(logits).argmax(1), torch.cat(truth)
        found["adjusted"] = {
            "f1_macro": round(float(f1_score(true, guess, average="macro")), 4),
            "accuracy": round(float(accuracy_score(true, guess)), 4),
        }
    return found


if __name__ == "__main__":
    main()
