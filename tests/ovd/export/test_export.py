"""Exported files give what the detector gives, in a runtime that knows nothing of it."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovd.detector import OpenVocabularyDetector
from ovd.export.detector import TensorDetector, vocabulary_tensors
from ovd.export.files import export_detector, export_towers, save_vocabulary
from ovd.export.program import read_description
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import build_detector

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = {
    "image_size": 160,
    "pyramid_channels": 16,
    "box_fc_dim": 32,
    "box_conv_dim": 16,
    "mask_conv_dim": 16,
    "window_size": 3,
    "global_blocks": 1,
    "rpn_pre_nms_topk": (40, 20),
    "rpn_post_nms_topk": (40, 20),
    "detections_per_image": 12,
}
SIZES = ((160, 160), (97, 160), (160, 70), (33, 160))


def make_detector(image_text, **fields) -> OpenVocabularyDetector:
    torch.manual_seed(0)
    # A block with windows and a global one; tracing takes time with every block.
    image_text.model.visual.trunk.blocks = image_text.model.visual.trunk.blocks[:2]
    model = build_detector(DetectorConfig(**{**SMALL, **fields}), image_text)
    detector = OpenVocabularyDetector(model, image_text, ["cat", "fire_engine", "mouse_(rodent)"])
    detector.set_vocabulary("cat, taco")
    return detector


def picture(height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(height + width).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height)))


def expected(detector: OpenVocabularyDetector, image: torch.Tensor) -> list[torch.Tensor]:
    found = detector.model.inference([{"image": image[0]}])[0]["instances"]
    raw = detector.model.inference([{"image": image[0]}], do_postprocess=False)[0]
    raw = raw[raw.pred_boxes.nonempty()]
    results = [found.pred_boxes.tensor, found.scores, found.pred_classes]
    return results + ([raw.pred_masks[:, 0]] if raw.has("pred_masks") else [])


def assert_same(results, detector: OpenVocabularyDetector, image: torch.Tensor) -> None:
    wanted = expected(detector, image)
    assert len(results) == len(wanted) and len(wanted[0]) > 0
    for result, value in zip(results, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(result), value.numpy(), rtol=0, atol=1e-3)


def run(session, image: torch.Tensor, vocabulary: dict[str, torch.Tensor]) -> list[np.ndarray]:
    given = {name: value.numpy() for name, value in {"image": image, **vocabulary}.items()}
    return session.run(None, given)


ARCHITECTURES = {
    "backbone": {"vlm_mode": "backbone"},
    "crops": {"vlm_mode": "crops", "vlm_crop_size": 32, "detector_temperature": 1.5},
    "frozen_copy": {"vlm_mode": "frozen_copy", "vlm_box_scale": 0.8, "objectness_delta": 0.5},
    "off": {"vlm_mode": "off", "mask_on": False, "background": "empty_prompt"},
    "sigmoid": {"classification": "sigmoid", "window_size": 0},
    "localization": {"proposals": "localization", "rpn_nms_thresholds": (0.7, 1.0)},
    "background": {"vlm_background": True, "objectness_delta": 1.0},
    "ensemble": {"distillation": "ensemble", "vlm_mode": "off", "vlm_crop_size": 32},
}


@pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_graph_gives_what_every_kind_of_detector_gives(image_text, fields) -> None:
    detector = make_detector(image_text, **fields)
    graph = TensorDetector(detector.model).eval()
    for size in ((97, 160), (160, 33)):
        image = torch.from_numpy(picture(*size)).permute(2, 0, 1)[None]
        with torch.no_grad():
            assert_same(graph(image, **vocabulary_tensors(detector)), detector, image)


@pytest.mark.parametrize("mode", ["backbone", "frozen_copy"])
def test_the_graph_gives_what_a_detector_of_14_px_patches_gives(patch14_folder, mode) -> None:
    from pretrain.modeling.checkpoint import load_checkpoint

    detector = make_detector(load_checkpoint(patch14_folder), vlm_mode=mode)
    graph = TensorDetector(detector.model).eval()
    for size in ((97, 160), (160, 33), (160, 160)):
        image = torch.from_numpy(picture(*size)).permute(2, 0, 1)[None]
        with torch.no_grad():
            assert_same(graph(image, **vocabulary_tensors(detector)), detector, image)


def test_onnx_of_a_frozen_copy_of_14_px_patches_takes_any_picture_size(patch14_folder, tmp_path) -> None:
    from pretrain.modeling.checkpoint import load_checkpoint

    detector = make_detector(load_checkpoint(patch14_folder), vlm_mode="frozen_copy")
    path = export_detector(detector, tmp_path / "copy.onnx")
    session = onnxruntime.InferenceSession(str(path))
    for size in SIZES:
        image = torch.from_numpy(picture(*size)).permute(2, 0, 1)[None]
        assert_same(run(session, image, vocabulary_tensors(detector)), detector, image)


@pytest.fixture(scope="module")
def exported(image_text_folder, tmp_path_factory):
    """A detector, the folder of its files, and an onnxruntime session of the one that takes any vocabulary."""
    from pretrain.modeling.checkpoint import load_checkpoint

    detector = make_detector(load_checkpoint(image_text_folder), vlm_mode="crops", vlm_crop_size=32)
    folder = tmp_path_factory.mktemp("exported")
    export_detector(detector, folder / "any.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return detector, folder, onnxruntime.InferenceSession(str(folder / "any.onnx"), options)


@pytest.mark.parametrize("num_words", [1, 80, 1203])
def test_onnx_takes_any_vocabulary_and_any_picture_size(exported, num_words) -> None:
    detector, _, session = exported
    torch.manual_seed(num_words)
    is_base = torch.rand(num_words) < 0.5
    detector.set_vocabulary([f"word {i}" for i in range(num_words)], embeddings=torch.randn(num_words, 64))
    detector.model.set_text_embeddings(torch.randn(num_words, 64), is_base, num_reported=max(1, num_words // 2))
    for size in SIZES:
        image = torch.from_numpy(picture(*size)).permute(2, 0, 1)[None]
        results = run(session, image, vocabulary_tensors(detector))
        assert_same(results, detector, image)
        assert results[2].max() < max(1, num_words // 2)


def test_onnx_takes_the_background_of_a_word_that_nothing_competes_with(exported) -> None:
    detector, _, session = exported
    image, scores = torch.from_numpy(picture(160, 160)).permute(2, 0, 1)[None], {}
    for competitors in (False, True):
        detector.set_vocabulary("taco", competitors=competitors)
        vocabulary = vocabulary_tensors(detector)
        assert bool(vocabulary["vlm_background"].any()) != competitors
        results = run(session, image, vocabulary)
        assert_same(results, detector, image)
        scores[competitors] = results[1]
    assert not np.allclose(scores[False], scores[True], atol=1e-3)


def test_the_file_says_what_a_consumer_must_know_and_nothing_of_the_machine(exported) -> None:
    detector, folder, session = exported
    about = session.get_modelmeta().custom_metadata_map
    assert about["vocabulary"] == "input" and "names" not in about
    assert (about["image_size"], about["embed_dim"], about["nms_threshold"]) == ("160", "64", "0.5")
    assert about["image_text_sha256"] == detector.image_text.fingerprint
    assert len(about["weights_sha256"]) == 64 and json.loads(about["mean"]) == list(detector.image_text.mean)
    beside = json.loads((folder / "any.json").read_text())
    assert beside["weights_sha256"] == about["weights_sha256"]
    assert str(Path(__file__).resolve().parents[3]).encode() not in (folder / "any.onnx").read_bytes()


def test_the_example_that_needs_only_onnxruntime_finds_what_the_detector_finds(exported, tmp_path) -> None:
    detector, folder, session = exported
    detector.set_vocabulary("cat, taco, koala")
    assert detector.competitors
    with np.load(save_vocabulary(detector, tmp_path / "words.npz"), allow_pickle=False) as file:
        words = dict(file)
    spec = importlib.util.spec_from_file_location(
        "onnx_detect", Path(__file__).resolve().parents[3] / "examples" / "onnx_detect.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    image = picture(231, 400)
    wanted = detector.predict(image, score_threshold=0.0, max_detections=12)
    found = example.detect(session, words, Image.fromarray(image), 0.0)
    names, scores, boxes, masks = zip(*found, strict=True)
    assert list(names) == wanted.names and len(names) > 0
    np.testing.assert_allclose(scores, wanted.scores, atol=1e-3)
    np.testing.assert_allclose(boxes, wanted.boxes, atol=5e-3)  # 1e-3 of the small picture's pixels
    assert np.mean(np.stack(masks) != wanted.masks) < 1e-3
    assert not detector.calibration  # then 0.3 is the lowest score; of calibrated ones it is 0.5
    assert len(example.detect(session, words, Image.fromarray(image))) == sum(score >= 0.3 for score in scores)
    words |= {"calibration_scores": np.array([0.0, min(scores), 1.0]), "calibration_shares": np.array([0.0, 0.4, 1.0])}
    calibrated = [score for _, score, *_ in example.detect(session, words, Image.fromarray(image), 0.0)]
    assert min(calibrated) < 0.5 < max(calibrated)
    assert len(example.detect(session, words, Image.fromarray(image))) == sum(score >= 0.5 for score in calibrated)
    with pytest.raises(ValueError, match="embedded by another model"):
        example.detect(session, {**words, "image_text_sha256": np.array("another")}, Image.fromarray(image), 0.0)
    old = {name: value for name, value in words.items() if name not in ("format", "vlm_background")}
    for other in (old, {**words, "format": np.array(3)}):
        with pytest.raises(ValueError, match="exported by different versions; export them together"):
            example.detect(session, other, Image.fromarray(image))


def test_pt2_with_the_vocabulary_inside_gives_the_same_and_names_its_words(image_text, tmp_path) -> None:
    detector = make_detector(image_text, vlm_mode="off")
    export_detector(detector, tmp_path / "baked.pt2", bake_vocabulary=True)
    program = torch.export.load(tmp_path / "baked.pt2").module()
    for size in SIZES:
        image = torch.from_numpy(picture(*size)).permute(2, 0, 1)[None]
        with torch.no_grad():
            assert_same(program(image), detector, image)
    assert read_description(tmp_path / "baked.pt2")["names"] == ["cat", "taco"]
    assert json.loads((tmp_path / "baked.json").read_text())["competitors"] == ["fire_engine", "mouse_(rodent)"]


def test_towers_embed_as_the_model_does(image_text, tmp_path) -> None:
    image_text.model.visual.trunk.blocks = image_text.model.visual.trunk.blocks[:1]
    paths = export_towers(image_text, tmp_path)
    images, tokens = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8), image_text.tokenizer(["cat"] * 4)
    mean, std = (255 * torch.tensor(v).reshape(1, 3, 1, 1) for v in (image_text.mean, image_text.std))
    with torch.no_grad():
        wanted = (
            image_text.model.encode_image((images.float() - mean) / std, normalize=True),
            image_text.model.encode_text(tokens, normalize=True),
        )
    for path, value, expected_value in zip(paths, (images, tokens), wanted, strict=True):
        session = onnxruntime.InferenceSession(str(path))
        (result,) = session.run(None, {session.get_inputs()[0].name: value.numpy()})
        np.testing.assert_allclose(result, expected_value.numpy(), atol=1e-5)


def test_what_cannot_be_written_gets_one_sentence(image_text, tmp_path) -> None:
    detector = make_detector(image_text)
    with pytest.raises(ValueError, match="does not end in .onnx or .pt2"):
        export_detector(detector, tmp_path / "detector.trt")
    with pytest.raises(ValueError, match="does not end in .npz"):
        save_vocabulary(detector, tmp_path / "words.json")
    empty = OpenVocabularyDetector(detector.model, image_text)
    with pytest.raises(ValueError, match="call set_vocabulary first"):
        export_detector(empty, tmp_path / "d.onnx", bake_vocabulary=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "other.pt2").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is no .pt2 file with a description"):
        read_description(tmp_path / "other.pt2")


def test_a_detector_too_small_to_trace_is_refused(image_text, tmp_path) -> None:
    with pytest.raises(ValueError, match="image_size 32 is too small"):
        export_detector(make_detector(image_text, image_size=32), tmp_path / "d.onnx")
