"""An exponential moving average of a module: the teacher that OTTER and methods like BYOL learn from.

It is updated after the optimiser's step, by whoever owns both; this file does not decide what the average is used for.
"""

import copy
from collections.abc import Iterable

import torch
from torch import nn


class MovingAverage(nn.Module):
    """A copy of a module, always in evaluation mode, never trained, that follows it slowly.

    average <- decay * average + (1 - decay) * module, with decay = min(limit, (1 + k) / (10 + k)) for the k-th update
    (2/11, 3/12, …), so that the first, random weights are soon forgotten. k is in the state, so a resumed run goes on
    where it was.

    What changes the module's shapes (a phase with another image size) must be done to `self.module` too.

    Args:
        module: what is followed; the copy starts from its present weights.
        decay: the limit, in 0–1. 0.999 is OTTER's.
        warmup: False: the limit from the first update on.

    Raises:
        ValueError: for a decay outside its range.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, warmup: bool = True):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"the decay of a moving average is {decay}: it must be between 0 and 1")
        self.decay, self.warmup = decay, warmup
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> "MovingAverage":
        """Stays in evaluation mode: what is averaged are weights, not dropped units."""
        return super().train(False)

    def forward(self, *arguments, **options):
        """What the averaged module returns; without gradient."""
        with torch.no_grad():
            return self.module(*arguments, **options)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take a step towards the module's parameters; buffers are copied.

        Running statistics are averages already, and a mask's minus infinity has none.

        Raises:
            ValueError: if the module has other tensors than the copy.
        """
        self.updates += 1
        # Tensor arithmetic: a number that changes at every step would be a new program for XLA at every step.
        k = self.updates.float()
        decay = ((1 + k) / (10 + k)).clamp(max=self.decay) if self.warmup else torch.full_like(k, self.decay)
        for average, value in _matched(self.module.named_parameters(), module.named_parameters()):
            average.lerp_(value.to(average.dtype), (1 - decay).to(average.dtype))
        for average, value in _matched(self.module.named_buffers(), module.named_buffers()):
            average.copy_(value)


def _matched(
    averages: Iterable[tuple[str, torch.Tensor]], values: Iterable[tuple[str, torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    averages, values = dict(averages), dict(values)
    shapes = [{name: tuple(tensor.shape) for name, tensor in named.items()} for named in (averages, values)]
    if shapes[0] != shapes[1]:
        name, shape = next(item for item in {**shapes[0], **shapes[1]}.items() if item not in shapes[0].items())
        raise ValueError(
            f"a moving average has {name} as {shapes[0].get(name, 'no tensor')}, what it follows as {shape}: change "
            "both alike"
        )
    return [(averages[name], values[name]) for name in averages]
