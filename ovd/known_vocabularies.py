"""Vocabularies that have a name, "lvis" and "coco", besides those a user writes down.

The names come from Detectron2's own category lists; everything else is `Vocabulary.parse`'s business.
"""

from collections.abc import Iterable
from pathlib import Path

from ovd.text.vocabulary import Vocabulary

KNOWN = ("lvis", "coco")


def known_vocabulary(name: str) -> Vocabulary:
    """The 1,203 names of LVIS v1 with their synonyms, or the 80 of COCO, by category id.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "lvis":
        from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

        return Vocabulary.from_categories(LVIS_CATEGORIES, source="LVIS v1")
    if name == "coco":
        from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

        return Vocabulary.from_categories([c for c in COCO_CATEGORIES if c["isthing"]], source="COCO")
    raise ValueError(f"no vocabulary is called {name!r}; known are {', '.join(KNOWN)}")


def parse_vocabulary(words: "Vocabulary | str | Path | Iterable[str]") -> Vocabulary:
    """As `Vocabulary.parse`; besides, the text "lvis" or "coco" alone is that vocabulary.

    Raises:
        ValueError: no words.
    """
    if isinstance(words, str) and words.strip().lower() in KNOWN:
        return known_vocabulary(words.strip().lower())
    return Vocabulary.parse(words)
