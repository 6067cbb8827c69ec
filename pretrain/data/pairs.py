"""All the pairs of a run: what is trained on (a table or shards) and what is evaluated on (splits of a table)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from pretrain.config import ConfigError, DataConfig
from pretrain.data.folder import ImageStore, read_backgrounds, read_table, read_words, select_split, withhold_words
from pretrain.data.shard_index import Together
from pretrain.data.shards import ShardSource


@dataclass
class Pairs:
    """The pairs of a run.

    Attributes:
        training: rows of the table, or shards.
        evaluation: rows of the table by split, those without a caption left out.
        classes: every caption of the table, each once: the classes of zero-shot evaluation.
        store: reads the images of the table.
        backgrounds: photographs to put behind cut-outs.
        notes: what was found and left out, for the log and the summary.
        table: where the rows are from; None where no table is used.
    """

    training: list[dict[str, str]] | ShardSource
    evaluation: dict[str, list[dict[str, str]]]
    classes: list[str]
    store: ImageStore
    backgrounds: list[Image.Image]
    notes: list[str] = field(default_factory=list)
    table: str | None = None

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the table; of shards, of their names, sizes and pair counts (their bytes may be terabytes); of a
        folder, of the images' names."""
        found = {}
        if self.table and Path(self.table).is_dir():
            names = "\n".join(row["image"] for row in self.training)
            found[f"{self.table} (names)"] = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
        elif self.table:
            found[self.table] = hashlib.sha256(Path(self.table).read_bytes()).hexdigest()
        if isinstance(self.training, ShardSource):
            found["shards (names, bytes, pairs)"] = self.training.fingerprint()
        return found

    def left_out(self) -> list[str]:
        """What training could not use so far, a line for each kind."""
        lines = self.training.report() if isinstance(self.training, ShardSource) else []
        if self.store.broken:
            lines.append(f"{self.store.broken} reads of broken images, replaced by the next row")
        return lines


def load_pairs(
    config: DataConfig, evaluation_splits: Sequence[str], together: Together | None = None,
    caption_reader: str = "training",
) -> Pairs:  # fmt: skip
    """Read the table and the shards' indices; leave out withheld words, empty captions and (with `preload`) images that
    cannot be decoded: counted, named, reported.

    Args:
        config: what to read.
        evaluation_splits: of the table.
        together: training processes that index shards together and all call this; None: this one is alone.
        caption_reader: what trains on captions, for messages; empty: nothing does, and images without are trained on,
            too. Those of which `data.withhold` could not tell what they show still need captions.

    Raises:
        ConfigError: if nothing is left to train on, or a split has no captions to evaluate on.
    """
    if config.withhold and not caption_reader:
        caption_reader = "data.withhold"
    needs_table = not config.shards or evaluation_splits
    table_reader = "" if config.shards else caption_reader
    if evaluation_splits and not table_reader:
        table_reader = "evaluation.splits (set it to [] for none)"
    table = read_table(config.table, table_reader) if needs_table else []
    store = ImageStore(_image_root(config), config.preload)
    if config.shards:
        training = ShardSource.from_config(config, together, caption_reader)
        notes = list(training.notes)
    else:
        training, notes = _training_rows(config, table, store, caption_reader)
    return Pairs(
        training=training,
        evaluation={split: _evaluation_rows(config, table, split, notes) for split in evaluation_splits},
        classes=sorted({row["caption"] for row in table if row["caption"].strip()}),
        store=store,
        backgrounds=read_backgrounds(config.backgrounds),
        notes=notes,
        table=config.table if needs_table else None,
    )


def _image_root(config: DataConfig) -> Path:
    """What the table's paths are relative to."""
    if Path(config.table).is_dir():
        if config.root:
            raise ConfigError(f"data.root is for the paths in a table, but data.table {config.table} is a folder: null")
        return Path(config.table)
    return Path(config.root) if config.root else Path(config.table).parent


def _evaluation_rows(
    config: DataConfig, table: list[dict[str, str]], split: str, notes: list[str]
) -> list[dict[str, str]]:
    """The rows of a split that have a caption, which is their class; how many have none goes to the notes."""
    rows = select_split(table, split, config.table)
    named = [row for row in rows if row["caption"].strip()]
    if not named:
        raise ConfigError(
            f"evaluation.splits: no row of {config.table} with split {split!r} has a caption, which is its class: set "
            "evaluation.splits=[] for none"
        )
    if len(named) < len(rows):
        notes.append(f"{len(rows) - len(named)} rows of split {split} are not evaluated on: empty caption")
    return named


def _training_rows(
    config: DataConfig, table: list[dict[str, str]], store: ImageStore, caption_reader: str
) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of the table to train on, and what is to be said of them."""
    rows = select_split(table, config.train_split, config.table)
    kind = "pairs" if caption_reader else "images"
    notes = [f"{len(rows)} training {kind} from {config.table}"]
    if config.withhold:
        rows, dropped = withhold_words(rows, read_words(config.withhold))
        notes.append(f"{dropped} pairs withheld: their text has a word of {Path(config.withhold)}")
    empty = sum(not row["caption"].strip() for row in rows) if caption_reader else 0
    if empty:
        rows = [row for row in rows if row["caption"].strip()]
        notes.append(f"{empty} pairs left out: empty caption, and {caption_reader} needs captions")
    broken = store.check(row["image"] for row in rows) if config.preload else {}
    if broken:
        rows = [row for row in rows if row["image"] not in broken]
        notes.append(f"{len(broken)} {kind} left out, for example: {next(iter(broken.values()))}")
    if not rows:
        raise ConfigError(f"no training {kind[:-1]} is left: " + "; ".join(notes))
    return rows, notes
