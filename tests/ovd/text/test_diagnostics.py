"""Findings about a vocabulary, on matrices where they can be seen by eye and against a loop."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from ovd.text import diagnostics
from ovd.text.diagnostics import background_of, diagnose_vocabulary
from ovd.text.vocabulary import Vocabulary

WORDS = Vocabulary.parse("east, almost east, north, up")
ROWS = torch.tensor([[1.0, 0, 0], [0.99, 0.1, 0], [0, 2, 0], [0, 0, 3]])


def test_near_duplicates_are_paired_with_their_cosine() -> None:
    found = diagnose_vocabulary(WORDS, ROWS)
    assert [pair[:2] for pair in found.near_duplicates] == [("east", "almost east")]
    assert found.near_duplicates[0][2] == pytest.approx(0.99 / (0.99**2 + 0.1**2) ** 0.5)
    assert diagnose_vocabulary(WORDS, ROWS, threshold=0.999).near_duplicates == []


def test_words_nearer_to_the_background_are_named_with_their_nearest_word() -> None:
    found = diagnose_vocabulary(WORDS, ROWS, background=torch.tensor([0.0, 0.1, 1.0]))
    assert [(word, other) for word, _, other, _ in found.near_background] == [("up", "east")]
    assert not found.ok and found.background_known
    assert not diagnose_vocabulary(WORDS, ROWS).background_known


def test_cut_words_carry_their_number_of_tokens(image_text) -> None:
    vocabulary = Vocabulary.parse(["cat", "dog " * 30])
    found = diagnose_vocabulary(vocabulary, torch.eye(2), image_text.tokenizer, ("a {}",))
    assert found.cut == [(("dog " * 30).strip(), 33, 16)]


def test_parts_give_what_a_loop_over_pairs_gives(monkeypatch) -> None:
    monkeypatch.setattr(diagnostics, "_ROWS_AT_ONCE", 7)
    torch.manual_seed(0)
    rows, background = torch.randn(40, 4), torch.randn(4)
    vocabulary = Vocabulary.parse([f"word {i}" for i in range(40)])
    found = diagnose_vocabulary(vocabulary, rows, background=background, threshold=0.8)
    cosine = F.cosine_similarity(rows[:, None], rows[None], dim=-1)
    pairs = {(f"word {i}", f"word {j}") for i, j in itertools.combinations(range(40), 2) if cosine[i, j] >= 0.8}
    assert {pair[:2] for pair in found.near_duplicates} == pairs and found.num_near_duplicates == len(pairs) > 10
    assert [p[2] for p in found.near_duplicates] == sorted((p[2] for p in found.near_duplicates), reverse=True)
    near = []
    for i in range(40):
        others = max(float(cosine[i, j]) for j in range(40) if j != i)
        if F.cosine_similarity(rows[i], background, dim=0) > others:
            near.append(f"word {i}")
    assert [entry[0] for entry in found.near_background] == near


def test_a_single_word_has_nothing_to_be_confused_with() -> None:
    assert diagnose_vocabulary(Vocabulary.parse("cat"), ROWS[:1], background=ROWS[0]).ok


def test_equal_rows_are_counted_but_not_all_listed(monkeypatch) -> None:
    monkeypatch.setattr(diagnostics, "_MOST_PAIRS", 5)
    vocabulary = Vocabulary.parse([f"word {i}" for i in range(30)])
    found = diagnose_vocabulary(vocabulary, torch.ones(30, 2))
    assert found.num_near_duplicates == 30 * 29 // 2 and len(found.near_duplicates) == 5
    assert "and 415 more" in found.to_text()


def test_the_background_of_an_image_text_model_is_the_empty_prompt(image_text_folder, image_text) -> None:
    background, source = background_of(image_text_folder, image_text)
    with torch.no_grad():
        expected = F.normalize(image_text.model.encode_text(image_text.tokenizer([""])), dim=-1)[0]
    torch.testing.assert_close(background, expected)
    assert source == "embedding of an empty prompt"


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="for 4 words"):
        diagnose_vocabulary(WORDS, ROWS[:2])
    with pytest.raises(ValueError, match="threshold is 2"):
        diagnose_vocabulary(WORDS, ROWS, threshold=2)
