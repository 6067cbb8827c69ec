"""Image-text pairs from tar shards in img2dataset's layout (KEY.jpg, KEY.txt, KEY.json), read at random.

An index of every shard (`shard_index`) says where each member's bytes are, so any pair is a read of a few byte ranges
and the order is a function of (seed, epoch, step): a run resumes at any step at once, and neither workers nor processes
keep state. Shards are files; mount remote storage.
"""

import glob
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.config import ConfigError, DataConfig
from pretrain.data.folder import LeftOut, WordFilter, read_words
from pretrain.data.jpeg import JpegPicture, open_picture
from pretrain.data.shard_index import BLOCK, ShardCounts, Together, count_shards, load_index
from pretrain.parsing import parse_json

_OPEN_SHARDS = 64  # per process: a descriptor and an index (48 bytes a pair) each
_MAX_IMAGE, _MAX_TEXT = 2**29, 2**24  # bytes of a member: more is no photograph, and no caption
_MAX_SHARDS = 1_000_000  # in a brace range


def expand_shards(pattern: str) -> list[Path]:
    """Files of a pattern: braces ({00000..00099}), wildcards, several patterns joined by "::".

    Raises:
        ConfigError: if a pattern or a file of a brace range names nothing.
    """
    try:
        from braceexpand import braceexpand  # comes with webdataset, the extra `shards`
    except ImportError as error:
        raise ConfigError("data.shards needs the package braceexpand: pip install -e '.[shards]'") from error
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern):
        if len(first) > 9 or len(last) > 9 or abs(int(last) - int(first)) > _MAX_SHARDS:
            raise ConfigError(f"data.shards: {{{first}..{last}}} names more than {_MAX_SHARDS:,} files; shorten it")
    paths: list[Path] = []
    for name in (name for part in pattern.split("::") for name in braceexpand(part)):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * Path(name).is_file()
        if not found:
            raise ConfigError(f"data.shards: no file {name}; correct the pattern {pattern!r}")
        paths += [Path(file) for file in found]
    return paths


class ShardSource:
    """Pairs of tar shards, numbered through in the order of the files.

    Args:
        paths: shards.
        caption_keys: where captions are: "txt" is KEY.txt, anything else a field (text or list of texts) of KEY.json.
        withhold: pairs whose captions have one of these words are not used.
        together: training processes that index the shards together; all of them must make a source. None: one alone.
        processes: that scan shards without an index; None: this process's share of the cores.
        caption_reader: what needs captions, for messages; empty: nothing does: every sample with an image counts, and
            no text is read, so that nothing can be withheld.

    Raises:
        ConfigError: if there is no pair at all.
        OSError: if a shard cannot be read.
    """

    def __init__(
        self, paths: Sequence[Path], caption_keys: Sequence[str] = ("txt",), withhold: Iterable[str] = (),
        together: Together | None = None, processes: int | None = None, caption_reader: str = "training",
    ):  # fmt: skip
        self._caption_reader = caption_reader
        self._paths, self._caption_keys = list(paths), list(caption_keys)
        if not self._caption_keys:
            raise ConfigError('data.caption_keys is empty: ["txt"] reads KEY.txt, other names are fields of KEY.json')
        self._withheld = WordFilter(withhold)
        self._left_out = LeftOut(["broken", "without caption", "withheld"])
        self._opened: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()
        counts = count_shards(self._paths, together, processes)
        self.sizes = np.array([shard.pairs if caption_reader else shard.images for shard in counts], np.int64)
        self._ends = np.cumsum(self.sizes)
        self.notes = self._describe(counts)
        if not len(self):
            raise ConfigError("data.shards: " + "; ".join(self.notes))
        self.remedy = "check data.shards"
        if caption_reader:
            self.remedy += f" and data.caption_keys ({caption_reader} needs captions)"

    @classmethod
    def from_config(
        cls, config: DataConfig, together: Together | None = None, caption_reader: str = "training"
    ) -> "ShardSource":
        """The shards of `data.shards`, without the pairs of `data.withhold`.

        Raises:
            ConfigError: for a pattern without files, a missing word list, or shards without pairs.
        """
        words = read_words(config.withhold) if config.withhold else []
        return cls(expand_shards(config.shards), config.caption_keys, words, together, caption_reader=caption_reader)

    def _describe(self, counts: Sequence[ShardCounts]) -> list[str]:
        images, pairs = sum(shard.images for shard in counts), sum(shard.pairs for shard in counts)
        without_image = sum(shard.without_image for shard in counts)
        cut = [path for path, shard in zip(self._paths, counts, strict=True) if shard.cut]
        notes = [f"{pairs} pairs in {len(counts)} shards"]
        if not self._caption_reader:
            notes = [f"{images} images in {len(counts)} shards, {pairs} of them with text or JSON"]
        if without_image:
            notes.append(f"{without_image} samples of shards left out: no image")
        if self._caption_reader and pairs < images:
            reason = f"neither text nor JSON, and {self._caption_reader} needs captions"
            notes.append(f"{images - pairs} samples of shards left out: {reason}")
        if cut:
            notes.append(
                f"{len(cut)} shards are cut off or damaged, for example {cut[0]}: what is whole in them is used, the "
                "rest left out; fetch them again"
            )
        return notes

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def fingerprint(self) -> str:
        """SHA-256 over the shards' file names, bytes and numbers of pairs, in order."""
        parts = [
            f"{path.name} {path.stat().st_size} {size}" for path, size in zip(self._paths, self.sizes, strict=True)
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": OrderedDict()}  # descriptors mean nothing in another process

    def __del__(self) -> None:
        for file, _ in self.__dict__.get("_opened", {}).values():
            os.close(file)

    def read(self, index: int) -> tuple[Image.Image | JpegPicture, dict]:
        """A picture and {"captions": list of texts}, an empty list where nothing needs them.

        Raises:
            OSError: if the image is damaged, no caption is there, or one is withheld; the message names the pair.
        """
        shard = int(np.searchsorted(self._ends, index, "right"))
        file, members = self._open(shard)
        image_at, image_size, *text = (int(n) for n in members[index - self._ends[shard]])  # counted from the end
        captions = self._captions(shard, file, text, image_at) if self._caption_reader else []
        if self._withheld.matches(captions):
            raise _Withheld(f"{self._name(shard, file, image_at)}: a word of data.withhold")
        name = self._name(shard, file, image_at)
        if image_size > _MAX_IMAGE:
            raise OSError(f"{name} has {image_size} bytes, more than any picture")
        return open_picture(os.pread(file, image_size, image_at), name), {"captions": captions}

    @staticmethod
    def _text(file: int, size: int, at: int) -> bytes:
        if size > _MAX_TEXT:
            raise ValueError(f"{size} bytes of text")
        return os.pread(file, size, at)

    def _captions(self, shard: int, file: int, text: list[int], image_at: int) -> list[str]:
        text_at, text_size, json_at, json_size = text
        found: list[str] = []
        try:
            fields = None
            for key in self._caption_keys:
                if key == "txt":
                    value = self._text(file, text_size, text_at).decode() if text_size > 0 else ""
                else:
                    if fields is None:
                        fields = parse_json(self._text(file, json_size, json_at)) if json_size > 0 else {}
                    value = fields.get(key)
                found += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
        except (ValueError, AttributeError) as error:  # not UTF-8, not JSON, not an object
            raise _NoCaption(f"{self._name(shard, file, image_at)}: its text cannot be read ({error})") from error
        captions = [caption for caption in map(str.strip, found) if caption]
        if not captions:
            raise _NoCaption(f"{self._name(shard, file, image_at)}: no caption in {', '.join(self._caption_keys)}")
        return captions

    def _open(self, shard: int) -> tuple[int, np.ndarray]:
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        path = self._paths[shard]
        index = load_index(path)
        members = index.pairs() if self._caption_reader else index.members
        if len(members) != self.sizes[shard]:
            raise OSError(f"{path} changed during the run: it had {self.sizes[shard]} pairs, now {len(members)}")
        self._opened[shard] = os.open(path, os.O_RDONLY), members
        if len(self._opened) > _OPEN_SHARDS:
            os.close(self._opened.popitem(last=False)[1][0])
        return self._opened[shard]

    def _name(self, shard: int, file: int, image_at: int) -> str:
        """Shard and member name, for a message: the name is the start of the header before the image."""
        name = os.pread(file, 100, image_at - BLOCK).split(b"\0")[0].decode(errors="replace")
        return f"{self._paths[shard]}/{name}"

    def count_left_out(self, index: int, error: OSError) -> None:
        """Count a pair that `read`, or decoding what it gave, refused."""
        kind = "broken"
        if isinstance(error, _NoCaption | _Withheld):
            kind = "without caption" if isinstance(error, _NoCaption) else "withheld"
        self._left_out.add(kind, error)

    def report(self) -> list[str]:
        """A line for each kind of pair that was left out so far, in all processes; reads, so epochs add up."""
        kinds = ("broken", "without caption", "withheld")
        counts = {kind: self._left_out[kind] for kind in kinds}
        return [f"{n} reads of pairs {kind}, replaced by the next pair" for kind, n in counts.items() if n]


class _NoCaption(OSError):
    """A pair without text that can be used."""


class _Withheld(OSError):
    """A pair that the strict open-vocabulary split leaves out."""


class ShardOrder:
    """The order of an epoch over shards: shards shuffled, then pairs within windows of neighbours.

    Reading stays near-sequential (a window is a few shards), and the pairs of any step follow from (seed, epoch) and
    the shards' sizes alone: nothing of the size of the data set is ever made.

    Args:
        sizes: pairs per shard.
        window: pairs that are shuffled together.
        seed: with the epoch, all that the order depends on.

    Raises:
        ConfigError: for a window below 1.
    """

    def __init__(self, sizes: np.ndarray, window: int, seed: int):
        if window < 1:
            raise ConfigError(f"data.shuffle_window is {window}: it must be at least 1 pair")
        self._sizes, self._window, self._seed = sizes, window, seed
        self._starts = np.cumsum(sizes) - sizes
        self._total = int(sizes.sum())
        self._epoch, self._numbered = -1, -1  # which shards' order, and which window, is at hand

    def __len__(self) -> int:
        return self._total

    def rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Row numbers (stop - start,) at the positions from `start` to `stop` of an epoch."""
        self._enter_epoch(epoch)
        parts = []
        for number in range(start // self._window, -(-stop // self._window)):
            first = number * self._window
            parts.append(self._window_rows(number)[max(0, start - first) : stop - first])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _enter_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._shards = np.random.default_rng([self._seed, epoch]).permutation(len(self._sizes))
            self._ends = np.cumsum(self._sizes[self._shards])
            self._epoch, self._numbered = epoch, -1

    def _window_rows(self, number: int) -> np.ndarray:
        if number != self._numbered:
            first = number * self._window
            positions = np.arange(first, min(first + self._window, self._total))
            place = np.searchsorted(self._ends, positions, "right")
            shard = self._shards[place]
            rows = self._starts[shard] + positions - (self._ends[place] - self._sizes[shard])
            self._rows = np.random.default_rng([self._seed, self._epoch, number]).permutation(rows)
            self._numbered = number
        return self._rows
