"""Training pictures as a function of (seed, position in the stream), so that a run continues exactly where it stopped.

Detectron2's samplers order the pictures; here each place in that order is numbered, and the number seeds the picture's
augmentation. Neither worker processes nor what was prefetched before a stop has a part in what step n sees.
Batches are made by Detectron2; the seeds of the model's own draws are in `step`.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import Dataset, Sampler

MAX_ATTEMPTS = 100


class PositionSampler(Sampler):
    """Endless (position, index) pairs of this process.

    Args:
        indices: this process's endless part of the stream (Detectron2's training samplers give process r of W the
            places r, r + W, …); iterated anew, and the same, every time.
        start: how many of them were used already.
    """

    def __init__(self, indices: Sampler, start: int = 0) -> None:
        self.indices, self.start = indices, start
        self.rank, self.world = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs from `start` on; positions count over all processes."""
        for number, index in enumerate(itertools.islice(iter(self.indices), self.start, None), self.start):
            yield number * self.world + self.rank, index


class SeededDataset(Dataset):
    """Map-style data set over (position, index) pairs; the position decides every random draw of the mapper.

    A picture that the mapper refuses (None) is replaced by another, which the position decides too.

    Args:
        dicts: Detectron2 dataset dicts.
        mapper: dataset dict -> model input or None; may draw from `random`, numpy and torch.
        seed: of the run.
    """

    def __init__(self, dicts: Sequence[dict], mapper: Callable[[dict], dict | None], seed: int) -> None:
        self.dicts, self.mapper, self.seed = dicts, mapper, seed

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        """The mapped picture of a pair.

        Raises:
            ValueError: if `MAX_ATTEMPTS` pictures in a row cannot be used.
        """
        position, index = place
        seed_all(self.seed, position)
        others = np.random.default_rng([self.seed, position])
        for _ in range(MAX_ATTEMPTS):
            record = self.mapper(self.dicts[index])
            if record is not None:
                return record
            index = int(others.integers(len(self.dicts)))
        raise ValueError(
            f"{MAX_ATTEMPTS} training pictures in a row could not be used, the last {self.dicts[index]['file_name']}: "
            "check the picture folder that the configuration names (image_root)"
        )


def seed_all(*key: int) -> None:
    """Seed `random`, numpy and torch from whole numbers >= 0; near keys give unrelated streams."""
    first, second = (int(word) for word in np.random.SeedSequence(key).generate_state(2))
    random.seed(first)
    np.random.seed(first)
    torch.manual_seed(first << 32 | second)
