"""Command lines of the recipes and the verbs: wrong, contradictory, or pointing at what must not be touched."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

from fuzz.made import Made, Random
from fuzz.runs import reached

ROOT = Path(__file__).resolve().parent.parent.parent
NUMBERS = (
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e-400",
    "1e400",
    "1" + "0" * 30,
    "9" * 5000,
    "-0.0",
    "\u0663",
    "\uff13",
    "0x10",
    "1_000",
    "1,5",
    "",
    " ",
    "fast",
    "1e",
    "--",
    "\udce9",
    "\x00",
    "None",
    "True",
    "[1]",
    "1e9",
)
OPTIONS = ("--lr", "--epochs", "--minutes", "--batch-size", "--seed", "--save-minutes")
LINES: tuple[tuple[str, ...], ...] = (
    (),
    ("--data",),
    ("--data", "{photos}", "--data", "{photos}"),
    ("--data", ""),
    ("--data", "/nowhere"),
    ("--data", "~nobody/photos"),
    ("--data", "{in}"),
    ("--data", "x" * 5000),
    ("--data", "a\x00b"),
    ("--data", "caf\udce9"),
    ("--data", "/dev/zero"),
    ("--data", "/etc/hostname"),
    ("--data", "owner/name"),
    ("--data", "https://huggingface.co/datasets/owner/name"),
    ("--data", "owner/name@../../x"),
    ("--data", "{photos}", "--epoch", "1"),
    ("--data", "{photos}", "--trust-remote-code"),
    ("--data", "{photos}", "--token", "hf_abcdefghijklmnopqrstuvwxyz01234567"),
    ("--data", "{photos}", "--overwrite", "maybe"),
    ("--data", "{photos}", "--minutes", "1", "--epochs", "1"),
    ("--data", "{photos}", "--overwrite", "--resume-anyway"),
    ("--data", "{photos}", "--test", "/nowhere"),
    ("--data", "{photos}", "--test", ""),
    ("--data", "{photos}", "--test", "{photos}"),
    ("--data", "{photos}", "--test", "{reviews}"),
    ("--data", "{photos}", "--test", "{photos}/train/red/0.png"),
    ("--data", "{reviews}"),
    ("--data", "{photos}/train/red"),
    ("--data", "{photos}/train/red/0.png"),
    ("--data", "{photos}", "--out", "{photos}"),
    ("--data", "{photos}", "--out", "{photos}", "--overwrite"),
    ("--data", "{photos}", "--out", "{photos}/train"),
    ("--data", "{photos}", "--out", "{in}", "--overwrite"),
    ("--data", "{photos}", "--out", "/"),
    ("--data", "{photos}", "--out", "/", "--overwrite"),
    ("--data", "{photos}", "--out", "/proc/x"),
    ("--data", "{photos}", "--out", "/sys"),
    ("--data", "{photos}", "--out", "/dev/null"),
    ("--data", "{photos}", "--out", "{reviews}"),
    ("--data", "{photos}", "--out", "{reviews}/x"),
    ("--data", "{photos}", "--out", "a\x00b"),
    ("--data", "{photos}", "--out", "{out}/" + "x" * 300),
    ("--data", "{photos}", "--out", "{out}/caf\udce9"),
    ("--data", "{photos}", "--backbone", ""),
    ("--data", "{photos}", "--backbone", "/nowhere"),
    ("--data", "{photos}", "--backbone", "resnet_of_tomorrow"),
    ("--data", "{photos}", "--backbone", "timm/resnet_of_tomorrow"),
    ("--data", "{photos}", "--backbone", "owner/name@"),
    ("--data", "{photos}", "--backbone", "../../x"),
    ("--data", "{photos}", "--backbone", "local-dir:"),
    ("--data", "{photos}", "--backbone", "hf-hub:"),
    ("--data", "{photos}", "--backbone", "~nobody/x"),
    ("--data", "{photos}", "--backbone", "x" * 5000),
    ("--data", "{photos}", "--backbone", "a\x00b"),
    ("--data", "{photos}", "--backbone", "caf\udce9"),
    ("--data", "{photos}", "--backbone", "https://user:hf_abcdefghijklmnopqrstuvwxyz01234567@huggingface.co/x/y"),
    ("--data", "{photos}", "--backbone", "{reviews}"),
    ("--data", "{photos}", "--backbone", "{photos}"),
    ("--data", "{photos}", "--backbone", "minilm"),
    ("--data", "{photos}", "--backbone", "{run}/checkpoints"),
    ("--data", "{photos}", "--push-to-hub", "not a name"),
    ("--data", "{photos}", "--push-to-hub", ""),
)
VERBS: tuple[tuple[str, ...], ...] = (
    (),
    ("dream",),
    ("predict",),
    ("predict", "{run}"),
    ("predict", "{run}", "{photos}", "--batch-size", "0"),
    ("predict", "{run}", "{photos}", "--batch-size", "-3"),
    ("predict", "{run}", "{photos}", "--batch-size", "1" + "0" * 30),
    ("predict", "{run}", "{photos}", "--out", "{photos}"),
    ("predict", "{run}", "{photos}", "--out", "{photos}/train"),
    ("predict", "{run}", "{photos}/test/red/0.png", "--out", "{photos}/test/red/0.png"),
    ("predict", "{run}", "{photos}/test/red/0.png", "--out", "{run}/run.json/x.csv"),
    ("predict", "{run}", "{photos}/test/red/0.png", "--out", "/dev/full"),
    ("predict", "{run}", "{photos}/test/red/0.png", "--out", "a\x00b"),
    ("predict", "{run}", "{reviews}", "--column", "outcome"),
    ("predict", "{run}", "{reviews}", "--column", "text"),
    ("predict", "{texts}", "x " * 3000, "--out", "{out}/x.csv"),
    ("predict", "{texts}", "{reviews}", "--out", "{reviews}"),
    ("predict", "{texts}", "{reviews}", "--column", ""),
    ("predict", "{texts}", "{photos}"),
    ("predict", "/nowhere", "x"),
    ("predict", "", "x"),
    ("predict", "{photos}", "x"),
    ("predict", "{reviews}", "x"),
    ("predict", "x" * 5000, "x"),
    ("predict", "a\x00b", "x"),
    ("predict", "~nobody/x", "x"),
    ("evaluate",),
    ("evaluate", "{run}", "/nowhere"),
    ("evaluate", "{run}", "{reviews}"),
    ("evaluate", "{texts}", "{photos}"),
    ("evaluate", "{texts}", "{reviews}", "--label", "text"),
    ("evaluate", "{texts}", "{reviews}", "--label", "outcome"),
    ("evaluate", "{texts}", "{reviews}", "--text", "label"),
    ("evaluate", "{texts}", "{reviews}", "--batch-size", "0"),
    ("evaluate", "{texts}", "{reviews}", "--batch-size", "-1"),
    ("evaluate", "{texts}", "{reviews}", "--out", "{photos}"),
    ("evaluate", "{texts}", "{reviews}", "--out", "{reviews}"),
    ("evaluate", "{texts}", "{reviews}", "--out", "/proc/x.json"),
    ("evaluate", "{photos}", "{photos}"),
    ("push", "{run}"),
    ("push", "{run}", "not a name", "--dry-run"),
    ("push", "{run}", "", "--dry-run"),
    ("push", "{photos}", "owner/name", "--dry-run"),
    ("push", "/nowhere", "owner/name", "--dry-run"),
    ("push", "{run}", "owner/name", "--dry-run", "--examples", "/nowhere.png"),
    ("push", "{run}", "owner/name", "--dry-run", "--examples", "{reviews}"),
    ("push", "{run}", "owner/name", "--message", " "),
    ("push", "{run}", "owner/name", "--revision", "0" * 40),
    ("push", "{run}", "owner/name", "--token", "hf_abcdefghijklmnopqrstuvwxyz01234567"),
    ("push", "{run}", "owner/name"),
    ("onnx", "/nowhere"),
    ("onnx", "{photos}"),
    ("onnx", "{run}", "--out", "{photos}"),
    ("onnx", "{run}", "--out", "{reviews}"),
    ("onnx", "{run}", "--out", "/proc/x.onnx"),
)


def flags(rng: Random, place: Path, base: Path, number: int) -> Made:
    """A command line of a recipe, up to where training would begin, or of a verb."""
    for name in ("photos", "run", "texts"):
        shutil.copytree(base / name, place / "in" / name)
    shutil.copy(base / "reviews.csv", place / "in" / "reviews.csv")
    numbers = [("--data", "{photos}", option, value) for option in OPTIONS for value in NUMBERS]
    every = [*(("recipe", *line) for line in LINES), *(("verb", *line) for line in VERBS)]
    rest = number - len(every)
    how, *words = every[number] if rest < 0 else ("recipe", *numbers[rest * 7 % len(numbers)])
    told = {name: str(place / "in" / name) for name in ("photos", "run", "texts")}
    told |= {"reviews": str(place / "in" / "reviews.csv"), "in": str(place / "in"), "out": str(place / "out")}
    shown = " ".join(word if len(word) < 50 else f"{word[:20]}…" for word in words)
    words = [word.format(**told) if "{" in word else word for word in words]
    if how == "recipe":
        words += [] if "--backbone" in words else ["--backbone", str(base / "timm")]
        words += [] if "--out" in words else ["--out", str(place / "out" / "run")]
    names = tuple(word for word in words if len(word) > 1) + tuple(
        word[2:].replace("-", "_") for word in words if word[:2] == "--"
    )
    names += (
        str(place / "in"),
        "--data",
        "predict",
        "model",
        "inputs",
        "name",
        "folder",
        "Hugging Face",
        "backbone",
        "''",
    )
    return Made(f"{how} {shown}", lambda: use(how, tuple(words)), names, limit=60)


def use(how: str, words: tuple[str, ...]) -> int:
    """Call a recipe or a verb; the script puts another function here, which does it in a new process."""
    return recipe(*words) if how == "recipe" else verb(*words)


def recipe(*words: str) -> int:
    """Call the recipe of images; where training would begin, it ends."""
    import finetune
    from finetune.train.trainer import Trainer

    spec = importlib.util.spec_from_file_location("recipe", ROOT / "recipes" / "image_classification.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Trainer.run = reached  # type: ignore[method-assign]
    sys.argv = ["image_classification.py", *words]
    finetune.cli(module.main)
    return 0


def verb(*words: str) -> int:
    """Call `finetune`."""
    from finetune.verbs_cli import main

    sys.argv = ["finetune", *words]
    main()
    return 0
