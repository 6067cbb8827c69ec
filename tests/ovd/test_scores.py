"""Cached scores give what the network gives: the same detections, whatever the settings, to the last bit in float32."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ovd
from ovd.data.mapper import OpenVocabularyMapper
from ovd.detections import Detections
from ovd.detector import OpenVocabularyDetector
from ovd.detector_folder import read_detector, read_prompting
from ovd.evaluation.lvis_evaluator import evaluate_results
from ovd.modeling.roi_heads import RegionScores
from ovd.scores import DESCRIPTION, CachedPicture, ScoreCache, cached_proposals, collect_scores
from ovd.sweep import (
    ScoreSettings,
    best_row,
    cached_detections,
    parse_grid,
    settings_grid,
    split_warning,
    sweep,
    sweep_table,
    temper,
)
from ovd.text.embeddings import Prompting

SIZES = {3: (100, 160), 5: (320, 240), 8: (200, 200)}  # id: (height, width)
CATEGORIES = [
    {"id": 2, "name": "cat", "synonyms": ["cat", "kitty"], "frequency": "f"},
    {"id": 7, "name": "taco", "synonyms": ["taco"], "frequency": "r"},
    {"id": 4, "name": "fire_engine", "synonyms": ["fire_engine"], "frequency": "c"},
]


@pytest.fixture(scope="module")
def annotations(tmp_path_factory) -> Path:
    """Three pictures of different shapes, boxes on them, in an LVIS file."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image_id, (height, width) in SIZES.items():
        small = rng.integers(0, 255, (height // 20, width // 20, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height)).save(folder / f"{image_id}.png")
        image = {"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width}
        content["images"].append(image | {"neg_category_ids": [2, 4, 7], "not_exhaustive_category_ids": []})
        for category in CATEGORIES:
            box = [5 * category["id"], 10, 40, 50]
            content["annotations"].append(
                {"id": 100 * image_id + category["id"], "image_id": image_id, "category_id": category["id"],
                 "bbox": box, "area": 2000, "segmentation": [[10, 10, 50, 10, 50, 60]]}
            )  # fmt: skip
    path = folder / "toy_val.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def detector() -> OpenVocabularyDetector:
    return OpenVocabularyDetector.from_pretrained("mini")


@pytest.fixture(scope="module")
def collected(detector, annotations, tmp_path_factory) -> tuple[ScoreCache, dict]:
    return collect_scores(detector, annotations, annotations.parent, tmp_path_factory.mktemp("cache"))


def full_run(detector, annotations: Path, settings: ScoreSettings) -> list[dict]:
    """Results of the network itself; the temperatures are put into the two models' scales."""
    heads = detector.model.roi_heads
    before = heads.alpha, heads.beta, heads.objectness_delta, heads.image_text_head.scale
    log_scale = heads.box_predictor.cls_score.log_scale
    heads.alpha, heads.beta, heads.objectness_delta = settings.alpha, settings.beta, settings.delta
    heads.image_text_head.scale /= settings.image_text_temperature
    log_scale.data -= np.log(settings.detector_temperature)
    mapper, results = OpenVocabularyMapper(False, detector.model.architecture.image_size), []
    for image_id in SIZES:
        record = {"file_name": str(annotations.parent / f"{image_id}.png"), "image_id": image_id}
        instances = detector.model.inference([mapper(record)])[0]["instances"]
        results += Detections.from_instances(instances).to_coco(image_id, [2, 4, 7])
    heads.alpha, heads.beta, heads.objectness_delta, heads.image_text_head.scale = before
    log_scale.data += np.log(settings.detector_temperature)
    return results


def key(result: dict) -> tuple:
    return (result["image_id"], result["category_id"], *(round(v, 1) for v in result["bbox"]))


@pytest.mark.parametrize(
    "settings", [ScoreSettings(0.35, 0.65), ScoreSettings(0.0, 0.0), ScoreSettings(1.0, 0.2, 3.0)], ids=str
)
def test_cached_detections_are_those_of_a_full_run(collected, detector, annotations, settings) -> None:
    cached = cached_detections(collected[0], detector.model.roi_heads, settings, SIZES, [2, 4, 7])
    full = full_run(detector, annotations, settings)
    assert len(cached) == len(full) > 30
    for ours, theirs in zip(cached, full, strict=True):
        assert ours == {name: value for name, value in theirs.items() if name != "segmentation"}


def test_cached_detections_are_those_of_a_full_run_with_a_background_too(annotations, tmp_path) -> None:
    folder = Path(ovd.__file__).parent / "weights" / "mini"
    model, image_text, names = read_detector(folder, {"vlm_background": True})
    detector = OpenVocabularyDetector(model.eval(), image_text, names, prompting=read_prompting(folder))
    cache, _ = collect_scores(detector, annotations, annotations.parent, tmp_path)
    assert (cache.read(3).regions.image_text[:, 0] > 0).all()
    for settings in (ScoreSettings(0.35, 0.65), ScoreSettings(0.2, 0.9, 1.0, 2.0, 0.5)):
        cached = cached_detections(cache, model.roi_heads, settings, SIZES, [2, 4, 7])
        full = full_run(detector, annotations, settings)
        assert [key(r) for r in cached] == [key(r) for r in full] and len(full) > 30
        np.testing.assert_allclose([r["score"] for r in cached], [r["score"] for r in full], rtol=1e-4, atol=1e-6)


def test_caches_of_before_there_was_a_background_still_count(detector, annotations, collected) -> None:
    described = json.loads((collected[0].folder / DESCRIPTION).read_text())["architecture"]
    assert "vlm_background" not in described and "box_smooth_l1_beta" not in described
    detector.model.architecture.vlm_background = True
    try:
        with pytest.raises(ValueError, match="different: architecture"):
            collect_scores(detector, annotations, annotations.parent, collected[0].folder)
    finally:
        detector.model.architecture.vlm_background = False


def test_cached_masks_are_those_of_a_full_run(detector, annotations, tmp_path) -> None:
    from pycocotools import mask as mask_codec

    cache, ground_truth = collect_scores(detector, annotations, annotations.parent, tmp_path, masks=True)
    settings = ScoreSettings(0.35, 0.65)
    cached = cached_detections(cache, detector.model.roi_heads, settings, SIZES, [2, 4, 7])
    full = full_run(detector, annotations, settings)
    assert len(cached) == len(full) > 30
    for ours, theirs in zip(cached, full, strict=True):
        assert ours["bbox"] == theirs["bbox"] and ours["segmentation"]["size"] == theirs["segmentation"]["size"]
        masks = [mask_codec.decode(result["segmentation"]) for result in (ours, theirs)]
        # Probabilities next to the threshold may differ in the last bit with the number of boxes in a batch.
        assert (masks[0] != masks[1]).mean() < 1e-3
    row = sweep(cache, detector.model.roi_heads, ground_truth, [settings])[0]
    assert row.metrics["mask_AP"] == evaluate_results(ground_truth, full, "segm")["AP"]
    assert "mask_APr" in sweep_table([row])


def test_a_cache_without_masks_is_not_one_with_them(detector, annotations, collected) -> None:
    with pytest.raises(ValueError, match="different: masks"):
        collect_scores(detector, annotations, annotations.parent, collected[0].folder, masks=True)


def test_cached_proposals_are_in_pixels_of_the_original(collected, detector, annotations) -> None:
    found = cached_proposals(collected[0], SIZES)
    record = {"file_name": str(annotations.parent / "3.png"), "image_id": 3}
    inputs = OpenVocabularyMapper(False, detector.model.architecture.image_size)(record)
    proposals = detector.model.inference([inputs], return_parts=True)[0]["parts"].proposals
    height, width = SIZES[3]
    scale = width / inputs["image"].shape[2]
    np.testing.assert_allclose(found[3][0], proposals.numpy() * scale, rtol=1e-4, atol=1e-2)
    assert found[3][0][:, 3].max() <= height + 1e-3


def test_temperatures_are_those_of_a_full_run(collected, detector, annotations) -> None:
    settings = ScoreSettings(0.35, 0.65, 1.0, detector_temperature=2.0, image_text_temperature=0.5)
    cached = cached_detections(collected[0], detector.model.roi_heads, settings, SIZES, [2, 4, 7])
    full = full_run(detector, annotations, settings)
    assert [key(r) for r in cached] == [key(r) for r in full]
    np.testing.assert_allclose([r["score"] for r in cached], [r["score"] for r in full], rtol=1e-4, atol=1e-6)


def test_half_precision_stays_within_its_bound(collected, detector, annotations, tmp_path) -> None:
    cache, ground_truth = collected
    half, _ = collect_scores(detector, annotations, annotations.parent, tmp_path, dtype="float16")
    assert half.bytes() < cache.bytes()
    for image_id in SIZES:
        ours, exact = half.read(image_id).regions, cache.read(image_id).regions
        assert torch.equal(ours.boxes, exact.boxes) and torch.equal(ours.objectness, exact.objectness)
        for name in ("detector", "image_text"):
            p, q = getattr(ours, name), getattr(exact, name)
            seen = q > 1e-30
            bound = q.log().abs() / 2048 + 1e-6
            assert ((p.log() - q.log()).abs()[seen] <= bound[seen]).all()
            assert (p[~seen] < 1e-29).all()


def test_independent_scores_without_image_text_come_back_as_they_were(tmp_path) -> None:
    cache = ScoreCache(tmp_path, {"dtype": "float32"})
    regions = RegionScores(
        torch.rand(4, 4), torch.rand(4, 4), torch.rand(4, 3), None, torch.rand(4), (90, 120), independent=True
    )
    cache.write(CachedPicture(7, (180, 240), regions))
    picture = cache.read(7)
    assert 7 in cache and picture.size == (180, 240) and picture.regions.image_size == (90, 120)
    assert picture.regions.independent is True and picture.regions.image_text is None
    assert torch.equal(picture.regions.detector, regions.detector)


def test_collection_continues_where_it_stopped(collected, detector, annotations, monkeypatch, tmp_path) -> None:
    first, _ = collect_scores(detector, annotations, annotations.parent, tmp_path, limit=1)
    assert [i for i in SIZES if i in first] == [3]
    runs = []
    again, ground_truth = collect_scores(
        detector, annotations, annotations.parent, tmp_path, progress=lambda jobs: runs.extend(jobs) or jobs
    )
    assert [record["image_id"] for record in runs] == [5, 8] and len(ground_truth["images"]) == 3
    for image_id in SIZES:
        for name, value in vars(collected[0].read(image_id).regions).items():
            other = getattr(again.read(image_id).regions, name)
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


def test_scores_of_something_else_are_not_mixed_in(detector, annotations, tmp_path) -> None:
    collect_scores(detector, annotations, annotations.parent, tmp_path, limit=1)
    with pytest.raises(ValueError, match="another run .different: embeddings, templates."):
        collect_scores(detector, annotations, annotations.parent, tmp_path, Prompting(("one {}",)))
    other = OpenVocabularyDetector(detector.model, detector.image_text, prompting=Prompting(("one {}",)))
    with pytest.raises(ValueError, match="another run .different: embeddings, templates."):
        collect_scores(other, annotations, annotations.parent, tmp_path)  # as it was trained
    with pytest.raises(ValueError, match="different: dtype"):
        collect_scores(detector, annotations, annotations.parent, tmp_path, dtype="float16")
    # What is decided after the scores may differ.
    heads = detector.model.roi_heads
    heads.alpha, before = 0.9, heads.alpha
    collect_scores(detector, annotations, annotations.parent, tmp_path, limit=1)
    heads.alpha = before


def test_a_damaged_picture_is_named(collected, detector, annotations, tmp_path) -> None:
    cache, _ = collect_scores(detector, annotations, annotations.parent, tmp_path, limit=1)
    cache.path(3).write_bytes(cache.path(3).read_bytes()[:200])
    with pytest.raises(ValueError, match="3.safetensors cannot be read.*delete it"):
        cache.read(3)
    assert (tmp_path / DESCRIPTION).is_file()


def test_a_sweep_measures_what_evaluation_measures(collected, detector, annotations) -> None:
    cache, ground_truth = collected
    heads = detector.model.roi_heads
    before = heads.alpha, heads.beta, heads.objectness_delta
    # Every third of what one of the settings finds is an object: precision depends on the order of the scores.
    best = sorted(full_run(detector, annotations, ScoreSettings(0.5, 0.65, 1.0)), key=lambda r: -r["score"])[::3]
    objects = [
        {"id": i, "image_id": r["image_id"], "category_id": r["category_id"], "bbox": r["bbox"],
         "area": r["bbox"][2] * r["bbox"][3]}
        for i, r in enumerate(best, start=1)
    ]  # fmt: skip
    ground_truth = {**ground_truth, "annotations": objects}
    grid = settings_grid((0.0, 0.5), (0.65,), (0.0, 1.0))
    rows = sweep(cache, heads, ground_truth, grid)
    assert (heads.alpha, heads.beta, heads.objectness_delta) == before
    assert [(r.settings.alpha, r.settings.delta) for r in rows] == [(0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.5, 1.0)]
    for row in (rows[0], rows[-1]):
        metrics = evaluate_results(ground_truth, full_run(detector, annotations, row.settings), "bbox")
        assert row.metrics["AP"] == pytest.approx(metrics["AP"], nan_ok=True)
        assert row.metrics["APr"] == pytest.approx(metrics["APr"], nan_ok=True)
    assert rows[-1].metrics["AP"] > 0 and rows[-1].metrics["AP"] != rows[0].metrics["AP"]
    table = sweep_table(rows)
    assert "delta" in table and "temperature" not in table and len(table.splitlines()) == 6
    assert best_row(rows, "AP").metrics["AP"] == max(row.metrics["AP"] for row in rows)
    with pytest.raises(ValueError, match="no metric 'APx'"):
        best_row(rows, "APx")


def test_a_temperature_divides_the_logits() -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(4, 7)
    torch.testing.assert_close(temper(logits.softmax(1), 2.5), (logits / 2.5).softmax(1))
    p = torch.nn.functional.pad(logits.softmax(1), (1, 0))  # image-text scores have no background
    torch.testing.assert_close(temper(p, 0.5)[:, 1:], (logits / 0.5).softmax(1))
    assert (temper(p, 0.5)[:, 0] == 0).all() and temper(p, 1.0) is p
    torch.testing.assert_close(temper(logits.sigmoid(), 2.0, independent=True), (logits / 2).sigmoid())
    assert temper(torch.tensor([[0.0]]), 2.0, independent=True).item() == 0  # the background of a sigmoid


@pytest.mark.parametrize(
    ("text", "values"),
    [("0:1:0.25", (0, 0.25, 0.5, 0.75, 1)), ("0:1:0.1", tuple(i / 10 for i in range(11))), ("0.5", (0.5,)),
     ("0.2,1", (0.2, 1)), ("0:1:0.3", (0, 0.3, 0.6, 0.9)), ("1:1:1", (1,))],
)  # fmt: skip
def test_grids_are_read_as_written(text, values) -> None:
    assert parse_grid(text) == pytest.approx(values)


@pytest.mark.parametrize("text", ["", "a", "0:1", "0:1:0", "1:0:0.1", "0:1:-1", "0:inf:1", "0:1:1e-9"])
def test_grids_that_mean_nothing_are_refused(text) -> None:
    with pytest.raises(ValueError, match="is no|larger step"):
        parse_grid(text)


@pytest.mark.parametrize(
    "wrong", [{"alpha": 1.1}, {"beta": -0.1}, {"delta": -1}, {"detector_temperature": 0}, {"alpha": float("nan")}]
)
def test_impossible_settings_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        ScoreSettings(**{"alpha": 0.5, "beta": 0.5} | wrong)


def test_sweeping_on_the_reported_split_is_warned_about(tmp_path) -> None:
    (tmp_path / "run" / "detector").mkdir(parents=True)
    folder = tmp_path / "run" / "detector"
    assert split_warning("data/lvis_val.json", folder) is None
    assert "test split" in split_warning("data/mini_lvis_test.json", folder)
    (tmp_path / "run" / "config.yaml").write_text("evaluation:\n  annotations: data/lvis_val.json\n")
    assert "reports on" in split_warning("elsewhere/lvis_val.json", folder)
    assert split_warning("data/lvis_minival.json", folder) is None
