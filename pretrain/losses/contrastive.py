"""The symmetric contrastive loss (InfoNCE) that RECLIP and CLIP train with, over one process or several.

Legend: B pairs in the batch, b of them on this process (b = B for one), D dimensions of the joint space. Row i of both
matrices is one pair.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.losses.gather import gather_features, process_count


def similarity(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor | float
) -> torch.Tensor:
    """(rows, columns) scaled similarities, image rows and text columns, in float32 at least (bfloat16 has 8 bits)."""
    with torch.autocast(image_features.device.type, enabled=False):
        return logit_scale * _at_least_float32(image_features) @ _at_least_float32(text_features).T


def info_nce(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    chunk_size: int = 0,
    gather: bool = False,
) -> torch.Tensor:
    """Mean of the image-to-text and the text-to-image cross entropy against the diagonal.

    Args:
        image_features: (b, D), normalised.
        text_features: (b, D), normalised.
        logit_scale: the inverse temperature itself, not its logarithm.
        chunk_size: image rows compared at once, 0 for all. Chunks are computed again in the backward pass: memory is
            chunk_size * B (and b / chunk_size * B) instead of b * B numbers, the result the same to rounding.
        gather: compare with the pairs of all processes, b on each. Every process then returns the loss of the whole
            batch, and the mean of the processes' gradients is its gradient.

    Returns:
        A scalar; log(B) for features that carry no information.
    """
    spread = gather and process_count() > 1
    if spread or 0 < chunk_size < len(image_features):
        return _info_nce_of_rows(image_features, text_features, logit_scale, chunk_size, spread)
    logits = similarity(image_features, text_features, logit_scale)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def over_chunks(function: Callable, chunk_size: int, rows: tuple[torch.Tensor, ...], *others) -> list:
    """Call `function(*rows, *others)` on consecutive chunks of the rows, and compute it again in the backward pass.

    On the CPU, glibc puts what a chunk returns into the hole that its matrix left, and takes new memory for the next
    matrix: the environment variable MALLOC_MMAP_THRESHOLD_=262144 prevents that (4,096 pairs in chunks of 256: 34 MiB
    instead of 175). CUDA's allocator keeps small and large tensors apart.

    Args:
        function: without randomness, pure in its arguments.
        chunk_size: rows in a chunk (the last may be smaller); 0 for one chunk, which is not computed again.
        rows: tensors of the same length, cut alike.
        others: passed on whole.

    Returns:
        The function's results, one a chunk.

    Raises:
        ValueError: for a negative chunk size.
    """
    if chunk_size < 0:
        raise ValueError(f"chunk_size is {chunk_size}: give a number of rows, or 0 for all at once")
    if chunk_size == 0 or chunk_size >= len(rows[0]):
        return [function(*rows, *others)]
    chunks = zip(*(row.split(chunk_size) for row in rows), strict=True)
    return [_recomputed(function, *chunk, *others) for chunk in chunks]


def _recomputed(function: Callable, *arguments):
    """The function's result, of which the backward pass needs no more than the arguments."""
    if arguments[0].device.type == "xla":
        # PyTorch's own does not know the device, and the compiler would undo a recomputation that it sees through.
        from torch_xla.utils.checkpoint import checkpoint as xla_checkpoint

        return xla_checkpoint(function, *arguments, preserve_rng_state=False)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _info_nce_of_rows(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    chunk_size: int,
    spread: bool,
) -> torch.Tensor:
    """InfoNCE from log-sum-exps: complete for the rows here, added up over chunks and processes for the columns.

    Nothing in it depends on the number of the process, so that XLA compiles the same program for all.
    """
    columns = gather_features(text_features) if spread else text_features
    parts = over_chunks(_log_sum_exps, chunk_size, (image_features, text_features), columns, logit_scale)
    true_pairs, by_row, by_column = zip(*parts, strict=True)
    loss_of_rows = torch.cat(by_row).mean() / 2 - torch.cat(true_pairs).mean()
    by_column = torch.stack(by_column).logsumexp(0)  # (B,) over the images of this process
    if spread:
        loss_of_rows = gather_features(loss_of_rows.reshape(1)).mean()
        by_column = gather_features(by_column.unsqueeze(0)).logsumexp(0)
    return loss_of_rows + by_column.mean() / 2


def _log_sum_exps(
    images: torch.Tensor, texts: torch.Tensor, columns: torch.Tensor, logit_scale: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Similarities of true pairs (c,), log-sum-exp of each row (c,) and of each column (B,), for c images."""
    logits = similarity(images, columns, logit_scale)
    # The true pairs from a product of their own: where they stand among the columns depends on chunk and process.
    return similarity(images, texts, logit_scale).diagonal(), logits.logsumexp(1), logits.logsumexp(0)


def _at_least_float32(features: torch.Tensor) -> torch.Tensor:
    return features if features.dtype == torch.float64 else features.float()
