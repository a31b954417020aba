"""WebDataset shards: tar files, here or at a URL, go in; a `Part` whose pictures stay where they are comes out.

A shard is read once for the names and places of its members; a picture is then read from its place when it is needed,
by the process that needs it. So nothing is unpacked or downloaded as a whole, and the order of rows, the checks and the
resuming are those of any other data. A sample's files have one name up to the first dot: `a/0001.jpg`, `a/0001.cls`,
`a/0001.json`, as https://github.com/webdataset/webdataset lays them out.
"""

import json
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
import fsspec

from finetune.data.tables import IMAGE_SUFFIXES, Part, Rows, columns_to_dataset
from finetune.errors import DataError

MEMBER = re.compile(r"(?s)(?P<shard>.+\.tar)::(?P<start>\d+)\+(?P<size>\d+)")  # where a picture lies
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # WebDataset's: {0000..0099}
TEXTS = {"cls": "label", "txt": "text"}  # suffix of a member -> column
MOST_BYTES, MOST_TEXT = 2**30, 2**24  # of one picture, and of a text or a label
TRIES, PAUSE = 4, 0.5  # of a read over a network; seconds, doubled each time


def is_shards(data: str) -> bool:
    """Whether this names shards: a tar file, a pattern or range of them, or URLs."""
    return data.endswith(".tar")


def is_member(source: Any) -> bool:
    """Whether this is the place of a picture in a shard."""
    return isinstance(source, str) and MEMBER.fullmatch(source) is not None


def is_remote(source: Any) -> bool:
    """Whether reading this goes over a network."""
    return isinstance(source, str) and "://" in source


def find_shards(data: str) -> list[str]:
    """The shards that a path, a pattern with *, a range {0000..0099}, or such a URL names, in order.

    Raises:
        DataError: There are none, or the URL cannot be listed.
    """
    found = []
    for one in _ranges(data):
        if not is_remote(one):
            found += sorted(glob(one)) if any(sign in one for sign in "*?[") else [one] * os.path.isfile(one)
            continue
        try:
            system, path = fsspec.core.url_to_fs(one)
            if any(sign in path for sign in "*?["):
                found += sorted(system.unstrip_protocol(each) for each in system.glob(path))
            else:
                found.append(one)
        except Exception as error:  # whatever the network and its many file systems raise
            raise DataError(f"{one}: cannot be listed ({type(error).__name__}: {error}); check the URL") from None
    if not found:
        raise DataError(f"{data}: no such shards; give a tar file, shards/train-*.tar or train-{{0000..0099}}.tar")
    return found


def read_shards(shards: Sequence[str], where: str) -> Part:
    """Read the names and places of all members, and the labels and texts. An id is "train-0000.tar/0001.jpg".

    Raises:
        DataError: A shard cannot be read to its end, or holds no samples.
    """
    rows = Rows()
    for shard in shards:
        for key, cells in _samples(shard):
            rows.add(f"{os.path.basename(shard)}/{key}", cells)
    if not rows.ids:
        raise DataError(
            f"{where}: no samples in {len(shards)} shards; a sample is files of one name, 0001.jpg and 0001.cls, or "
            "0001.json with the label in it"
        )
    places = rows.columns.pop("image", None)
    data = columns_to_dataset(rows.columns) if rows.columns else None
    if places is not None:
        features = datasets.Features({"image": datasets.Image(decode=False)})
        pictures = [None if place is None else {"path": place, "bytes": None} for place in places]
        images = datasets.Dataset.from_dict({"image": pictures}, features=features)
        data = images if data is None else datasets.concatenate_datasets([images, data], axis=1)
    assert data is not None
    return Part(data, rows.ids, where)


def read_member(place: str) -> bytes:
    """The bytes of a picture in a shard.

    Raises:
        OSError: They cannot be read.
    """
    found = cast(re.Match[str], MEMBER.fullmatch(place))
    shard, start, size = found["shard"], int(found["start"]), int(found["size"])
    if size > MOST_BYTES:
        raise OSError(f"{place}: more than {MOST_BYTES} bytes")
    if not is_remote(shard):
        with open(shard, "rb") as file:
            file.seek(start)
            return file.read(size)
    for attempt in range(TRIES):
        try:
            system, path = _system(shard)
            return bytes(system.cat_file(path, start=start, end=start + size))
        except Exception as error:  # as above; a network is often back a second later
            if attempt == TRIES - 1:
                raise OSError(f"{place}: {error}") from None
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError


@lru_cache(maxsize=4096)
def _system(shard: str) -> tuple[Any, str]:
    return cast(tuple[Any, str], fsspec.core.url_to_fs(shard))


def _ranges(data: str) -> Iterator[str]:
    """What a name with ranges stands for, leading zeros kept."""
    found = RANGE.search(data)
    if found is None:
        yield data
        return
    first, last = found[1], found[2]
    for number in range(int(first), int(last) + 1):
        yield from _ranges(data[: found.start()] + str(number).zfill(len(first)) + data[found.end() :])


def _samples(shard: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The samples of a shard: the name of their picture or first file, and their cells."""
    key, name, cells = None, "", {}  # type: ignore[var-annotated]
    try:
        with fsspec.open(shard, "rb") as file, tarfile.open(fileobj=cast(BinaryIO, file), mode="r:") as members:
            for member in members:
                folder, _, base = member.name.rpartition("/")
                if not member.isfile() or base.startswith("."):  # links lead elsewhere
                    continue
                stem, _, suffix = base.partition(".")
                if f"{folder}/{stem}" != key:
                    if cells:
                        yield name, cells
                    key, name, cells = f"{folder}/{stem}", member.name, {}
                suffix = suffix.lower()
                if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES and "image" not in cells:
                    cells["image"], name = f"{shard}::{member.offset_data}+{member.size}", member.name
                elif suffix in (*TEXTS, "json"):
                    if member.size > MOST_TEXT:
                        raise ValueError(f"{member.name} has more than {MOST_TEXT} bytes")
                    content = cast(BinaryIO, members.extractfile(member)).read().decode("utf-8")
                    cells |= {TEXTS[suffix]: content.strip()} if suffix in TEXTS else _fields(content)
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise DataError(
            f"{shard}: cannot be read after {name or 'its start'} ({type(error).__name__}: {str(error)[:200]}); it "
            "must be a whole, uncompressed tar file: fetch or make it again"
        ) from None
    if cells:
        yield name, cells


def _fields(content: str) -> dict[str, Any]:
    """The fields of a sample's JSON; one that is no object is its label."""
    found = json.loads(content)
    return {k: v for k, v in found.items() if k != "image"} if isinstance(found, dict) else {"label": found}


def split_shards(folder: Path, names: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Shards in a folder by the split at the start of their names; all are train where none says so."""
    files = sorted(str(path) for path in folder.glob("*.tar") if not path.name.startswith("."))
    found: dict[str, list[str]] = {}
    for file in files:
        first = re.split(r"[^a-z]", os.path.basename(file).lower(), maxsplit=1)[0]
        split = next((name for name, aliases in names.items() if first in aliases), None)
        found.setdefault(split or "", []).append(file)
    loose = found.pop("", [])
    return found if "train" in found or not loose else {"train": loose, **found}
