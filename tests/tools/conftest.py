"""The detection half's tiny image-text model, and a random detector on it, for tests of the command lines."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("ovd_fixtures", Path(__file__).parents[1] / "ovd" / "conftest.py")
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)
image_text_folder = _FIXTURES.image_text_folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory, image_text_folder) -> Path:
    """Folder of a random detector, 160 px, with masks."""
    import torch

    from ovd.detector import save_detector
    from ovd.modeling.detector_config import DetectorConfig
    from ovd.modeling.rcnn import build_detector

    torch.manual_seed(0)
    small = {"image_size": 160, "pyramid_channels": 16, "box_fc_dim": 32, "box_conv_dim": 16, "mask_conv_dim": 16}
    model = build_detector(DetectorConfig(**small), image_text_folder)
    return save_detector(tmp_path_factory.mktemp("weights"), model, image_text_folder, base_names=["cat"])
