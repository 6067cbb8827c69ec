"""What each setting of a detector may be, for all who take one: its description, evaluation, a sweep.

One table, so that what a folder may hold and what an evaluation may choose anew cannot differ. Choices between names
are not here: they are checked where they are read.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Range:
    """Values of one setting.

    Attributes:
        least, most: both allowed, unless `above`.
        whole: whole numbers only.
        above: `least` itself is not allowed.
        count: the setting is a sequence of so many; 0 for any number but none. None: it is one number.
        optional: it may be None.
    """

    least: float
    most: float
    whole: bool = False
    above: bool = False
    count: int | None = None
    optional: bool = False

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        how = f"between {self.least:,} and {self.most:,}"
        if self.most == math.inf:
            how = f"above {self.least:g}" if self.above else f"of at least {self.least:g}"
        elif self.above:
            how = f"above {self.least:g} and at most {self.most:g}"
        one = f"a {kind} {how}"
        if self.count is not None:
            one = f"a list of {f'{self.count} ' if self.count else ''}numbers, each {one}"
        return f"{one}, or null" if self.optional else one

    def holds(self, value: Any) -> bool:
        """Whether a value is one of these."""
        if value is None:
            return self.optional
        if self.count is not None:
            try:
                values = () if isinstance(value, str) else tuple(value)
            except TypeError:
                return False
            return len(values) == (self.count or max(1, len(values))) and all(map(self._holds_one, values))
        return self._holds_one(value)

    def _holds_one(self, value: Any) -> bool:
        # A bool is a number to Python. NaN is in no range, since comparisons with it are false.
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        return self.least <= value <= self.most and math.isfinite(value) and not (self.above and value == self.least)


def _whole(least: int, most: int, **more: Any) -> Range:
    return Range(least, most, whole=True, **more)


_SHARE, _POSITIVE, _NOT_NEGATIVE = Range(0, 1), Range(0, math.inf, above=True), Range(0, math.inf)
# The limits of sizes and counts are far beyond any use: a folder from elsewhere must not ask for more memory than
# there is.
RANGES = {
    "image_size": _whole(32, 16_384),
    "window_size": _whole(0, 16_384),
    "global_blocks": _whole(0, 1_000),
    "pyramid_channels": _whole(1, 16_384),
    "anchor_sizes": Range(0, 16_384, above=True, count=4),  # p2 to p5
    "rpn_num_conv": _whole(0, 64),
    "rpn_nms_thresholds": Range(0, 1, count=2),
    "rpn_batch_size": _whole(1, 1_000_000),
    "rpn_pre_nms_topk": _whole(1, 1_000_000, count=2),
    "rpn_post_nms_topk": _whole(1, 1_000_000, count=2),
    "roi_batch_size": _whole(1, 1_000_000),
    "box_num_conv": _whole(0, 64),
    "box_conv_dim": _whole(1, 16_384),
    "box_fc_dim": _whole(1, 65_536),
    "box_smooth_l1_beta": _NOT_NEGATIVE,
    "mask_num_conv": _whole(0, 64),
    "mask_conv_dim": _whole(1, 16_384),
    "classifier_scale": Range(0, 100, above=True),  # `MAX_SCALE` of the classifier
    "background_weight": _NOT_NEGATIVE,
    "federated_classes": _whole(1, 1_000_000),
    "distillation_weight": _NOT_NEGATIVE,
    "distillation_regions": _whole(1, 1_000_000),
    "distillation_box_scales": Range(0, 100, above=True, count=0),
    "vlm_scale": Range(0, math.inf, above=True, optional=True),
    "vlm_output_size": _whole(1, 256),
    "vlm_crop_size": _whole(0, 4_096),
    "vlm_box_scale": Range(0, 100, above=True),
    "alpha": _SHARE,
    "beta": _SHARE,
    "objectness_delta": _NOT_NEGATIVE,
    "detector_temperature": _POSITIVE,
    "nms_threshold": _SHARE,
    "score_threshold": _SHARE,
    "detections_per_image": _whole(1, 100_000),
}


def check_setting(name: str, value: Any, shown_as: str = "") -> None:
    """Refuse a value that a setting cannot have.

    Args:
        name: one of `RANGES`.
        value: as it was given.
        shown_as: where the user wrote it, for the message; empty: the name.

    Raises:
        ValueError: it is out of range or of another type; the message has the name, the value and the range.
    """
    if not RANGES[name].holds(value):
        raise ValueError(f"{shown_as or name} is {value!r}, but it is {RANGES[name]}; choose such a one")
