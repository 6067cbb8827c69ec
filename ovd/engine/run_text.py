"""The text embeddings of a run: how its words become prompts, and one process that embeds them for all.

A published recipe has 866 classes in 80 prompts each, minutes on a GPU: they are made once and kept in the run folder.
"""

import logging
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from torch import Tensor

from ovd.detector_folder import detector_folder, read_prompting
from ovd.text.embeddings import Prompting, embed_vocabulary
from ovd.text.vocabulary import Vocabulary
from pretrain.modeling.checkpoint import ImageTextModel

logger = logging.getLogger(__name__)
CACHE = "text_embeddings"  # folder in a run folder


def run_prompting(cfg: Any) -> Prompting:
    """Prompts of a config: cfg.text.{templates, use_synonyms}, each where it is None the fine-tuned detector's own."""
    templates, use_synonyms = cfg.text.templates, cfg.text.use_synonyms
    own = read_prompting(detector_folder(cfg.model.detector)) if "detector" in cfg.model else Prompting()
    return Prompting(
        own.templates if templates is None else tuple(templates),
        own.use_synonyms if use_synonyms is None else bool(use_synonyms),
    )


def embed_once(
    vocabulary: Vocabulary, image_text: ImageTextModel, prompting: Prompting, folder: str | Path | None
) -> Tensor:
    """(C, D) text embeddings; see `embed_vocabulary`.

    Args:
        folder: where they are kept: the first process makes them, the others, and later runs, read them; None: every
            process makes its own.
    """
    if folder is not None and not comm.is_main_process():
        comm.synchronize()  # the first process has written them
    logger.info("text embeddings of %d classes, %d templates", len(vocabulary), len(prompting.templates))
    rows = embed_vocabulary(
        vocabulary, image_text, prompting.templates, prompting.use_synonyms, cache_folder=folder
    )  # fmt: skip
    if folder is not None and comm.is_main_process():
        comm.synchronize()
    return rows
