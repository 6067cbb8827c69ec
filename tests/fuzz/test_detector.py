"""The Python interface: any picture, any words and any argument give detections or the documented ValueError."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ovd import OpenVocabularyDetector
from ovd.data.images import ImageError, read_image


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
