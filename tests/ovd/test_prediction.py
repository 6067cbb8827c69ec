"""Predicting: batches, threads, precision, what pictures and vocabularies may be, and pictures as the query."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.ops import box_iou

from ovd.detector import OpenVocabularyDetector, save_detector
from ovd.image_prompts import embed_crops
from ovd.known_vocabularies import parse_vocabulary
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import build_detector

SMALL = {"image_size": 160, "pyramid_channels": 16, "box_fc_dim": 32, "box_conv_dim": 16, "mask_conv_dim": 16}
EVERYTHING = {"threshold": 0.0, "max_detections": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image_text_folder) -> Path:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(**SMALL), image_text_folder)
    path = tmp_path_factory.mktemp("detector")
    return save_detector(path, model, image_text_folder, base_names=["cat", "fire_engine", "mouse_(rodent)"])


@pytest.fixture
def detector(folder) -> OpenVocabularyDetector:
    return OpenVocabularyDetector.from_checkpoint(folder)


def picture(height: int = 120, width: int = 200, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def assert_same(found, expected, atol: float = 1e-4) -> None:
    assert found.names == expected.names and found.image_size == expected.image_size
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=atol, rtol=1e-5)
    np.testing.assert_allclose(found.scores, expected.scores, atol=atol)
    if found.masks is not None:
        assert (found.masks != expected.masks).mean() < 1e-3


def test_a_batch_of_different_sizes_gives_what_single_pictures_give(detector) -> None:
    sizes = [(120, 200), (300, 90), (240, 402), (40, 40), (161, 160), (1, 70), (91, 150)]
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    single = [detector.predict(p, **EVERYTHING) for p in pictures]
    for size in (2, 7):
        for one, other in zip(detector.predict(pictures, batch_size=size, **EVERYTHING), single, strict=True):
            assert_same(one, other)
    assert detector.predict([]) == []


def test_paths_pil_arrays_bytes_and_tensors_are_the_same_picture(detector, tmp_path) -> None:
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    forms = [
        tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), Image.fromarray(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1), pixels,
    ]  # fmt: skip
    found = detector.predict(forms, **EVERYTHING)
    for one in found[:-1]:
        assert_same(one, found[-1], atol=0)


def test_the_vocabulary_of_the_call_holds_whatever_other_threads_set(detector) -> None:
    """Two vocabularies of different lengths, changed under way; every answer is one of the two, never a mixture."""
    vocabularies, pictures = (
        (["taco", "koala"], ["owl", "boat", "cat", "dog", "cup"]),
        [picture(seed=i) for i in (0, 1)],
    )
    expected = {}
    for i, words in enumerate(vocabularies):
        detector.set_vocabulary(words)
        expected[i] = [detector.predict(p, **EVERYTHING) for p in pictures]
    wrong, start = [], threading.Barrier(4)

    def predict() -> None:
        start.wait()
        for _ in range(3):
            found = detector.predict(pictures, batch_size=1, **EVERYTHING)
            which = 0 if set(found[0].names) <= set(vocabularies[0]) else 1
            try:
                for one, other in zip(found, expected[which], strict=True):
                    assert_same(one, other)
            except AssertionError as error:
                wrong.append(str(error))

    def change() -> None:
        start.wait()
        for i in range(30):
            detector.set_vocabulary(vocabularies[i % 2])

    threads = [threading.Thread(target=f) for f in (predict, predict, predict, change)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong, wrong[0]


def test_a_refused_vocabulary_leaves_the_present_one(detector) -> None:
    detector.set_vocabulary("taco, koala")
    before = detector.predict(picture(), **EVERYTHING)
    for bad in ({"embeddings": np.zeros((2, 64), np.float32)}, {"embeddings": np.ones((2, 3), np.float32)}):
        with pytest.raises(ValueError):
            detector.set_vocabulary("owl, cat", **bad)
    assert detector.vocabulary.words == ("taco", "koala")
    assert_same(detector.predict(picture(), **EVERYTHING), before, atol=0)


def test_known_vocabularies_are_complete() -> None:
    lvis, coco = parse_vocabulary("lvis"), parse_vocabulary("COCO")
    assert len(lvis) == 1203 and lvis.words[0] == "aerosol_can" and lvis.synonyms[0] == ("aerosol can", "spray can")
    assert len(coco) == 80 and coco.words[0] == "person" and coco.words[-1] == "toothbrush"
    assert parse_vocabulary("lvis, coco").words == ("lvis", "coco")


def test_bfloat16_finds_about_the_same_boxes_on_a_cpu(folder, detector) -> None:
    half = OpenVocabularyDetector.from_checkpoint(folder, precision="bfloat16")
    one, other = (d.predict(picture(), **EVERYTHING) for d in (detector, half))
    assert other.boxes.dtype == other.scores.dtype == np.float32
    assert not np.array_equal(one.scores, other.scores)  # it did something
    np.testing.assert_allclose(one.scores[:5], other.scores[:5], atol=0.05)


def test_precision_and_device_that_are_not_there_are_refused(detector) -> None:
    with pytest.raises(ValueError, match="float64.*choose one of"):
        detector.set_precision("float64")
    with pytest.raises(ValueError, match="a CPU has no fast arithmetic"):
        detector.set_precision("float16")
    detector.set_precision("auto")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            detector.to("cuda")
    assert detector.to("auto").device.type in ("cpu", "cuda")


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"max_detections": -1}, {"tile": 4}, {"tile": 64, "overlap": 1.0}])
def test_arguments_out_of_range_are_refused(detector, bad) -> None:
    with pytest.raises(ValueError):
        detector.predict(picture(), **bad)


def test_an_image_prompt_is_the_image_towers_own_embedding(detector, image_text) -> None:
    """Against open_clip's preprocessing of a square picture of the tower's size, which needs no resizing."""
    pixels = picture(160, 160)
    row = embed_crops([pixels], image_text)
    scaled = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor(image_text.mean)[:, None, None]) / (
        torch.tensor(image_text.std)[:, None, None]
    )
    with torch.no_grad():
        expected = torch.nn.functional.normalize(image_text.model.encode_image(scaled[None])[0], dim=0)
    torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)
    both = embed_crops([pixels, picture(160, 160, 1)], image_text)
    other = embed_crops([picture(160, 160, 1)], image_text)
    torch.testing.assert_close(both, torch.nn.functional.normalize(row + other, dim=0), atol=1e-5, rtol=1e-4)


def test_words_and_pictures_mix_and_order_is_kept(detector) -> None:
    crop = Image.fromarray(picture(30, 60))
    words = detector.set_vocabulary({"taco": None, "my mug": crop, "cat": [crop, picture(20, 20)]}).words
    assert words == ("taco", "my mug", "cat")
    assert detector.competitors == ("cat", "fire_engine", "mouse_(rodent)")  # the word still competes with the picture
    assert detector.set_vocabulary(["taco", crop, crop]).words == ("taco", "picture 1", "picture 2")
    detector.set_vocabulary("taco, koala")
    before = detector._active.embeddings
    assert detector.add_image_prompt("my mug", crop).words == ("taco", "koala", "my mug")
    after = detector._active.embeddings
    torch.testing.assert_close(torch.cat([after[:2], after[3:]]), before)
    detector.add_image_prompt("Koala", [crop])
    assert detector.vocabulary.words == ("taco", "koala", "my mug")
    torch.testing.assert_close(detector._active.embeddings[1], detector._active.embeddings[2])
    assert {"my mug"} <= set(detector.predict(picture(), **EVERYTHING).names) | {"my mug"}


def test_mistakes_in_image_prompts_get_one_sentence(detector) -> None:
    with pytest.raises(ValueError, match="'mug' was given no crops"):
        detector.set_vocabulary({"mug": []})
    with pytest.raises(ValueError, match="stands twice"), pytest.warns(UserWarning, match="repeats Mug"):
        detector.set_vocabulary({"mug": picture(), "Mug": None})
    with pytest.raises(ValueError, match="pictures were given together with embeddings"):
        detector.set_vocabulary({"mug": picture()}, embeddings=np.ones((1, 64)))
    with pytest.raises(ValueError, match="no such file"):
        detector.add_image_prompt("mug", "none.png")


EXAMPLES = Path(__file__).resolve().parents[2] / "ovd" / "web" / "examples"
# By class: an example picture, and the box of the object in it, x1 y1 x2 y2 in pixels.
OBJECTS = {
    "coat": ("coat_bell", (172, 156, 315, 288)), "bell": ("coat_bell", (31, 126, 106, 207)),
    "shark": ("coat_bell", (188, 70, 282, 169)), "cake": ("cake_telephone", (153, 99, 294, 245)),
    "telephone": ("cake_telephone", (16, 190, 68, 236)), "bread": ("bread_bear", (119, 83, 221, 176)),
    "bear": ("bread_bear", (172, 188, 230, 242)),
}  # fmt: skip


def test_mirrored_crops_as_the_query_find_their_objects_among_all_pictures() -> None:
    """Kept weights, drawings never trained on; easier than another vendor's drawing: the very object, but mirrored.

    Right: of all boxes in all pictures, the surest one of a class lies on its object. A class gets none of its name's
    meaning, so the chance of that is at most 1 of 7.
    """
    detector = OpenVocabularyDetector.from_pretrained("mini")
    pictures = {name: Image.open(EXAMPLES / f"{name}.jpg").convert("RGB") for name, _ in OBJECTS.values()}
    crops = {name: ImageOps.mirror(pictures[where].crop(box)) for name, (where, box) in OBJECTS.items()}
    detector.set_vocabulary(crops, competitors=False)
    found = dict(zip(pictures, detector.predict(list(pictures.values()), 0.0, 100, calibrated=False), strict=True))
    right = []
    for name, (where, box) in OBJECTS.items():
        boxes = [
            (score, picture, place)
            for picture, detections in found.items()
            for score, label, place in zip(detections.scores, detections.names, detections.boxes, strict=True)
            if label == name
        ]
        _, picture, place = max(boxes, key=lambda entry: entry[0], default=(0.0, None, np.zeros(4)))
        overlap = box_iou(torch.tensor(place)[None].float(), torch.tensor([box]).float())
        right.append(picture == where and overlap.item() >= 0.5)
    # When written: all but the shark, whose tail the coat hides; no query finds it.
    assert sum(right) >= 5, dict(zip(OBJECTS, right, strict=True))


MINI = Path(__file__).resolve().parents[2] / "data" / "mini"
SHOWN = {
    "koala": "1F428", "taco": "1F32E", "saxophone": "1F3B7", "bicycle": "1F6B2",
    "carrot": "1F955", "banana": "1F34C", "butterfly": "1F98B", "camera": "1F4F7",
}  # fmt: skip


@pytest.mark.skipif(not (MINI / "drawings").is_dir(), reason="the miniature is not built: tools/prepare_data.py mini")
def test_a_drawing_as_the_query_finds_its_kind_in_another_vendors_drawing() -> None:
    """Kept weights; queries by one vendor, pictures by one whose drawings were never trained on."""
    detector = OpenVocabularyDetector.from_pretrained("mini")
    detector.set_vocabulary(
        {name: Image.open(MINI / "drawings" / "noto" / f"{code}.png") for name, code in SHOWN.items()},
        competitors=False,
    )
    pictures = []
    for code in SHOWN.values():
        drawing = Image.open(MINI / "drawings" / "emojione" / f"{code}.png").convert("RGBA").resize((140, 140))
        ground = Image.new("RGB", (320, 320), (150, 160, 150))
        ground.paste(drawing, (90, 90), drawing)
        pictures.append(ground)
    found = detector.predict(pictures, 0.0, 1, calibrated=False)
    first = [d.names[0] == name for d, name in zip(found, SHOWN, strict=True)]
    print(f"image prompts: {sum(first)} of {len(first)} classes first")
    assert sum(first) >= 4, [d.names for d in found]  # chance: 1 of 8
