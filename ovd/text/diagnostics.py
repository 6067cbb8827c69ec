"""What is wrong with a vocabulary before any picture is looked at: words that no detector could tell apart or read.

This file looks at words and their embeddings only; what the detector makes of a region is in `ovd/explanation.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ovd.text.embeddings import DEFAULT_TEMPLATES, class_prompts, cut_words
from ovd.text.vocabulary import Vocabulary
from pretrain.modeling.checkpoint import ImageTextModel

NEAR_DUPLICATE = 0.95
_ROWS_AT_ONCE = 256  # 256 x 20,000 cosines are 20 MB, and topk takes four times that
_MOST_PAIRS = 10_000  # a matrix of equal rows would list every pair
_SHOWN = 20


@dataclass(frozen=True)
class VocabularyDiagnosis:
    """Findings about a vocabulary.

    Attributes:
        num_words: words looked at.
        threshold: cosine from which two words count as near-duplicates.
        near_duplicates: (word, other word, cosine), the most similar first, at most 10,000.
        num_near_duplicates: all such pairs, listed or not.
        cut: (word, tokens of its longest prompt, tokens that fit).
        near_background: (word, cosine with the background, nearest other word, cosine with that one), for words nearer
            to the background embedding than to any other word.
        background_known: False when there was no background embedding to compare with.
    """

    num_words: int
    threshold: float
    near_duplicates: list[tuple[str, str, float]] = field(default_factory=list)
    num_near_duplicates: int = 0
    cut: list[tuple[str, int, int]] = field(default_factory=list)
    near_background: list[tuple[str, float, str, float]] = field(default_factory=list)
    background_known: bool = True

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not (self.near_duplicates or self.cut or self.near_background)

    def to_text(self) -> str:
        """The findings as lines for a terminal, at most 20 of a kind."""
        background = f"{len(self.near_background)}" if self.background_known else "not compared (no background)"
        lines = [
            f"{self.num_words} words",
            f"near-duplicates (cosine at least {self.threshold:g}): {self.num_near_duplicates}",
            *_first([f"  {a} = {b}: {cosine:.3f}" for a, b, cosine in self.near_duplicates], self.num_near_duplicates),
            f"cut by the context length: {len(self.cut)}",
            *_first([f"  {word}: {tokens} tokens, {limit} fit" for word, tokens, limit in self.cut]),
            f"nearer to the background than to any other word: {background}",
            *_first(
                [
                    f"  {word}: background {cosine:.3f}, nearest word {other} {other_cosine:.3f}"
                    for word, cosine, other, other_cosine in self.near_background
                ]
            ),
        ]
        return "\n".join(lines) + "\n"


def diagnose_vocabulary(
    vocabulary: Vocabulary,
    embeddings: Tensor,
    tokenizer=None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    use_synonyms: bool = False,
    background: Tensor | None = None,
    threshold: float = NEAR_DUPLICATE,
) -> VocabularyDiagnosis:
    """Find near-duplicate words, words cut by the context length, and words that look like background.

    Args:
        vocabulary: C words.
        embeddings: (C, D) their text embeddings, of any length.
        tokenizer: of the text tower; None (embeddings that others made) does not look for cut words.
        templates, use_synonyms: what the prompts are made of.
        background: (D,) the detector's background embedding, or None.
        threshold: cosine from which two words count as near-duplicates, in -1..1.

    Returns:
        The findings; memory is bounded by 256 rows of cosines at a time.

    Raises:
        ValueError: the shapes disagree or the threshold is no cosine.
    """
    if embeddings.dim() != 2 or len(embeddings) != len(vocabulary):
        raise ValueError(
            f"embeddings have shape {tuple(embeddings.shape)} for {len(vocabulary)} words; give one row for each word"
        )
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, but a cosine lies in -1..1; choose one there")
    rows = F.normalize(embeddings.detach().float().cpu(), dim=-1)
    duplicates, count, nearest, nearest_cosine = _compare(rows, threshold)
    words = vocabulary.words
    cut = []
    if tokenizer is not None:
        limit = tokenizer(["a"]).shape[1]
        prompts = class_prompts(vocabulary, templates, use_synonyms)
        cut = [(words[i], tokens, limit) for i, tokens in cut_words(prompts, tokenizer).items()]
    near_background = []
    if background is not None and len(words) > 1:
        cosine = rows @ F.normalize(background.detach().float().cpu(), dim=-1)
        near_background = [
            (words[i], float(cosine[i]), words[nearest[i]], float(nearest_cosine[i]))
            for i in (cosine > nearest_cosine).nonzero()[:, 0].tolist()
        ]
    return VocabularyDiagnosis(
        num_words=len(words),
        threshold=threshold,
        near_duplicates=[(words[i], words[j], value) for i, j, value in duplicates],
        num_near_duplicates=count,
        cut=cut,
        near_background=near_background,
        background_known=background is not None,
    )


@torch.no_grad()
def background_of(folder: str | Path, image_text_model: ImageTextModel) -> tuple[Tensor, str]:
    """What words are compared with as background: the detector's, or else that of an empty prompt.

    Args:
        folder: of a detector or of an image-text model.
        image_text_model: gives the embedding of the empty prompt.

    Returns:
        (D,) embedding, and where it comes from in words.
    """
    path = Path(folder) / "model.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith("cls_score.background_embedding")]  # noqa: SIM118
            if names:
                return file.get_tensor(names[0]).float(), "the detector's own"
    model = image_text_model.model
    tokens = image_text_model.tokenizer([""]).to(next(model.parameters()).device)
    return F.normalize(model.encode_text(tokens).float(), dim=-1)[0].cpu(), "embedding of an empty prompt"


def _compare(rows: Tensor, threshold: float) -> tuple[list[tuple[int, int, float]], int, Tensor, Tensor]:
    """Pairs (i < j, cosine) from the threshold on, their number, and each row's nearest other row with its cosine."""
    pairs: list[tuple[int, int, float]] = []
    count = 0
    nearest = torch.zeros(len(rows), dtype=torch.long)
    nearest_cosine = torch.full((len(rows),), -torch.inf)
    columns = torch.arange(len(rows))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        own = columns[start : start + _ROWS_AT_ONCE]
        cosine = rows[own] @ rows.T
        cosine[torch.arange(len(own)), own] = -torch.inf
        nearest_cosine[own], nearest[own] = cosine.max(dim=1)
        cosine.masked_fill_(columns <= own[:, None], -torch.inf)  # each pair once
        count += int((cosine >= threshold).sum())
        values, places = cosine.flatten().topk(min(_MOST_PAIRS, cosine.numel()))
        places = places[values >= threshold]
        first, second = own[places // len(rows)].tolist(), (places % len(rows)).tolist()
        pairs += zip(first, second, values[: len(places)].tolist(), strict=True)
        pairs = sorted(pairs, key=lambda pair: -pair[2])[:_MOST_PAIRS]
    return pairs, count, nearest, nearest_cosine


def _first(lines: list[str], total: int | None = None) -> list[str]:
    """At most 20 lines, and how many more there are."""
    rest = (len(lines) if total is None else total) - _SHOWN
    return lines[:_SHOWN] + ([f"  … and {rest} more"] if rest > 0 else [])
