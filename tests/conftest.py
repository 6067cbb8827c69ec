"""Fixtures that tests of both halves use."""

import importlib.util
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: each of several processes with a thread for every core would wait for the others.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Every test draws the same numbers, whatever ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real ground truth that lies beside the project, or skip the test where it does not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data (COCO-100 and LVIS-100 ground truth) is not beside the project on this machine")
    return folder


@pytest.fixture(scope="session")
def command() -> Callable[[str], Callable[[list[str]], int]]:
    """`command(name)`: the function `main` of tools/NAME.py; loading the file leaves the import path as it was."""

    def load(name: str) -> Callable[[list[str]], int]:
        before = list(sys.path)
        path = Path(__file__).resolve().parents[1] / "tools" / f"{name}.py"
        specification = importlib.util.spec_from_file_location(f"tools_{name}", path)
        module = importlib.util.module_from_spec(specification)
        try:
            specification.loader.exec_module(module)
        finally:
            sys.path[:] = before
        return module.main

    return load
