"""Projectors: small networks from a tower's feature to the space that one loss works in, with batch norm.

The statistics of batch norm are the whole batch's, over all processes and on any device. torch's own SyncBatchNorm does
that on CUDA only. A projector sees the embeddings of all rows at once, so it belongs into an objective's `loss`, not
into `encode`.
"""

from collections.abc import Callable

import torch
from torch import nn

# Rows (b, …) to the rows of all processes, with gradient; the rows themselves for one process.
Gather = Callable[[torch.Tensor], torch.Tensor]


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm of (b, D) rows, b of them on each process; running statistics are the same on all.

    Computed in float32 at least. In evaluation mode, torch's own.

    Args:
        features: D.
        affine: whether a learned scale and shift follow.
        gather: how processes exchange statistics (`losses.gather.gather_features`); None: they do not.
    """

    def __init__(self, features: int, affine: bool = True, gather: Gather | None = None):
        super().__init__(features, affine=affine)
        self._gather = gather or _alone

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(b, D), normalised over all processes' rows."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        with torch.autocast(rows.device.type, enabled=False):
            if not self.training:
                return super().forward(rows)
            means = self._gather(rows.mean(0, keepdim=True))
            if len(means) == 1:
                return super().forward(rows)
            # Two small exchanges instead of one with E[x²] - E[x]², which loses digits where the mean is large.
            mean = means.mean(0)
            variance = self._gather((rows - mean).square().mean(0, keepdim=True)).mean(0)
            self._remember(mean.detach(), variance.detach(), len(rows) * len(means))
            normalised = (rows - mean) * (variance + self.eps).rsqrt()
            return normalised * self.weight + self.bias if self.affine else normalised

    def _remember(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))  # as torch keeps it
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


def _alone(rows: torch.Tensor) -> torch.Tensor:
    return rows


class Projector(nn.Sequential):
    """A multi-layer perceptron: (b, D) features to (b, E). Hidden layers are followed by batch norm and ReLU.

    Args:
        inputs: D.
        hidden: width of the hidden layers.
        outputs: E.
        layers: linear layers in all; 1: just one, without bias.
        last_norm: what follows the last layer: none, affine (batch norm with scale and shift) or plain (without).
        gather: as for `GlobalBatchNorm`.

    Raises:
        ValueError: for fewer than one layer, or another `last_norm`.
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int, layers: int = 3, last_norm: str = "none",
        gather: Gather | None = None,
    ):  # fmt: skip
        if layers < 1:
            raise ValueError(f"layers is {layers}: a projector has at least 1")
        if last_norm not in ("none", "affine", "plain"):
            raise ValueError(f"last_norm is {last_norm!r}: use none, affine or plain")
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        parts: list[nn.Module] = []
        for given, made in zip(widths[:-2], widths[1:-1], strict=True):
            # No bias before a batch norm: it would take it away again.
            parts += [nn.Linear(given, made, bias=False), GlobalBatchNorm(made, gather=gather), nn.ReLU(inplace=True)]
        parts.append(nn.Linear(widths[-2], outputs, bias=last_norm == "none" and layers > 1))
        if last_norm != "none":
            parts.append(GlobalBatchNorm(outputs, affine=last_norm == "affine", gather=gather))
        super().__init__(*parts)
