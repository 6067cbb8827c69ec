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
from pretrain.data.folder import ImageStore
from pretrain.data.text_augment import training_caption
from pretrain.data.tokenizer import build_tokenizer
from pretrain.data.transforms import TrainingView


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
    """Sampler of (epoch, row) lists from a given step on, for `steps` steps."""

    def __init__(self, size: int, batch_size: int, seed: int, first: int, steps: int, groups: list[str] | None):
        self._arguments = (size, batch_size, seed)
        self._first, self._steps, self._groups = first, steps, groups
        self._per_epoch = len(plan_epoch(size, batch_size, seed, 0, groups))
        if self._per_epoch == 0:
            kinds = f" of {len(set(groups))} distinct values" if groups else ""
            raise ConfigError(f"{size} rows{kinds} do not fill one batch of {batch_size}: lower phases.batch_size")

    def __len__(self) -> int:
        return max(0, self._steps - self._first)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step, epoch = 0, 0
        while step < self._steps:
            batches = plan_epoch(*self._arguments, epoch, self._groups)
            for batch in batches:
                if self._first <= step < self._steps:
                    yield [(epoch, row) for row in batch]
                step += 1
            epoch += 1


class TrainingPairs(Dataset):
    """Augmented pairs by (epoch, row)."""

    def __init__(
        self, rows: list[dict[str, str]], store: ImageStore, view: TrainingView, config: DataConfig, seed: int
    ):
        self._rows, self._store, self._view, self._config, self._seed = rows, store, view, config, seed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, str]:
        """An image (3, S, S) and its caption. A broken file is counted and the next row takes its place: a batch keeps
        its size. OSError if no file can be read."""
        epoch, index = key
        rng = np.random.default_rng([self._seed, epoch, index])
        for offset in range(len(self._rows)):
            row = self._rows[(index + offset) % len(self._rows)]
            try:
                image = self._store.read(row["image"])
            except OSError as error:
                self._store.count_broken(row["image"], error)
                continue
            return self._view(image, rng), training_caption(row, self._config.caption, rng)
        raise OSError(f"none of the {len(self._rows)} images can be read; check data.root")


class _Collate:
    def __init__(self, context_length: int):
        self._tokenizer = build_tokenizer(context_length)

    def __call__(self, samples: list[tuple[torch.Tensor, str]]) -> dict[str, torch.Tensor]:
        images, captions = zip(*samples, strict=True)
        return {"image": torch.stack(images), "tokens": self._tokenizer(list(captions))}


def build_loader(
    rows: list[dict[str, str]], store: ImageStore, backgrounds: list, config: DataConfig, phase: PhaseConfig,
    seed: int, first_step: int = 0,
) -> DataLoader:  # fmt: skip
    """Batches of one phase from `first_step` on: {"image": (B, 3, S, S) uint8, "tokens": (B, L) int64}.

    Raises:
        ConfigError: if the rows do not fill one batch, or `data.unique_by` names no column.
    """
    groups = None
    if config.unique_by:
        if config.unique_by not in rows[0]:
            raise ConfigError(
                f"data.unique_by: the table has no column {config.unique_by!r}; it has {', '.join(rows[0])}"
            )
        groups = [row[config.unique_by] for row in rows]
    view = TrainingView(phase.image_size, config.augmentation, backgrounds)
    return DataLoader(
        TrainingPairs(rows, store, view, config, seed),
        batch_sampler=BatchPlan(len(rows), phase.batch_size, seed, first_step, phase.steps, groups),
        num_workers=config.workers,
        collate_fn=_Collate(phase.context_length),
        # Forked workers share the preloaded images; a prefetch of a few batches hides the uneven cost of samples.
        prefetch_factor=4 if config.workers else None,
    )
