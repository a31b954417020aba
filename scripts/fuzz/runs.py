"""Run folders, checkpoints to resume from, trained models and what they are to predict for: spoilt."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.checkpoints import content, gone, setting
from fuzz.made import REVIEWS, Made, Random, Reached, as_csv, as_lines, bend_file, damage_file, damaged, write_evil

OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "settings": {"replay": "off"}}
Way = Callable[[Random, Path, Path], Any]


def damages(*files: str) -> dict[str, Way]:
    """Each file damaged, bent where it is JSON, emptied, and gone."""
    found: dict[str, Way] = {}
    for file in files:
        found[f"{file} damaged"] = lambda rng, folder, place, file=file: damage_file(rng, folder / file)
        found[f"{file} emptied"] = content(file, b"", b"\n", b"\xff\xfe\xff", b"\0\0")
        found[f"{file} gone"] = gone(file)
        if file.endswith(".json"):
            found[f"{file} bent"] = lambda rng, folder, place, file=file: bend_file(rng, folder / file)
            found[f"{file} bent often"] = lambda rng, folder, place, file=file: bend_file(rng, folder / file, 8)
            found[f"{file} no object"] = content(file, b"[]", b"3", b'"x"', b"null", b"{}")
    return found


def lines(file: str, *choices: str) -> Way:
    """Add a line."""
    return lambda rng, folder, place: (folder / file).open("a").write(rng.choice(choices) + "\n")


RUN_WAYS: dict[str, Way] = {
    **damages("run.json", "steps.jsonl", "predictions/test.csv", "left_out.csv", "model/finetune.json"),
    **damages("model/config.json"),
    "step of no object": lines("steps.jsonl", "3", "[]", "{}", '{"step": "x"}', '{"step": 1, "rates": []}', "null"),
    "step beyond": lines(
        "steps.jsonl", json.dumps({"step": 10**30, "stage": 99, "loss": None, "rates": [], "momentum": 0})
    ),
    "rows of another shape": lines("predictions/test.csv", "a", "a,b,c", "a,b,c,d,e", 'a,"b', "x,blue,red,high"),
    "left out of another shape": lines("left_out.csv", "a", "", "a,b,c,d"),
    "labels of scripts": setting("run.json", "task", "labels", to=["<script>alert(1)</script>"] * 3),
    "labels of the model of scripts": setting("model/finetune.json", "task", "labels", to=["<script>", "b", "c"]),
    "labels too few": setting("model/finetune.json", "task", "labels", to=["a"]),
    "another kind": setting("model/finetune.json", "task", "kind", to="dreams"),
    "another kind that exists": setting("model/finetune.json", "task", "kind", to="regression"),
    "another modality": setting("model/finetune.json", "task", "modality", to="text"),
    "another kind in the record": setting("run.json", "task", "kind", to="dreams"),
    "another family": setting("model/finetune.json", "family", to="module"),
    "a family of its own": setting("model/finetune.json", "family", to="x"),
    "a head of its own": setting("model/finetune.json", "head", to={"class": "Evil", "linear": False}),
    "a linear head": setting("model/finetune.json", "head", to={"class": "Linear", "linear": True}),
    "base model of a path": setting("model/finetune.json", "base_model", to="../../../etc"),
    "licence of a script": setting("model/finetune.json", "licence", to="<script>alert(1)</script>\n---"),
    "status of its own": setting("run.json", "status", to=["x"]),
    "no metrics": setting("run.json", "metrics", to={}),
    "metrics of words": setting("run.json", "metrics", "test", "accuracy", to="high"),
    "confusion of another shape": setting("run.json", "metrics", "valid", "confusion", to=[[1, 2]]),
    "command of a script": setting("run.json", "command", to="x.py <script>alert(1)</script> ```\n# x"),
    "source that leads out": setting("run.json", "data", "source", to="../../../../etc/passwd"),
    "a pickle in the model": lambda rng, folder, place: write_evil(place, folder / "model" / "pytorch_model.bin"),
    "a link in the model": lambda rng, folder, place: (folder / "model" / "x.json").symlink_to("/etc/passwd"),
    "plots that are a file": lambda rng, folder, place: (
        shutil.rmtree(folder / "plots"),
        (folder / "plots").write_text(""),
    ),
    "no model": lambda rng, folder, place: shutil.rmtree(folder / "model"),
    "model that is a file": lambda rng, folder, place: (
        shutil.rmtree(folder / "model"),
        (folder / "model").write_text(""),
    ),
}


def runs(rng: Random, place: Path, base: Path, number: int) -> Made:
    """Spoil a run that ended; then write its report, its card, load it, score it, or give its command again."""
    folder = place / "in" / "run"
    shutil.copytree(base / ("texts" if number % 7 == 6 else "run"), folder)
    what = list(RUN_WAYS)[number % len(RUN_WAYS)]
    try:
        RUN_WAYS[what](rng, folder, place)
    except Exception:  # there is no such value
        what = "as it is"
    uses = {"report": report, "card": card, "load": load, "score": score, "again": again}
    use = list(uses)[(number + number // len(RUN_WAYS)) % len(uses)]
    return Made(f"{what}, {use}", lambda: uses[use](folder, place, base), (str(folder), "run.json"))


def report(folder: Path, place: Path, base: Path) -> int:
    from finetune.output.report import write_report

    copied = place / "out" / "run"  # the plots are written beside the record
    shutil.copytree(folder, copied, symlinks=True)
    try:
        page = write_report(copied, place / "out" / "report.html").read_text()
    except Exception as error:
        raise type(error)(str(error).replace(str(copied), str(folder))) from error
    assert "<script" not in page
    return 0


def card(folder: Path, place: Path, base: Path) -> int:
    from finetune.output.card import make_card
    from finetune.output.card_facts import Facts
    from finetune.output.hub import push_to_hub

    push_to_hub(folder, "owner/name", dry_run=True)
    made = make_card(Facts.of(folder / "model"), "owner/name")
    assert "<script" not in made.text, "a script in the card"
    return 0


def load(folder: Path, place: Path, base: Path) -> int:
    from PIL import Image

    import finetune

    predictor = finetune.load(folder)
    one: Any = Image.new("RGB", (40, 40)) if predictor.task.modality == "image" else "the film was good"
    return sum(each.error is not None for each in predictor.predict([one]))


def score(folder: Path, place: Path, base: Path) -> int:
    from finetune.output.predict import load
    from finetune.output.verbs import evaluate_on, trained_columns

    predictor = load(folder)
    data = base / "photos" if predictor.task.modality == "image" else base / "reviews.csv"
    found = evaluate_on(predictor, data, usual=trained_columns(str(folder)))
    json.dumps(found.to_json(), default=float)
    return len(found.left_out)


def again(folder: Path, place: Path, base: Path) -> int:
    import finetune

    finetune.fit(base / "photos", base / "timm", out=folder, **OPTIONS)
    raise AssertionError("a run that ended was trained again")


RESUME_WAYS: dict[str, Way] = {
    "as it is": lambda rng, folder, place: None,
    **damages("run.json", "steps.jsonl"),
    **{
        f"checkpoint: {name}": (lambda rng, folder, place, way=way: way(rng, newest(folder), place))
        for name, way in damages(
            "progress.json", "checksums.json", "model.safetensors", "optimizer.pt", "best.safetensors"
        ).items()
    },
    "progress bent, with its checksum": lambda rng, folder, place: with_checksums(
        folder, lambda new: bend_file(rng, new / "progress.json")
    ),
    "progress of no object, with its checksum": lambda rng, folder, place: with_checksums(
        folder, content("progress.json", b"[]", b"3", b"{}"), rng
    ),
    "evil optimizer, with its checksum": lambda rng, folder, place: with_checksums(
        folder, lambda new: write_evil(place, new / "optimizer.pt")
    ),
    "no checksums at all": lambda rng, folder, place: (
        (newest(folder) / "checksums.json").write_text("{}"),
        (newest(folder) / "model.safetensors").unlink(),
    ),
    "checksums of other files": lambda rng, folder, place: (newest(folder) / "checksums.json").write_text(
        '{"../../run.json": "x", "/etc/passwd": "y"}'
    ),
    "no whole checkpoint": lambda rng, folder, place: [
        (path / "progress.json").unlink() for path in (folder / "checkpoints").iterdir()
    ],
    "a checkpoint of an odd name": lambda rng, folder, place: (folder / "checkpoints" / "step-x").mkdir(),
    "a checkpoint that is a file": lambda rng, folder, place: (folder / "checkpoints" / "step-9999999").write_text("x"),
    "checkpoints that are a file": lambda rng, folder, place: (
        shutil.rmtree(folder / "checkpoints"),
        (folder / "checkpoints").write_text(""),
    ),
    "steps that are a folder": lambda rng, folder, place: (
        (folder / "steps.jsonl").unlink(),
        (folder / "steps.jsonl").mkdir(),
    ),
    "the user's own files in it": lambda rng, folder, place: (folder / "thesis.txt").write_text("years of work"),
}


def newest(folder: Path) -> Path:
    """The newest checkpoint."""
    return max((folder / "checkpoints").glob("step-*"))


def with_checksums(folder: Path, change: Callable[..., Any], *given: Any) -> None:
    """Change a checkpoint and write its checksums anew."""
    from finetune.train.checkpoint import CHECKSUMS, _checksum

    path = newest(folder)
    change(*given, path, path) if given else change(path)
    kept = {file.name: _checksum(file) for file in sorted(path.iterdir()) if file.name != CHECKSUMS}
    (path / CHECKSUMS).write_text(json.dumps(kept))


def resumes(rng: Random, place: Path, base: Path, number: int) -> Made:
    """Spoil a run that did not end, and give its command again; with --overwrite, its own files are all that may go."""
    folder = place / "out" / "run"
    shutil.copytree(base / "unfinished", folder)
    what = list(RESUME_WAYS)[number % len(RESUME_WAYS)]
    RESUME_WAYS[what](rng, folder, place)
    overwrite = number >= len(RESUME_WAYS)

    def act() -> int:
        import finetune
        from finetune.train.trainer import Trainer

        if overwrite:
            (folder / "thesis.txt").write_text("years of work")
            Trainer.run = reached  # type: ignore[method-assign]
        try:
            finetune.fit(base / "photos", base / "timm", out=folder, overwrite=overwrite, **OPTIONS)
        finally:
            thesis = (folder / "thesis.txt").is_file() or not (overwrite or "own files" in what)
            assert thesis, "a file of the user is gone"
        return 0

    return Made(what + " (overwrite)" * overwrite, act, (str(folder),), limit=90)


def reached(self: Any) -> Any:
    """In place of training."""
    raise Reached


# What is to be predicted for


def predict_inputs(rng: Random, place: Path, base: Path, number: int) -> Made:
    """Give a trained model odd things, in Python or on the command line."""
    images = number % 2 == 0
    model = base / ("run" if images else "texts")
    folder = place / "in" / "given"
    folder.mkdir()
    shutil.copy(base / "photos" / "test" / "red" / "0.png", folder / "0.png")
    ways = IMAGE_INPUTS if images else TEXT_INPUTS
    what = list(ways)[number // 2 % len(ways)]
    given = ways[what](rng, folder, place)
    on_command_line = (
        isinstance(given, list) and number // 2 >= len(ways) and all(isinstance(each, str) for each in given)
    )

    def act() -> int:
        import finetune

        if on_command_line:
            from fuzz.flags import verb

            return verb("predict", str(model), *given, "--out", str(place / "out" / rng.choice(("x.csv", "x.jsonl"))))
        found = finetune.load(model).predict(given)
        from finetune.output.verbs import write_rows

        for name in ("x.csv", "x.jsonl"):
            write_rows(found, finetune.load(model).task, place / "out" / name)
        return sum(one.error is not None for one in found)

    names = (str(folder), "inputs", "--out", "column", "predict")
    return Made(f"{'images' if images else 'texts'}: {what}{' (command line)' * on_command_line}", act, names)


def table(folder: Path, name: str, text: str | bytes) -> str:
    """A table of pictures or texts."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return str(folder / name)


def secret(folder: Path, place: Path) -> str:
    """A table of pictures that lie elsewhere."""
    shutil.copy(folder / "0.png", place / "secret.png")
    return table(folder, "x.csv", "image\n../../secret.png\n" + f"{place / 'secret.png'}\n")


def pipe(folder: Path) -> str:
    """A pipe that nobody writes to."""
    os.mkfifo(folder / "pipe.png")
    return str(folder / "pipe.png")


IMAGE_INPUTS: dict[str, Callable[[Random, Path, Path], Any]] = {
    "nothing": lambda rng, folder, place: [],
    "None": lambda rng, folder, place: [None],
    "numbers": lambda rng, folder, place: [1, 2.5, True],
    "a number": lambda rng, folder, place: 3,
    "empty names": lambda rng, folder, place: ["", " "],
    "no such file": lambda rng, folder, place: [str(folder / "gone.png"), "/nowhere/x.png"],
    "long names": lambda rng, folder, place: ["x" * 5000, str(folder / ("y" * 300 + ".png"))],
    "zero bytes": lambda rng, folder, place: ["a\0b.png"],
    "half characters": lambda rng, folder, place: ["caf\udce9.png"],
    "a folder in a list": lambda rng, folder, place: [str(folder)],
    "an empty folder": lambda rng, folder, place: [str((folder / "empty").mkdir() or folder / "empty")],
    "a pipe": lambda rng, folder, place: [pipe(folder)],
    "a pipe in a folder": lambda rng, folder, place: pipe(folder) and str(folder),
    "a device": lambda rng, folder, place: ["/dev/zero"],
    "bytes": lambda rng, folder, place: [b"", b"not an image", (folder / "0.png").read_bytes()],
    "a dictionary": lambda rng, folder, place: {"image": "x"},
    "addresses": lambda rng, folder, place: ["http://127.0.0.1:9/x.png"],
    "a table of paths that lead out": lambda rng, folder, place: [secret(folder, place)],
    "a table without pictures": lambda rng, folder, place: [table(folder, "x.csv", "a,b\n1,2\n")],
    "an empty table": lambda rng, folder, place: [table(folder, "x.csv", "")],
    "a damaged table": lambda rng, folder, place: [
        table(folder, "x.csv", damaged(rng, b"image,label\n0.png,red\n0.png,blue\n"))
    ],
    "half a utf-16 table": lambda rng, folder, place: [table(folder, "x.csv", "image\n0.png\n".encode("utf-16")[:-1])],
    "a ragged table": lambda rng, folder, place: [table(folder, "x.csv", "image\n0.png\n0.png,x,y\n\0\n")],
    "an odd parquet file": lambda rng, folder, place: [table(folder, "x.parquet", b"PAR1")],
    "a strange picture": lambda rng, folder, place: [picture((1, 60_000)), picture((0, 5)), picture((1, 1))],
    "a script for a name": lambda rng, folder, place: ["<script>alert(1)</script>.png"],
}
TEXT_INPUTS: dict[str, Callable[[Random, Path, Path], Any]] = {
    "nothing": lambda rng, folder, place: [],
    "None": lambda rng, folder, place: [None],
    "numbers": lambda rng, folder, place: [1, 2.5, True],
    "a number": lambda rng, folder, place: 3,
    "empty texts": lambda rng, folder, place: ["", " ", "\n"],
    "a giant text": lambda rng, folder, place: ["film " * 500_000],
    "a giant word": lambda rng, folder, place: ["x" * 1_000_000],
    "zero bytes": lambda rng, folder, place: ["a\0b", "\0"],
    "half characters": lambda rng, folder, place: ["caf\udce9", "\ud83d"],
    "long names": lambda rng, folder, place: ["x" * 5000 + ".txt"],
    "no such file": lambda rng, folder, place: ["gone.txt", str(folder / "gone.csv")],
    "a picture": lambda rng, folder, place: [str(folder / "0.png")],
    "a folder": lambda rng, folder, place: [str(folder)],
    "a folder named like a text": lambda rng, folder, place: [str((folder / "x.txt").mkdir() or folder / "x.txt")],
    "a pipe named like a text": lambda rng, folder, place: [str(os.mkfifo(folder / "x.txt") or folder / "x.txt")],
    "bytes": lambda rng, folder, place: [b"film"],
    "pairs of all kinds": lambda rng, folder, place: [
        ("a",),
        (),
        ("a", None),
        ("a", "b", "c"),
        [1, 2],
        {"text": "a"},
        {},
        {"x": 1},
    ],
    "a pair of nothing": lambda rng, folder, place: [("", "")],
    "texts of latin-1": lambda rng, folder, place: [table(folder, "x.txt", b"caf\xe9")],
    "a table without texts": lambda rng, folder, place: [table(folder, "x.csv", "a,b\n1,2\n")],
    "an empty table": lambda rng, folder, place: [table(folder, "x.csv", "")],
    "a damaged table": lambda rng, folder, place: [table(folder, "x.csv", damaged(rng, as_csv(REVIEWS).encode()))],
    "damaged lines": lambda rng, folder, place: [table(folder, "x.jsonl", damaged(rng, as_lines(REVIEWS).encode()))],
    "odd lines": lambda rng, folder, place: [
        table(folder, "x.jsonl", '{"text": "\\ud83d"}\n{"text": 3}\n[]\n{"text": null}\n')
    ],
    "numbers beyond": lambda rng, folder, place: [table(folder, "x.jsonl", '{"text": "a", "n": ' + "9" * 400 + "}\n")],
    "a formula": lambda rng, folder, place: ["=cmd|' /C calc'!A0", "-- --out", "<script>alert(1)</script>"],
}


def picture(size: tuple[int, int]) -> Any:
    """An empty picture of a size."""
    from PIL import Image

    return Image.new("RGB", size)
