"""Text embeddings of a vocabulary: a prompt ensemble through the text tower of an image-text model.

Source: CLIP's prompt ensemble (normalise, average, normalise) as used by F-VLM; synonyms averaged as in ViLD.
"""

import hashlib
import warnings
from collections.abc import Sequence
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


def embed_vocabulary(
    vocabulary: Vocabulary,
    image_text_model: ImageTextModel,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    use_synonyms: bool = False,
    batch_size: int = 256,
    cache_folder: str | Path | None = None,
) -> Tensor:
    """Embed every class of a vocabulary.

    Args:
        vocabulary: C words.
        image_text_model: model, tokenizer and fingerprint of the weights.
        templates: prompts with one "{}" for the word.
        use_synonyms: average over all phrases of a class instead of its name alone.
        batch_size: prompts in one pass of the text tower.
        cache_folder: keep the result there, named after the contents of everything it depends on; None for no cache.

    Returns:
        (C, D) float32 on the CPU, rows of length 1.

    Raises:
        ValueError: no template, or one without "{}".
    """
    bad = [template for template in templates if "{}" not in template]
    if bad or not templates:
        raise ValueError(
            f"prompt template {bad[0]!r} has no {{}} for the word" if bad else "no prompt templates; give one"
        )
    phrases = [names if use_synonyms else names[:1] for names in vocabulary.synonyms]
    prompts = [[t.replace("{}", name) for name in names for t in templates] for names in phrases]
    cached = None
    if cache_folder is not None:
        key = hashlib.sha256(repr((image_text_model.fingerprint, prompts)).encode()).hexdigest()[:24]
        cached = Path(cache_folder) / f"{key}.npy"
        if cached.is_file():
            return load_embeddings(cached, len(vocabulary), image_text_model.embed_dim)
    _warn_about_cut_words(vocabulary, prompts, image_text_model.tokenizer)
    flat = [prompt for group in prompts for prompt in group]
    embeddings = _embed_prompts(flat, image_text_model, batch_size)
    owners = torch.tensor([i for i, group in enumerate(prompts) for _ in group])
    sums = torch.zeros(len(vocabulary), embeddings.shape[1]).index_add_(0, owners, embeddings)
    result = F.normalize(sums, dim=-1)
    if cached is not None:
        with replacing(cached) as temporary, temporary.open("wb") as file:
            np.save(file, result.numpy())
    return result


def load_embeddings(path: str | Path, num_classes: int, embed_dim: int) -> Tensor:
    """Read a (C, D) matrix from a .npy file, check its shape and normalise its rows.

    Raises:
        ValueError: the file is missing or no array, or has another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"embedding file {path} does not exist; check the path")
    try:
        matrix = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"embedding file {path} is not a .npy matrix of numbers; write it with numpy.save") from error
    if matrix.shape != (num_classes, embed_dim):
        raise ValueError(
            f"embedding file {path} has shape {matrix.shape}, but the vocabulary and the model need "
            f"({num_classes}, {embed_dim}); embed the same words with the model's own text tower"
        )
    return F.normalize(torch.from_numpy(matrix.astype(np.float32)), dim=-1)


@torch.no_grad()
def _embed_prompts(prompts: list[str], image_text_model: ImageTextModel, batch_size: int) -> Tensor:
    model = image_text_model.model
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    parts = []
    for start in range(0, len(prompts), batch_size):
        tokens = image_text_model.tokenizer(prompts[start : start + batch_size]).to(device)
        parts.append(F.normalize(model.encode_text(tokens).float(), dim=-1).cpu())
    model.train(was_training)
    return torch.cat(parts)


def _warn_about_cut_words(vocabulary: Vocabulary, prompts: list[list[str]], tokenizer) -> None:
    """Warn with the words whose longest prompt does not fit the context; the tokenizer cuts it silently."""
    longest = [max(group, key=len) for group in prompts]
    rows = tokenizer(longest)
    # Only full rows can have been cut (padding is token 0); the encoder then tells the true length.
    full = [i for i in range(len(rows)) if int(rows[i, -1]) != 0]
    encode = getattr(tokenizer, "encode", None)
    if encode is not None:
        full = [i for i in full if len(encode(longest[i])) + 2 > rows.shape[1]]  # 2: start and end tokens
    if full:
        names = ", ".join(vocabulary.words[i] for i in full[:10]) + (" …" if len(full) > 10 else "")
        warnings.warn(
            f"{len(full)} word(s) do not fit the text tower's {rows.shape[1]} tokens in the longest prompt and are cut "
            f"short: {names}; shorten them or use shorter templates",
            stacklevel=3,
        )
