"""Run lengths of many masks in few objects: a dictionary and a text per mask take 0.5 kB before the first run.

Encoding masks and comparing them are not here (`ovd.detections`, `matching`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class PackedMasks(Sequence[Mapping[str, Any]]):
    """N masks that read like a list of run lengths ({"size": [height, width], "counts": bytes}), made when asked for.

    Args:
        texts: of each of P pictures the compressed run lengths (pycocotools' `counts`) of its masks, one after another.
        sizes: (P, 2) height and width of the pictures in pixels.
        picture: (N,) place in `texts` of each mask's picture.
        start, length: (N,) where in that text the mask begins and how many bytes it has.
    """

    texts: Sequence[bytes]
    sizes: np.ndarray
    picture: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.picture)

    def __getitem__(self, number: Any) -> Any:
        """Return one mask; the masks of a slice."""
        if isinstance(number, slice):
            return self.take(np.arange(len(self))[number])
        picture, start = self.picture[number], int(self.start[number])
        counts = self.texts[picture][start : start + int(self.length[number])]
        return {"size": self.sizes[picture].tolist(), "counts": counts}

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[number] for number in range(len(self)))

    def take(self, rows: np.ndarray) -> "PackedMasks":
        """Return the masks at these places (R,), in this order; the texts are shared, not copied."""
        return PackedMasks(self.texts, self.sizes, self.picture[rows], self.start[rows], self.length[rows])
