"""Endless, reproducible batches: the order depends on the seed and the epoch, a sample on the seed, epoch and row.

Because no state is kept, resuming at step k means starting the plan at step k: the next batch is the same one, and
which worker prepares it does not matter.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.config import ConfigError, DataConfig, PhaseConfig
from pretrain.cores import own_cores
from pretrain.data.folder import ImageStore, TableSource
from pretrain.data.shards import ShardOrder, ShardSource
from pretrain.data.tokenizer import build_tokenizer
from pretrain.data.views import Views

# Samples in a row that cannot be used before a run stops: by then it is the setting that is wrong, not the samples.
_MOST_FAILURES = 1000


def plan_epoch(size: int, batch_size: int, seed: int, epoch: int, groups: list[str] | None = None) -> list[list[int]]:
    """The batches of one epoch: a shuffle cut into full batches.

    Args:
        size: number of rows.
        groups: a value per row; then no two rows of a batch share it. Rows that no longer fit a full batch are left
            out of this epoch.

    Returns:
        Lists of `batch_size` distinct row numbers.
    """
    order = np.random.default_rng([seed, epoch]).permutation(size).tolist()
    if groups is None:
        return [order[i : i + batch_size] for i in range(0, size - batch_size + 1, batch_size)]
    batches, waiting = [], deque(order)
    while len(waiting) >= batch_size:
        batch, seen, later = [], set(), deque()
        while waiting and len(batch) < batch_size:
            row = waiting.popleft()
            if groups[row] in seen:
                later.append(row)
            else:
                seen.add(groups[row])
                batch.append(row)
        if len(batch) < batch_size:
            break
        batches.append(batch)
        waiting.extendleft(reversed(later))
    return batches


class BatchPlan:
    """Sampler of (epoch, row) lists from a given step on, for `steps` steps.

    Each of `world` processes gets its part of every batch: the parts of all ranks, in order, are the batch that one
    process would get.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, first: int, steps: int, groups: list[str] | None,
        rank: int = 0, world: int = 1,
    ):  # fmt: skip
        self._arguments = (size, batch_size, seed)
        self._first, self._steps, self._groups = first, steps, groups
        self._part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._per_epoch = len(plan_epoch(size, batch_size, seed, 0, groups))
        if self._per_epoch == 0:
            kinds = f" of {len(set(groups))} distinct values" if groups else ""
            raise ConfigError(
                f"{size} rows{kinds} do not fill one batch of {batch_size}: lower phases[0].batch_size, and that of "
                "the other phases"
            )

    def __len__(self) -> int:
        return max(0, self._steps - self._first)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, epoch = 0, 0
        while step < self._steps:
            batches = plan_epoch(*self._arguments, epoch, self._groups)
            for batch in batches:
                if self._first <= step < self._steps:
                    yield [(epoch, row) for row in batch[self._part]]
                step += 1
            epoch += 1


class ShardPlan:
    """As BatchPlan, over shards: starts at any step at once and makes one window of the order at a time."""

    def __init__(self, order: ShardOrder, batch_size: int, first: int, steps: int, rank: int = 0, world: int = 1):
        self._order, self._batch_size, self._first, self._steps = order, batch_size, first, steps
        self._part = rank * batch_size // world, (rank + 1) * batch_size // world
        self._per_epoch = len(order) // batch_size
        if self._per_epoch == 0:
            raise ConfigError(
                f"{len(order)} pairs do not fill one batch of {batch_size}: lower phases[0].batch_size, and that of "
                "the other phases"
            )

    def __len__(self) -> int:
        return max(0, self._steps - self._first)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self._first, self._steps):
            epoch, number = divmod(step, self._per_epoch)
            start, stop = (number * self._batch_size + edge for edge in self._part)
            yield [(epoch, row) for row in self._order.rows(epoch, start, stop).tolist()]


class TrainingPairs(Dataset):
    """The views of pairs by (epoch, row)."""

    def __init__(self, source: TableSource | ShardSource, views: Views, seed: int):
        self._source, self._views, self._seed = source, views, seed

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | str]:
        """Images (3, S, S) and texts by batch key. A pair that cannot be used is counted and the next row takes its
        place: a batch keeps its size. OSError if none of many rows can be used."""
        epoch, index = key
        attempts = min(len(self._source), _MOST_FAILURES)
        for row_number in range(index, index + attempts):
            rng = np.random.default_rng([self._seed, epoch, index])
            row_number %= len(self._source)
            try:
                image, row = self._source.read(row_number)
                return self._views(image, row, rng)
            except OSError as error:
                self._source.count_left_out(row_number, error)
                last = error
        raise OSError(f"none of {attempts} samples in a row can be used, the last: {last}; {self._source.remedy}")


class _Collate:
    def __init__(self, context_length: int):
        self._tokenizer = build_tokenizer(context_length)

    def __call__(self, samples: list[dict[str, torch.Tensor | str]]) -> dict[str, torch.Tensor]:
        columns = {key: [sample[key] for sample in samples] for key in samples[0]}
        return {
            key: self._tokenizer(values) if isinstance(values[0], str) else torch.stack(values)
            for key, values in columns.items()
        }


def build_loader(
    rows: list[dict[str, str]] | ShardSource, store: ImageStore | None, views: Views, config: DataConfig,
    phase: PhaseConfig, seed: int, first_step: int = 0, rank: int = 0, world: int = 1,
) -> DataLoader:  # fmt: skip
    """Batches of one phase from `first_step` on: under the keys of `views`, images and tokens as described there.

    With several processes each gets its 1/world of every batch. `store` has the images of a table's rows; shards have
    their own.

    Raises:
        ConfigError: if the rows do not fill one batch, or `data.unique_by` names no column.
    """
    if isinstance(rows, ShardSource):
        plan = _shard_plan(rows, config, phase, seed, first_step, rank, world)
        source = rows
    else:
        groups = _groups(rows, config.unique_by)
        plan = BatchPlan(len(rows), phase.batch_size, seed, first_step, phase.steps, groups, rank, world)
        source = TableSource(rows, store)
    workers = worker_count(config.workers)
    return DataLoader(
        TrainingPairs(source, views, seed),
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_Collate(phase.context_length),
        # Forked workers share the preloaded images; a prefetch of a few batches hides the uneven cost of samples. Two
        # of each do for many workers: at 224 px, batches wait in memory by the hundred megabytes.
        prefetch_factor=min(4, max(2, 8 // workers)) if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def worker_count(workers: int | None) -> int:
    """Processes that prepare batches: as many as given, or (None) one for each core that is this process's share."""
    return own_cores() if workers is None else workers


def _groups(rows: list[dict[str, str]], column: str | None) -> list[str] | None:
    if not column:
        return None
    if column not in rows[0]:
        raise ConfigError(f"data.unique_by: the table has no column {column!r}; it has {', '.join(rows[0])}")
    return [row[column] for row in rows]


def _shard_plan(
    source: ShardSource, config: DataConfig, phase: PhaseConfig, seed: int, first: int, rank: int, world: int
) -> ShardPlan:
    if config.unique_by:
        raise ConfigError(f"data.unique_by {config.unique_by!r} needs a table: remove it to train on shards")
    order = ShardOrder(source.sizes, config.shuffle_window, seed)
    return ShardPlan(order, phase.batch_size, first, phase.steps, rank, world)
