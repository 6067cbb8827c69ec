"""Distillation of image embeddings into regions, on the fly and from files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from torch import nn

from ovd.data.regions import place_regions, precompute_regions, read_regions
from ovd.losses.distillation import RegionTeacher, distillation_loss


class MeanColour(nn.Module):
    """A teacher's head that is easily checked: boxes' centres and sides, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def embed_regions(self, pixels: torch.Tensor, boxes: list[torch.Tensor]) -> torch.Tensor:
        boxes = torch.cat(boxes)
        return self.weight * torch.cat([boxes[:, :2] + boxes[:, 2:], boxes[:, 2:] - boxes[:, :2]], dim=1)


def test_loss_is_zero_when_embeddings_agree_in_direction() -> None:
    teacher = torch.randn(5, 8)
    assert distillation_loss(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_loss_is_the_l1_norm_averaged_over_regions() -> None:
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    expected = (abs(0.6 - 1) + 0.8 + 1 + 1) / 2
    assert distillation_loss(student, teacher).item() == pytest.approx(expected)


def test_gradient_reaches_the_student_and_not_the_teacher() -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    distillation_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_no_regions_give_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 4, requires_grad=True)
    loss = distillation_loss(student, torch.zeros(0, 4))
    loss.backward()
    assert loss == 0 and student.grad is not None


def test_a_teacher_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\) but the teacher's are \(2, 6\)"):
        distillation_loss(torch.ones(2, 4), torch.ones(2, 6))


def test_the_teacher_averages_crops_about_the_same_centre_and_keeps_no_gradient() -> None:
    teacher = RegionTeacher(MeanColour, 4, box_scales=(1.0, 2.0))
    found = teacher(torch.zeros(1, 3, 8, 8), [torch.tensor([[0.0, 2.0, 4.0, 6.0]])])
    expected = torch.tensor([[2 * 4.0, 2 * 8.0, 4.0 + 8.0, 4.0 + 8.0]])
    torch.testing.assert_close(found, expected / expected.norm())
    assert not found.requires_grad and not any(p.requires_grad for p in teacher.head.parameters())


def test_the_teacher_copies_nothing_before_there_are_regions() -> None:
    teacher = RegionTeacher(MeanColour, 4)
    assert teacher(torch.zeros(2, 3, 8, 8), [torch.zeros(0, 4), torch.zeros(0, 4)]).shape == (0, 4)
    assert teacher.head is None
    with pytest.raises(ValueError, match="at least one positive factor"):
        RegionTeacher(MeanColour, 4, box_scales=(0.0,))


def embed(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    count = inputs["image_id"]
    return torch.arange(4.0 * count).reshape(count, 4), torch.eye(6)[:count]


def test_precomputed_regions_come_back_and_are_not_computed_twice(tmp_path: Path) -> None:
    pictures = [{"image_id": 2}, {"image_id": 3}]
    assert precompute_regions(pictures, embed, tmp_path / "regions", teacher="abc") == 2
    assert precompute_regions([*pictures, {"image_id": 1}], embed, tmp_path / "regions", teacher="abc") == 1
    boxes, embeddings = read_regions(tmp_path / "regions", 3, teacher="abc")
    assert np.array_equal(boxes, embed({"image_id": 3})[0]) and np.array_equal(embeddings, np.eye(6)[:3])
    with pytest.raises(ValueError, match="'abc', but this detector has 'xyz'"):
        read_regions(tmp_path / "regions", 3, teacher="xyz")


def test_a_folder_of_another_teacher_is_not_added_to(tmp_path: Path) -> None:
    precompute_regions([{"image_id": 2}], embed, tmp_path, teacher="abc")
    with pytest.raises(ValueError, match="2.npz was made by the image-text model 'abc'.*'xyz'; remove the folder"):
        precompute_regions([{"image_id": 2}, {"image_id": 3}], embed, tmp_path, teacher="xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["2.npz"]


def test_a_picture_without_an_embedding_gets_no_file(tmp_path: Path) -> None:
    assert precompute_regions([{"image_id": 2}], lambda _: None, tmp_path) == 0
    assert not list(tmp_path.iterdir())


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "7.npz").write_bytes(b"PK\x03\x04 broken")
    for image_id in (5, 7):
        with pytest.raises(ValueError, match=f"{image_id}.npz holds no regions.*prepare_data.py regions"):
            read_regions(tmp_path, image_id)


def test_regions_follow_the_augmentation_of_their_picture() -> None:
    boxes = np.array([[10.0, 10, 30, 20], [0, 0, 8, 8], [90, 40, 100, 50]], dtype=np.float32)
    # Mirrored in a picture 100 wide, then its left 75 columns: of the first a quarter is left, of the second nothing.
    transforms = T.TransformList([T.HFlipTransform(100), T.CropTransform(0, 0, 75, 50)])
    regions = place_regions(boxes, np.eye(3, dtype=np.float32), transforms, (50, 75))
    assert regions.proposal_boxes.tensor.tolist() == [[0.0, 40.0, 10.0, 50.0]]
    assert regions.teacher_embeddings.tolist() == [[0.0, 0.0, 1.0]]
    assert len(place_regions(boxes, np.eye(3), T.NoOpTransform(), (50, 100), limit=2)) == 2
    assert len(place_regions(np.zeros((0, 4)), np.zeros((0, 3)), transforms, (50, 75))) == 0
