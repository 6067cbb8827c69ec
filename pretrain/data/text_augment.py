"""Training captions from a row of the table: a template around the caption, sometimes followed by keywords."""

import numpy as np

from pretrain.config import CaptionConfig


def training_caption(row: dict[str, str], config: CaptionConfig, rng: np.random.Generator) -> str:
    """One caption; `row` has `caption` and may have `keywords` ("a|b|c")."""
    caption = config.templates[rng.integers(len(config.templates))].format(row["caption"])
    keywords = [k for k in (row.get("keywords") or "").split("|") if k]
    if keywords and rng.random() < config.keyword_probability:
        count = min(len(keywords), int(rng.integers(1, config.max_keywords + 1)))
        chosen = rng.choice(len(keywords), count, replace=False)
        caption = ", ".join([caption, *(keywords[i] for i in chosen)])
    return caption
