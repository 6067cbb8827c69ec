"""Resample learned position tables when the image size changes between phases (RECLIP, section 3).

One rule everywhere, timm's: bicubic with anti-aliasing on the grid part; prefix tokens keep their own rows.
Text tables need no resampling: a shorter phase uses their first rows.
"""

import math

import torch
from timm.layers import resample_abs_pos_embed


def resample_grid(table: torch.Tensor, new_size: int | tuple[int, int], num_prefix_tokens: int = 0) -> torch.Tensor:
    """Resample a square position table to a new grid.

    Args:
        table: (1, k + H*H, D), the k prefix rows first.
        new_size: the new grid in tokens, a side or (height, width).
        num_prefix_tokens: k, rows that belong to class or register tokens and are carried over untouched.

    Returns:
        (1, k + h*w, D) in the table's dtype; the table itself when the grid does not change.

    Raises:
        ValueError: if the grid part of the table is not square.
    """
    height, width = (new_size, new_size) if isinstance(new_size, int) else new_size
    tokens = table.shape[1] - num_prefix_tokens
    side = math.isqrt(max(tokens, 0))
    if side * side != tokens or side == 0:
        raise ValueError(
            f"a position table of {table.shape[1]} rows with {num_prefix_tokens} prefix rows leaves {tokens}, which is "
            "not a square grid; give the number of prefix tokens that the table was made with"
        )
    if (height, width) == (side, side):
        return table
    return resample_abs_pos_embed(table, [height, width], [side, side], num_prefix_tokens=num_prefix_tokens)
