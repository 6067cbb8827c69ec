"""Cropped position embedding against torchvision's RoIAlign, PyTorch's grid_sample and cases done by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align
from torchvision.transforms import RandomResizedCrop

from pretrain.modeling.cropped_positions import crop_positions, sample_boxes

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def table(side: int, dims: int = 5) -> torch.Tensor:
    return torch.randn(1, side * side, dims, generator=torch.Generator().manual_seed(side))


def upsampled(table: torch.Tensor, up: int) -> torch.Tensor:
    """(1, D, up, up) by PyTorch."""
    side = math.isqrt(table.shape[1])
    image = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(image, size=(up, up), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("side", [1, 2, 4, 7, 14])
def test_the_whole_image_on_the_tables_own_grid_is_the_table(side):
    source = table(side)
    out = crop_positions(source, WHOLE.expand(3, -1), up=side)
    torch.testing.assert_close(out, source.expand(3, -1, -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("side", "up"), [(4, 18), (4, 4), (7, 10), (14, 64)])
def test_equals_roi_align_with_one_point_a_cell(side, up):
    source = table(side)
    boxes = sample_boxes(40, generator=torch.Generator().manual_seed(up))
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes * up], dim=1)
    theirs = roi_align(upsampled(source, up), rois, side, sampling_ratio=1, aligned=True)
    ours = crop_positions(source, boxes, up).reshape(40, side, side, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("side", "up"), [(4, 18), (14, 64)])
def test_equals_grid_sample(side, up):
    source = table(side)
    boxes = sample_boxes(10, generator=torch.Generator().manual_seed(side))
    cells = (torch.arange(side) + 0.5) / side
    points = []
    for left, top, right, bottom in boxes.tolist():
        y, x = torch.meshgrid(top + cells * (bottom - top), left + cells * (right - left), indexing="ij")
        points.append(torch.stack([x, y], dim=-1) * 2 - 1)
    image = upsampled(source, up).expand(10, -1, -1, -1)
    theirs = F.grid_sample(image, torch.stack(points), padding_mode="border", align_corners=False)
    ours = crop_positions(source, boxes, up).reshape(10, side, side, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_a_quarter_of_the_image_by_hand():
    """The right upper quarter of columns numbered 0 … 3: cell centres at 2.25, 2.75, 3.25 and 3.75 patches."""
    columns = torch.arange(4.0).repeat(4).view(1, 16, 1)
    out = crop_positions(columns, torch.tensor([[0.5, 0.0, 1.0, 0.5]]), up=4).view(4, 4)
    torch.testing.assert_close(out, torch.tensor([1.75, 2.25, 2.75, 3.0]).expand(4, 4))  # minus a half; the edge holds
    rows = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)
    out = crop_positions(rows, torch.tensor([[0.5, 0.0, 1.0, 0.5]]), up=4).view(4, 4)
    torch.testing.assert_close(out, torch.tensor([0.0, 0.25, 0.75, 1.25])[:, None].expand(4, 4))


def test_the_paper_upsamples_14_to_64():
    source, boxes = table(14), sample_boxes(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(crop_positions(source, boxes), crop_positions(source, boxes, up=64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_the_tables_also_under_autocast(dtype):
    boxes = sample_boxes(3)
    plain = crop_positions(table(4).to(dtype), boxes)
    with torch.autocast("cpu", torch.bfloat16):
        inside = crop_positions(table(4).to(dtype), boxes)
    assert plain.dtype == inside.dtype == dtype and torch.equal(plain, inside)


def test_the_table_learns_through_it():
    source = table(4).double().float().requires_grad_()
    crop_positions(source, torch.tensor([[0.0, 0.0, 0.4, 0.4]]), up=4).sum().backward()
    touched = source.grad.abs().sum(-1).view(4, 4) > 0
    assert touched[:2, :2].all() and not touched[3].any() and not touched[:, 3].any()


def test_memory_stays_that_of_the_result():
    """The upsampled table of every image alone would be 64 * 64 / 196 times the result."""
    source, boxes = table(14, dims=32).requires_grad_(), sample_boxes(8)
    with Largest() as largest:
        out = crop_positions(source, boxes)
        out.sum().backward()
    assert largest.numel == out.numel()


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().size() >= tensor.numel():
                self.numel = max(self.numel, tensor.numel())
        return out


def test_boxes_are_those_of_random_resized_crop():
    """Areas and ratios of the boxes that fit at once have torchvision's own distribution (of the first try)."""
    torch.manual_seed(0)
    boxes = sample_boxes(20_000)
    left, top, right, bottom = boxes.T
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-6 and (left < right).all() and (top < bottom).all()
    width, height = right - left, bottom - top
    fits = (width < 1 - 1e-6) & (height < 1 - 1e-6)
    ratio = (width / height)[fits]
    assert 0.5 - 1e-4 <= ratio.min() and ratio.max() <= 2 + 1e-3
    image, theirs = torch.zeros(1, 1000, 1000), []
    for _ in range(4000):
        y, x, h, w = RandomResizedCrop.get_params(image, (0.1, 1.0), (0.5, 2.0))
        theirs.append([x / 1000, y / 1000, (x + w) / 1000, (y + h) / 1000])
    x0, y0, x1, y1 = torch.tensor(theirs).T
    for ours, reference in ((left, x0), (top, y0), (right, x1), (bottom, y1), (width * height, (x1 - x0) * (y1 - y0))):
        quantiles = torch.linspace(0.1, 0.9, 9)
        torch.testing.assert_close(ours[fits].quantile(quantiles), reference.quantile(quantiles), atol=0.03, rtol=0)


def test_a_side_longer_than_the_image_is_the_whole_side():
    boxes = sample_boxes(200, scale=(0.9, 1.0), aspect=(2.0, 2.0))
    torch.testing.assert_close(boxes[:, [0, 2]], torch.tensor([0.0, 1.0]).expand(200, 2))
    height = boxes[:, 3] - boxes[:, 1]
    assert (height**2 * 2 >= 0.9 - 1e-4).all() and (height < 1).all()


def test_a_generator_repeats_boxes():
    pair = [sample_boxes(5, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*pair)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_an_impossible_scale_is_refused(scale):
    with pytest.raises(ValueError, match=r"scale \(.*\) is no range above 0 and up to 1"):
        sample_boxes(2, scale=scale)


def test_an_impossible_aspect_is_refused():
    with pytest.raises(ValueError, match=r"aspect \(-1.0, 2.0\) is no range above 0"):
        sample_boxes(2, aspect=(-1.0, 2.0))


def test_a_table_with_a_class_token_is_refused():
    with pytest.raises(ValueError, match="17 positions are no square grid: give the rows of the patches only"):
        crop_positions(torch.zeros(1, 17, 4), WHOLE)


def test_a_smaller_upsampled_grid_is_refused():
    with pytest.raises(ValueError, match="upsampled grid 3 is smaller than the table's 4: use 4 or more"):
        crop_positions(table(4), WHOLE, up=3)
