"""Captions and tokens."""

import numpy as np
import open_clip
import pytest
import torch

from pretrain.config import CaptionConfig
from pretrain.data.text_augment import training_caption
from pretrain.data.tokenizer import build_tokenizer

START, END = 49406, 49407  # open_clip's special tokens


@pytest.mark.parametrize("length", [4, 8, 16])
def test_a_cut_caption_keeps_its_end_token(length):
    tokens = build_tokenizer(length)(["a very long caption about " + "many different things " * 20])
    assert tokens.shape == (1, length) and tokens.dtype == torch.int64
    assert tokens[0, 0] == START and tokens[0, -1] == END and (tokens[0] == END).sum() == 1


def test_a_short_caption_is_padded_with_zeros_after_its_end():
    tokens = build_tokenizer(8)(["an axe"])[0].tolist()
    assert tokens[0] == START and tokens[3:] == [END, 0, 0, 0, 0]


def test_equals_open_clips_tokenizer_where_nothing_is_cut():
    texts = ["an axe", "Crêpe & Tea!"]
    assert torch.equal(build_tokenizer(77)(texts), open_clip.get_tokenizer("ViT-B-32")(texts))


def test_equals_open_clips_tokenizer_on_any_text():
    rng = np.random.default_rng(0)
    letters = list("abcXYZ  019'.,!?-_&;<>#\t\n\r\x1b\x00\"`") + [
        "é",
        "’",
        "ﬁ",
        "日本",
        "&amp;",
        "Ã©",
        "'s",
        "'LL",
        "\u00a0",
        "İ",
    ]
    texts = ["".join(rng.choice(letters, int(rng.integers(0, 30)))) for _ in range(2000)]
    texts += ["<start_of_text> <end_of_text>", "", " ", "&AMP;lt;", "x\u2028y"]
    ours, theirs = build_tokenizer(40), open_clip.SimpleTokenizer(context_length=40)
    for _ in range(2):  # the second time from the cache
        assert torch.equal(ours(texts), theirs(texts))


def test_one_of_several_captions_is_drawn_evenly():
    found = captions(CaptionConfig(), {"caption": "unused", "captions": ["axe", "hatchet", "tool"]})
    assert set(found) == {"axe", "hatchet", "tool"} and all(70 < found.count(text) < 130 for text in set(found))


def captions(config, row, count=300):
    return [training_caption(row, np.random.default_rng(i), config) for i in range(count)]


def test_templates_are_drawn_evenly():
    config = CaptionConfig(templates=["{}", "a {}"])
    found = captions(config, {"caption": "axe", "keywords": "tool|wood"})
    assert set(found) == {"axe", "a axe"} and 110 < found.count("axe") < 190


def test_keywords_are_appended_as_often_as_asked():
    row = {"caption": "axe", "keywords": "tool||wood|chop|split"}
    found = captions(CaptionConfig(keyword_probability=0.5, max_keywords=2), row)
    with_keywords = [text.split(", ")[1:] for text in found if text != "axe"]
    assert 110 < len(with_keywords) < 190
    assert all(1 <= len(words) <= 2 and len(set(words)) == len(words) for words in with_keywords)
    assert {word for words in with_keywords for word in words} == {"tool", "wood", "chop", "split"}


@pytest.mark.parametrize("row", [{"caption": "axe"}, {"caption": "axe", "keywords": ""}])
def test_rows_without_keywords_stay_plain(row):
    assert set(captions(CaptionConfig(keyword_probability=1.0), row, 20)) == {"axe"}


def test_braces_in_a_caption_are_plain_characters():
    assert captions(CaptionConfig(templates=["a {}"]), {"caption": "{0} {x}"}, 1) == ["a {0} {x}"]
