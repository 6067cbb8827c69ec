"""The detector's benchmark: both networks do the same work, and the tables say what was measured."""

import argparse

import pytest
import torch

from ovd.engine import benchmark_detector, detectron2_reference
from ovd.engine.benchmark_detector import OWN, REFERENCE, DetectorBenchmark, Timing, Work, time_in_turn, to_markdown
from ovd.engine.detectron2_reference import Scene, TowerSize, count_regions, match_detections
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import crop_size
from pretrain.config import ConfigError, load_config
from pretrain.modeling.checkpoint import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


def tiny_heads(image_size: int, window_size: int) -> DetectorConfig:
    return DetectorConfig(
        image_size, window_size, pyramid_channels=16, rpn_post_nms_topk=(20, 20), roi_batch_size=16, box_conv_dim=16,
        box_fc_dim=32, mask_num_conv=1, mask_conv_dim=16, vlm_crop_size=32, vlm_scale=50.0, detections_per_image=12,
    )  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch) -> DetectorBenchmark:
    """A tower of 48 x 6 at 128 px, 8 x 8 patches in windows of 2 x 2, and heads for 12 detections."""
    monkeypatch.setitem(detectron2_reference.TOWERS, "tiny", TowerSize(48, 6, 2, 16))
    monkeypatch.setitem(detectron2_reference.HEADS, "tiny", tiny_heads)
    return DetectorBenchmark(
        "tiny", 128, "tiny", batch_size=1, words=5, vocabularies=(5, 70), modes=("off",), repeats=1
    )


def test_both_towers_compute_the_same_map(benchmark) -> None:
    scene = Scene(benchmark)
    own = scene.own("off").eval()
    reference = scene.reference(own).eval()
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        expected = reference.backbone.net(images)["last_feat"]
        torch.testing.assert_close(own.backbone.net(images)["vit"], expected, rtol=1e-5, atol=1e-5)


def test_both_networks_differ_in_the_classifier_and_what_is_sized_by_classes_only(benchmark) -> None:
    scene = Scene(benchmark)
    own = scene.own("off")
    weights = {name: value for name, value in own.state_dict().items() if not name.startswith("roi_heads.mask_head.p")}
    different = []
    for name, value in scene.reference(own).state_dict().items():
        found = weights.pop(name.replace("patch_embed.proj", "patch_embed"), None)
        if found is None or not torch.equal(found, value):
            different.append(name.removeprefix("roi_heads."))
    kinds = ("weight", "bias")
    modules = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
    assert different == [f"{module}.{kind}" for module in modules for kind in kinds]
    assert all(name.startswith("roi_heads.box_predictor.") for name in weights)


def test_both_find_as_much(benchmark) -> None:
    scene = Scene(benchmark)
    own = scene.own("off")
    reference = scene.reference(own)
    threshold = match_detections(own, reference, scene.inputs)
    (proposals, detections), (others, found) = (count_regions(model, scene.inputs) for model in (own, reference))
    assert proposals == pytest.approx(others, rel=0.1)
    assert found >= detections or threshold == 0


def test_crops_have_the_size_that_towers_end_at() -> None:
    """Not that of the benchmark's random tower, which is as large as the picture."""
    kept = load_checkpoint("ovd/weights/mini/image_text").image_size
    published = load_config("configs/pretrain/reclip_b16_64px_550k_ft20k.yaml").phases[-1].image_size
    for heads, expected in (("small", kept), ("published", published)):
        config = detectron2_reference.HEADS[heads](512, 8)
        assert crop_size(config, detectron2_reference.random_image_text(TowerSize(48, 1, 2, 16), 512)) == expected


def test_random_objects_fill_their_boxes_within_the_picture() -> None:
    first, second = detectron2_reference.random_inputs(2, 128, num_classes=3, objects=4)
    for inputs in (first, second):
        objects = inputs["instances"]
        boxes = objects.gt_boxes.tensor
        assert (boxes >= 0).all() and (boxes <= 128).all() and (objects.gt_classes < 3).all()
        assert torch.equal(objects.gt_masks.get_bounding_boxes().tensor, boxes)
        assert torch.equal(objects.gt_masks.tensor.sum(dim=(1, 2)).float(), objects.gt_boxes.area())
    assert not torch.equal(first["image"], second["image"])


def test_everything_is_run_in_turn_and_prepared_before_its_clock_starts() -> None:
    calls = []
    works = [Work(name, lambda name=name: calls.append(name), lambda: calls.append("-")) for name in "ab"]
    timings = time_in_turn(works, repeats=2, device="cpu")
    assert "".join(calls) == "-b-a" + "-a-b" + "-b-a"
    assert [(t.name, len(t.wall), len(t.cpu)) for t in timings] == [("a", 2, 2), ("b", 2, 2)]


def test_table_shows_the_ratio_of_medians_to_the_first() -> None:
    slow, fast = Timing("theirs", [9.0] * 3, [2.0, 4.0, 3.0]), Timing("ours", [8.0] * 3, [1.0, 1.0, 6.0])
    text = to_markdown("step", [slow, fast])
    assert "| step | CPU s | ratio | wall s |" in text
    assert "| theirs | 3 (2 to 4) | 1 | 9 |" in text
    assert "| ours | 1 (1 to 6) | **0.33** (0.25 to 2.00) | 8 |" in text
    # A GPU's work has no CPU time.
    assert "| ours | 8 (8 to 8) | **2.00** (2.00 to 2.00) | 8 |" in to_markdown(
        "step", [Timing("theirs", [4.0], []), Timing("ours", [8.0], [])]
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_every_part_runs_and_names_what_it_compares(benchmark, bf16: bool, capsys) -> None:
    parser = argparse.ArgumentParser()
    benchmark_detector.add_detector_command(parser.add_subparsers())
    words = (
        "detector --tower tiny --heads tiny --image-size 128 --batch-size 1 --words 5 --vocabularies 5 70 --repeats 1"
    )
    options = parser.parse_args([*words.split(), "--modes", "off", "crops", *["--bf16"] * bf16])
    threads = torch.get_num_threads()
    options.run(options)
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert text.count(f"| {REFERENCE} |") == 2 and f"| {OWN} |" in text
    assert f"| {OWN}: text classifier alone |" in text and f"| {OWN}: and image-text score of crops" in text
    assert text.count("| 70 words |") == 2
    assert ("bfloat16" in text) == bf16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 100}, "--image-size 100 is not a multiple of 64"),
        ({"tower": "huge"}, "--tower huge is not known; choose from mini, vit_ti"),
        ({"modes": ("off", "all")}, "--modes all is not known"),
        ({"repeats": 0}, "--repeats is 0; give at least 1"),
        ({"vocabularies": (80, 0)}, "has a number below 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark_detector.check(DetectorBenchmark(**change))
