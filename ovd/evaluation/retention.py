"""What fine-tuning on a user's few words did to these words and to the others: average precision before and after.

Both results lists are of the same pictures with the same vocabulary, one by the detector before fine-tuning, one by
that after it. How to fine-tune so that the others stay is not here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovd.evaluation.bootstrap import METRICS, Interval, bootstrap, interval
from ovd.evaluation.lvis_evaluator import Results, lvis_matches
from ovd.evaluation.results import text_table
from ovd.evaluation.tables import FREQUENCIES, GroundTruth

_FREQUENCY_NAMES = {"r": "rare", "c": "common", "f": "frequent"}


@dataclass(frozen=True)
class RetentionRow:
    """One group of words: how many have objects, a metric before, after, and after - before (paired)."""

    words: int
    before: Interval
    after: Interval
    change: Interval


@dataclass(frozen=True)
class RetentionReport:
    """Rows by group ("fine-tuned", "untouched", "untouched, rare", …) and metric ("AP", "AP50", "AR")."""

    rows: dict[tuple[str, str], RetentionRow]

    def to_markdown(self, metric: str = "AP") -> str:
        """Return the table of one metric, in percent with 95 % intervals over pictures."""
        body = [
            [group, str(row.words), str(row.before), str(row.after), str(row.change)]
            for (group, name), row in self.rows.items()
            if name == metric
        ]
        return text_table([f"{metric}, percent", "words", "before", "after", "change"], body)


def retention_report(
    ground_truth_json: str | Path | Mapping[str, Any],
    before: Results,
    after: Results,
    fine_tuned: Sequence[str | int],
    iou_type: str = "bbox",
    max_dets: int = 300,
    samples: int = 1000,
    seed: int = 0,
) -> RetentionReport:
    """Compare a detector before and after fine-tuning.

    Args:
        ground_truth_json: LVIS annotations of both kinds of words.
        before, after: results lists as of `lvis_evaluator.evaluate_results`, both of the whole vocabulary.
        fine_tuned: names or category ids of the words that were fine-tuned.
        samples: resamples of the pictures; the same ones before and after.

    Raises:
        ValueError: a fine-tuned word is unknown or stands for several categories, or none or all were fine-tuned.
    """
    ground_truth, matches_before = lvis_matches(ground_truth_json, before, iou_type, max_dets)
    _, matches_after = lvis_matches(ground_truth_json, after, iou_type, max_dets)
    groups = word_groups(ground_truth, fine_tuned)
    has_objects = np.bincount(ground_truth.category, minlength=len(ground_truth.names)) > 0
    values = bootstrap([matches_before, matches_after], groups, samples, seed)
    rows = {}
    for group, members in groups.items():
        for metric in METRICS:
            one, two = values[group, metric]
            words = int((members & has_objects).sum())
            rows[group, metric] = RetentionRow(
                words, interval(one, least=0.0), interval(two, least=0.0), interval(two - one)
            )
    return RetentionReport(rows)


def word_groups(ground_truth: GroundTruth, fine_tuned: Sequence[str | int]) -> dict[str, np.ndarray]:
    """Which classes (K,) were fine-tuned, which were not, and of these which are rare, common and frequent.

    Raises:
        ValueError: see `retention_report`.
    """
    tuned = _members(fine_tuned, ground_truth.names, ground_truth.category_ids)
    groups = {"fine-tuned": tuned, "untouched": ~tuned}
    for frequency in FREQUENCIES:
        groups[f"untouched, {_FREQUENCY_NAMES[frequency]}"] = ~tuned & (ground_truth.frequencies == frequency)
    return groups


def _members(words: Sequence[str | int], names: list[str], category_ids: np.ndarray) -> np.ndarray:
    """Return which categories (K,) the words stand for."""
    members = np.zeros(len(names), bool)
    if isinstance(words, str):
        raise ValueError(f"fine_tuned is the text {words!r}; give a list of names or category ids")
    for word in words:
        found = [k for k, name in enumerate(names) if word == (name if isinstance(word, str) else category_ids[k])]
        if len(found) != 1:
            raise ValueError(
                f"fine-tuned word {word!r} stands for {len(found)} categories of the ground truth; "
                "give a name that it has once, or the category's id"
            )
        members[found[0]] = True
    if members.all() or not members.any():
        raise ValueError(
            f"{members.sum()} of {len(members)} categories were fine-tuned; retention needs some that were and some "
            "that were not"
        )
    return members
