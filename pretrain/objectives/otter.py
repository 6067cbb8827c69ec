"""OTTER (arXiv 2112.09445, section 3): the contrastive loss with soft targets from optimal transport, because texts
and images of a batch match beyond their pairs.

loss = alpha · InfoNCE + (1 - alpha) · KL as in `distillation`, but for the targets: with S from the teacher
(image_weight and text_weight 1), M = rows of Sinkhorn(-S, epsilon, iterations), each divided by its sum; one plan for
images and one for texts. The pairs themselves are InfoNCE's part: their cost is set so high that no mass goes there.
With one temperature the whole is the cross entropy with alpha · identity + (1 - alpha) · M, up to the entropy of M.
"""

import math
from dataclasses import dataclass

import torch
from open_clip import CustomTextCLIP

from pretrain.config import ConfigError, ModelConfig
from pretrain.losses.sinkhorn import sinkhorn
from pretrain.losses.soft_targets import true_pairs
from pretrain.objectives.distillation import Distillation, DistillationOptions

_REMOVED = -200.0  # similarity of what must get no mass; OTTER's code: -100 of v·v and of t·t each


@dataclass
class OtterOptions(DistillationOptions):
    """Options of `otter`; the defaults are the paper's."""

    image_weight: float = 1.0  # γv
    text_weight: float = 1.0  # γt
    epsilon: float = 0.15  # λ, the weight of the plan's entropy, in units of cosine
    iterations: int = 5
    remove_diagonal: bool = True  # no mass for the pairs themselves
    # With several processes, OTTER's code removes the entries (i, i) of every process's rows, although only the first
    # one's pairs are there, and leaves the true pairs of the others. True does the same.
    compat_rank0_diagonal: bool = False


class Otter(Distillation):
    """`Distillation` with targets from a transport plan over the pairs of all processes.

    Raises:
        ConfigError: for an option outside its range.
    """

    def __init__(self, model: CustomTextCLIP, config: ModelConfig, options: OtterOptions | None = None):
        super().__init__(model, config, options)

    def _default_options(self) -> OtterOptions:
        return OtterOptions()

    def _check_options(self) -> None:
        super()._check_options()
        options = self.options
        if not 0 < options.epsilon < math.inf or options.iterations < 1:
            raise ConfigError(
                f"objective.options: epsilon {options.epsilon} must be above 0 and iterations {options.iterations} at "
                "least 1 (the paper's: 0.15 and 5)"
            )

    def targets(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Distillation.targets`."""
        return tuple(self._rows_of_plan(s) for s in self._similarities(images, texts))

    def _rows_of_plan(self, similarities: torch.Tensor) -> torch.Tensor:
        options = self.options
        if options.remove_diagonal:
            similarities = similarities.masked_fill(self._removed(similarities), _REMOVED)
        plan = sinkhorn(-similarities, options.epsilon, options.iterations, gather=True)
        return plan / plan.sum(1, keepdim=True)

    def _removed(self, similarities: torch.Tensor) -> torch.Tensor:
        if self.options.compat_rank0_diagonal:
            rows, columns = (torch.arange(n, device=similarities.device) for n in similarities.shape)
            return rows.unsqueeze(1) == columns
        return true_pairs(len(similarities), similarities.device, gather=True)
