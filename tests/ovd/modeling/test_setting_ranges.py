"""Every mistake in a setting names its field, wherever the setting is given."""

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest

from ovd.engine.evaluate import FUSION_SETTINGS, INFERENCE_SETTINGS, apply_settings
from ovd.engine.lazy_config import load_config
from ovd.modeling.detector_config import BACKGROUNDS, SWITCHES, DetectorConfig
from ovd.modeling.setting_ranges import RANGES, check_setting
from ovd.modeling.text_classifier import MAX_SCALE
from ovd.sweep import ScoreSettings
from pretrain.config import ConfigError

NUMBERS = {f.name: f.default for f in fields(DetectorConfig) if not isinstance(f.default, (bool, str))}


def test_every_number_has_a_range_that_holds_its_default() -> None:
    assert set(RANGES) == set(NUMBERS)
    assert set(SWITCHES) == {f.name for f in fields(DetectorConfig) if isinstance(f.default, bool)}
    for name, value in NUMBERS.items():
        check_setting(name, value)
        if isinstance(value, tuple):
            check_setting(name, list(value))
    assert RANGES["classifier_scale"].most == MAX_SCALE and "learned" in BACKGROUNDS


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, "0.5", "a", True, [], {}, -1], ids=str)
@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_what_no_number_can_be_is_refused_by_name(name, wrong) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*, but it is a .*; choose such a one$"):
        DetectorConfig.from_dict({name: wrong})


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("vlm_scale", 0), ("vlm_scale", -50.0), ("vlm_box_scale", 0.0), ("vlm_box_scale", -1.0), ("nms_threshold", 2.0),
        ("background_weight", -0.1), ("objectness_delta", -1.0), ("detector_temperature", 0), ("window_size", 2.0),
        ("rpn_pre_nms_topk", [100]), ("rpn_pre_nms_topk", [100, 0]), ("rpn_nms_thresholds", [0.7]),
        ("rpn_nms_thresholds", [0.7, 1.1]), ("rpn_nms_thresholds", 0.7), ("rpn_post_nms_topk", "10"),
        ("anchor_sizes", [32, 64, 128]), ("anchor_sizes", [32, 64, 128, 0]), ("distillation_box_scales", []),
        ("classifier_scale", 0), ("classifier_scale", 101), ("detections_per_image", 1.5), ("alpha", 1.01),
        ("alpha", None), ("image_size", 31), ("box_smooth_l1_beta", -0.5), ("mask_on", "no"), ("vlm_background", 1),
    ],
    ids=str,
)  # fmt: skip
def test_a_description_with_an_impossible_value_names_it(name, wrong) -> None:
    with pytest.raises(ValueError, match=f"^{name} is ") as caught:
        DetectorConfig(**{name: wrong})
    assert repr(wrong) in str(caught.value) and "\n" not in str(caught.value)


def heads() -> SimpleNamespace:
    """What settings are given to; nothing in it is a detector's."""
    kept = dict.fromkeys(FUSION_SETTINGS, "as it was")
    predictor = SimpleNamespace(**dict.fromkeys(INFERENCE_SETTINGS.values(), 100))
    return SimpleNamespace(roi_heads=SimpleNamespace(**kept, box_predictor=predictor))


WRONG = [
    ("fusion", "detector_temperature", 0), ("fusion", "detector_temperature", -1), ("fusion", "alpha", "a"),
    ("fusion", "alpha", 2.0), ("fusion", "beta", math.nan), ("fusion", "objectness_delta", -1),
    ("inference", "nms_threshold", -1.0), ("inference", "score_threshold", 2), ("inference", "detections_per_image", 0),
    ("inference", "detections_per_image", 1.5), ("inference", "detections_per_image", None),
]  # fmt: skip


@pytest.mark.parametrize(("group", "name", "wrong"), WRONG, ids=str)
def test_an_evaluation_with_an_impossible_setting_names_it_and_changes_nothing(group, name, wrong) -> None:
    model, given = heads(), {"fusion": {"alpha": 0.5}, "inference": {}}
    given[group] = given[group] | {name: wrong}
    with pytest.raises(ConfigError, match=rf"^evaluation\.{group}\.{name} is "):
        apply_settings(model, given["fusion"], given["inference"], False)
    assert model.roi_heads.alpha == "as it was"


@pytest.mark.parametrize(("group", "name", "wrong"), WRONG[:3], ids=str)
def test_the_command_line_is_read_no_further_than_the_mistake(group, name, wrong) -> None:
    with pytest.raises(ConfigError, match=rf"^evaluation\.{group}\.{name} is {wrong!r}, but it is a number "):
        load_config("configs/ovd/mini_lvis.py", [f"evaluation.{group}.{name}={wrong}"])


def test_settings_that_are_possible_are_given_to_the_detector() -> None:
    model = heads()
    apply_settings(model, {"alpha": 0, "detector_temperature": 2.0}, {"detections_per_image": 1000}, True)
    assert (model.roi_heads.alpha, model.roi_heads.detector_temperature) == (0, 2.0)
    assert model.roi_heads.box_predictor.test_topk_per_image == 1000


@pytest.mark.parametrize("name", ["alpha", "delta", "detector_temperature", "image_text_temperature"])
def test_a_sweep_names_its_own_setting(name) -> None:
    with pytest.raises(ValueError, match=f"^{name} is -1"):
        ScoreSettings(**{"alpha": 0.5, "beta": 0.5, name: -1})
