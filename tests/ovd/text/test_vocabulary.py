"""Vocabularies from everything a user may give."""

import json
from pathlib import Path

import pytest

from ovd.text.vocabulary import Vocabulary, normalize_word, prompt_phrase


def test_comma_list_file_and_list_agree(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("# my words\ncat\n\n fire engine \n", encoding="utf-8")
    expected = ("cat", "fire engine")
    assert Vocabulary.parse("cat, fire engine,").words == expected
    assert Vocabulary.parse(["cat", "fire engine"]).words == expected
    assert Vocabulary.parse(file).words == Vocabulary.parse(str(file)).words == expected


def test_duplicates_are_merged_and_named() -> None:
    with pytest.warns(UserWarning, match="repeats Fire_Engine"):
        vocabulary = Vocabulary.parse(["fire engine", "cat", "Fire_Engine"])
    assert vocabulary.words == ("fire engine", "cat")


@pytest.mark.parametrize("empty", ["", " , ,", [], ["  "]])
def test_empty_is_refused(empty) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Vocabulary.parse(empty)


@pytest.mark.parametrize(
    ("word", "phrase"),
    [
        ("mouse_(computer_equipment)", "mouse"),
        ("fire_engine", "fire engine"),
        ("(odd)", "odd"),
        ("Übergröße", "Übergröße"),
    ],
)
def test_prompt_phrase(word: str, phrase: str) -> None:
    assert prompt_phrase(word) == phrase


def test_normalised_words_ignore_case_and_underscores() -> None:
    assert normalize_word(" Fire_Engine") == normalize_word("fire  engine") == "fire engine"


def test_unicode_words_survive_a_file(tmp_path: Path) -> None:
    file = tmp_path / "wörter.txt"
    file.write_text("\ufeffzebra\n猫\nсобака\n", encoding="utf-8")
    assert Vocabulary.parse(file).words == ("zebra", "猫", "собака")


def test_lvis_file_gives_one_class_a_category_in_the_order_of_ids(tmp_path: Path) -> None:
    categories = [
        {"id": 9, "name": "bow_(weapon)", "synonyms": ["bow_(weapon)"]},
        {"id": 3, "name": "bow_(decorative_ribbons)", "synonyms": ["bow_(decorative_ribbons)", "ribbon_bow"]},
        {"id": 5, "name": "cat"},
    ]
    file = tmp_path / "lvis.json"
    file.write_text(json.dumps({"categories": categories}))
    vocabulary = Vocabulary.parse(file)
    assert vocabulary.words == ("bow_(decorative_ribbons)", "cat", "bow_(weapon)")
    # Both would read "bow" without their qualifier, so they keep it.
    assert [names[0] for names in vocabulary.synonyms] == ["bow decorative ribbons", "cat", "bow weapon"]
    assert "ribbon bow" in vocabulary.synonyms[0]


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "{"), ("b.json", '{"images": []}'), ("c.txt", b"\xff\xfe\x00")]
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str | bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=name):
        Vocabulary.parse(file)


def test_missing_file_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match="nowhere.txt does not exist; check the path"):
        Vocabulary.parse("nowhere.txt")


def test_category_without_a_name_is_named() -> None:
    with pytest.raises(ValueError, match=r"without a name \(ids \[4\]\)"):
        Vocabulary.from_categories([{"id": 4, "name": " "}])
