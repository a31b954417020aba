"""What the generators of bad inputs share: the result of one, bytes and JSON that are damaged by a seed, good rows."""

import csv
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Random = random.Random
STRANGE: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    3.5,
    10**12,
    10**400,
    float("nan"),
    "",
    "x",
    "../../x",
    "\ud800",
    True,
    [],
    {},
    [None],
    [[1]],
    {"a": {"b": []}},
    "<script>alert(1)</script>",
    "9" * 5000,
)
REVIEWS: list[dict[str, Any]] = [
    {
        "text": f"the film number {i} was {'good' if i % 2 else 'bad'} and not dull",
        "label": "good" if i % 2 else "bad",
    }
    for i in range(24)
]
TAGGED: list[dict[str, Any]] = [
    {"tokens": ["marie", "visited", "paris", str(i)], "tags": ["B-per", "O", "B-loc", "O"]} for i in range(16)
]


@dataclass(frozen=True)
class Made:
    """A bad input on the disk.

    Attributes:
        what: What is wrong with it.
        act: Uses it; how many parts of it were counted as left out.
        names: Of which an error has to name one.
        limit: Seconds.
    """

    what: str
    act: Callable[[], int]
    names: tuple[str, ...]
    limit: int = 20


class Reached(BaseException):
    """Training would begin."""


def chosen(rng: Random, number: int, ways: dict[str, Any]) -> list[str]:
    """Names of what is done: each alone in turn, then two at a time."""
    names = list(ways)
    return [names[number]] if number < len(names) else rng.sample(names, 2)


def damaged(rng: Random, content: bytes) -> bytes:
    """Bytes with a few of them changed, taken out, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(len(data) + 1)
        how = rng.choice(("flip", "cut", "put", "double", "end"))
        if how == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del data[at : at + rng.choice((1, 4, 50))]
        elif how == "put":
            data[at:at] = bytes(rng.choice((0, 10, 34, 44, 92, 123, 255, rng.randrange(256))) for _ in range(3))
        elif how == "double":
            data[at:at] = data[max(0, at - 30) : at]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def bent(rng: Random, content: Any) -> Any:
    """JSON with a value changed, taken out, or under another name."""
    content = json.loads(json.dumps(content))
    holder: Any = None
    key: Any = None
    spot = content
    while isinstance(spot, dict | list) and spot and (holder is None or rng.random() < 0.7):
        holder, key = spot, rng.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))
        spot = spot[key]
    if holder is None:
        return rng.choice(STRANGE)
    how = rng.random()
    if how < 0.2:
        del holder[key]
    elif how < 0.3 and isinstance(holder, dict):
        holder[f"{key} "] = holder.pop(key)
    else:
        holder[key] = rng.choice(STRANGE)
    return content


def bend_file(rng: Random, file: Path, times: int = 1) -> None:
    """The same for a file."""
    content = json.loads(file.read_text())
    for _ in range(times):
        content = bent(rng, content)
    file.write_text(json.dumps(content))


def damage_file(rng: Random, file: Path) -> None:
    """Damage a file's bytes."""
    file.write_bytes(damaged(rng, file.read_bytes()))


def as_csv(rows: list[dict[str, Any]], **options: Any) -> str:
    """Rows as separated values."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n", **options)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_lines(rows: list[dict[str, Any]]) -> str:
    """Rows as a JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def png(width: int, height: int, claimed: tuple[int, int] | None = None, extra: bytes = b"") -> bytes:
    """A black picture of one bit a pixel, that may claim to be of another size, with more chunks."""
    packer, line = zlib.compressobj(1), b"\0" * (1 + (width + 7) // 8)
    body = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", *(claimed or (width, height)), 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(name: bytes, content: bytes) -> bytes:
    """A piece of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def write_evil(place: Path, file: Path) -> None:
    """A pickle, as torch writes it, that runs code when it is loaded without care."""
    import torch

    torch.save({"weight": Evil(place / "ran")}, file)


def looked_at(data: Any, place: Path, modality: str, **options: Any) -> int:
    """Load data as a run does, up to its batches; how many rows were left out."""
    import finetune
    from finetune.data.loaders import make_loader
    from finetune.model.pretrained import Preprocessing
    from tests.tiny import tokenizer

    splits = (finetune.load_images if modality == "image" else finetune.load_table)(data, **options)
    print("\n".join(splits.report.lines()))
    splits.report.left_out_csv(place / "out" / "left_out.csv")
    (place / "out" / "labels.json").write_text(
        json.dumps([*splits.task.labels, splits.fingerprint], ensure_ascii=False), encoding="utf-8"
    )
    processor: Any = Preprocessing((224, 224)) if splits.task.modality == "image" else tokenizer()
    for part in splits.named.values():
        for train in (True, False):
            order = [list(range(start, min(start + 8, len(part)))) for start in range(0, len(part), 8)]
            for batch in make_loader(part, splits.task, processor, order, train=train, workers=0):
                assert all(tensor.shape[0] for tensor in batch.inputs.values())
    return len(splits.report.left_out)
