"""Where the members of tar shards are: an index of every shard, made once from its headers and kept beside it.

Scanning is work for the CPU (60 µs a pair, in Python's tarfile), so processes do it, and training processes share it:
each scans its part, they meet, and all read what was kept.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from pretrain.atomic import replacing
from pretrain.cores import local_place, own_cores

_IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
_INDEX_VERSION = 2  # 1 had no samples without text
BLOCK = 512  # bytes of a tar header, and what members are padded to
_READING_THREADS = 8  # kept indices are small files: reading them is waiting for the disk


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of a shard's samples are.

    Attributes:
        members: (N, 6) int64: offset and size in bytes of the image, KEY.txt and KEY.json; size -1 for an absent one.
            Every sample with an image is there, so that one index serves training with and without captions.
        without_image: keys that have none.
        cut: the file ends before the archive does, or is no tar file; samples past the end are in no count.
    """

    members: np.ndarray
    without_image: int
    cut: bool

    def pairs(self) -> np.ndarray:
        """(P, 6): the members of samples that also have a text or JSON."""
        return self.members[self.members[:, [3, 5]].max(1) >= 0]

    def counts(self) -> "ShardCounts":
        """How many there are of what."""
        return ShardCounts(len(self.members), len(self.pairs()), self.without_image, self.cut)


@dataclass(frozen=True)
class ShardCounts:
    """What an index says without its members: samples with an image, those of them with text or JSON, keys without
    image, and whether the file is cut off."""

    images: int
    pairs: int
    without_image: int
    cut: bool


def scan_shard(path: Path) -> ShardIndex:
    """Read a shard's headers; its samples in the order of their first members."""
    size = path.stat().st_size
    keys: dict[str, list[int]] = {}
    with path.open("rb") as file:
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    if member.size < 0:  # would lead back to what was read, over and over
                        raise tarfile.TarError("negative size")
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if member.isfile() and member.offset_data + member.size <= size:
                        _add_member(keys, member)
                    elif member.isfile():
                        keys.setdefault(_split_name(member.name)[0], [0, -1] * 3)
                    archive.members = []  # or it keeps them all
        except Exception:  # cut within a member, no archive, or headers that lead the parser astray; told below
            pass
        file.seek(min(end, size))
        # An archive ends with zeros; where something else or nothing follows the last member, the rest is missing.
        cut = file.read(BLOCK) != bytes(BLOCK)
    members = np.array([row for row in keys.values() if row[1] > 0], np.int64).reshape(-1, 6)
    return ShardIndex(members, len(keys) - len(members), cut)


def _split_name(name: str) -> tuple[str, str]:
    """Key and ending, as WebDataset splits them: at the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def _add_member(keys: dict[str, list[int]], member: tarfile.TarInfo) -> None:
    key, ending = _split_name(member.name)
    kinds = {"txt": 2, "json": 4} | dict.fromkeys(_IMAGE_ENDINGS, 0)
    if not key.rpartition("/")[2]:
        return  # a hidden file
    row = keys.setdefault(key, [0, -1] * 3)
    if ending in kinds:
        row[kinds[ending] : kinds[ending] + 2] = member.offset_data, member.size


def _cache_places(path: Path) -> list[Path]:
    """Where a shard's index may be: beside it, or in the user's cache where that folder is read-only."""
    name = f".{path.name}.index.npz"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reclip-ovd" / "shards"
    return [path.with_name(name), cache / (hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24] + ".npz")]


def kept_index(path: Path) -> ShardIndex | None:
    """The kept index of a shard, if the file's size and time are still those; None where there is none.

    Raises:
        OSError: if the shard is not there.
    """
    stamp = _stamp(path)
    for place in _cache_places(path):
        try:
            with np.load(place, allow_pickle=False) as kept:
                if np.array_equal(kept["stamp"], stamp):
                    return ShardIndex(kept["members"], int(kept["without_image"]), bool(kept["cut"]))
        except (OSError, ValueError, KeyError, EOFError):  # absent, or not ours
            continue
    return None


def load_index(path: Path) -> ShardIndex:
    """The index of a shard: the kept one if it is still right, else a new one, kept if possible.

    Raises:
        OSError: if the shard cannot be read.
    """
    index = kept_index(path)
    return _scan_and_keep(path) if index is None else index


def _stamp(path: Path) -> np.ndarray:
    status = path.stat()
    return np.array([_INDEX_VERSION, status.st_size, status.st_mtime_ns])


def _scan_and_keep(path: Path) -> ShardIndex:
    stamp, index = _stamp(path), scan_shard(path)
    for place in _cache_places(path):
        try:
            with replacing(place) as temporary, temporary.open("wb") as file:
                np.savez(file, stamp=stamp, members=index.members, without_image=index.without_image, cut=index.cut)
            break
        except OSError:  # read-only or full: the next place, or none
            continue
    return index


class Together(Protocol):
    """Training processes that can meet (`engine.processes.Processes`)."""

    rank: int
    world: int

    def wait(self) -> None:
        """Return when every process is here."""


def count_shards(
    paths: Sequence[Path], together: Together | None = None, processes: int | None = None
) -> list[ShardCounts]:
    """The counts of every shard, in order; shards without a kept index are scanned, each by one process.

    Args:
        paths: the shards, the same in every training process.
        together: the training processes, which must all call this; None: this one is alone.
        processes: that scan; None: as many as this process's share of the cores.

    Raises:
        OSError: if a shard cannot be read.
    """
    processes = processes or own_cores()
    found: dict[int, ShardCounts] = {}
    quiet = together is not None and together.rank > 0
    for first, step in _shares(together):
        numbers = [n for n in range(first, len(paths), step) if n not in found]
        found |= zip(numbers, _count([paths[n] for n in numbers], processes, quiet), strict=True)
        together.wait()
    # What the others scanned, if it could be kept where this one sees it; all of it for a process alone.
    numbers = [n for n in range(len(paths)) if n not in found]
    found |= zip(numbers, _count([paths[n] for n in numbers], processes, quiet), strict=True)
    return [found[n] for n in range(len(paths))]


def _shares(together: Together | None) -> list[tuple[int, int]]:
    """First number and step of what this process scans, one pair for each meeting: its part among all; then, in case
    that machines keep indices each for itself, its part among the machine's processes."""
    if together is None or together.world == 1:
        return []
    local, count = local_place()
    return [(together.rank, together.world), *([(local, count)] if 1 < count < together.world else [])]


def _count(paths: Sequence[Path], processes: int, quiet: bool) -> list[ShardCounts]:
    with ThreadPoolExecutor(_READING_THREADS) as pool:
        counts = list(pool.map(_kept_counts, paths))
    missing = [n for n, found in enumerate(counts) if found is None]
    processes = min(processes, len(missing))
    with ProcessPoolExecutor(processes) if processes > 1 else nullcontext() as pool:
        mapped: Callable[..., Iterable[ShardCounts]] = pool.map if pool else map
        scanned = mapped(_scanned_counts, [paths[n] for n in missing])
        shown = tqdm(scanned, "shards", len(missing), delay=2.0, leave=False, disable=quiet)
        for number, found in zip(missing, shown, strict=True):
            counts[number] = found
    return counts


def _kept_counts(path: Path) -> ShardCounts | None:
    index = kept_index(path)
    return None if index is None else index.counts()


def _scanned_counts(path: Path) -> ShardCounts:
    return _scan_and_keep(path).counts()
