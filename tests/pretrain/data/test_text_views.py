"""Weak and strong caption views: seeded, with the published frequencies, never empty."""

import pickle
from collections import Counter

import numpy as np
import pytest

from pretrain.config import CaptionConfig, ConfigError
from pretrain.data.text_views import (
    STOP_WORDS,
    TextView,
    TextViewOptions,
    check_text_options,
    delete_words,
    drop_stop_words,
    read_synonyms,
    replace_synonyms,
    swap_words,
)

ROW = {"caption": "a dog and the cat on a red sofa", "keywords": "pet|couch"}
PLAIN = CaptionConfig()
TRIALS = 4000  # 0.035 is then over four deviations of a share of one half


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([7, 0, seed])


@pytest.fixture
def synonyms(tmp_path):
    path = tmp_path / "synonyms.tsv"
    path.write_text("# a comment\ndog\thound|puppy\n\nSofa\tcouch | settee\n")
    return path


def test_a_view_depends_on_the_generator_alone(synonyms):
    view = pickle.loads(pickle.dumps(TextView(TextViewOptions(synonyms=str(synonyms)), True, PLAIN)))
    drawn = [[view(ROW, rng(seed)) for seed in range(50)] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 10


def test_the_weak_view_drops_all_stop_words_or_none_with_the_probability():
    for probability in (0.8, 0.9):
        view = TextView(TextViewOptions(stop_word_probability=probability), False, PLAIN)
        generator = rng()
        counts = Counter(view(ROW, generator) for _ in range(TRIALS))
        assert set(counts) == {ROW["caption"], "dog cat red sofa"}
        assert counts["dog cat red sofa"] / TRIALS == pytest.approx(probability, abs=0.035)


def test_stop_words_are_found_despite_case_and_punctuation():
    assert drop_stop_words("The dog, and (the) cat.".split()) == ["dog,", "cat."]
    assert drop_stop_words("to be or not to be".split()) == "to be or not to be".split()


def test_the_stop_words_are_nltks_179():
    """The number, and words that tell it from other lists: modals are not in it but for can, will and should."""
    assert len(STOP_WORDS) == 179 and {"the", "with", "should", "now", "ma", "y", "shan't", "that'll"} <= STOP_WORDS
    assert not {"could", "would", "might", "without", "us", "also", "dog", "red", "man"} & STOP_WORDS


def test_the_strong_view_draws_one_operation_with_the_published_weights(synonyms):
    """With long distinct words every operation can be told from what it left: lengths, words, order."""
    words = ["dog", *(f"word{i}" for i in range(19))]
    options = TextViewOptions(stop_word_probability=0.0, synonyms=str(synonyms), deletion_probability=0.5)
    view, generator, counts = TextView(options, True, PLAIN), rng(), Counter()
    for _ in range(TRIALS):
        made = view({"caption": " ".join(words)}, generator).split()
        if made[0] in ("hound", "puppy") and made[1:] == words[1:]:
            counts["synonym"] += 1
        elif sorted(made) == sorted(words):
            counts["swap"] += 1
        else:
            assert [word for word in words if word in made] == made
            counts["deletion"] += 1
    for name, weight in {"synonym": 0.4, "swap": 0.4, "deletion": 0.2}.items():
        assert counts[name] / TRIALS == pytest.approx(weight, abs=0.035), counts


def test_without_a_list_of_synonyms_another_operation_is_drawn_with_its_own_weight():
    words = [f"word{i}" for i in range(20)]
    view = TextView(TextViewOptions(stop_word_probability=0.0, deletion_probability=0.5), True, PLAIN)
    generator = rng()
    made = [view({"caption": " ".join(words)}, generator).split() for _ in range(TRIALS)]
    swapped = sum(len(m) == 20 for m in made) / TRIALS
    assert swapped == pytest.approx(2 / 3, abs=0.035)


def test_a_caption_without_a_word_of_the_list_stays_where_a_synonym_is_drawn(synonyms):
    words = [f"word{i}" for i in range(20)]
    options = TextViewOptions(stop_word_probability=0.0, deletion_probability=0.5, synonyms=str(synonyms))
    view, generator = TextView(options, True, PLAIN), rng()
    made = [view({"caption": " ".join(words)}, generator).split() for _ in range(TRIALS)]
    assert sum(m == words for m in made) / TRIALS == pytest.approx(0.4, abs=0.035)


def test_an_operation_touches_one_word_however_long_the_caption_is(synonyms):
    """As published; a deletion, the one operation of a share, takes a tenth of the words."""
    words = [*(["dog", "sofa"] * 20), *(f"word{i}" for i in range(60))]
    options = TextViewOptions(stop_word_probability=0.0, synonyms=str(synonyms))
    view, generator, lengths = TextView(options, True, PLAIN), rng(), []
    for _ in range(TRIALS // 4):
        made = view({"caption": " ".join(words)}, generator).split()
        if len(made) < 100:
            lengths.append(len(made))
        elif sorted(made) == sorted(words):
            assert sum(a != b for a, b in zip(words, made, strict=True)) in (0, 2)  # 0: a dog for a dog
        else:
            new = set(made) - set(words)
            assert len(new) == 1 and sum(word in new for word in made) == 20  # wherever the word occurs
    assert np.mean(lengths) == pytest.approx(90, abs=1)


def test_keywords_stand_in_for_synonyms_where_asked():
    options = TextViewOptions(stop_word_probability=1.0, keywords_as_synonyms=True)
    view, generator = TextView(options, True, PLAIN), rng()
    made = Counter(
        view({"caption": "the cyclone", "keywords": "twister|hurricane|cyclone"}, generator) for _ in range(TRIALS)
    )
    assert set(made) == {"cyclone", "twister", "hurricane"}
    assert 1 - made["cyclone"] / TRIALS == pytest.approx(0.4, abs=0.035)
    without = TextView(TextViewOptions(), True, PLAIN)
    assert {without({"caption": "cyclone", "keywords": "twister"}, generator) for _ in range(50)} == {"cyclone"}


@pytest.mark.parametrize("caption", ["a", "the of", "dog", "a dog", "  two   words "])
@pytest.mark.parametrize("repair", [False, True])
def test_a_caption_is_never_empty(caption, repair):
    options = TextViewOptions(stop_word_probability=1.0, deletion_probability=1.0, repair=repair)
    for strong in (False, True):
        view, generator = TextView(options, strong, PLAIN), rng()
        assert all(view({"caption": caption}, generator).strip() for _ in range(200))


def test_repair_comes_first_and_makes_lower_case():
    view = TextView(TextViewOptions(stop_word_probability=0.0, repair=True), False, PLAIN)
    assert view({"caption": "Salt &amp;amp;  PEPPER\n"}, rng()) == "salt & pepper"
    plain = TextView(TextViewOptions(stop_word_probability=0.0), False, PLAIN)
    assert plain({"caption": "Salt  PEPPER\n"}, rng()) == "Salt PEPPER"


def test_single_gives_all_views_of_a_sample_one_caption_and_multi_draws_anew():
    row = {"captions": ["one", "two", "three", "four"]}
    for captions, agreement in (("single", 1.0), ("multi", 0.25)):
        options = TextViewOptions(captions=captions)
        weak, strong = TextView(options, False, PLAIN), TextView(options, True, PLAIN)
        same, seen = 0, Counter()
        for seed in range(800):
            generator = rng(seed)
            drawn = [weak(row, generator), strong(row, generator)]
            same += drawn[0] == drawn[1]
            seen[drawn[0]] += 1
        assert same / 800 == pytest.approx(agreement, abs=0.07)
        assert min(seen.values()) > 140 and len(seen) == 4  # 200 each


def test_operations_on_words():
    words = "one two three four".split()
    assert replace_synonyms(words, {"two": ["zwei"], "four": ["vier"]}, 9, rng()) == ["one", "zwei", "three", "vier"]
    assert replace_synonyms(words, {"five": ["x"]}, 1, rng()) is None
    assert replace_synonyms(["one", "can"], {"can": ["tin"]}, 1, rng()) is None  # a stop word
    assert replace_synonyms("(Two, two, too".split(), {"two": ["a pair"]}, 1, rng(1)) == ["(a pair,", "two,", "too"]
    for seed in range(20):
        swapped = swap_words(words, 1, rng(seed))
        assert sorted(swapped) == sorted(words) and sum(a != b for a, b in zip(words, swapped, strict=True)) == 2
    assert swap_words(["one"], 3, rng()) == ["one"]
    kept = [len(delete_words(words, 0.25, rng(seed))) for seed in range(1000)]
    assert np.mean(kept) == pytest.approx(3, abs=0.15)
    assert {delete_words(words, 1.0, rng(seed))[0] for seed in range(100)} == set(words)


def test_a_synonym_file_is_read_and_its_faults_are_named(synonyms, tmp_path):
    assert read_synonyms(synonyms) == {"dog": ["hound", "puppy"], "sofa": ["couch", "settee"]}
    with pytest.raises(ConfigError, match="no synonym file at .*none.tsv.* run `python tools/prepare_data.py syn"):
        read_synonyms(tmp_path / "none.tsv")
    synonyms.write_text("dog\thound\ncat feline\n")
    with pytest.raises(ConfigError, match="line 2: 'cat feline' is not of the form"):
        read_synonyms(synonyms)


def test_options_that_cannot_be_used_are_named():
    with pytest.raises(ConfigError, match="x.stop_word_probability is 80"):
        check_text_options(TextViewOptions(stop_word_probability=80), "x")
    with pytest.raises(ConfigError, match="x.captions is 'all'"):
        check_text_options(TextViewOptions(captions="all"), "x")
    with pytest.raises(ConfigError, match="x.deletion_probability is 10.0"):
        check_text_options(TextViewOptions(deletion_probability=10.0), "x")
    with pytest.raises(ConfigError, match="x.eda_words is 0: it must be at least 1"):
        check_text_options(TextViewOptions(eda_words=0), "x")
