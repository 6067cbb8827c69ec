"""Drawing: right pixels in the right places, and no picture too small, large or full."""

import numpy as np
import pytest
from PIL import Image

from ovd.detections import Detections
from ovd.visualization import colour_of, distinct_colours, draw_detections, image_grid, write_png_atomic


def grey(height, width):
    return np.full((height, width, 3), 128, np.uint8)


def one(box, size, name="cat", mask=None, score=0.9):
    masks = None if mask is None else mask[None]
    return Detections([box], [score], [0], [name], size, masks)


def test_the_box_frame_lies_on_the_box_edges_and_nowhere_else():
    drawn = draw_detections(grey(100, 120), one([30, 20, 80, 70], (100, 120)), show_labels=False)
    expected = grey(100, 120)
    expected[20:70, 30:80] = colour_of("cat")
    expected[21:69, 31:79] = 128  # one pixel of frame at this size; x2 and y2 are exclusive
    assert np.array_equal(drawn, expected)


def test_the_mask_is_blended_at_the_given_opacity_and_outlined():
    mask = np.zeros((60, 60), bool)
    mask[10:40, 20:50] = True
    detections = one([20, 10, 50, 40], (60, 60), mask=mask)
    drawn = draw_detections(grey(60, 60), detections, show_labels=False, mask_opacity=0.5)
    middle = [128 * 0.5 + value * 0.5 for value in colour_of("cat")]
    assert np.abs(drawn[25, 35].astype(float) - middle).max() <= 1
    assert tuple(drawn[10, 35]) == colour_of("cat")
    assert (drawn[~mask] == 128).all()


def test_the_input_picture_is_not_changed():
    image, mask = grey(50, 50), np.ones((50, 50), bool)
    draw_detections(image, one([5, 5, 45, 45], (50, 50), mask=mask))
    assert (image == 128).all()


def test_without_detections_the_picture_is_returned_as_a_copy():
    image = np.random.default_rng(0).integers(0, 255, (31, 47, 3), dtype=np.uint8)
    empty = Detections([], [], [], [], (31, 47), np.zeros((0, 31, 47), bool))
    drawn = draw_detections(image, empty)
    assert np.array_equal(drawn, image) and drawn is not image and drawn.flags.writeable


def test_labels_add_ink_and_do_not_hide_one_another():
    # Three detections on the same box: every label must keep a place of its own, so every chip's colour stays in view.
    names = ["cat", "tiger", "lynx"]
    colours = {"cat": (255, 0, 0), "tiger": (0, 255, 0), "lynx": (0, 0, 255)}
    detections = Detections([[100, 100, 300, 300]] * 3, [0.9, 0.8, 0.7], [0, 1, 2], names, (400, 400))
    bare = draw_detections(grey(400, 400), detections, colours=colours, show_labels=False)
    drawn = draw_detections(grey(400, 400), detections, colours=colours)
    areas = [((drawn == colour).all(-1) & ~(bare == colour).all(-1)).sum() for colour in colours.values()]
    assert min(areas) > 150


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 9), (33, 2000)])
def test_tiny_and_thin_pictures_are_safe(size):
    detections = one([0, 0, size[1], size[0]], size, "a rather long name of a thing", np.ones(size, bool))
    assert draw_detections(grey(*size), detections).shape == (*size, 3)


def test_a_picture_of_10000_pixels_is_drawn_with_a_visible_frame_and_label():
    size = (10_000, 1_200)
    drawn = draw_detections(grey(*size), one([100, 5000, 1100, 6000], size))
    inside_frame = (drawn[5500, 100:110] == colour_of("cat")).all(-1)
    assert inside_frame.sum() >= 4
    # Letters grow too: the label stands higher than the smallest readable font.
    rows = (drawn[4500:5000, 100:300] == colour_of("cat")).all(-1).any(axis=1).sum()
    assert rows > 40


@pytest.mark.parametrize(
    "box", [[-50, -50, 20, 20], [90, 90, 200, 200], [300, 300, 400, 400], [-9, 5, -2, 9], [40, 40, 40, 40]]
)
def test_boxes_outside_or_without_area_are_safe(box):
    assert draw_detections(grey(100, 100), one(box, (100, 100))).shape == (100, 100, 3)


def test_scale_enlarges_picture_boxes_and_masks_together():
    mask = np.zeros((50, 60), bool)
    mask[10:30, 20:40] = True
    detections = one([20, 10, 40, 30], (50, 60), mask=mask)
    drawn = draw_detections(grey(50, 60), detections, show_labels=False, scale=4)
    assert drawn.shape == (200, 240, 3)
    touched = np.argwhere((drawn != 128).any(-1))
    assert touched.min(axis=0).tolist() == [40, 80] and touched.max(axis=0).tolist() == [119, 159]


def test_names_in_any_script_and_empty_names_are_safe():
    for name in ("", "кошка", "猫", "line\nbreak", "x" * 5000):
        assert draw_detections(grey(80, 80), one([10, 10, 60, 60], (80, 80), name)).shape == (80, 80, 3)


def test_a_colour_belongs_to_its_name():
    # Written down, because a change would recolour every picture already published.
    assert colour_of("cat") == (0, 181, 219) and colour_of("dog") == (0, 184, 78)
    assert distinct_colours(["cat", "dog"])["cat"] == colour_of("cat")


def test_colours_of_a_vocabulary_differ():
    names = [f"thing {i}" for i in range(54)]
    assert len(set(distinct_colours(names).values())) == 54
    assert len(distinct_colours([f"thing {i}" for i in range(200)])) == 200
    few = np.array(list(distinct_colours(names[:6]).values()), float)
    gaps = np.abs(few[:, None] - few[None]).sum(-1)
    assert gaps[~np.eye(6, dtype=bool)].min() > 60


def test_wrong_pictures_are_refused_with_the_reason():
    detections = one([1, 1, 5, 5], (10, 10))
    with pytest.raises(ValueError, match=r"picture is \(20, 10\).* \(10, 10\)"):
        draw_detections(grey(20, 10), detections)
    for bad in (np.zeros((10, 10), np.uint8), np.zeros((10, 10, 3)), np.zeros((10, 10, 4), np.uint8), [[0]]):
        with pytest.raises(ValueError, match="uint8 array"):
            draw_detections(bad, detections)
    with pytest.raises(ValueError, match="mask_opacity 2"):
        draw_detections(grey(10, 10), detections, mask_opacity=2)


def test_a_grid_puts_every_picture_into_its_cell():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [np.full((40, 60, 3), colour, np.uint8) for colour in colours]
    grid = image_grid(images, columns=2, gap=10)
    assert grid.shape == (10 + 50 + 50, 10 + 70 + 70, 3)
    for (row, column), colour in zip([(0, 0), (0, 1), (1, 0)], colours, strict=True):
        top, left = 10 + 50 * row, 10 + 70 * column
        assert (grid[top : top + 40, left : left + 60] == colour).all()
    assert (grid[60:100, 80:140] == 255).all()


def test_a_grid_fits_mixed_sizes_into_a_cell_and_writes_captions():
    images = [grey(10, 200), grey(300, 20), grey(1, 1)]
    plain = image_grid(images, 3, cell=(100, 80))
    captioned = image_grid(images, 3, ["wide", "tall", "one pixel"], cell=(100, 80))
    assert captioned.shape[1] == plain.shape[1] and captioned.shape[0] > plain.shape[0]
    assert (captioned[plain.shape[0] - 2 :] < 120).any()
    assert image_grid(images).ndim == 3


def test_a_grid_refuses_what_it_cannot_lay_out():
    with pytest.raises(ValueError, match="no pictures"):
        image_grid([])
    with pytest.raises(ValueError, match="1 captions for 2"):
        image_grid([grey(5, 5)] * 2, captions=["a"])
    with pytest.raises(ValueError, match="columns 0"):
        image_grid([grey(5, 5)], columns=0)


def test_png_is_written_whole_and_replaces_the_old_file(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (12, 17, 3), dtype=np.uint8)
    path = tmp_path / "new" / "picture.png"
    write_png_atomic(path, grey(3, 3))
    assert write_png_atomic(path, image) == path
    assert np.array_equal(np.asarray(Image.open(path)), image)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = write_png_atomic(tmp_path / "picture.png", grey(3, 3))
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk is gone")))
    with pytest.raises(OSError, match="disk is gone"):
        write_png_atomic(path, grey(9, 9))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
