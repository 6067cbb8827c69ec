"""How much of the training time the device had nothing to do because the next batch was not ready."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

_WORTH_TELLING = 0.1  # share of a phase's time
Batch = TypeVar("Batch")


class DataWait:
    """Measures the waiting of a loop over batches.

    On a GPU the loop runs ahead of the device, so that a loop that waits need not mean an idle device. There two events
    around the waiting are put among the device's work: the time between them is what it had none. On the CPU the loop's
    own waiting is the device's. On XLA, which has no such events, it is an upper bound. Measuring never waits itself.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._waited, self._elapsed = 0.0, 0.0

    def over(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The loader's batches. Starting its workers is waiting too."""
        began = self._mark()
        for batch in loader:
            ended = self._mark()
            if self._on_cuda:
                self._events.append((began, ended))
            else:
                self._seconds += ended - began
            yield batch
            began = self._mark()

    def _mark(self) -> "torch.cuda.Event | float":
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def share(self, elapsed: float) -> float:
        """Share (0-1) of the last `elapsed` seconds; counts from now on anew.

        Call it where the device has done its work, as after reading a loss: the events must have happened.
        """
        waited = self._seconds + sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
        self._events, self._seconds = [], 0.0
        self._waited, self._elapsed = self._waited + waited, self._elapsed + elapsed
        return min(1.0, waited / elapsed)

    def note(self, phase: str, workers: int) -> str:
        """A sentence for the log about all time so far, where waiting was a tenth of it or more; else empty."""
        if self._waited < _WORTH_TELLING * self._elapsed or not self._elapsed:
            return ""
        share = min(1.0, self._waited / self._elapsed)
        return (
            f"phase {phase} waited for data {share:.0%} of its time: loading is the limit; give it more processes "
            f"(data.workers, {workers} here)"
        )
