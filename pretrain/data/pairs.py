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
        evaluation: rows of the table by split.
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
        """SHA-256 of the table; of shards, of their names, sizes and pair counts (their bytes may be terabytes)."""
        found = {}
        if self.table:
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


def load_pairs(config: DataConfig, evaluation_splits: Sequence[str], together: Together | None = None) -> Pairs:
    """Read the table and the shards' indices; leave out withheld words, empty captions and (with `preload`) images that
    cannot be decoded: counted, named, reported.

    Args:
        config: what to read.
        evaluation_splits: of the table.
        together: training processes that index shards together and all call this; None: this one is alone.

    Raises:
        ConfigError: if nothing is left to train on.
    """
    needs_table = not config.shards or evaluation_splits
    table = read_table(config.table) if needs_table else []
    store = ImageStore(Path(config.root) if config.root else Path(config.table).parent, config.preload)
    if config.shards:
        training = ShardSource.from_config(config, together)
        notes = training.notes
    else:
        training, notes = _training_rows(config, table, store)
    return Pairs(
        training=training,
        evaluation={split: select_split(table, split, config.table) for split in evaluation_splits},
        classes=sorted({row["caption"] for row in table}),
        store=store,
        backgrounds=read_backgrounds(config.backgrounds),
        notes=notes,
        table=config.table if needs_table else None,
    )


def _training_rows(
    config: DataConfig, table: list[dict[str, str]], store: ImageStore
) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of the table to train on, and what is to be said of them."""
    rows = select_split(table, config.train_split, config.table)
    notes = [f"{len(rows)} training pairs from {config.table}"]
    if config.withhold:
        rows, dropped = withhold_words(rows, read_words(config.withhold))
        notes.append(f"{dropped} pairs withheld: their text has a word of {Path(config.withhold)}")
    empty = sum(not row["caption"].strip() for row in rows)
    rows = [row for row in rows if row["caption"].strip()]
    if empty:
        notes.append(f"{empty} pairs left out: empty caption")
    broken = store.check(row["image"] for row in rows) if config.preload else {}
    if broken:
        rows = [row for row in rows if row["image"] not in broken]
        notes.append(f"{len(broken)} pairs left out, for example: {next(iter(broken.values()))}")
    if not rows:
        raise ConfigError("no training pair is left: " + "; ".join(notes))
    return rows, notes
