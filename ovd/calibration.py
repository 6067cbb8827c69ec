"""A map from a detector's score to the share of such detections that are right, for any number of words.

Source: isotonic regression (Zadrozny and Elkan, 2002), one curve for each size of vocabulary, since a softmax score
depends on how many words compete for it; between sizes the curves are interpolated in the logarithm of the size.
This file does not run a detector: see `ovd/calibration_data.py` for what curves are fitted on.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.atomic import write_atomically
from pretrain.parsing import parse_json

CALIBRATION = "calibration.json"
FORMAT = 1
# Lowest score shown when none is asked for: of raw scores, and of calibrated ones.
RAW_THRESHOLD, CALIBRATED_THRESHOLD = 0.3, 0.5
_BINS, _LEAST_IN_BIN = 40, 20
_HIGHEST = 0.995  # the last fitted value; a curve ends in (1, 1) and must still rise there

Curve = tuple[np.ndarray, np.ndarray]  # (K,) scores and (K,) shares, both rising from 0 to 1


@dataclass(frozen=True)
class ScoreCalibration:
    """Curves of one detector.

    Attributes:
        curves: {whether the base classes compete: {number of words reported: curve}}.
        settings: what the curves depend on besides the weights, as `inference_settings` gives it.
        measured: how they were made, for people.
    """

    curves: Mapping[bool, Mapping[int, Curve]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def knows(self, competitors: bool) -> bool:
        """Whether there are curves of this kind of vocabulary; scores of another kind are other scores."""
        return bool(self.curves.get(competitors))

    def curve(self, num_words: int, competitors: bool) -> Curve:
        """The curve of a vocabulary; beyond the sizes that were fitted, that of the nearest one, and the identity for a
        kind that it does not know.

        Args:
            num_words: words reported, at least 1.
            competitors: the base classes compete for the scores; otherwise the empty prompt does, for the image-text
                score.
        """
        if not self.knows(competitors):
            return np.array([0.0, 1.0]), np.array([0.0, 1.0])
        table = self.curves[competitors]
        sizes = sorted(table)
        place = float(np.interp(np.log(max(1, num_words)), np.log(sizes), np.arange(len(sizes))))
        low, part = int(place), place - int(place)
        if part == 0:
            return table[sizes[low]]
        (x1, y1), (x2, y2) = table[sizes[low]], table[sizes[low + 1]]
        x = np.union1d(x1, x2)
        return x, (1 - part) * np.interp(x, x1, y1) + part * np.interp(x, x2, y2)

    def apply(self, scores: np.ndarray, num_words: int, competitors: bool) -> np.ndarray:
        """Scores of any shape in 0..1 -> shares of the same shape, float32; the order stays."""
        x, y = self.curve(num_words, competitors)
        return np.interp(scores, x, y).astype(np.float32)

    def invert(self, share: float, num_words: int, competitors: bool) -> float:
        """The score whose share is `share`."""
        x, y = self.curve(num_words, competitors)
        return float(np.interp(share, y, x))


class ShownScores:
    """The scores of one vocabulary as users see them, and back.

    Args:
        calibration: None leaves scores as they are, and so does one that does not know this kind of vocabulary.
        num_words, competitors: see `ScoreCalibration.curve`.
    """

    def __init__(self, calibration: ScoreCalibration | None, num_words: int, competitors: bool) -> None:
        self.calibration = calibration if calibration and calibration.knows(competitors) else None
        self.place = (num_words, competitors)

    def raw(self, threshold: float | None) -> float:
        """The network's score for a shown one; for None that of the usual threshold."""
        if self.calibration is None:
            return RAW_THRESHOLD if threshold is None else threshold
        threshold = CALIBRATED_THRESHOLD if threshold is None else threshold
        # Above 1 is above every score, which the curve cannot say.
        return threshold if threshold > 1 else self.calibration.invert(threshold, *self.place)

    def shown(self, scores: np.ndarray) -> np.ndarray:
        """Shown scores for the network's."""
        return scores if self.calibration is None else self.calibration.apply(scores, *self.place)


def fit_curve(scores: np.ndarray, is_right: np.ndarray) -> Curve:
    """Fit a rising curve through the share of detections that are right at each score.

    Detections are put into bins of about equal count, the bins' shares are made monotone, and the curve runs straight
    between their mean scores, from (0, 0) to (1, 1).

    Args:
        scores: (N,) in 0..1.
        is_right: (N,) bool.

    Raises:
        ValueError: there are too few detections to say anything.
    """
    from scipy.optimize import isotonic_regression

    scores, is_right = np.asarray(scores, float), np.asarray(is_right, float)
    if len(scores) < 2 * _LEAST_IN_BIN or scores.shape != is_right.shape:
        raise ValueError(
            f"{len(scores)} detections are too few to calibrate on (at least {2 * _LEAST_IN_BIN}); use more pictures"
        )
    order = np.argsort(scores, kind="stable")
    bins = np.array_split(order, min(_BINS, len(scores) // _LEAST_IN_BIN))
    counts = np.array([len(b) for b in bins])
    fitted = isotonic_regression([is_right[b].mean() for b in bins], weights=counts)
    ends = fitted.blocks  # bins of one block have the same share, and become one knot
    x, y = [0.0], [0.0]
    for start, stop in zip(ends[:-1], ends[1:], strict=True):
        members = np.concatenate(bins[start:stop])
        share = min(float(fitted.x[start]), _HIGHEST)
        place = min(float(scores[members].mean()), _HIGHEST)
        if share > y[-1] and place > x[-1]:
            x.append(place)
            y.append(share)
    return np.array([*x, 1.0]), np.array([*y, 1.0])


def inference_settings(architecture: Any) -> dict[str, Any]:
    """The fields of a `DetectorConfig` that change scores or which detections there are, without new weights."""
    names = ("alpha", "beta", "objectness_delta", "detector_temperature", "nms_threshold", "vlm_scale")
    return {name: getattr(architecture, name) for name in (*names, "vlm_background")}


def save_calibration(path: str | Path, calibration: ScoreCalibration) -> Path:
    """Write `calibration.json`: for each kind of vocabulary and each size the knots of the curve."""
    curves = [
        {"competitors": kind, "words": size, "scores": np.round(x, 6).tolist(), "shares": np.round(y, 6).tolist()}
        for kind, table in calibration.curves.items()
        for size, (x, y) in sorted(table.items())
    ]
    content = {
        "format": FORMAT,
        "meaning": "share of detections with this score that are right, by number of words reported",
        "measured": dict(calibration.measured),
        "settings": dict(calibration.settings),
        "curves": curves,
    }
    return write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_calibration(path: str | Path) -> ScoreCalibration:
    """Read what `save_calibration` wrote.

    Raises:
        ValueError: it is not such a file.
    """
    path = Path(path)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} where this version reads {FORMAT}")
        curves: dict[bool, dict[int, Curve]] = {}
        for entry in content["curves"]:
            table = curves.setdefault(bool(entry["competitors"]), {})
            if not isinstance(entry["words"], int) or entry["words"] < 1:
                raise ValueError(f"{entry['words']!r} is no number of words")
            table[entry["words"]] = _checked(entry["scores"], entry["shares"])
        if not curves or not isinstance(content["settings"], dict):
            raise ValueError("no curves, or no settings")
        return ScoreCalibration(curves, content["settings"], content.get("measured", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no calibration ({error}); make it again with tools/calibrate.py, or delete it"
        ) from error


def read_fitting_calibration(path: Path, architecture: Any) -> ScoreCalibration | None:
    """The calibration in a detector's folder; None where there is none, and, with a warning, where it was made with
    other settings than those of `architecture` (a `DetectorConfig`).

    An older file's curves of words among which nothing competes are left out, with a warning: they are of the score
    without the empty prompt.
    """
    if not path.is_file():
        return None
    calibration, present = read_calibration(path), inference_settings(architecture)
    made = {"vlm_background": False} | dict(calibration.settings)  # older files have no such field
    changed = [f"{n} {v} (now {present.get(n)})" for n, v in made.items() if present.get(n) != v]
    if changed:
        warnings.warn(
            f"{path} was made with {', '.join(changed)}, so scores stay as the network gives them; run "
            "tools/calibrate.py again",
            stacklevel=4,
        )
        return None
    # The field came together with the empty prompt where nothing competes. Without an image-text score it has no part.
    if "vlm_background" not in calibration.settings and calibration.knows(False) and architecture.vlm_mode != "off":
        warnings.warn(
            f"{path} is from before the empty prompt competes where nothing else does, so scores of such words stay as "
            "the network gives them; run tools/calibrate.py again",
            stacklevel=4,
        )
        kept = {kind: table for kind, table in calibration.curves.items() if kind}
        return replace(calibration, curves=kept) if kept else None
    return calibration


def _checked(scores: Sequence[float], shares: Sequence[float]) -> Curve:
    x, y = np.asarray(scores, float), np.asarray(shares, float)
    rises = all(v.ndim == 1 and len(v) > 1 and v[0] == 0 and v[-1] == 1 and (np.diff(v) > 0).all() for v in (x, y))
    if not rises or len(x) != len(y):
        raise ValueError("a curve does not rise from (0, 0) to (1, 1)")
    return x, y
