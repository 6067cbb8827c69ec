"""Tiles: where they lie, what becomes of objects that borders cut, and that nothing of the whole picture is lost."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from ovd import OpenVocabularyDetector
from ovd.detections import Detections
from ovd.tiling import merge_windows, tile_windows


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"),
    [(1000, 1500, 320, 0.25), (641, 320, 320, 0.0), (100, 5000, 64, 0.5), (320, 321, 320, 0.9)],
)
def test_tiles_cover_every_pixel_and_share_at_least_the_overlap(height, width, tile, overlap) -> None:
    whole, *tiles = tile_windows(height, width, tile, overlap)
    assert whole == (0, 0, width, height)
    seen = np.zeros((height, width), int)
    for x1, y1, x2, y2 in tiles:
        assert x2 - x1 == min(tile, width) and y2 - y1 == min(tile, height)
        seen[y1:y2, x1:x2] += 1
    assert seen.min() >= 1
    for axis, length in ((0, width), (1, height)):
        starts = sorted({t[axis] for t in tiles})
        shared = [starts[i] + min(tile, length) - starts[i + 1] for i in range(len(starts) - 1)]
        assert all(s >= int(overlap * tile) for s in shared)


def test_a_picture_no_larger_than_a_tile_is_looked_at_once() -> None:
    assert tile_windows(320, 200, 320) == [(0, 0, 200, 320)]


@pytest.mark.parametrize(("tile", "overlap"), [(31, 0.25), (320, 1.0), (320, -0.1)])
def test_tiles_out_of_range_are_refused(tile, overlap) -> None:
    with pytest.raises(ValueError, match="tile|overlap"):
        tile_windows(500, 500, tile, overlap)


def found(boxes, scores, labels, size, masks=False) -> Detections:
    masked = np.ones((len(boxes), *size), bool) if masks else None
    return Detections(np.array(boxes), scores, labels, [f"word {i}" for i in labels], size, masked)


WINDOWS = [(0, 0, 200, 100), (0, 0, 120, 100), (80, 0, 200, 100)]


def test_a_piece_cut_by_a_border_gives_way_to_the_whole_object_even_with_a_lower_score() -> None:
    # An object at x 90..160: the left tile sees 90..120 of it, and is surer of that.
    parts = [
        found([[90, 10, 160, 60]], [0.5], [0], (100, 200)),
        found([[90, 10, 120, 60]], [0.9], [0], (100, 120)),
        found([[10, 10, 80, 60]], [0.7], [0], (100, 120)),
    ]
    merged = merge_windows(parts, WINDOWS, (100, 200))
    assert merged.boxes.tolist() == [[90, 10, 160, 60]] and merged.scores.tolist() == [np.float32(0.7)]


def test_a_piece_that_nothing_completes_is_kept_and_so_are_other_classes() -> None:
    parts = [
        found([[90, 10, 160, 60]], [0.5], [1], (100, 200)),
        found([[90, 10, 120, 60]], [0.9], [0], (100, 120)),
        found(np.zeros((0, 4)), [], [], (100, 120)),
    ]
    merged = merge_windows(parts, WINDOWS, (100, 200))
    assert merged.names == ["word 0", "word 1"]


def test_a_border_of_the_picture_cuts_nothing() -> None:
    parts = [
        found([[0, 0, 60, 60]], [0.4], [0], (100, 200)),
        found([[0, 0, 40, 60]], [0.9], [0], (100, 120)),  # IoU 0.67 with the other: ordinary suppression
        found(np.zeros((0, 4)), [], [], (100, 120)),
    ]
    assert merge_windows(parts, WINDOWS, (100, 200)).boxes.tolist() == [[0, 0, 40, 60]]


def test_masks_lie_in_the_picture_where_the_tile_lay() -> None:
    parts = [
        found(np.zeros((0, 4)), [], [], (100, 200), masks=True),
        found(np.zeros((0, 4)), [], [], (100, 120), masks=True),
        found([[10, 10, 80, 60]], [0.7], [0], (100, 120), masks=True),
    ]
    merged = merge_windows(parts, WINDOWS, (100, 200))
    expected = np.zeros((1, 100, 200), bool)
    expected[:, :, 80:] = True
    np.testing.assert_array_equal(merged.masks, expected)


def test_without_anything_found_there_is_an_empty_answer() -> None:
    parts = [found(np.zeros((0, 4)), [], [], (y2 - y1, x2 - x1)) for x1, y1, x2, y2 in WINDOWS]
    assert len(merge_windows(parts, WINDOWS, (100, 200))) == 0


def test_tiles_find_in_a_mosaic_of_four_scenes_what_is_found_in_each_alone() -> None:
    """Kept weights on their own showcase picture sizes: scenes of 320 px, in a mosaic of 640."""
    detector = OpenVocabularyDetector.from_pretrained("mini")
    scenes = mini_scenes(4)
    mosaic = np.concatenate([np.concatenate(scenes[:2], axis=1), np.concatenate(scenes[2:], axis=1)], axis=0)
    alone = detector.predict(scenes, 0.4, calibrated=False)
    tiled = detector.predict(mosaic, 0.4, tile=320, overlap=0.0, calibrated=False)
    whole = detector.predict(mosaic, 0.4, calibrated=False)
    recovered = {"tiled": 0, "whole": 0}
    total = 0
    for i, part in enumerate(alone):
        offset = np.array([i % 2 * 320, i // 2 * 320] * 2, np.float32)
        for box, name in zip(part.boxes + offset, part.names, strict=True):
            total += 1
            for kind, answer in (("tiled", tiled), ("whole", whole)):
                same = np.array([n == name for n in answer.names], bool)
                overlaps = box_iou(torch.tensor(box)[None], torch.from_numpy(answer.boxes[same]))
                recovered[kind] += bool((overlaps > 0.5).any())
    print(f"mosaic: {total} objects alone, {recovered}")
    assert total >= 3 and recovered["tiled"] == total >= recovered["whole"], (total, recovered)


def mini_scenes(count: int) -> list[np.ndarray]:
    from pathlib import Path

    from ovd.data.images import read_image

    folder = Path(__file__).resolve().parents[2] / "data" / "mini" / "scenes" / "val"
    files = sorted(folder.glob("*.jpg"))[:count]
    if len(files) < count:
        pytest.skip("the miniature is not built: python tools/prepare_data.py mini")
    return [read_image(file) for file in files]
