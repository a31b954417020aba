"""WebDataset shards: found, read by place, refused in words; the same rows and pixels as the files that they hold."""

import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.data import shards
from finetune.data.images import BadImage, open_image
from finetune.data.shards import find_shards, read_member
from finetune.data.sources import load_images, load_table
from finetune.errors import DataError
from finetune.output.inputs import named_inputs

LABELS = ("cat", "dog")


def png(value: int) -> bytes:
    pixels = np.random.default_rng(value).integers(0, 255, (8, 9, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def make(folder: Path, stem: str = "train", count: int = 2, rows: int = 6) -> list[Path]:
    """Shards of pictures with their class; the first is `png(0)`."""
    folder.mkdir(exist_ok=True)
    return [
        write(folder / f"{stem}-{shard:04}.tar", {
            f"a/{number:05}.{suffix}": content
            for number in range(shard * rows, (shard + 1) * rows)
            for suffix, content in (("png", png(number)), ("cls", LABELS[number % 2].encode()))
        })
        for shard in range(count)
    ]  # fmt: skip


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A server that gives parts of files, as any does, and tells what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            content = (tmp_path / self.path.lstrip("/")).read_bytes()
            wanted = self.headers.get("Range")
            asked.append(f"{self.path} {wanted}")
            start, end = 0, len(content) - 1
            if wanted:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first), min(int(last or end), end)
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(end - start + 1))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[start : end + 1])

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_the_same_as_the_files(tmp_path: Path) -> None:
    make(tmp_path / "shards")
    for number in range(12):
        place = tmp_path / "files" / LABELS[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05}.png").write_bytes(png(number))
    ours, plain = load_images(tmp_path / "shards"), load_images(tmp_path / "files")
    assert ours.task == plain.task and len(ours.train) + len(ours.valid) == 12
    assert {row["id"] for row in ours.train} <= {f"train-{n // 6:04}.tar/a/{n:05}.png" for n in range(12)}
    for row in ours.train:
        number = int(row["id"][-9:-4])
        assert row["image"]["bytes"] is None  # it stays where it is
        assert np.array_equal(np.array(open_image(row["image"]["path"])), np.array(open_image(png(number))))
        assert ours.task.labels[row["target"]] == LABELS[number % 2]
    assert ours.fingerprint == load_images(tmp_path / "shards").fingerprint


def test_over_a_network_each_picture_is_asked_for_by_its_place(served: tuple[str, list[str]], tmp_path: Path) -> None:
    make(tmp_path)
    url, asked = served
    splits = load_images(f"{url}/train-{{0000..0001}}.tar")
    assert len(splits.train) + len(splits.valid) == 12
    asked.clear()
    place = splits.train[0]["image"]["path"]
    assert place.startswith(f"{url}/train-000") and open_image(place).size == (9, 8)
    assert len(asked) == 1 and "bytes=" in asked[0]


def test_a_network_that_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [2]

    class Flaky:
        def cat_file(self, path: str, start: int, end: int) -> bytes:
            left[0] -= 1
            if left[0] >= 0:
                raise ConnectionError("gone")
            return b"x" * (end - start)

    monkeypatch.setattr(shards, "_system", lambda shard: (Flaky(), shard))
    monkeypatch.setattr(shards, "PAUSE", 0.0)
    assert read_member("hf://a/b.tar::10+5") == b"x" * 5
    left[0] = 99
    with pytest.raises(BadImage, match=r"cannot be read \(hf://a/b.tar::10\+5: gone\)"):
        open_image("hf://a/b.tar::10+5")


def test_splits_by_name(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, "test", 1)
    splits = load_images(tmp_path)
    assert len(splits.train) + len(splits.valid) == 6  # the other half stands in test too
    assert splits.test is not None and len(splits.test) == 6
    with pytest.raises(DataError, match="no train split"):
        make(tmp_path / "only", "test", 1)
        load_images(tmp_path / "only")


def test_labels_and_texts_in_json(tmp_path: Path) -> None:
    rows = [
        {"text": f"{word} number {number}", "label": label}
        for number in range(8)
        for word, label in (("good", 1), ("bad", 0))
    ]
    write(tmp_path / "train.tar", {f"{i}.json": json.dumps(row).encode() for i, row in enumerate(rows)})
    splits = load_table(tmp_path / "train.tar")
    assert splits.task.modality == "text" and len(splits.train) + len(splits.valid) == 16
    found = list(named_inputs(str(tmp_path / "train.tar"), splits.task))
    assert found[0].item == "good number 0" and len(found) == 16


def test_predicting_names_the_sample(tmp_path: Path) -> None:
    make(tmp_path)
    task = load_images(tmp_path).task
    found = list(named_inputs(str(tmp_path / "train-*.tar"), task))
    assert [one.name for one in found][:2] == ["train-0000.tar/a/00000.png", "train-0000.tar/a/00001.png"]
    assert found[0].error is None and open_image(found[0].item).size == (9, 8)


def test_patterns_and_ranges(tmp_path: Path) -> None:
    make(tmp_path, count=3)
    names = [str(tmp_path / f"train-{n:04}.tar") for n in range(3)]
    assert find_shards(str(tmp_path / "train-*.tar")) == names
    assert find_shards(str(tmp_path / "train-{0001..0002}.tar")) == names[1:]
    with pytest.raises(DataError, match=r"none.tar: no such shards; give a tar file"):
        find_shards(str(tmp_path / "none.tar"))
    with pytest.raises(DataError, match=r"nosuch://a/b-\*.tar: cannot be listed \(ValueError: Protocol not known"):
        find_shards("nosuch://a/b-*.tar")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no tar at all", "cannot be read after its start"),
        (b"", "cannot be read after its start"),
        ("half", "cannot be read after"),
        ("gzip", "it must be a whole, uncompressed tar file"),
        ("broken json", r"JSONDecodeError"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, content: Any, said: str) -> None:
    path = make(tmp_path, count=1)[0]
    whole = path.read_bytes()
    if content == "gzip":
        import gzip

        content = gzip.compress(whole)
    elif content == "half":
        content = whole[: 512 * 5 + 300]
    elif content == "broken json":
        write(path, {"a.json": b"{"})
        content = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        load_images(path)
    assert str(path) in str(caught.value) and "fetch or make it again" in str(caught.value)


def test_links_are_not_followed_and_damaged_pictures_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(12):
            for suffix, content in (
                ("png", b"no png" if number == 3 else png(number)),
                ("cls", str(number % 2).encode()),
            ):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("99.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    splits = load_images(path)
    assert len(splits.train) + len(splits.valid) == 11
    assert [(entry.id, entry.reason) for entry in splits.report.left_out] == [("train.tar/3.png", "not an image")]


def test_a_place_cannot_ask_for_any_amount(tmp_path: Path) -> None:
    make(tmp_path, count=1)
    with pytest.raises(BadImage, match="more than"):
        open_image(f"{tmp_path}/train-0000.tar::0+99999999999")
