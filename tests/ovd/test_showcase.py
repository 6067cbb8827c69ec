"""The pictures and the table at the end of `make demo`."""

import json

import numpy as np
from PIL import Image

from ovd.showcase import novel_scenes, table, write_grid


def test_the_pictures_with_most_novel_objects_come_first(tmp_path):
    truth = {
        "categories": [
            {"id": 1, "name": "cat", "frequency": "f"},
            {"id": 2, "name": "race_car", "frequency": "r"},
            {"id": 3, "name": "octopus_(animal)", "frequency": "r"},
        ],
        "images": [{"id": i, "file_name": f"scenes/{i}.jpg"} for i in (1, 2, 3)],
        "annotations": [{"image_id": i, "category_id": c} for i, c in ((1, 1), (1, 1), (2, 2), (3, 2), (3, 3))],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    pictures, words = novel_scenes(tmp_path / "truth.json", "data", 5)
    assert pictures == ["data/scenes/3.jpg", "data/scenes/2.jpg"]  # picture 1 has no novel object
    assert words == ["octopus", "race car"]


def test_the_table_is_in_percent_and_says_where_nothing_was_measured(tmp_path):
    (tmp_path / "zero_shot.json").write_text('{"top1": 0.125, "top5": 0.5, "chance": 0.00116}')
    for row, value in (("model", 0.2), ("shuffled_text", None)):
        folder = tmp_path / "evaluation" / row
        folder.mkdir(parents=True)
        metrics = {task: {"AP": 0.1, "APr": value, "APc": 0.3, "APf": 0.4} for task in ("bbox", "segm")}
        (folder / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    line = table({"mine": tmp_path}).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert cells[:3] == ["mine", "12.5% / 50.0% (0.12%)", "10.0 / 20.0 / 30.0 / 40.0"]
    assert cells[4] == "10.0 / n/a / 30.0 / 40.0"


def test_the_grid_holds_the_pictures_with_the_surest_detections(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    colours = {0: (255, 0, 0), 1: (0, 255, 0), 2: (0, 0, 255)}
    for i, colour in colours.items():
        Image.new("RGB", (30, 20), colour).save(folder / f"{i}.png")
    found = {
        "images": [{"id": i, "file_name": f"somewhere/{i}.jpg"} for i in colours],
        "annotations": [{"image_id": i, "score": s} for i, s in ((0, 0.4), (2, 0.1), (2, 0.9))],
    }
    (folder / "detections.json").write_text(json.dumps(found))
    grid = np.asarray(Image.open(write_grid(folder, tmp_path / "grid.png", shown=2, columns=2)))
    seen = {tuple(pixel) for pixel in grid.reshape(-1, 3)}
    assert colours[0] in seen and colours[2] in seen and colours[1] not in seen
    more = np.asarray(Image.open(write_grid(folder, tmp_path / "more.png", shown=3, columns=2)))
    assert np.array_equal(more, grid)  # the third picture shows nothing, and is left out
