"""Open-vocabulary detection: a Detectron2 detector whose classifier is a matrix of text embeddings.

The detector class is imported on first use, so reading data or results does not load the models.
"""

from typing import Any

__all__ = ["OpenVocabularyDetector"]


def __getattr__(name: str) -> Any:
    if name == "OpenVocabularyDetector":
        from ovd.detector import OpenVocabularyDetector

        return OpenVocabularyDetector
    raise AttributeError(f"module 'ovd' has no attribute {name!r}")
