"""What a detector is told to look for, as one object that never changes, and how it is made of words and pictures.

This file does not touch the network: see `OpenVocabularyDetector`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovd.image_prompts import Prompts, embed_crops, split_prompts
from ovd.text.embedding_file import SUFFIX, is_embedding_file, load_embeddings, read_info
from ovd.text.embeddings import Prompts as Prompted
from ovd.text.embeddings import embed_empty_prompt, embed_vocabulary
from ovd.text.vocabulary import Vocabulary, normalize_word, prompt_phrase
from pretrain.modeling.checkpoint import ImageTextModel


@dataclass(frozen=True, eq=False)
class ActiveVocabulary:
    """A vocabulary with its matrix.

    Attributes:
        vocabulary: C words.
        embeddings: (C + K, D) rows of the words, then of the competitors; None for a matrix the network was given.
        is_base: (C + K,) bool, True for classes trained on.
        competitors: K words that take part in the scores and are not reported.
        prompted: templates and whether synonyms were used; None for given embeddings.
        background: (D,) embedding that takes the competitors' place in the image-text score where nothing competes, so
            that a word alone is not certain to be there; None where something does.
        compete: the base classes take part in the scores, as words or as competitors.
    """

    vocabulary: Vocabulary
    embeddings: Tensor | None = None
    is_base: Tensor | None = None
    competitors: tuple[str, ...] = ()
    prompted: tuple[tuple[str, ...], bool] | None = None
    background: Tensor | None = None
    compete: bool = False


def word_forms(words: Iterable[str]) -> set[str]:
    """The words as compared: plain, and as they stand in a prompt."""
    return {form for word in words for form in (normalize_word(word), normalize_word(prompt_phrase(word)))}


class VocabularyBuilder:
    """Make vocabularies for one detector; rows of earlier words are remembered. For one thread at a time.

    Args:
        image_text: embeds words and crops.
        base_names: names of the categories trained on.
    """

    def __init__(self, image_text: ImageTextModel, base_names: Sequence[str]) -> None:
        self.image_text, self.base_names = image_text, tuple(base_names)
        self._memory: dict[Prompted, Tensor] = {}
        self._empty_prompt: Tensor | None = None

    def remember(self, rows: Mapping[Prompted, Tensor]) -> None:
        """Take rows that this text tower made before, by the prompts of their class."""
        self._memory.update(rows)

    def build(
        self,
        words: Any,
        base_words: Iterable[str] | None,
        templates: Sequence[str],
        embeddings: Tensor | np.ndarray | str | Path | None,
        competitors: bool,
        use_synonyms: bool,
    ) -> ActiveVocabulary:
        """See `OpenVocabularyDetector.set_vocabulary`."""
        if embeddings is None and is_embedding_file(words):
            words, embeddings = None, words
        own_file = is_embedding_file(embeddings)
        if words is None:
            if not own_file:
                raise ValueError(f"no words were given; give some, or a {SUFFIX} file of embeddings that names its own")
            words = read_info(embeddings).vocabulary
        vocabulary, prompts = split_prompts(words)
        if prompts and embeddings is not None:
            raise ValueError("pictures were given together with embeddings; give one of them")
        if own_file:
            info = read_info(embeddings)
            templates, use_synonyms = info.templates, info.use_synonyms
        prompted = (tuple(templates), use_synonyms) if embeddings is None or own_file else None
        rows = self._rows(vocabulary, embeddings, templates, use_synonyms)
        known = word_forms(self.base_names if base_words is None else base_words)
        is_base = torch.tensor([normalize_word(word) in known for word in vocabulary.words])
        rows, is_base = self._with_pictures(rows, is_base, prompts)
        forms = word_forms(word for i, word in enumerate(vocabulary.words) if i not in prompts)
        missing = [n for n in self.base_names if normalize_word(prompt_phrase(n)) not in forms]
        added = competitors and bool(missing) and prompted is not None  # rows from elsewhere: not beside this tower's
        others = Vocabulary.from_words(missing).words if added else ()
        if others:
            rest = self._embed(Vocabulary.from_words(others), templates, use_synonyms)
            rows = torch.cat([rows.to(rest), rest])
            is_base = torch.cat([is_base, torch.ones(len(rest), dtype=torch.bool)])
        # A vocabulary may name all base classes itself: they compete then, whoever made its rows.
        named = competitors and bool(self.base_names) and not missing and len(vocabulary) > 1
        background = None if others or named else self._background()
        return ActiveVocabulary(vocabulary, rows, is_base, others, prompted, background, compete=background is None)

    def with_image_prompt(self, active: ActiveVocabulary | None, name: str, crops: Sequence[Any]) -> ActiveVocabulary:
        """A vocabulary and one more class, or one class in the place of the word of that name."""
        if active is None:
            raise ValueError("the detector has no vocabulary yet; call set_vocabulary({name: crops}) first")
        if active.embeddings is None:
            raise ValueError("the matrix was given to the network itself; call set_vocabulary first")
        row = embed_crops(crops, self.image_text)
        words, count = active.vocabulary, len(active.vocabulary)
        places = [i for i, word in enumerate(words.words) if normalize_word(word) == normalize_word(name)]
        if places:
            rows, is_base = active.embeddings.clone(), active.is_base.clone()
            rows[places[0]], is_base[places[0]] = row, False
            return replace(active, embeddings=rows, is_base=is_base)
        added = Vocabulary.from_words([name])
        words = Vocabulary((*words.words, *added.words), (*words.synonyms, *added.synonyms))
        old, flags = active.embeddings, active.is_base
        rows = torch.cat([old[:count], row[None].to(old), old[count:]])
        is_base = torch.cat([flags[:count], torch.zeros(1, dtype=torch.bool), flags[count:]])
        return replace(active, vocabulary=words, embeddings=rows, is_base=is_base)

    def _background(self) -> Tensor:
        if self._empty_prompt is None:
            self._empty_prompt = embed_empty_prompt(self.image_text)
        return self._empty_prompt

    def _with_pictures(self, rows: Tensor, is_base: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Rows of crops in the place of those of their names; what is shown counts as not trained on."""
        for i, crops in prompts.items():
            rows[i], is_base[i] = embed_crops(crops, self.image_text), False
        return rows, is_base

    def _embed(self, vocabulary: Vocabulary, templates: Sequence[str], use_synonyms: bool) -> Tensor:
        return embed_vocabulary(vocabulary, self.image_text, templates, use_synonyms, memory=self._memory)

    def _rows(
        self,
        vocabulary: Vocabulary,
        given: Tensor | np.ndarray | str | Path | None,
        templates: Sequence[str],
        use_synonyms: bool,
    ) -> Tensor:
        """(C, D) embeddings of the words: those given, or the text tower's."""
        if given is None:
            return self._embed(vocabulary, templates, use_synonyms)
        if isinstance(given, (str, Path)):
            return load_embeddings(given, vocabulary, self.image_text)
        try:
            given = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:  # objects, texts, rows of several lengths
            raise ValueError(f"embeddings must be a matrix of numbers or a file, not {type(given).__name__}") from error
        if given.ndim != 2 or given.is_complex():
            raise ValueError(f"embeddings have the shape {tuple(given.shape)}; give (words, width), real numbers")
        if len(given) != len(vocabulary):
            raise ValueError(f"{len(given)} embeddings for {len(vocabulary)} words; give one row for each word")
        return given
