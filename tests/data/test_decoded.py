import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from finetune.data import decoded
from finetune.data.decoded import HEADER, DecodedCache, Shelf, free_disk, free_memory

GIB = 2**30
SIZES = (12, 48, 3, 300)  # bytes of the rows
Make = Callable[..., DecodedCache]


def array(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (SIZES[row] // 3, 1, 3), dtype=np.uint8)


@pytest.fixture(params=["memory", "file"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make caches that keep everything in memory, or everything in the file."""
    made: list[DecodedCache] = []
    monkeypatch.setattr(decoded, "free_memory", lambda: GIB)
    monkeypatch.setattr(decoded, "free_disk", lambda folder: GIB)
    if request.param == "file":
        monkeypatch.setattr(decoded, "MEMORY_SHARE", 0.0)

    def make(budget: int | None = None) -> DecodedCache:
        made.append(DecodedCache(tmp_path / "cache", budget))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def filled(cache: DecodedCache, key: str = "a") -> Shelf:
    shelf = cache.shelf(key, 4, SIZES.__getitem__)
    for row in range(4):
        shelf.put(row, array(row))
    return shelf


def found(shelf: Shelf) -> list[bool]:
    """Which rows are there; what is there must be right."""
    rows = [shelf.get(row) for row in range(4)]
    assert all(pixels is None or np.array_equal(pixels, array(row)) for row, pixels in enumerate(rows))
    return [pixels is not None for pixels in rows]


def test_rows_come_out_as_they_went_in(make: Make):
    cache = make()
    first = cache.shelf("a", 4, SIZES.__getitem__)
    assert found(first) == [False] * 4
    first.put(3, array(3))
    assert found(first) == [False, False, False, True]
    assert cache.shelf("a", 4, SIZES.__getitem__) is first
    second = filled(cache, "b")
    assert found(second) == [True] * 4 and found(first) == [False, False, False, True]
    floats = cache.shelf("c", 1, lambda row: 24, np.float32)
    floats.put(0, np.arange(6, dtype=np.float32).reshape(3, 1, 2))
    assert np.array_equal(floats.get(0), np.arange(6).reshape(3, 1, 2)) and floats.get(0).dtype == np.float32


def test_what_has_another_size_or_kind_than_foretold_is_left_out(make: Make):
    shelf = make().shelf("a", 4, SIZES.__getitem__)
    shelf.put(0, array(1))
    shelf.put(0, np.ones((1, 1, 3), np.float32))
    assert found(shelf) == [False] * 4


@pytest.mark.parametrize("fit", [0, 1, 3, 4])
def test_what_does_not_fit_is_left_out(make: Make, fit: int):
    budget = sum(SIZES[:fit]) + fit * HEADER.size
    cache = make(budget)
    assert found(filled(cache)) == [row < fit for row in range(4)]
    assert found(filled(cache, "b")) == [False] * 4
    assert sum(place.used for place in cache.places) == budget


def test_memory_before_the_file_and_the_file_before_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    total = sum(SIZES) + 4 * HEADER.size
    monkeypatch.setattr(decoded, "MEMORY_SHARE", 1.0)
    monkeypatch.setattr(decoded, "DISK_SHARE", 1.0)
    monkeypatch.setattr(decoded, "free_disk", lambda folder: total)
    for memory, places in ((2 * total, ["memory"] * 2), (total, ["memory", "file"]), (total - 1, ["file", "memory"])):
        monkeypatch.setattr(decoded, "free_memory", lambda memory=memory: memory)
        cache = DecodedCache(tmp_path / "cache", 10 * total)
        shelves = [filled(cache, key) for key in "ab"]
        assert ["memory" if shelf.place.folder is None else "file" for shelf in shelves] == places
        assert found(shelves[0]) == [True] * 4 and found(shelves[1])[0]
        cache.close()


@pytest.mark.parametrize("damage", ["cut off", "a bit", "emptied", "another row", "zeros"])
def test_a_damaged_row_is_not_there(make: Make, damage: str):
    shelf = filled(make())
    descriptor, start = shelf.place.descriptor, int(shelf.starts[1])
    assert descriptor is not None
    if damage in ("cut off", "emptied"):
        os.ftruncate(descriptor, 0 if damage == "emptied" else start + HEADER.size + 5)
    else:
        of_another = os.pread(descriptor, HEADER.size + SIZES[0], 0)
        flipped = bytes([array(1).tobytes()[0] ^ 1])
        content, at = {
            "a bit": (flipped, start + HEADER.size), "another row": (of_another, start), "zeros": (bytes(64), start),
        }[damage]  # fmt: skip
        os.pwrite(descriptor, content, at)
    after = {"cut off": [True, False, False, False], "emptied": [False] * 4}.get(damage, [True, False, True, True])
    assert found(shelf) == after
    shelf.put(1, array(1))
    assert found(shelf)[1]


def test_a_row_of_the_same_size_in_the_wrong_place_is_not_taken(make: Make):
    shelf = make().shelf("a", 2, lambda row: 12)
    shelf.put(0, array(0))
    descriptor = shelf.place.descriptor
    assert descriptor is not None
    os.pwrite(descriptor, os.pread(descriptor, HEADER.size + 12, 0), int(shelf.starts[1]))
    assert shelf.get(0) is not None and shelf.get(1) is None


def test_rows_of_another_cache_are_not_taken(make: Make):
    shelves = [filled(make()) for _ in range(2)]
    content, start = b"", int(shelves[0].starts[0])
    for shelf in shelves:
        assert shelf.place.descriptor is not None
        content = content or os.pread(shelf.place.descriptor, HEADER.size + SIZES[0], start)
        os.pwrite(shelf.place.descriptor, content, start)
    assert [found(shelf)[0] for shelf in shelves] == [True, False]


def test_a_full_disk_keeps_what_is_there(make: Make, monkeypatch: pytest.MonkeyPatch):
    shelf = make().shelf("a", 4, SIZES.__getitem__)
    shelf.put(0, array(0))

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    shelf.put(1, array(1))
    monkeypatch.undo()
    shelf.put(2, array(2))  # nothing more is tried
    assert found(shelf) == [True, False, False, False]


def test_a_disk_that_takes_only_a_part(make: Make, monkeypatch: pytest.MonkeyPatch):
    shelf = make().shelf("a", 4, SIZES.__getitem__)
    monkeypatch.setattr(
        os, "pwritev", lambda descriptor, parts, start: os.pwrite(descriptor, b"".join(parts)[:30], start)
    )
    shelf.put(3, array(3))
    monkeypatch.undo()
    assert found(shelf) == [False] * 4 and shelf.place.full


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoded, "MEMORY_SHARE", 0.0)
    (tmp_path / "cache").write_text("a file")
    assert found(filled(DecodedCache(tmp_path / "cache", 1000))) == [False] * 4


def test_another_process_finds_the_rows(make: Make):
    shelf = filled(make())
    code = (
        "import pickle, sys; shelf = pickle.load(sys.stdin.buffer); row = shelf.get(3); shelf.put(2, shelf.get(2) * 0);"
        "sys.stdout.buffer.write(row.tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(shelf), capture_output=True, check=True)
    assert done.stdout == array(3).tobytes()
    assert not shelf.get(2).any()  # and what it wrote is here


def test_another_process_after_the_file_is_gone_or_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoded, "MEMORY_SHARE", 0.0)
    cache = DecodedCache(tmp_path, 1000)
    shelf = filled(cache)
    path = tmp_path / "decoded-0.bin"
    path.unlink()
    assert found(shelf) == [True] * 4  # open files stay
    assert found(pickle.loads(pickle.dumps(shelf))) == [False] * 4
    path.write_text("something else")
    other = pickle.loads(pickle.dumps(shelf))
    other.put(0, array(0))
    assert path.read_text() == "something else" and found(other) == [False] * 4


def test_closing_deletes_the_file(make: Make, tmp_path: Path):
    cache = make()
    shelf = filled(cache)
    cache.close()
    assert found(shelf) == [False] * 4 and not (tmp_path / "cache").exists()
    shelf.put(0, array(0))
    assert found(filled(cache, "b")) == [False] * 4 and not (tmp_path / "cache").exists()
    assert found(pickle.loads(pickle.dumps(shelf))) == [False] * 4
    cache.close()


def test_what_a_killed_run_left_is_not_taken_for_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoded, "MEMORY_SHARE", 0.0)
    left = DecodedCache(tmp_path, 1000)
    filled(left)
    cache = DecodedCache(tmp_path, 1000)
    assert found(cache.shelf("a", 4, SIZES.__getitem__)) == [False] * 4
    assert len(list(tmp_path.iterdir())) == 1
    assert found(filled(cache)) == [True] * 4


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoded, "CGROUPS", (str(tmp_path), str(tmp_path / "none")))
    without = free_memory()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 3000\n")
    assert abs(free_memory() - without) < 0.5 * without
    (tmp_path / "memory.max").write_text("10000\n")
    assert free_memory() == 8000
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory() == 0


def test_processes_of_a_machine_share_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoded, "free_memory", lambda: GIB)
    monkeypatch.setattr(decoded, "free_disk", lambda folder: GIB)
    alone = [place.limit for place in DecodedCache(tmp_path).places]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [place.limit for place in DecodedCache(tmp_path).places] == pytest.approx([n / 4 for n in alone], abs=1)


def test_free_disk_of_a_folder_to_be(tmp_path: Path):
    assert free_disk(tmp_path / "a" / "b") > 0
