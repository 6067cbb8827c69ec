"""Prompt ensembles against a loop over single prompts."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovd.text.embeddings import class_prompts, cut_words, embed_vocabulary, read_matrix, read_templates
from ovd.text.vocabulary import Vocabulary


@torch.no_grad()
def test_ensemble_is_the_normalised_mean_of_normalised_prompts(image_text) -> None:
    vocabulary, templates = Vocabulary.parse("cat, fire_engine"), ("a {}", "a drawing of a {}")
    ours = embed_vocabulary(vocabulary, image_text, templates, batch_size=3)
    for embedding, word in zip(ours, ("cat", "fire engine"), strict=True):
        tokens = [image_text.tokenizer([template.format(word)]) for template in templates]
        prompts = [F.normalize(image_text.model.encode_text(row), dim=-1)[0] for row in tokens]
        torch.testing.assert_close(embedding, F.normalize((prompts[0] + prompts[1]) / 2, dim=-1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_synonyms_are_averaged_when_asked(image_text) -> None:
    vocabulary = Vocabulary.from_categories([{"id": 1, "name": "sofa", "synonyms": ["sofa", "couch"]}])
    ours = embed_vocabulary(vocabulary, image_text, ("{}",), use_synonyms=True)
    sofa, couch = F.normalize(image_text.model.encode_text(image_text.tokenizer(["sofa", "couch"])), dim=-1)
    torch.testing.assert_close(ours[0], F.normalize(sofa + couch, dim=-1), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours, embed_vocabulary(vocabulary, image_text, ("{}",)))


def test_words_cut_by_the_context_are_named(image_text) -> None:
    long = "very " * 30 + "long dog"
    with pytest.warns(UserWarning, match="1 word.*16 tokens.*long dog"):
        embed_vocabulary(Vocabulary.parse(["cat", long]), image_text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_vocabulary(Vocabulary.parse("cat"), image_text)


def test_cache_is_read_back_and_depends_on_the_words(image_text, tmp_path: Path) -> None:
    first = embed_vocabulary(Vocabulary.parse("cat, dog"), image_text, cache_folder=tmp_path)
    again = embed_vocabulary(Vocabulary.parse("cat, dog"), image_text, cache_folder=tmp_path)
    embed_vocabulary(Vocabulary.parse("cat, owl"), image_text, cache_folder=tmp_path)
    torch.testing.assert_close(first, again)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_template_without_a_place_for_the_word_is_refused(image_text) -> None:
    with pytest.raises(ValueError, match="'a photo' has no {}"):
        embed_vocabulary(Vocabulary.parse("cat"), image_text, ("a photo",))


def test_only_new_words_go_through_the_text_tower(image_text, monkeypatch) -> None:
    memory: dict = {}
    first = embed_vocabulary(Vocabulary.parse("cat, dog, owl"), image_text, memory=memory)
    seen = []
    encode = image_text.model.encode_text
    monkeypatch.setattr(image_text.model, "encode_text", lambda tokens: seen.append(len(tokens)) or encode(tokens))
    again = embed_vocabulary(Vocabulary.parse("owl, taco, cat"), image_text, ("{}", "a {}"), memory=memory)
    assert seen == [6]  # other templates: nothing is known
    seen.clear()
    again = embed_vocabulary(Vocabulary.parse("owl, taco, cat"), image_text, memory=memory)
    assert seen == [4]  # the four prompts of "taco"
    torch.testing.assert_close(again[[2, 0]], first[[0, 2]])


def test_batches_do_not_change_the_result(image_text) -> None:
    vocabulary = Vocabulary.from_categories(
        [{"id": i, "name": f"thing {i}", "synonyms": [f"object {j}" for j in range(i)]} for i in range(5)]
    )
    one = embed_vocabulary(vocabulary, image_text, use_synonyms=True, batch_size=1000)
    torch.testing.assert_close(embed_vocabulary(vocabulary, image_text, use_synonyms=True, batch_size=3), one)


def test_token_counts_of_cut_words(image_text) -> None:
    prompts = class_prompts(Vocabulary.parse(["cat", "dog " * 30]), ("a {}",))
    assert cut_words(prompts, image_text.tokenizer) == {1: 33}  # start, "a", 30 times "dog", end


def test_template_files(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a {}\n\n a photo of a {} \n")
    assert read_templates(file) == ("a {}", "a photo of a {}")
    file.write_text("a {}\na photo\n")
    with pytest.raises(ValueError, match="'a photo' without {}"):
        read_templates(file)
    with pytest.raises(ValueError, match="does not exist"):
        read_templates(tmp_path / "none.txt")


def test_matrix_files_are_checked_and_normalised(tmp_path: Path) -> None:
    file = tmp_path / "matrix.npy"
    np.save(file, np.full((2, 4), 3.0))
    torch.testing.assert_close(read_matrix(file, 2, 4), torch.full((2, 4), 0.5))
    with pytest.raises(ValueError, match=r"shape \(2, 4\).*\(3, 4\)"):
        read_matrix(file, 3, 4)
    with pytest.raises(ValueError, match="does not exist"):
        read_matrix(tmp_path / "none.npy", 2, 4)
    for content in (b"no matrix", b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a .npy matrix"):
            read_matrix(file, 2, 4)
