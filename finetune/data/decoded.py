"""Decoded pictures go in by row and come out by row, out of memory or a file; a row that is not whole is not there.

Reading and writing go through a file descriptor and not through a memory map: a map of a file that was cut off, or of a
disk that is full, ends the process with a bus error, where `pread` and `pwrite` give an answer.
"""

import math
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

MEMORY_SHARE = 0.2  # of the free memory, for rows that need no disk
FILE_SHARE = 0.6  # of the free memory too: pages of a file that do not stay in memory may be slower than decoding
DISK_SHARE = 0.5  # of the free disk
HEADER = struct.Struct("<4I")  # checksum, three sizes
CGROUPS = ("/sys/fs/cgroup", "/sys/fs/cgroup/memory")  # of a container, versions 2 and 1
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


@dataclass
class Place:
    """Bytes by position, shared between processes: a file, or memory that looks like one (Linux).

    Attributes:
        limit: Bytes that may be used.
        folder: Where the file is made when the first bytes are asked for; None for memory.
        used: Bytes that were given out.
        path: By which a process that was not forked from this one opens it.
        identity: Of the file behind the path, by which the other process sees that it is still the same.
        descriptor: None before it is made, and where it cannot be.
        full: Whether this process has met an error in writing; it does not try again.
    """

    limit: int
    folder: Path | None = None
    used: int = 0
    path: Path | None = None
    identity: tuple[int, int] | None = None
    descriptor: int | None = None
    full: bool = False

    @property
    def left(self) -> int:
        """Bytes that can still be given out."""
        return max(0, self.limit - self.used)

    def make(self) -> None:
        """Make the file, empty; where it cannot be made, nothing will be found in it."""
        if self.descriptor is not None or self.full:
            return
        try:
            if self.folder is None:
                self.descriptor = os.memfd_create("decoded")
                self.path = Path(f"/proc/{os.getpid()}/fd/{self.descriptor}")
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.path = self.folder / f"decoded-{os.environ.get('RANK', '0')}.bin"
                self.path.unlink(missing_ok=True)  # one that a killed run has left
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            self.identity = identity(self.descriptor)
        except OSError:
            self.full = True

    def read(self, start: int, target: memoryview) -> bool:
        """Fill `target` with what stands at `start`; whether that much was there."""
        if self.descriptor is None:
            return False
        try:
            return os.preadv(self.descriptor, [target], start) == target.nbytes
        except OSError:
            return False

    def write(self, start: int, header: bytes, pixels: memoryview) -> None:
        """Write both at `start`, or a part of them where the disk is full."""
        if self.descriptor is None or self.full:
            return
        try:
            self.full = os.pwritev(self.descriptor, [header, pixels], start) < len(header) + pixels.nbytes
        except OSError:
            self.full = True

    def close(self) -> None:
        """Give the space back."""
        if self.descriptor is not None:
            os.close(self.descriptor)
        if self.folder is not None and self.path is not None:
            self.path.unlink(missing_ok=True)
            with suppress(OSError):  # something else is in it
                self.folder.rmdir()
        self.descriptor, self.full = None, True

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"descriptor": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.path is None or self.full:
            return
        try:
            descriptor = os.open(self.path, os.O_RDWR)
        except OSError:
            self.full = True
            return
        if identity(descriptor) == self.identity:
            self.descriptor = descriptor
        else:
            os.close(descriptor)
            self.full = True


def identity(descriptor: int) -> tuple[int, int]:
    """Device and number of an open file."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class Shelf:
    """The rows of one Dataset in a `Place`; several processes may read and write it at once.

    Nothing has to be locked: what is written for a row is the same whoever writes it, and the checksum, over salt, row,
    sizes and pixels, tells a row that is whole from one that is half written, damaged, or another's.
    """

    place: Place
    starts: np.ndarray  # int64 [rows that fit + 1]
    dtype: np.dtype
    salt: bytes

    def get(self, row: int) -> np.ndarray | None:
        """The array of a row, or None."""
        header = bytearray(HEADER.size)
        if row + 1 >= len(self.starts) or not self.place.read(int(self.starts[row]), memoryview(header)):
            return None
        checksum, *shape = HEADER.unpack(header)
        if not 0 < math.prod(shape) * self.dtype.itemsize == self.room(row):
            return None
        pixels = np.empty(shape, self.dtype)
        whole = self.place.read(int(self.starts[row]) + HEADER.size, pixels.data)
        return pixels if whole and self.checksum(row, pixels) == checksum else None

    def put(self, row: int, pixels: np.ndarray) -> None:
        """Keep the array [., ., .] of a row, if it has a place and the size that was foretold."""
        if row + 1 < len(self.starts) and pixels.nbytes == self.room(row) and pixels.dtype == self.dtype:
            pixels = np.ascontiguousarray(pixels)
            header = HEADER.pack(self.checksum(row, pixels), *pixels.shape)
            self.place.write(int(self.starts[row]), header, pixels.data)

    def room(self, row: int) -> int:
        """Bytes for the array of a row."""
        return int(self.starts[row + 1] - self.starts[row]) - HEADER.size

    def checksum(self, row: int, pixels: np.ndarray) -> int:
        """CRC-32."""
        return zlib.crc32(pixels.data, zlib.crc32(struct.pack("<4Q", row, *pixels.shape), zlib.crc32(self.salt)))


@dataclass
class DecodedCache:
    """Arrays of the rows of Datasets, in memory where they are few, else in a file of `folder`.

    One for a run: loaders of all epochs and parts share it, and fill it as their rows come. It is found again by forked
    and spawned loading processes alike. What does not fit, and all of it on Windows, is decoded each time.

    Args:
        folder: Where the file may be made.
        budget: Bytes at most, in memory and file together; by default what is free says.
    """

    folder: Path
    budget: int | None = None
    places: list[Place] = field(init=False)
    shelves: dict[str, Shelf] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        memory, disk = free_memory() // here, free_disk(self.folder) // here
        in_file = int(DISK_SHARE * disk) if hasattr(os, "preadv") else 0
        if self.budget is None:
            in_file = min(in_file, int(FILE_SHARE * memory))
        in_memory = int(MEMORY_SHARE * memory) if hasattr(os, "memfd_create") else 0
        self.places = [Place(in_memory), Place(in_file, self.folder)]

    def shelf(self, key: str, rows: int, size_of: Callable[[int], int], dtype: type = np.uint8) -> Shelf:
        """The shelf of a name: where it is new, for the first rows that fit.

        Args:
            key: Tells apart all that the arrays depend on.
            rows: Number of rows.
            size_of: Bytes of the array of a row; called for each that fits.
            dtype: Of the arrays.
        """
        if key not in self.shelves:
            rest = None if self.budget is None else self.budget - sum(place.used for place in self.places)
            spare = [place.left if rest is None else min(place.left, rest) for place in self.places]
            ends, end = [0], 0
            for row in range(rows):
                end += HEADER.size + size_of(row)
                if end > max(spare):
                    break
                ends.append(end)
            place = next(place for place, room in zip(self.places, spare, strict=True) if ends[-1] <= room)
            if ends[-1] > 0:
                place.make()
            starts = np.asarray(ends, dtype=np.int64) + place.used
            self.shelves[key] = Shelf(place, starts, np.dtype(dtype), os.urandom(16))
            place.used += ends[-1]
        return self.shelves[key]

    def close(self) -> None:
        """Give memory and disk back; what is asked for afterwards is decoded."""
        for place in self.places:
            place.close()


def free_memory() -> int:
    """Bytes that can be had without taking them from others, within the limit of a container."""
    free = psutil.virtual_memory().available
    for folder, (limit, used) in zip(map(Path, CGROUPS), LIMITS, strict=True):
        try:
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, most - now + int(stat["inactive_file"]))  # pages of files that were read are given up
        except (OSError, ValueError, KeyError):  # no limit ("max"), or another system
            continue
    return max(0, free)


def free_disk(folder: Path) -> int:
    """Free bytes of the disk on which a folder is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return 0
