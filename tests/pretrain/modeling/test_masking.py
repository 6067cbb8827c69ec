"""Token dropping: exact counts, where the kept patches lie, and how often each is kept."""

import math

import pytest
import torch

from pretrain.modeling.masking import SAMPLERS, keep_patches

GRIDS = [(4, 4), (7, 7), (14, 14), (3, 8), (9, 2), (1, 6), (1, 1)]


def cells(kept: torch.Tensor, width: int) -> list[set[tuple[int, int]]]:
    """Row and column of every kept patch, one set an image."""
    return [{divmod(index, width) for index in row} for row in kept.tolist()]


def connected(patches: set[tuple[int, int]]) -> bool:
    """Whether one can walk between any two patches over shared sides."""
    seen, border = set(), [next(iter(patches))]
    while border:
        row, column = border.pop()
        if (row, column) in patches and (row, column) not in seen:
            seen.add((row, column))
            border += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    return seen == patches


def shares(kind: str, grid: tuple[int, int], keep: int, images: int = 20_000) -> torch.Tensor:
    """How often each patch was kept."""
    torch.manual_seed(0)
    kept = keep_patches(kind, images, grid, keep, "cpu")
    return torch.bincount(kept.flatten(), minlength=grid[0] * grid[1]) / images


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_count_is_kept_exactly_in_order_and_in_range(kind, grid):
    patches = grid[0] * grid[1]
    for keep in range(1, patches + 1):
        kept = keep_patches(kind, 6, grid, keep, "cpu")
        assert kept.shape == (6, keep) and kept.dtype == torch.int64
        assert kept.min() >= 0 and kept.max() < patches
        assert (kept.diff(dim=1) > 0).all()  # ascending, so distinct


@pytest.mark.parametrize("kind", SAMPLERS)
def test_images_differ_and_a_seed_repeats_them(kind):
    torch.manual_seed(3)
    first = keep_patches(kind, 64, (14, 14), 49, "cpu")
    torch.manual_seed(3)
    assert torch.equal(first, keep_patches(kind, 64, (14, 14), 49, "cpu"))
    assert len(first.unique(dim=0)) > (3 if kind == "grid" else 30)  # grid: 2 x 2 windows have four offsets
    own = [keep_patches(kind, 8, (14, 14), 49, "cpu", torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*own)


@pytest.mark.parametrize(
    ("kind", "grid", "keep"),
    [("random", (4, 4), 5), ("grid", (4, 4), 4), ("grid", (4, 4), 7), ("grid", (5, 3), 4), ("grid", (4, 6), 11)],
)
def test_every_patch_is_kept_equally_often(kind, grid, keep):
    share = keep / (grid[0] * grid[1])
    error = 4.5 * math.sqrt(share * (1 - share) / 20_000)  # standard deviations of a count
    torch.testing.assert_close(shares(kind, grid, keep), torch.full((grid[0] * grid[1],), share), atol=error, rtol=0)


def test_random_keeps_pairs_of_patches_independently_of_their_distance():
    torch.manual_seed(0)
    kept = keep_patches("random", 20_000, (3, 3), 4, "cpu")
    seen = torch.zeros(len(kept), 9).scatter_(1, kept, 1.0)
    together = (seen.T @ seen / len(kept))[~torch.eye(9, dtype=torch.bool)]
    torch.testing.assert_close(together, torch.full_like(together, 4 * 3 / (9 * 8)), atol=0.013, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_block_is_connected_and_fills_the_smallest_near_square(grid):
    height, width = grid
    for keep in range(1, height * width + 1):
        for patches in cells(keep_patches("block", 8, grid, keep, "cpu"), width):
            rows, columns = ({p[axis] for p in patches} for axis in (0, 1))
            down, across = max(rows) - min(rows) + 1, max(columns) - min(columns) + 1
            assert connected(patches)
            assert down * across - keep < across  # less than a row is cut off
            if math.ceil(math.sqrt(keep)) <= min(grid):
                assert 0 <= across - down <= 1 and across == math.ceil(math.sqrt(keep))


def test_a_block_lies_everywhere_equally_often():
    torch.manual_seed(0)
    kept = keep_patches("block", 9000, (4, 4), 4, "cpu")  # 2 x 2 blocks: 9 places
    places, counts = kept.unique(dim=0, return_counts=True)
    assert len(places) == 9 and (counts - 1000).abs().max() < 4.5 * math.sqrt(9000 * 8 / 81)


def test_a_block_cut_off_at_every_corner_equally_often():
    torch.manual_seed(0)
    kept = keep_patches("block", 8000, (2, 2), 3, "cpu")
    missing, counts = (6 - kept.sum(1)).unique(return_counts=True)
    assert missing.tolist() == [0, 1, 2, 3] and (counts - 2000).abs().max() < 4.5 * math.sqrt(1500)


@pytest.mark.parametrize(("grid", "window"), [((4, 4), 2), ((14, 14), 2), ((14, 14), 7), ((6, 9), 3), ((5, 4), 1)])
def test_a_grid_keeps_one_patch_of_every_window_at_one_offset(grid, window):
    height, width = grid
    keep = height * width // window**2
    for patches in cells(keep_patches("grid", 32, grid, keep, "cpu"), width):
        assert {(r // window, c // window) for r, c in patches} == {
            (r, c) for r in range(height // window) for c in range(width // window)
        }
        assert len({(r % window, c % window) for r, c in patches}) == 1


def test_a_grid_of_any_count_is_spaced_evenly():
    """Within a row neighbours are w/n patches apart, rounded either way, and so are the rows."""
    for keep in range(2, 14 * 14 + 1):
        for patches in cells(keep_patches("grid", 4, (14, 14), keep, "cpu"), 14):
            rows = sorted({r for r, _ in patches})
            counts = [sum(r == row for r, _ in patches) for row in rows]
            assert max(counts) - min(counts) <= 1
            gaps = [b - a for a, b in zip(rows, rows[1:], strict=False)]
            assert all(abs(gap - 14 / len(rows)) < 1 for gap in gaps)
            for row, count in zip(rows, counts, strict=True):
                columns = sorted(c for r, c in patches if r == row)
                assert all(abs(b - a - 14 / count) < 1 for a, b in zip(columns, columns[1:], strict=False))


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("keep", [0, 17, -1])
def test_an_impossible_count_is_refused(kind, keep):
    with pytest.raises(ValueError, match=f"cannot keep {keep} patches of a 4 x 4 grid: keep between 1 and 16"):
        keep_patches(kind, 2, (4, 4), keep, "cpu")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="token dropping is 'blocks': one of random, block, grid"):
        keep_patches("blocks", 2, (4, 4), 4, "cpu")
