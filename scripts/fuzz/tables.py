"""Tables of texts, words and paths of pictures, and data sets saved to disk: spoilt."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.made import (
    REVIEWS,
    TAGGED,
    Made,
    Random,
    as_csv,
    as_lines,
    bend_file,
    bent,
    damage_file,
    damaged,
    looked_at,
)

# Separated values: text -> bytes

CSV_WAYS: dict[str, Callable[[Random, str], str | bytes]] = {
    "wrong delimiter": lambda rng, text: text.replace(",", rng.choice(("#", " ", ":", "\x01"))),
    "semicolons": lambda rng, text: text.replace(",", ";"),
    "byte order mark": lambda rng, text: b"\xef\xbb\xbf" + text.encode(),
    "utf-16": lambda rng, text: text.encode("utf-16"),
    "half of utf-16": lambda rng, text: text.encode("utf-16")[:-1],
    "utf-16 without mark": lambda rng, text: text.encode("utf-16-le"),
    "a mark alone": lambda rng, text: rng.choice((b"\xff\xfe", b"\xef\xbb\xbf", b"\xff\xfe\0\0")),
    "latin-1": lambda rng, text: text.replace("film", "caf\xe9").encode("latin-1"),
    "bytes of no encoding": lambda rng, text: text.encode().replace(b"film", b"\x81\x8d\xff\xc0"),
    "zero bytes": lambda rng, text: text.replace("film", "fi\0lm"),
    "zero bytes at the end": lambda rng, text: text + "\0" * 1000,
    "ragged rows": lambda rng, text: text.replace(",good\n", ",good,x\n" if rng.random() < 0.5 else "\n", 5),
    "all ragged": lambda rng, text: text.replace("\n", ",\n").replace(",\n", "\n", 1),
    "no header": lambda rng, text: text.partition("\n")[2],
    "header twice": lambda rng, text: text.replace("text,label", "text,text"),
    "blank header": lambda rng, text: text.replace("text,label", ","),
    "header alone": lambda rng, text: "text,label\n",
    "nothing": lambda rng, text: "",
    "blank lines": lambda rng, text: "\n" * 50,
    "one column": lambda rng, text: "\n".join(line.partition(",")[0] for line in text.splitlines()),
    "no labels": lambda rng, text: text.replace(",good", ",").replace(",bad", ","),
    "nan labels": lambda rng, text: text.replace(",good", ",NaN"),
    "one label": lambda rng, text: text.replace(",bad", ",good"),
    "a label of one row": lambda rng, text: text.replace(",bad", ",rare", 1),
    "labels like measures": lambda rng, text: "text,label\n" + "".join(f"film {i},{i * 1.37}\n" for i in range(24)),
    "huge numbers": lambda rng, text: "text,label\n" + "".join(f"film {i},{i}e{300 + i}\n" for i in range(24)),
    "numbers and words": lambda rng, text: text.replace(",good", ",1.5", 6),
    "long digits": lambda rng, text: text.replace(",good", "," + "9" * 5000),
    "labels of a script": lambda rng, text: text.replace(",good", ",<script>alert(1)</script>"),
    "a giant cell": lambda rng, text: text.replace("film number 3", "x " * 2_000_000),
    "a giant word": lambda rng, text: text.replace("film number 3", "x" * 3_000_000),
    "many columns": lambda rng, text: "\n".join(line + ",0" * 3000 for line in text.splitlines()),
    "line breaks in cells": lambda rng, text: text.replace("the film", '"the\n\nfilm"'),
    "an open quote": lambda rng, text: text.replace("the film number 5", '"the film number 5'),
    "stray quotes": lambda rng, text: text.replace("film", 'fi"lm'),
    "empty texts": lambda rng, text: "text,label\n" + "".join(f",{'ab'[i % 2]}\n" for i in range(24)),
    "equal texts": lambda rng, text: "text,label\n" + "".join(f"same,{'ab'[i % 2]}\n" for i in range(24)),
    "old line ends": lambda rng, text: text.replace("\n", "\r"),
    "lists that are none": lambda rng, text: text.replace(",good", ",\"['a', \"").replace(",bad", ",['b']"),
    "deep lists": lambda rng, text: text.replace(",good", f",{'[' * 3000}{']' * 3000}"),
    "code for lists": lambda rng, text: text.replace(",good", ",[__import__('os').system('touch ran')]"),
    "odd escapes": lambda rng, text: text.replace(",good", r",['\d\N{x}']"),
    "damaged": lambda rng, text: damaged(rng, text.encode()),
    "more damaged": lambda rng, text: damaged(rng, damaged(rng, text.encode())),
    "control signs": lambda rng, text: text.replace("film", "\x1b[31m\x07\x0b\x0c\x1c\x85\u2028"),
    "another name of the label": lambda rng, text: text.replace("label", "outcome of it"),
    "a pickle": lambda rng, text: b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


def changed(rows: list[dict[str, Any]], name: str, value: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Rows with another value in every second of them."""
    return [{**row, name: value(i)} if i % 2 else row for i, row in enumerate(rows)]


JSON_WAYS: dict[str, Callable[[Random, list[dict[str, Any]]], str | bytes]] = {
    "cut off": lambda rng, rows: as_lines(rows)[: rng.randrange(1, 600)],
    "damaged": lambda rng, rows: damaged(rng, as_lines(rows).encode()),
    "not objects": lambda rng, rows: as_lines(rows) + '[1, 2]\n3\nnull\n"x"\n',
    "no object": lambda rng, rows: "1\n2\n",
    "empty objects": lambda rng, rows: "{}\n" * 20,
    "bent": lambda rng, rows: "".join(json.dumps(bent(rng, row)) + "\n" for row in rows),
    "nested": lambda rng, rows: as_lines(changed(rows, "label", lambda i: {"a": [{"b": i}]})),
    "nested text": lambda rng, rows: as_lines(changed(rows, "text", lambda i: {"a": ["b"]})),
    "deep": lambda rng, rows: as_lines(rows) + '{"text": ' + "[" * 100_000 + "]" * 100_000 + ', "label": "good"}\n',
    "half characters": lambda rng, rows: as_lines(changed(rows, "text", lambda i: f"half \ud83d of {i}")),
    "labels of half characters": lambda rng, rows: as_lines(changed(rows, "label", lambda i: "\ud83d")),
    "names of half characters": lambda rng, rows: as_lines(changed(rows, "\ud83d", lambda i: i)),
    "numbers beyond": lambda rng, rows: as_lines(changed(rows, "label", lambda i: 10**30)),
    "more digits than Python reads": lambda rng, rows: as_lines(rows).replace('"good"', "9" * 5000),
    "numbers far beyond": lambda rng, rows: as_lines(changed(rows, "label", lambda i: 10**400)),
    "ids beyond": lambda rng, rows: as_lines(changed(rows, "id", lambda i: 2**64 + i)),
    "infinity": lambda rng, rows: as_lines(changed(rows, "label", lambda i: float("inf"))),
    "nan": lambda rng, rows: as_lines(changed(rows, "label", lambda i: float("nan"))),
    "mixed labels": lambda rng, rows: as_lines(
        changed(rows, "label", lambda i: [None, 1, "a", 2.5, True, ["b"]][i % 6])
    ),
    "mixed texts": lambda rng, rows: as_lines(changed(rows, "text", lambda i: [None, 1, "a", 2.5, True, ["b"]][i % 6])),
    "tags of any length": lambda rng, rows: as_lines(changed(rows, "label", lambda i: ["a"] * (i % 4))),
    "hot ones of any length": lambda rng, rows: as_lines(
        [{**row, "label": [0, 1] * (i % 3)} for i, row in enumerate(rows)]
    ),
    "zero bytes": lambda rng, rows: as_lines(rows).replace("film", "\\u0000"),
    "keys twice": lambda rng, rows: as_lines(rows).replace('{"text"', '{"text": "x", "text"'),
    "a list": lambda rng, rows: json.dumps(rows),
    "nothing": lambda rng, rows: rng.choice(("", "\n\n", "null")),
    "labels of dictionaries": lambda rng, rows: as_lines([{**row, "label": {"x": i}} for i, row in enumerate(rows)]),
    "thousand columns": lambda rng, rows: as_lines(
        [{**row, **{f"c{i}-{k}": k for k in range(100)}} for i, row in enumerate(rows)]
    ),
}
WORDS_WAYS: dict[str, Callable[[Random, list[dict[str, Any]]], str | bytes]] = {
    "tags too few": lambda rng, rows: as_lines(changed(rows, "tags", lambda i: ["O"] * (i % 5))),
    "no words": lambda rng, rows: as_lines(changed(rows, "tokens", lambda i: [])),
    "blank words": lambda rng, rows: as_lines(changed(rows, "tokens", lambda i: ["", " ", "\u200b", "x"])),
    "half words": lambda rng, rows: as_lines(changed(rows, "tokens", lambda i: ["\ud83d", "b", "c", "d"])),
    "numbers for words": lambda rng, rows: as_lines(changed(rows, "tokens", lambda i: [1, None, 2.5, True])),
    "a string for words": lambda rng, rows: as_lines(changed(rows, "tokens", lambda i: "marie visited paris")),
    "no tags": lambda rng, rows: as_lines(changed(rows, "tags", lambda i: None)),
    "tags of all kinds": lambda rng, rows: as_lines(changed(rows, "tags", lambda i: [None, 1, ["O"], {}])),
    "one tag": lambda rng, rows: as_lines([{**row, "tags": ["O"] * 4} for row in rows]),
    "bent": lambda rng, rows: "".join(json.dumps(bent(rng, row)) + "\n" for row in rows),
    "damaged": lambda rng, rows: damaged(rng, as_lines(rows).encode()),
    "long sentences": lambda rng, rows: as_lines(changed(rows, "tokens", lambda i: ["film"] * 20_000)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "no such label": {"label": "outcome"},
    "no such text": {"text": "story"},
    "label is the text": {"label": "text"},
    "both": {"label": "label", "targets": "label"},
    "several": {"label": ["label", "text"]},
    "label twice": {"label": ["label", "label"]},
    "no labels": {"label": []},
    "no such kind": {"task": "guess"},
    "regression of words": {"task": "regression"},
    "tokens of texts": {"task": "tokens"},
    "multi-label of words": {"task": "multi_label"},
    "words of texts": {"tokens": "text", "task": "tokens"},
    "pictures of texts": {"image": "text"},
    "pair of itself": {"text": "text", "text_pair": "text"},
    "no test": {"test": "/nowhere/test.csv"},
    "blank test": {"test": ""},
    "test of a folder": {"test": "."},
    "odd seed": {"seed": -1},
    "huge seed": {"seed": 10**30},
}


def tables(rng: Random, place: Path, base: Path, number: int) -> Made:
    """Spoil a table of texts, or ask for the wrong things."""
    ways: dict[str, Any] = {f"csv: {name}": ("reviews.csv", way) for name, way in CSV_WAYS.items()}
    ways |= {f"jsonl: {name}": ("reviews.jsonl", way) for name, way in JSON_WAYS.items()}
    ways |= {f"json: {name}": ("reviews.json", JSON_WAYS[name]) for name in ("cut off", "damaged", "deep", "no object")}
    ways |= {f"tsv: {name}": ("reviews.tsv", CSV_WAYS[name]) for name in ("stray quotes", "an open quote", "damaged")}
    ways |= {f"words: {name}": ("train.jsonl", way) for name, way in WORDS_WAYS.items()}
    ways |= {f"options: {name}": ("reviews.csv", given) for name, given in OPTIONS.items()}
    names = list(ways)
    what = names[number] if number < len(names) else rng.choice(names)
    name, way = ways[what]
    file, options = place / "in" / name, way if isinstance(way, dict) else {}
    if isinstance(way, dict):
        content: str | bytes = as_csv(REVIEWS)
    elif what.startswith("words"):
        content, options = way(rng, TAGGED), {"task": "tokens"}
    elif what.startswith("json"):
        content = way(rng, REVIEWS)
    else:
        content = way(rng, as_csv(REVIEWS, delimiter="\t" if name.endswith("tsv") else ","))
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if number >= len(names):  # on top of it
        content, what = damaged(rng, content), f"{what} + damaged"
    file.write_bytes(content)
    names_of = (name, *(str(value) for value in options.values() if value), *options)
    return Made(what, lambda: looked_at(file, place, "text", **options), names_of)


PATHS: dict[str, Callable[[Path, str], str]] = {
    "paths that go up": lambda place, path: f"../../{path}",
    "paths that go up and down": lambda place, path: f"train/../../photos/../../in2/{path}",
    "paths of the system": lambda place, path: "/etc/hostname",
    "other pictures of the machine": lambda place, path: str(place / "secret.png"),
    "addresses": lambda place, path: f"https://example.com/{path}",
    "file addresses": lambda place, path: f"file:///etc/{path}",
    "home": lambda place, path: f"~/{path}",
    "zero bytes": lambda place, path: f"{path}\0.png",
    "other slashes": lambda place, path: path.replace("/", "\\"),
    "two lines": lambda place, path: f"\n{path}\n",
    "devices": lambda place, path: "/dev/zero",
    "the folder": lambda place, path: ".",
    "too long": lambda place, path: "x" * 5000 + ".png",
    "nothing": lambda place, path: "",
    "half characters": lambda place, path: f"\ud83d{path}",
    "commands": lambda place, path: f"$(touch ran)|touch ran;{path}",
    "the table": lambda place, path: "photos.csv",
    "a link that leads out": lambda place, path: "out.png",
    "variables": lambda place, path: f"$HOME/{path}",
}


def pictures_in_tables(rng: Random, place: Path, base: Path, number: int) -> Made:
    """A table of pictures whose paths lead astray, as CSV, JSONL or Parquet; nothing may be read outside its folder."""
    from PIL import Image

    what = list(PATHS)[number % len(PATHS)]
    form = ("csv", "jsonl", "parquet")[number // len(PATHS) % 3]
    folder = place / "in" / "photos"
    shutil.copytree(base / "photos", folder)
    secret = place / "secret.png"
    os.makedirs(place / "in2", exist_ok=True)
    Image.new("RGB", (24, 24), "white").save(secret)
    (folder / "out.png").symlink_to(secret)
    rows = [
        {"image": str(one.relative_to(folder)), "label": one.parent.name} for one in sorted(folder.rglob("[0-9].png"))
    ]
    rows = (
        changed(rows, "image", lambda i: PATHS[what](place, rows[i]["image"]))
        if number % 2
        else rows[:-3] + [{**row, "image": PATHS[what](place, row["image"])} for row in rows[-3:]]
    )
    table = folder / f"photos.{form}"
    if form == "csv":
        table.write_bytes(as_csv(rows).encode("utf-8", "surrogatepass"))
    elif form == "jsonl":
        table.write_text(as_lines(rows))
    else:
        write_parquet(table, rows)

    def act() -> int:
        import finetune

        skipped = looked_at(table, place, "image")
        if what != "a link that leads out":  # whoever can make links there can as well put the file there
            assert_inside(finetune.load_images(table), folder)
        return skipped

    return Made(f"{form}: {what}", act, (table.name, str(folder)))


def write_parquet(table: Path, rows: list[dict[str, Any]]) -> None:
    """Pictures by path, as `datasets` keeps them."""
    import datasets
    import pyarrow.parquet as pq

    cells = [{"path": row["image"].encode("utf-8", "replace").decode(), "bytes": None} for row in rows]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    labels = [row["label"] for row in rows]
    data = datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)
    pq.write_table(data.data.table, str(table))  # the writer of `datasets` would look for the files


def assert_inside(splits: Any, folder: Path) -> None:
    """No picture that is used lies elsewhere."""
    for part in splits.named.values():
        for cell in part["image"][:]:
            path = Path(folder, cell["path"]).resolve() if cell["bytes"] is None else folder
            assert path.is_relative_to(folder.resolve()), f"{path} was read"


SAVED_WAYS: dict[str, Callable[[Random, Path], Any]] = {
    "as it is": lambda rng, folder: None,
    "state that is damaged": lambda rng, folder: damage_file(rng, folder / "state.json"),
    "state that is bent": lambda rng, folder: bend_file(rng, folder / "state.json", 2),
    "no state": lambda rng, folder: (folder / "state.json").write_text("{}"),
    "info that is damaged": lambda rng, folder: damage_file(rng, folder / "dataset_info.json"),
    "info that is bent": lambda rng, folder: bend_file(rng, folder / "dataset_info.json", 3),
    "no info": lambda rng, folder: (folder / "dataset_info.json").unlink(),
    "rows that are damaged": lambda rng, folder: damage_file(rng, next(folder.glob("*.arrow"))),
    "rows that are cut off": lambda rng, folder: next(folder.glob("*.arrow")).write_bytes(b"ARROW1"),
    "no rows": lambda rng, folder: next(folder.glob("*.arrow")).unlink(),
    "rows elsewhere": lambda rng, folder: elsewhere(folder),
    "splits elsewhere": lambda rng, folder: splits_elsewhere(folder),
    "splits that are not there": lambda rng, folder: (folder / "dataset_dict.json").write_text('{"splits": ["train"]}'),
    "splits that are none": lambda rng, folder: (folder / "dataset_dict.json").write_text("[]"),
}


def elsewhere(folder: Path) -> None:
    file = next(folder.glob("*.arrow"))
    file.rename(folder.parent / "secret.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": "../secret.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))


def splits_elsewhere(folder: Path) -> None:
    folder.rename(folder.parent / "secret")
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["../secret"]}))


def saved(rng: Random, place: Path, base: Path, number: int) -> Made:
    """A data set saved to disk, or a Parquet file, spoilt."""
    import datasets

    rows = rng.choice((REVIEWS, [{**row, "text": i} for i, row in enumerate(REVIEWS)]))
    data, folder = datasets.Dataset.from_list(rows), place / "in" / "saved"
    if number % 5 == 4:
        file, way = place / "in" / "reviews.parquet", rng.choice(("damaged", "cut off", "nothing", "a text"))
        data.to_parquet(str(file))
        content = file.read_bytes()
        changed_ = {"damaged": damaged(rng, content), "cut off": content[:-9], "nothing": b"", "a text": b"PAR1 x PAR1"}
        file.write_bytes(changed_[way])
        return Made(f"parquet: {way}", lambda: looked_at(file, place, "text"), (file.name,))
    data.save_to_disk(str(folder))
    way = list(SAVED_WAYS)[number % len(SAVED_WAYS)]
    SAVED_WAYS[way](rng, folder)

    def act() -> int:
        skipped = looked_at(folder, place, "text")
        assert "elsewhere" not in way, "rows of another folder were read"
        return skipped

    return Made(way, act, (str(folder), "train"))
