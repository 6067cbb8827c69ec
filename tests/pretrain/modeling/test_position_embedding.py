"""Position tables against timm's and open_clip's own resampling."""

import types

import pytest
import torch
from open_clip.model import resize_pos_embed
from timm.layers import resample_abs_pos_embed

from pretrain.modeling.position_embedding import resample_grid


def table(side: int, prefix: int = 0, dims: int = 12) -> torch.Tensor:
    return torch.randn(1, prefix + side * side, dims, generator=torch.Generator().manual_seed(side))


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 14), (8, 4), (10, 2), (10, 14), (3, 5)])
@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_identical_to_timm(old, new, prefix):
    source = table(old, prefix)
    theirs = resample_abs_pos_embed(source, [new, new], num_prefix_tokens=prefix)
    assert torch.equal(resample_grid(source, new, prefix), theirs)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 14), (8, 4), (8, 14)])
def test_identical_to_open_clip(old, new):
    source = table(old, prefix=1)
    state = {"visual.positional_embedding": source[0].clone()}
    resize_pos_embed(state, types.SimpleNamespace(visual=types.SimpleNamespace(grid_size=(new, new))))
    assert torch.equal(resample_grid(source, new, 1)[0], state["visual.positional_embedding"])


def test_equal_size_returns_the_table_itself():
    source = table(6, 1)
    assert resample_grid(source, 6, 1) is source


@pytest.mark.parametrize("new", [2, 9, (3, 7)])
def test_a_constant_table_stays_constant(new):
    out = resample_grid(torch.full((1, 25, 4), 0.375), new)
    torch.testing.assert_close(out, torch.full_like(out, 0.375))


def test_prefix_rows_are_untouched():
    source = table(5, 3)
    assert torch.equal(resample_grid(source, 8, 3)[:, :3], source[:, :3])


def test_rectangles_keep_row_order():
    rows = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)  # the value is the row number
    out = resample_grid(rows, (4, 7)).view(4, 7)
    torch.testing.assert_close(out, torch.arange(4.0)[:, None].expand(4, 7), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    assert resample_grid(table(4).to(dtype), 6).dtype == dtype


@pytest.mark.parametrize(("rows", "prefix"), [(17, 0), (16, 1), (1, 1), (3, 5)])
def test_a_table_that_is_not_square_is_refused(rows, prefix):
    with pytest.raises(ValueError, match=f"{rows} rows with {prefix} prefix rows .* not a square grid"):
        resample_grid(torch.zeros(1, rows, 4), 8, prefix)
