"""Features of all processes on each of them, with gradient: what makes the batch of a contrastive loss global.

Three cases behind one name: torch.distributed (CPU, CUDA), torch-xla with several processes, and one process, where
nothing happens (XLA's single-program mode is one process: its compiler inserts the exchange itself). torch-xla is
looked at only if the program has imported it.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable


def process_count() -> int:
    """How many processes train together."""
    if (xla := _xla_runtime()) is not None:
        return xla.world_size()
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process among them, from 0."""
    if (xla := _xla_runtime()) is not None:
        return xla.global_ordinal()
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def rank_offset(rows: int) -> int:
    """Where this process's `rows` rows begin in what `gather_features` returns."""
    return process_index() * rows


def gather_features(features: torch.Tensor) -> torch.Tensor:
    """Stack the rows of all processes, in their order; the gradient comes back from all of them.

    Backward adds up what every process's loss says about this process's rows. With the mean of the processes' losses as
    the loss, and gradients averaged over processes (as DistributedDataParallel does), that is the whole batch's.

    Args:
        features: (b, …), the same shape on every process.

    Returns:
        (processes * b, …); the argument itself for one process.
    """
    if process_count() == 1:
        return features
    if _xla_runtime() is not None:
        return _XlaGather.apply(features)
    return torch.cat(differentiable.all_gather(features))


class _XlaGather(torch.autograd.Function):
    """All-gather whose gradient is added up over processes; torch-xla's own keeps that of one process's loss only."""

    @staticmethod
    def forward(ctx, features: torch.Tensor) -> torch.Tensor:
        import torch_xla.core.xla_model as xm

        return xm.all_gather(features, dim=0)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        import torch_xla.core.xla_model as xm

        return xm.reduce_scatter(
            xm.REDUCE_SUM, gradient.contiguous(), scale=1.0, scatter_dim=0, shard_count=process_count()
        )


def _xla_runtime():
    """torch-xla's runtime module if several processes run on it, else None."""
    # Imported but without a device of its own (PJRT_DEVICE is set where there is one): training is elsewhere.
    if sys.modules.get("torch_xla") is None or "PJRT_DEVICE" not in os.environ:
        return None
    import torch_xla.runtime as runtime

    return runtime if not runtime.is_spmd() and runtime.world_size() > 1 else None
