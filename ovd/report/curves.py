"""Precision over recall from matches, class by class and as means of groups of classes.

The curve is the one that average precision is read from (Lin et al. 2014): precision is the highest at a recall or
above, at recalls 0, 0.01, …, 1, and the mean of its 101 values is the class's AP. Nothing is matched or drawn here.
"""

from collections.abc import Mapping

import numpy as np

from ovd.evaluation.matching import THRESHOLDS, Matches, bit

RECALLS = np.linspace(0.0, 1.0, 101)


def precision_curves(matches: Matches) -> np.ndarray:
    """Return (T, K, 101) precision by IoU threshold, class and recall; NaN for classes without an object that counts.

    Objects of all sizes count.
    """
    num_classes = matches.num_categories
    curves = np.full((len(THRESHOLDS), num_classes, len(RECALLS)), np.nan)
    true, ignored = (np.zeros(len(matches.category), np.uint64) for _ in range(2))
    true[matches.event], ignored[matches.event] = matches.true, matches.ignored
    countable = (matches.countable & 1).astype(bool)
    objects = np.bincount(matches.object_category, weights=matches.object_counts & 1, minlength=num_classes)
    start = np.searchsorted(matches.category, np.arange(num_classes + 1))
    for k in np.flatnonzero(objects):
        rows = slice(start[k], start[k + 1])
        for t in range(len(THRESHOLDS)):
            hit = ((true[rows] >> bit(t, 0)) & np.uint64(1)).astype(bool)
            uncounted = ((ignored[rows] >> bit(t, 0)) & np.uint64(1)).astype(bool)
            hits = np.cumsum(hit)
            precision = hits / (np.cumsum(hit | (countable[rows] & ~uncounted)) + np.spacing(1))
            best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)  # never reached: 0
            curves[t, k] = best[np.searchsorted(hits / objects[k], RECALLS, side="left")]
    return curves


def group_curves(curves: np.ndarray, groups: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return per group of classes the mean curves (101,): at IoU 0.5, and over all thresholds.

    Their means are the group's AP50 and AP. Groups without a measured class are left out.

    Args:
        curves: of `precision_curves`.
        groups: name -> (K,) boolean.
    """
    measured = ~np.isnan(curves[0, :, 0])
    found = {}
    for name, members in groups.items():
        mine = curves[:, members & measured]
        if mine.shape[1]:
            found[name] = (mine[0].mean(axis=0), mine.mean(axis=(0, 1)))
    return found
