"""Text embeddings of a vocabulary: a prompt ensemble through the text tower of an image-text model.

Source: CLIP's prompt ensemble (normalise, average, normalise) as used by F-VLM; synonyms averaged as in ViLD.
This file does not read or write files for users: see `embedding_file.py`.
"""

import hashlib
import warnings
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovd.text.vocabulary import Vocabulary
from pretrain.atomic import replacing
from pretrain.modeling.checkpoint import ImageTextModel

# Short, because the miniature's captions are.
DEFAULT_TEMPLATES = ("{}", "a {}", "a drawing of a {}", "a picture of a {}")
# Rows kept in memory between calls: 100,000 words of 512 dimensions are 200 MB.
MAX_REMEMBERED = 100_000

Prompts = tuple[str, ...]


@dataclass(frozen=True)
class Prompting:
    """How the words of a data set become prompts.

    Attributes:
        templates: each with "{}" for the word.
        use_synonyms: a class is the mean over all its phrases, not its name alone.
    """

    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    use_synonyms: bool = True


def class_prompts(vocabulary: Vocabulary, templates: Sequence[str], use_synonyms: bool = False) -> list[Prompts]:
    """The prompts of each class: every template with the class's name, or with each of its synonyms.

    Raises:
        ValueError: no template, or one without "{}".
    """
    bad = [t for t in templates if not isinstance(t, str) or "{}" not in t]
    if bad or not templates:
        raise ValueError(
            f"prompt template {bad[0]!r} has no {{}} for the word" if bad else "no prompt templates; give one"
        )
    phrases = [names if use_synonyms else names[:1] for names in vocabulary.synonyms]
    return [tuple(t.replace("{}", name) for name in names for t in templates) for names in phrases]


def embed_vocabulary(
    vocabulary: Vocabulary,
    image_text_model: ImageTextModel,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    use_synonyms: bool = False,
    batch_size: int = 256,
    cache_folder: str | Path | None = None,
    memory: MutableMapping[Prompts, Tensor] | None = None,
) -> Tensor:
    """Embed every class of a vocabulary; besides the result, memory does not grow with the number of classes.

    Args:
        vocabulary: C words.
        image_text_model: model, tokenizer and fingerprint of the weights.
        templates: prompts with one "{}" for the word.
        use_synonyms: average over all phrases of a class instead of its name alone.
        batch_size: prompts in one pass of the text tower.
        cache_folder: keep the result there, named after the contents of everything it depends on; None for no cache.
        memory: rows of earlier calls with the SAME model by their prompts; read, and added to, so that changing one
            word of many costs one word.

    Returns:
        (C, D) float32 on the CPU, rows of length 1.

    Raises:
        ValueError: no template, or one without "{}".
    """
    prompts = class_prompts(vocabulary, templates, use_synonyms)
    cached = None
    if cache_folder is not None:
        key = hashlib.sha256(repr((image_text_model.fingerprint, prompts)).encode()).hexdigest()[:24]
        cached = Path(cache_folder) / f"{key}.npy"
        if cached.is_file():
            return read_matrix(cached, len(vocabulary), image_text_model.embed_dim)
    _warn_about_cut_words(vocabulary, prompts, image_text_model.tokenizer)
    memory = {} if memory is None else memory
    known = {group: memory[group] for group in prompts if group in memory}
    # dict.fromkeys: two classes may read the same in a prompt, and are embedded once.
    new = [group for group in dict.fromkeys(prompts) if group not in known]
    if new:
        rows = _embed_groups(new, image_text_model, batch_size)
        known.update(zip(new, rows, strict=True))
        if len(memory) + len(new) > MAX_REMEMBERED:
            memory.clear()
        if len(new) <= MAX_REMEMBERED:
            memory.update(zip(new, rows, strict=True))
    result = torch.stack([known[group] for group in prompts])
    if cached is not None:
        with replacing(cached) as temporary, temporary.open("wb") as file:
            np.save(file, result.numpy())
    return result


@torch.no_grad()
def embed_empty_prompt(image_text_model: ImageTextModel) -> Tensor:
    """(D,) float32 on the CPU, not normalised: what F-VLM's family classifies background by."""
    model = image_text_model.model
    tokens = image_text_model.tokenizer([""]).to(next(model.parameters()).device)
    return model.encode_text(tokens)[0].float().cpu()


def read_matrix(path: str | Path, num_classes: int, embed_dim: int) -> Tensor:
    """Read a plain (C, D) matrix from a .npy file, check its shape and normalise its rows.

    Raises:
        ValueError: the file is missing or no array, or has another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"embedding file {path} does not exist; check the path")
    try:
        matrix = np.load(path, allow_pickle=False)
        if matrix.dtype.kind not in "fiu":  # casting would drop imaginary parts and count days
            raise ValueError(f"its type is {matrix.dtype}")
        matrix = matrix.astype(np.float32)
    except Exception as error:  # numpy raises many types: for an archive, a header that lies, more than fits
        raise ValueError(f"embedding file {path} is not a .npy matrix of numbers; write it with numpy.save") from error
    if matrix.shape != (num_classes, embed_dim):
        raise ValueError(
            f"embedding file {path} has shape {matrix.shape}, but the vocabulary and the model need "
            f"({num_classes}, {embed_dim}); embed the same words with the model's own text tower"
        )
    if not np.isfinite(matrix).all():
        raise ValueError(f"embedding file {path} holds values that are not finite (NaN or infinite); make it again")
    return F.normalize(torch.from_numpy(matrix), dim=-1)


def cut_words(prompts: Sequence[Prompts], tokenizer, batch_size: int = 1024) -> dict[int, int]:
    """Classes with a prompt that does not fit the text tower's context; the tokenizer cuts it silently.

    Args:
        prompts: the prompts of each class.
        tokenizer: texts to (N, context length) tokens, padded with 0.
        batch_size: classes tokenised at once.

    Returns:
        {index of the class: tokens that its longest prompt has}; where the tokenizer cannot tell the true length, the
        context length itself.
    """
    longest = [max(group, key=len) for group in prompts]
    found = {}
    for start in range(0, len(longest), batch_size):
        rows = tokenizer(longest[start : start + batch_size])
        # Only full rows can have been cut.
        for i in (rows[:, -1] != 0).nonzero()[:, 0].tolist():
            tokens = _count_tokens(tokenizer, longest[start + i])
            if tokens is None or tokens > rows.shape[1]:
                found[start + i] = tokens or rows.shape[1]
    return found


def _count_tokens(tokenizer, text: str) -> int | None:
    """Tokens of a text before it is cut, start and end included; None for a tokenizer that does not tell."""
    if hasattr(tokenizer, "encode"):  # open_clip's own
        return len(tokenizer.encode(text)) + 2
    if callable(getattr(tokenizer, "tokenizer", None)):  # open_clip's wrapper around one of Hugging Face
        return len(tokenizer.tokenizer(tokenizer.clean_fn(text)).input_ids)
    return None


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Prompt templates from a UTF-8 text file, one a line; blank lines are skipped.

    Raises:
        ValueError: no such file, no template in it, not UTF-8, or one without "{}".
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"template file {path} does not exist; check the path")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"template file {path} is not UTF-8 text; save it as UTF-8") from error
    templates = tuple(line for line in lines if line)
    wrong = [line for line in templates if "{}" not in line]
    if wrong or not templates:
        raise ValueError(
            f"template file {path} has the line {wrong[0]!r} without {{}} for the word; add it"
            if wrong
            else f"template file {path} holds no template; write one a line, with {{}} for the word"
        )
    return templates


def tokenizer_identity(tokenizer) -> str:
    """Name of what a tokenizer does: its class, its context length, and a hash of the tokens of fixed probes.

    Two tokenizers of the same identity give the same tokens for ordinary words, whatever files they were made from.
    """
    probes = ["a drawing of a cat", "Fire-engine, No. 7!", "naïve café 東京", "very " * 200]
    rows = tokenizer(probes)
    content = hashlib.sha256(np.ascontiguousarray(rows.cpu().numpy(), dtype=np.int64).tobytes()).hexdigest()[:16]
    return f"{type(tokenizer).__name__}:{rows.shape[1]}:{content}"


@torch.no_grad()
def _embed_groups(groups: Sequence[Prompts], image_text_model: ImageTextModel, batch_size: int) -> Tensor:
    """Normalised mean of the normalised embeddings of each group of prompts, (groups, D)."""
    model = image_text_model.model
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    flat = [(i, prompt) for i, group in enumerate(groups) for prompt in group]
    sums = torch.zeros(len(groups), image_text_model.embed_dim)
    for start in range(0, len(flat), batch_size):
        owners, texts = zip(*flat[start : start + batch_size], strict=True)
        tokens = image_text_model.tokenizer(list(texts)).to(device)
        embedded = F.normalize(model.encode_text(tokens).float(), dim=-1).cpu()
        sums.index_add_(0, torch.tensor(owners), embedded)
    model.train(was_training)
    return F.normalize(sums, dim=-1)


def _warn_about_cut_words(vocabulary: Vocabulary, prompts: Sequence[Prompts], tokenizer) -> None:
    """Warn with the words whose longest prompt does not fit the context."""
    cut = list(cut_words(prompts, tokenizer))
    if cut:
        names = ", ".join(vocabulary.words[i] for i in cut[:10]) + (" …" if len(cut) > 10 else "")
        context = tokenizer(["a"]).shape[1]
        warnings.warn(
            f"{len(cut)} word(s) do not fit the text tower's {context} tokens in the longest prompt and are cut "
            f"short: {names}; shorten them or use shorter templates",
            stacklevel=3,
        )
