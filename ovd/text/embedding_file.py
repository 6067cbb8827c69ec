"""Files of text embeddings that say what made them, so that a file of another model is refused instead of believed.

One safetensors file holds the matrix; its header holds words, phrases, templates, dimension, the fingerprint of the
weights (SHA-256) and the identity of the tokenizer. Plain `.npy` matrices of others are accepted with a warning, since
nothing in them says which model made them. This file does not embed words: see `embeddings.py`.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ovd.text.embeddings import read_matrix, tokenizer_identity
from ovd.text.vocabulary import Vocabulary
from pretrain.atomic import replacing
from pretrain.modeling.checkpoint import ImageTextModel
from pretrain.parsing import parse_json

SUFFIX = ".safetensors"
_FORMAT = 1
_HEADER, _TENSOR = "ovd_text_embeddings", "embeddings"
_RECOMPUTE = "recompute it: python tools/embed_vocabulary.py --checkpoint DIR --vocabulary WORDS --output {path}"


@dataclass(frozen=True)
class EmbeddingFileInfo:
    """What made an embedding file.

    Attributes:
        words: the C words, in the order of the rows.
        synonyms: the phrases of each word that stand in prompts.
        use_synonyms: all phrases were averaged, not the first one alone.
        templates: the prompts.
        dimension: width D of the matrix.
        fingerprint: SHA-256 of the weights of the image-text model.
        tokenizer: see `ovd.text.embeddings.tokenizer_identity`.
        format: version of this description.
    """

    words: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]
    use_synonyms: bool
    templates: tuple[str, ...]
    dimension: int
    fingerprint: str
    tokenizer: str
    format: int = _FORMAT

    @property
    def vocabulary(self) -> Vocabulary:
        """The words with their phrases."""
        return Vocabulary(self.words, self.synonyms)


def is_embedding_file(words: object) -> bool:
    """Whether what was given as words is the path of an embedding file, by its suffix."""
    return isinstance(words, (str, Path)) and str(words).lower().endswith(SUFFIX)


def save_embeddings(
    path: str | Path,
    embeddings: Tensor,
    vocabulary: Vocabulary,
    image_text_model: ImageTextModel,
    templates: Sequence[str],
    use_synonyms: bool = False,
) -> Path:
    """Write a matrix with a description of what made it; the file is complete or absent.

    Args:
        path: ends in .safetensors.
        embeddings: (C, D), as `embed_vocabulary` made it with the other arguments.

    Raises:
        ValueError: another suffix, or the matrix has another shape than the vocabulary and the model say.
    """
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        raise ValueError(f"embedding file {path} does not end in {SUFFIX}, by which it is recognised; name it so")
    if tuple(embeddings.shape) != (len(vocabulary), image_text_model.embed_dim):
        raise ValueError(
            f"embeddings have shape {tuple(embeddings.shape)}, but {len(vocabulary)} words and the model need "
            f"({len(vocabulary)}, {image_text_model.embed_dim}); embed this vocabulary with this model"
        )
    info = EmbeddingFileInfo(
        words=vocabulary.words,
        synonyms=vocabulary.synonyms,
        use_synonyms=use_synonyms,
        templates=tuple(templates),
        dimension=image_text_model.embed_dim,
        fingerprint=image_text_model.fingerprint,
        tokenizer=tokenizer_identity(image_text_model.tokenizer),
    )
    header = {_HEADER: json.dumps(asdict(info), ensure_ascii=False)}
    with replacing(path) as temporary:
        save_file({_TENSOR: embeddings.detach().float().cpu().contiguous()}, temporary, header)
    return path


def read_info(path: str | Path) -> EmbeddingFileInfo:
    """Read what made an embedding file, without its matrix.

    Raises:
        ValueError: the file is missing, damaged, or not one that `save_embeddings` wrote.
    """
    return _read(Path(path))[0]


def load_embeddings(path: str | Path, vocabulary: Vocabulary, image_text_model: ImageTextModel) -> Tensor:
    """Read the (C, D) matrix of a vocabulary from a file of `save_embeddings` or a plain `.npy` matrix.

    Args:
        path: a .safetensors file, whose words, model and tokenizer must be these; or a .npy file, of which only the
            shape can be checked (a warning says so).
        vocabulary: the words that the rows must stand for.
        image_text_model: the model whose text tower must have made them.

    Returns:
        (C, D) float32 on the CPU, rows of length 1.

    Raises:
        ValueError: missing or damaged file, other words, another dimension, backbone or tokenizer.
    """
    path = Path(path)
    if path.suffix.lower() != SUFFIX:
        matrix = read_matrix(path, len(vocabulary), image_text_model.embed_dim)
        warnings.warn(
            f"nothing in {path} says which model made it: the scores mean something only if it was the text tower of "
            "this detector, with the words in this order",
            stacklevel=2,
        )
        return matrix
    info, matrix = _read(path)
    _check(path, info, vocabulary, image_text_model)
    return F.normalize(matrix.float(), dim=-1)


def _read(path: Path) -> tuple[EmbeddingFileInfo, Tensor]:
    if not path.is_file():
        raise ValueError(f"embedding file {path} does not exist; check the path, or {_recompute(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            content = parse_json((file.metadata() or {})[_HEADER])
            matrix = file.get_tensor(_TENSOR)
        version = content["format"]
        info = _info_from(content) if version == _FORMAT else None
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or no embedding file of this package ({error}); {_recompute(path)}"
        ) from error
    if info is None:
        raise ValueError(f"embedding file {path} has format {version!r:.20}, not {_FORMAT}; {_recompute(path)}")
    if not matrix.isfinite().all():
        raise ValueError(f"{path} holds values that are not finite (NaN or infinite); {_recompute(path)}")
    if tuple(matrix.shape) != (len(info.words), info.dimension):
        raise ValueError(f"{path} holds a matrix of shape {tuple(matrix.shape)} that its header contradicts; "
                         f"{_recompute(path)}")  # fmt: skip
    return info, matrix


def _info_from(content: dict) -> EmbeddingFileInfo:
    """The header's description; TypeError or ValueError where it is not what `save_embeddings` writes."""
    words, templates = _texts(content["words"]), _texts(content["templates"])
    synonyms = tuple(_texts(names) for names in content["synonyms"])
    if not words or len(synonyms) != len(words) or not all(synonyms):
        raise ValueError("its words have not a phrase each")
    return EmbeddingFileInfo(**{**content, "words": words, "templates": templates, "synonyms": synonyms})


def _texts(values: list) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r:.60} is no list of texts")
    return tuple(values)


def _recompute(path: Path) -> str:
    return _RECOMPUTE.format(path=path)


def _check(path: Path, info: EmbeddingFileInfo, vocabulary: Vocabulary, model: ImageTextModel) -> None:
    """Refuse a file that was made for something else; the most telling difference first."""
    if info.dimension != model.embed_dim:
        raise ValueError(
            f"{path} holds embeddings of {info.dimension} dimensions, but this model has {model.embed_dim}: another "
            f"backbone made it; {_recompute(path)}"
        )
    if info.fingerprint != model.fingerprint:
        raise ValueError(
            f"{path} was made by the text tower with weights {info.fingerprint[:12]}…, but this model's are "
            f"{model.fingerprint[:12]}…; {_recompute(path)}"
        )
    identity = tokenizer_identity(model.tokenizer)
    if info.tokenizer != identity:
        raise ValueError(
            f"{path} was made with the tokenizer {info.tokenizer}, but this model has {identity}; {_recompute(path)}"
        )
    if info.words == vocabulary.words:
        return
    pairs = zip(info.words, vocabulary.words, strict=False)
    place = next((i for i, (left, right) in enumerate(pairs) if left != right), None)
    if place is None:
        reason = f"{len(info.words)} words, but the vocabulary has {len(vocabulary)}"
    else:
        reason = f"{info.words[place]!r} as word {place + 1}, but the vocabulary has {vocabulary.words[place]!r} there"
    raise ValueError(f"{path} holds {reason}; give the same words in the same order, or {_recompute(path)}")
