"""UTA's reversed blocks: exact counts, kept sets that hang together, and no preference for the border."""

import pytest
import torch

from pretrain.modeling.masking import keep_random, keep_reversed_blocks
from pretrain.objectives.uta import kept_count

GRIDS = [(4, 4), (14, 14), (3, 8), (9, 2), (1, 6), (1, 1)]


def maps(kept: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return torch.zeros(len(kept), grid[0] * grid[1]).scatter_(1, kept, 1.0).view(-1, *grid)


def shared_sides(kept: torch.Tensor, grid: tuple[int, int]) -> float:
    """Pairs of neighbours that are both kept, a mean over images."""
    is_kept = maps(kept, grid)
    down, across = is_kept[:, 1:] * is_kept[:, :-1], is_kept[:, :, 1:] * is_kept[:, :, :-1]
    return ((down.sum((1, 2)) + across.sum((1, 2))).mean()).item()


@pytest.mark.parametrize("grid", GRIDS)
def test_every_count_is_kept_exactly_in_order_and_in_range(grid):
    for keep in range(1, grid[0] * grid[1] + 1):
        kept = keep_reversed_blocks(5, grid, keep, "cpu")
        assert kept.shape == (5, keep) and kept.dtype == torch.int64
        assert kept.min() >= 0 and kept.max() < grid[0] * grid[1]
        assert (kept.diff(dim=1) > 0).all()


@pytest.mark.parametrize(("ratio", "patches", "keep"), [(0.4, 196, 118), (0.5, 196, 98), (0.4, 16, 10), (0.0, 9, 9)])
def test_the_published_ratios_keep_the_rounded_share(ratio, patches, keep):
    assert kept_count(patches, ratio) == keep


@pytest.mark.parametrize(("grid", "keep"), [((14, 14), 118), ((14, 14), 98), ((7, 7), 29), ((4, 4), 10)])
def test_kept_patches_hang_together_more_than_random_ones(grid, keep):
    torch.manual_seed(0)
    blocks, scattered = (draw(1000, grid, keep, "cpu") for draw in (keep_reversed_blocks, keep_random))
    assert shared_sides(blocks, grid) > 1.3 * shared_sides(scattered, grid)


@pytest.mark.parametrize(("grid", "keep"), [((14, 14), 118), ((14, 14), 98), ((7, 7), 29), ((4, 4), 10)])
def test_no_border_patch_is_kept_more_often_than_a_central_one(grid, keep):
    torch.manual_seed(0)
    rate = maps(keep_reversed_blocks(4000, grid, keep, "cpu"), grid).mean(0)
    side = grid[0]
    border = torch.cat([rate[0], rate[-1], rate[:, 0], rate[:, -1]])
    centre = rate[side // 4 : side - side // 4, side // 4 : side - side // 4]
    assert border.max() < centre.min() and border.min() > 0


def test_the_four_quarters_are_kept_equally_often():
    torch.manual_seed(0)
    rate = maps(keep_reversed_blocks(8000, (14, 14), 118, "cpu"), (14, 14)).mean(0)
    error = 4.5 * (2 * 0.25 / 8000) ** 0.5  # standard deviations of the difference of two shares
    for other in (rate.flip(0), rate.flip(1)):
        torch.testing.assert_close(rate, other, atol=error, rtol=0)


def test_images_differ_and_a_generator_repeats_them():
    kept = [keep_reversed_blocks(64, (14, 14), 98, "cpu", torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*kept) and len(kept[0].unique(dim=0)) == 64


@pytest.mark.parametrize("keep", [0, 17])
def test_an_impossible_count_is_refused(keep):
    with pytest.raises(ValueError, match=f"cannot keep {keep} patches of a 4 x 4 grid: keep between 1 and 16"):
        keep_reversed_blocks(2, (4, 4), keep, "cpu")
