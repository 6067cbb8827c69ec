"""Fixtures that tests of both halves use."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real ground truth that lies beside the project, or skip the test where it does not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data (COCO-100 and LVIS-100 ground truth) is not beside the project on this machine")
    return folder
