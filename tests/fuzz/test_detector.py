"""The Python interface: any picture, any words and any argument give detections or the documented ValueError."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import ovd
from ovd import OpenVocabularyDetector
from ovd.calibration import read_calibration
from ovd.data.images import ImageError, read_image
from ovd.detector_folder import FORMAT


@pytest.fixture(scope="module")
def detector() -> OpenVocabularyDetector:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield OpenVocabularyDetector.from_pretrained("mini")
    torch.set_num_threads(threads)


PICTURES = [
    np.zeros((4, 4, 3)), np.zeros((4, 4), complex), np.zeros((4, 4), "M8[s]"), np.zeros((4, 4), object), np.array("x"),
    np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8), np.zeros((1, 2, 3, 4), np.uint8), np.full((4, 4, 3), np.nan),
    np.full((4, 4, 3), np.inf), np.zeros((4, 4, 7), np.uint8), np.uint8(3), None, 5, object(), {}, "", b"", "\0",
    torch.zeros(3, 4, 4), torch.zeros(0), torch.full((3, 4, 4), torch.nan), torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
]  # fmt: skip


@pytest.mark.parametrize("picture", PICTURES, ids=range(len(PICTURES)))
def test_what_is_no_picture_is_refused(picture, detector):
    with pytest.raises(ImageError) as caught:
        detector.predict(picture)
    assert "\n" not in str(caught.value)


@given(array=hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_any_array_is_read_as_rgb_or_refused(array):
    try:
        pixels = read_image(array)
    except ImageError:
        return
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 1)])
def test_extreme_pictures_give_boxes_inside_them(size, detector):
    detector.set_vocabulary("cat")
    found = detector.predict(Image.new("RGB", size), threshold=0.0, max_detections=5)
    assert np.isfinite(found.boxes).all() and (found.boxes >= 0).all()
    assert (found.boxes[:, 2::2] <= size[0]).all() and (found.boxes[:, 3::2] <= size[1]).all()


WORDS = [
    "a\0b",
    "\x1b[31mred",
    "\u202ecat",
    "שלום",
    "مرحبا",
    "🦜👩‍👩‍👧",
    "x" * 5000,
    "\u200b",
    "e\u0301" * 50,
    "<b>cat</b>",
    "../x",
]


def test_words_of_any_script_give_scores_that_are_numbers(detector):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of long words
        vocabulary = detector.set_vocabulary([*WORDS, *WORDS])
    assert len(vocabulary) == len(WORDS)
    found = detector.predict(np.zeros((64, 64, 3), np.uint8), threshold=0.0, max_detections=3)
    assert np.isfinite(found.scores).all() and set(found.names) <= set(vocabulary.words)


@given(words=st.one_of(st.lists(st.text(max_size=8), max_size=3), st.text(max_size=12), st.integers()))
@settings(max_examples=15)
def test_any_words_become_a_vocabulary_or_a_value_error(words, detector):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            detector.set_vocabulary(words)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert all(word.strip() for word in detector.vocabulary.words)


@pytest.mark.parametrize("words", [[], "", " , ,", [""], [5], [None], None, 7, ["\ud800"], {}])
def test_a_vocabulary_without_words_is_refused_and_the_old_one_stays(words, detector):
    detector.set_vocabulary("cat, dog")
    with pytest.raises(ValueError):
        detector.set_vocabulary(words)
    assert detector.vocabulary.words == ("cat", "dog")


WRONG = ["x", None, 1.5, float("nan"), -1, [], 10**30]


@pytest.mark.parametrize(
    "arguments",
    [
        *({"threshold": value} for value in ("x", float("nan"), -0.1, 1.1, [], 1j)),
        *({"max_detections": value} for value in WRONG if value != 10**30),
        *({"batch_size": value} for value in WRONG if value != 10**30),
        *({"tile": value} for value in WRONG if value not in (None, 10**30)),
        {"tile": 1}, {"tile": 32, "overlap": 0.9999}, {"tile": 64, "overlap": float("nan")}, {"tile": 64, "overlap": 1},
    ],
    ids=str,
)  # fmt: skip
def test_an_argument_out_of_range_is_one_sentence(arguments, detector):
    detector.set_vocabulary("cat")
    with pytest.raises(ValueError, match="give|use|needed|overlap") as caught:
        detector.predict(np.zeros((4000, 4000, 3), np.uint8), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments", [{"index": "x"}, {"index": 0.5}, {"index": -1}, {"index": 0, "top": "x"}], ids=str
)
def test_a_wrong_place_to_explain_is_one_sentence(arguments, detector):
    detector.set_vocabulary("cat")
    with pytest.raises(ValueError, match="give a whole number"):
        detector.explain(np.zeros((40, 40, 3), np.uint8), **arguments)


@pytest.mark.parametrize(
    "matrix",
    [np.array(["x"]), np.array([[object()]]), [[1, 2], [3]], np.zeros(3), np.zeros((1, 4), complex)],
    ids=range(5),
)
def test_what_is_no_matrix_of_embeddings_is_refused(matrix, detector):
    with pytest.raises(ValueError, match="embeddings"):
        detector.set_vocabulary("cat", embeddings=matrix)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "not valid YAML"), ("base_names: 5\nformat: {f}\narchitecture: {{}}\n", "base_names"),
        ("base_names: {{a: b}}\nformat: {f}\narchitecture: {{}}\n", "base_names"),
        ("format: {f}\narchitecture: {{image_size: 10000000}}\n", "image_size is 10000000"),
        ("format: {f}\narchitecture: {{box_fc_dim: 1000000000}}\n", "box_fc_dim is 1000000000"),
        ("format: {f}\narchitecture: {{detections_per_image: null}}\n", "detections_per_image"),
    ],
)  # fmt: skip
def test_a_detector_folder_that_asks_for_nonsense_is_refused(tmp_path, text, message):
    shipped = Path(ovd.__file__).parent / "weights" / "mini"
    shutil.copytree(shipped / "image_text", tmp_path / "image_text")
    (tmp_path / "config.yaml").write_text(text if text.startswith("[") else text.format(f=FORMAT))
    with pytest.raises(ValueError, match=message):
        OpenVocabularyDetector.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "5", '{"format": 1, "settings": 5, "curves": []}', '{"format": 1, "curves": [{"words": -1}]}'],
)
def test_a_calibration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ValueError, match="is no calibration"):
        read_calibration(tmp_path / "calibration.json")
