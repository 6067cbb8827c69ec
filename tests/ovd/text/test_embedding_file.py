"""Embedding files are believed only by the model and the words that they were made for."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ovd.text.embedding_file import load_embeddings, read_info, save_embeddings
from ovd.text.embeddings import embed_vocabulary, tokenizer_identity
from ovd.text.vocabulary import Vocabulary

TEMPLATES = ("{}", "one {}")
CATEGORIES = [{"id": 1, "name": "sofa", "synonyms": ["sofa", "couch"]}, {"id": 2, "name": "bât_(animal)"}]


@pytest.fixture
def written(tmp_path: Path, image_text) -> tuple[Path, Vocabulary, torch.Tensor]:
    vocabulary = Vocabulary.from_categories(CATEGORIES)
    embeddings = embed_vocabulary(vocabulary, image_text, TEMPLATES, use_synonyms=True)
    path = save_embeddings(tmp_path / "words.safetensors", embeddings, vocabulary, image_text, TEMPLATES, True)
    return path, vocabulary, embeddings


def test_a_file_gives_back_the_matrix_and_says_what_made_it(written, image_text) -> None:
    path, vocabulary, embeddings = written
    torch.testing.assert_close(load_embeddings(path, vocabulary, image_text), embeddings)
    info = read_info(path)
    assert info.vocabulary == vocabulary and info.templates == TEMPLATES and info.use_synonyms
    assert info.dimension == 64 and info.fingerprint == image_text.fingerprint
    assert info.tokenizer == tokenizer_identity(image_text.tokenizer)
    assert torch.equal(load_file(path)["embeddings"], embeddings)  # any reader of safetensors sees the matrix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "f" * 64}, "made by the text tower with weights"),
        ({"embed_dim": 32}, "64 dimensions, but this model has 32"),
        ({"tokenizer": lambda texts: torch.ones(len(texts), 16)}, "tokenizer"),
    ],
)
def test_another_model_is_refused_with_the_command_that_helps(written, image_text, change, message) -> None:
    path, vocabulary, _ = written
    with pytest.raises(ValueError, match=message) as error:
        load_embeddings(path, vocabulary, dataclasses.replace(image_text, **change))
    assert "tools/embed_vocabulary.py" in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sofa", "taco"], "'bât_.animal.' as word 2, but the vocabulary has 'taco'"),
        (["bât_(animal)", "sofa"], "'sofa' as word 1"),
        (["sofa"], "2 words, but the vocabulary has 1"),
    ],
)
def test_other_words_are_refused(written, image_text, words, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_embeddings(written[0], Vocabulary.from_words(words), image_text)


def test_foreign_and_damaged_files_are_refused(tmp_path: Path, written, image_text) -> None:
    path, vocabulary, embeddings = written
    foreign = tmp_path / "foreign.safetensors"
    save_file({"embeddings": embeddings}, foreign)
    with pytest.raises(ValueError, match="no embedding file of this package"):
        load_embeddings(foreign, vocabulary, image_text)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        load_embeddings(path, vocabulary, image_text)
    with pytest.raises(ValueError, match="does not exist"):
        read_info(tmp_path / "none.safetensors")


def test_what_does_not_fit_is_not_written(tmp_path: Path, image_text) -> None:
    vocabulary = Vocabulary.parse("cat, dog")
    with pytest.raises(ValueError, match=r"shape \(3, 64\)"):
        save_embeddings(tmp_path / "w.safetensors", torch.ones(3, 64), vocabulary, image_text, TEMPLATES)
    with pytest.raises(ValueError, match="does not end in .safetensors"):
        save_embeddings(tmp_path / "w.npy", torch.ones(2, 64), vocabulary, image_text, TEMPLATES)
    assert not list(tmp_path.iterdir())


def test_plain_matrices_are_taken_with_a_warning(tmp_path: Path, image_text) -> None:
    file = tmp_path / "matrix.npy"
    np.save(file, np.full((2, 64), 3.0, dtype=np.float16))
    with pytest.warns(UserWarning, match="nothing in .* says which model made it"):
        rows = load_embeddings(file, Vocabulary.parse("cat, dog"), image_text)
    torch.testing.assert_close(rows, torch.full((2, 64), 0.125))


def test_tokenizers_are_told_apart_by_what_they_do() -> None:
    import open_clip

    same = [tokenizer_identity(open_clip.SimpleTokenizer(context_length=16)) for _ in range(2)]
    assert same[0] == same[1]
    assert tokenizer_identity(open_clip.SimpleTokenizer(context_length=77)) != same[0]
    assert tokenizer_identity(open_clip.SimpleTokenizer(context_length=16, clean="whitespace")) != same[0]
