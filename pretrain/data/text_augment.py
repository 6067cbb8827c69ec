"""Training captions from a sample: a template around one of its captions, sometimes followed by keywords."""

import numpy as np

from pretrain.config import CaptionConfig


def training_caption(row: dict, rng: np.random.Generator, config: CaptionConfig) -> str:
    """One caption; `row` has `captions` (a list, one is drawn) or `caption`, and may have `keywords` ("a|b|c")."""
    captions = row.get("captions") or [row["caption"]]
    # No draw where there is no choice: runs on single captions stay what they were.
    drawn = captions[rng.integers(len(captions))] if len(captions) > 1 else captions[0]
    caption = config.templates[rng.integers(len(config.templates))].format(drawn)
    keywords = [k for k in (row.get("keywords") or "").split("|") if k]
    if keywords and rng.random() < config.keyword_probability:
        count = min(len(keywords), int(rng.integers(1, config.max_keywords + 1)))
        chosen = rng.choice(len(keywords), count, replace=False)
        caption = ", ".join([caption, *(keywords[i] for i in chosen)])
    return caption
