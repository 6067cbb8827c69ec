"""Which image patches a training step keeps: random, block and grid token dropping, and UTA's reversed blocks.

Random is FLIP's (arXiv 2212.00794); block ("keep a single block") and grid ("one patch in each 2 x 2 window") are the
two other maskings that CLIPA compares with resizing (arXiv 2305.07017, section 3). CLIPA published no code for the
last two: the exact geometry here, for any number of kept patches, is ours. The encoder that drops the others is in
`image_tower`. Everything is arithmetic on static shapes, so that XLA compiles it once.
"""

import math

import torch

Grid = tuple[int, int]  # height and width in patches


def keep_random(
    batch: int, grid: Grid, keep: int, device: torch.device | str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Patches drawn without replacement, every set equally likely. See `keep_patches` for arguments and result."""
    _check(grid, keep)
    order = torch.rand(batch, grid[0] * grid[1], device=device, generator=generator).argsort(1)
    return order[:, :keep].sort(1).values


def keep_block(
    batch: int, grid: Grid, keep: int, device: torch.device | str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One block at a uniformly random place. See `keep_patches` for arguments and result.

    The block is the smallest rectangle, as near to a square as the grid allows, that holds `keep` patches: its width is
    ceil(sqrt(keep)) (more where the grid is too low for that), its height ceil(keep / width). Where the rectangle holds
    more than `keep`, the rest is cut off one end of its first or last row, which end and which row at random; what is
    left hangs together by patch sides.
    """
    _check(grid, keep)
    height, width = grid
    across = min(width, max(math.isqrt(keep - 1) + 1, -(-keep // height)))
    down = -(-keep // across)
    cell = torch.arange(keep, device=device)
    row, column = cell // across, cell % across
    top, left, flip_row, flip_column = torch.rand(4, batch, 1, device=device, generator=generator)
    row = torch.where(flip_row < 0.5, row, down - 1 - row) + _integer_below(top, height - down + 1)
    column = torch.where(flip_column < 0.5, column, across - 1 - column) + _integer_below(left, width - across + 1)
    return (row * width + column).sort(1).values


def keep_grid(
    batch: int, grid: Grid, keep: int, device: torch.device | str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """One patch of every cell, at the same place in all cells of an image. See `keep_patches`.

    The image is cut into bands, and each band into cells, as many cells as patches are kept and as near to squares as
    that allows; cells that are not a whole number of patches long end at the nearest ones. A quarter of the patches is
    thus one in each 2 x 2 window, with one random offset an image. Where bands have unequal numbers of cells, which
    band has more is random. Every patch of the image is equally likely to be kept.
    """
    _check(grid, keep)
    height, width = grid
    bands = _bands(grid, keep)
    cells = [keep // bands + (band < keep % bands) for band in range(bands)]
    band = torch.tensor([i for i, count in enumerate(cells) for _ in range(count)], device=device)
    cell = torch.tensor([j for count in cells for j in range(count)], device=device)
    count = torch.tensor([count for count in cells for _ in range(count)], device=device)
    turn, down, across = torch.rand(3, batch, 1, device=device, generator=generator)
    band = (band + _integer_below(turn, bands)) % bands
    # (i * height + t) // bands, with t uniform below height, reaches every row with equal chance and never twice.
    row = (band * height + _integer_below(down, height)) // bands
    column = (cell * width + _integer_below(across, width)) // count
    return (row * width + column).sort(1).values


_BLOCKS = 16  # drawn for an image; the first few fill the wanted number
_LEAST_AREA = 1 / 12  # of the image, in one block: BEiT's 16 of 196 patches
_LONGEST = 1 / 0.3  # a block's sides are at most so unequal, as in BEiT


def keep_reversed_blocks(
    batch: int, grid: Grid, keep: int, device: torch.device | str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The patches of random blocks, block after block until there are `keep`. See `keep_patches` for arguments, result.

    BEiT (arXiv 2106.08254, algorithm 1) masks such blocks; UTA (arXiv 2405.19009) keeps them and drops the rest
    ("reversed"), so that what is kept hangs together and border patches, which fewer blocks reach, are not preferred.
    UTA published no code for it. As in BEiT a block has a twelfth of the image or more, sides at most 1 : 0.3, and lies
    anywhere inside; as only K patches shall be kept, one has K at most, and the last is cut off along its rows. Where
    all blocks hold fewer than K, the patches nearest to the middle of the image follow.
    """
    _check(grid, keep)
    height, width = grid
    area, ratio, top, left, flip_row, flip_column = torch.rand(6, batch, _BLOCKS, 1, device=device, generator=generator)
    least = min(keep, height * width * _LEAST_AREA)
    area, ratio = least + area * (keep - least), (math.log(_LONGEST) * (2 * ratio - 1)).exp()
    down = (area * ratio).sqrt().round().clamp(1, height)
    across = (area / ratio).sqrt().round().clamp(1, width)
    top, left = _integer_below(top, height - down + 1), _integer_below(left, width - across + 1)
    patch = torch.arange(height * width, device=device)
    row, column = patch // width - top, patch % width - left  # (B, blocks, N), from the block's corner
    inside = (row >= 0) & (row < down) & (column >= 0) & (column < across)
    row = torch.where(flip_row < 0.5, row, down - 1 - row)
    column = torch.where(flip_column < 0.5, column, across - 1 - column)
    # A patch has the number of its first block, and behind the point its place in it.
    place = torch.arange(_BLOCKS, device=device)[:, None] + (row * across + column) / (down * across + 1)
    down_off, across_off = (2 * (patch // width) + 1 - height).abs(), (2 * (patch % width) + 1 - width).abs()
    from_middle = torch.maximum(down_off / height, across_off / width)
    place = torch.where(inside, place, _BLOCKS + from_middle).amin(1)
    return place.argsort(1)[:, :keep].sort(1).values


SAMPLERS = {"random": keep_random, "block": keep_block, "grid": keep_grid}


def keep_patches(
    kind: str,
    batch: int,
    grid: Grid,
    keep: int,
    device: torch.device | str,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw the patches to keep, anew for every image.

    Args:
        kind: random, block or grid.
        batch: B, the number of images.
        grid: height and width of the image in patches.
        keep: K, how many patches of each image stay.
        device: where to draw, the images' own.
        generator: of that device; None: the device's global one (XLA has no other).

    Returns:
        (B, K) int64, ascending indices into the patches in row order.

    Raises:
        ValueError: for an unknown kind, or a K below 1 or above the number of patches.
    """
    if kind not in SAMPLERS:
        raise ValueError(f"token dropping is {kind!r}: one of {', '.join(SAMPLERS)}")
    return SAMPLERS[kind](batch, grid, keep, device, generator)


def _check(grid: Grid, keep: int) -> None:
    if not 1 <= keep <= grid[0] * grid[1]:
        raise ValueError(
            f"cannot keep {keep} patches of a {grid[0]} x {grid[1]} grid: keep between 1 and {grid[0] * grid[1]}"
        )


def _integer_below(uniform: torch.Tensor, limit: int | torch.Tensor) -> torch.Tensor:
    """Uniform numbers in [0, 1) as integers in [0, limit); the minimum is for devices whose numbers may round to 1."""
    return (uniform * limit).long().clamp(max=limit - 1)


def _bands(grid: Grid, keep: int) -> int:
    """How many rows of cells: near the number that makes cells square; a divisor of `keep` if one is within twice."""
    height, width = grid
    square = math.sqrt(keep * height / width)
    possible = range(-(-keep // width), min(height, keep) + 1)
    return min(possible, key=lambda n: abs(math.log(n / square)) + (math.log(2) if keep % n else 0))
