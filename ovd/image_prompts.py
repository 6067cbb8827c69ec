"""Pictures as the query: crops of an object through the image tower become a row of the classifier's matrix.

Source: OWL-ViT (Minderer et al., 2022, section 3.3, one-shot detection with image queries).
This file does not find the object in the crop: give crops that it fills.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ovd.data.images import read_image
from ovd.known_vocabularies import parse_vocabulary
from ovd.text.vocabulary import Vocabulary
from pretrain.modeling.checkpoint import ImageTextModel

Prompts = dict[int, list[Any]]  # crops by the class that they stand for
_PICTURES = (Image.Image, np.ndarray)


def split_prompts(words: Any) -> tuple[Vocabulary, Prompts]:
    """Separate words from pictures in what a user gave as a vocabulary.

    Args:
        words: anything `parse_vocabulary` takes; a list in which PIL images or arrays stand among words (they are
            called "picture 1", …); or {name: crop, list of crops, or None for the word itself}.

    Raises:
        ValueError: no words, a name twice, or a name whose crops are an empty list.
    """
    if isinstance(words, Mapping):
        entries = list(words.items())
    elif isinstance(words, (list, tuple)) and any(isinstance(w, _PICTURES) for w in words):
        entries, count = [], 0
        for word in words:
            is_picture = isinstance(word, _PICTURES)
            count += is_picture
            entries.append((f"picture {count}", word) if is_picture else (word, None))
    else:
        return parse_vocabulary(words), {}
    vocabulary = Vocabulary.from_words([name for name, _ in entries])
    if len(vocabulary) != len(entries):
        raise ValueError("a name is empty or stands twice among words and pictures; give each class its own name")
    return vocabulary, {i: as_crops(crops, name) for i, (name, crops) in enumerate(entries) if crops is not None}


def as_crops(crops: Any, name: str) -> list[Any]:
    """One crop or several as a list.

    Raises:
        ValueError: there is none.
    """
    crops = list(crops) if isinstance(crops, Iterable) and not isinstance(crops, (*_PICTURES, str, bytes)) else [crops]
    if not crops or any(c is None for c in crops):
        raise ValueError(f"{name!r} was given no crops; give at least one picture of it, or leave the word to the text")
    return crops


@torch.no_grad()
def embed_crops(crops: Sequence[str | Path | bytes | Image.Image | np.ndarray], image_text: ImageTextModel) -> Tensor:
    """Mean of the image tower's embeddings of crops, (D,) float32 on the CPU, of length 1.

    Crops are laid on a square of the mean colour, which keeps their shape, and scaled to the tower's size.

    Raises:
        ImageError: a crop cannot be read.
    """
    model, size = image_text.model, image_text.image_size
    device = next(model.parameters()).device
    colour = tuple(round(255 * value) for value in image_text.mean)
    mean, std = (torch.tensor(v)[:, None, None] for v in (image_text.mean, image_text.std))
    tensors = []
    for crop in crops:
        picture = Image.fromarray(read_image(crop))
        side = max(picture.size)
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        resized = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
        tensors.append((torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255 - mean) / std)
    was_training = model.training
    model.eval()
    rows = F.normalize(model.encode_image(torch.stack(tensors).to(device)).float(), dim=-1)
    model.train(was_training)
    return F.normalize(rows.mean(dim=0), dim=0).cpu()
