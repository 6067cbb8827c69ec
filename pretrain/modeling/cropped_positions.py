"""Cropped position embedding (RO-ViT, arXiv 2305.07011, section 3.2): an image takes the positions of a random region.

The table is upsampled to a detector's grid (14 to 64 in the paper), a random box of that is cut out for every image,
and the box is resized back to the table's own grid. The whole image then looks like a region of a larger one, which
is what a detector will make of it. Training only: evaluation adds the plain table.

Both resizings are bilinear and axis-aligned, so that they are products with two small matrices: no (B, D, up, up)
tensor is ever made, and every device can do it. One point is read at the centre of every output cell; RO-ViT's own
code averages several, whose result for the whole image would not be the table.
"""

import math

import torch

UP = 64 / 14  # the paper's pretraining grid of 224 px and its detector's grid of 1024 px


def sample_boxes(
    batch: int,
    scale: tuple[float, float] = (0.1, 1.0),
    aspect: tuple[float, float] = (0.5, 2.0),
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Random boxes as torchvision's RandomResizedCrop draws them, without its retries.

    Args:
        batch: B, the number of boxes.
        scale: range of the area as a share of the image, uniform.
        aspect: range of width / height, uniform in the logarithm.
        device: where to draw.
        generator: of that device; None: the device's global one.

    Returns:
        (B, 4) left, top, right, bottom in 0–1. A side that would be longer than the image is the whole side
        (torchvision draws again), so that the area of such a box is smaller than the one drawn.

    Raises:
        ValueError: for a range that is empty or not of positive numbers, or an area above 1.
    """
    for name, (low, high), limit in (("scale", scale, 1.0), ("aspect", aspect, math.inf)):
        if not 0 < low <= high <= limit:
            raise ValueError(f"{name} ({low}, {high}) is no range above 0{' and up to 1' if limit == 1 else ''}")
    area, ratio, left, top = torch.rand(4, batch, device=device, generator=generator)
    area = scale[0] + area * (scale[1] - scale[0])
    ratio = (math.log(aspect[0]) + ratio * math.log(aspect[1] / aspect[0])).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = left * (1 - width), top * (1 - height)
    return torch.stack([left, top, left + width, top + height], dim=1)


def crop_positions(table: torch.Tensor, boxes: torch.Tensor, up: int = 0) -> torch.Tensor:
    """Positions of regions: the boxes cut out of the upsampled table and resized to the table's grid.

    Args:
        table: (1, N, D), positions of the patches of a square grid, without prefix rows.
        boxes: (B, 4) left, top, right, bottom in 0–1 (`sample_boxes`).
        up: side of the upsampled grid in patches; 0: 64/14 of the table's, as in the paper.

    Returns:
        (B, N, D) in the table's dtype; the table itself (to rounding) for the box of the whole image with `up` equal to
        the table's side.

    Raises:
        ValueError: if the table is not square, or `up` is smaller than its side.
    """
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1] or side == 0:
        raise ValueError(f"{table.shape[1]} positions are no square grid: give the rows of the patches only")
    up = up or round(side * UP)
    if up < side:
        raise ValueError(f"the upsampled grid {up} is smaller than the table's {side}: use {side} or more")
    with torch.autocast(table.device.type, enabled=False):
        out = _crop(table.float().reshape(side, side, -1), boxes.float(), up)
    return out.to(table.dtype)


def _crop(grid: torch.Tensor, boxes: torch.Tensor, up: int) -> torch.Tensor:
    """(B, side * side, D) from a grid (side, side, D)."""
    side = len(grid)
    upsampling = _reading(side, _centres(up, grid.device))  # (up, side)
    left, top, right, bottom = boxes.unsqueeze(-1).unbind(1)  # each (B, 1)
    cells = _centres(side, grid.device)
    columns = _reading(up, left + cells * (right - left)) @ upsampling  # (B, side, side): output cell, table cell
    rows = _reading(up, top + cells * (bottom - top)) @ upsampling
    # Columns first, rows second: the product of all three at once would hold N * N weights for every image.
    across = torch.einsum("bkl,jld->bjkd", columns, grid)
    return (rows @ across.flatten(2)).reshape(len(boxes), side * side, -1)


def _centres(size: int, device: torch.device) -> torch.Tensor:
    """(size,): the centres of `size` equal cells of 0–1."""
    return (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size


def _reading(size: int, points: torch.Tensor) -> torch.Tensor:
    """(…, P, size): weights that read a row of `size` cells at points (…, P) in 0–1, linearly between cell centres."""
    place = (points * size - 0.5).clamp(0, size - 1).unsqueeze(-1)
    return (1 - (place - torch.arange(size, device=points.device)).abs()).clamp(min=0)
