"""Every data set with every backbone at hand, by the recipes with nothing but `--data`: test metrics and seconds.

    python scripts/every_set.py --data ../shared/data           # runs what is missing, then prints the table
    python scripts/every_set.py --report                        # only prints

Each run is the command that a user would give, under `accelerate launch`, in a process of its own. Results are kept in
scripts/results/every_set.json as they come. Start it twice with --shard 0/2 and --shard 1/2 to use two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "every_set.json"
RECIPES = Path(__file__).parent.parent / "recipes"
VISION = ("hymenoptera", "dogs_cats", "face_mask", "cifar10_small")
BACKBONES = tuple(f"mobilenetv2_100_{name}" for name in ("torch", "tf", "inat_bird", "inat_insect"))
TEXT = ("cr", "trec6", "tweet_emotion", "sms_spam", "sts", "sst2", "banking77", "ag_news")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th run from the i-th on")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        shard, shards = map(int, options.shard.split("/"))
        for name, command in commands(options.data)[shard::shards]:
            if name in results():
                continue
            row = one_run(command)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps({**results(), name: row}, indent=1) + "\n")
            print(name, row, flush=True)
    for name, row in results().items():
        figures = ", ".join(f"{metric} {value:.4g}" for metric, value in row["test"].items())
        print(f"{name:<45} {figures}   {row['seconds']:.0f} s")


def commands(data: Path) -> list[tuple[str, list[str]]]:
    """(name, recipe and its options) of every run, the short ones of each modality first."""
    weights = {backbone: f"local-dir:{data / 'weights' / backbone}" for backbone in BACKBONES}
    text = [(name, "minilm", ["text_classification.py", "--data", str(data / "text" / name)]) for name in TEXT]
    text.insert(3, ("wnut17", "minilm", ["token_classification.py", "--data", str(data / "text" / "wnut17")]))
    image = [(name, backbone, ["image_classification.py", "--data", str(data / "vision" / name)])
             for name in VISION for backbone in BACKBONES]  # fmt: skip
    cells = [str(data / "vision" / "bccd_multilabel" / f"{part}.csv") for part in ("train", "test")]
    image[4:4] = [("bccd counts and presence", backbone, ["custom_head.py", "--data", cells[0], "--test", cells[1]])
                  for backbone in BACKBONES]  # fmt: skip
    return [(f"{name} / {backbone}", [*command, "--backbone", weights.get(backbone, backbone)])
            for name, backbone, command in [*text, *image]]  # fmt: skip


def one_run(command: list[str]) -> dict[str, Any]:
    """Run a recipe on one core; its test metrics, and the seconds from start to finish that it reports."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        done = subprocess.run([*launch, str(RECIPES / command[0]), *command[1:], "--out", str(out)],
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        record = json.loads((out / "run.json").read_text())
    numbers = {name: value for name, value in record["metrics"]["test"].items() if isinstance(value, float)}
    return {"test": numbers, "seconds": record["seconds"]["total"], "rows": record["data"]["counts"]["train"],
            "epochs": record["settings"]["epochs"]["value"], "kept": record["kept"], "threads": 1}  # fmt: skip


def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


if __name__ == "__main__":
    main()
