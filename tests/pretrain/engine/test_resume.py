"""Where a run continues from: processes of torch-xla must agree, which several machines without a TPU only imitate."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pretrain.config import ConfigError
from pretrain.engine.checkpoint import save_state
from pretrain.engine.device import Device
from pretrain.engine.processes import Processes
from pretrain.engine.resume import starting_state

STATE = {"phase": 1, "step": 500, "config": {"run.seed": 0}, "data": {"t.csv": "ab"}}


@pytest.fixture
def others(monkeypatch):
    """A list of rows: what the other processes give to an all-reduce of maxima."""
    rows = []
    xla, core, model = (ModuleType(name) for name in ("torch_xla", "torch_xla.core", "torch_xla.core.xla_model"))
    model.REDUCE_MAX = "max"
    model.all_reduce = lambda kind, value: torch.stack([value, *rows]).amax(0)
    xla.core, core.xla_model = core, model
    for module in (xla, core, model):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return rows


def numbers(phase: int, step: int, digest: int) -> torch.Tensor:
    row = torch.tensor([1, phase, step, digest], dtype=torch.int32)
    return torch.cat([row, -row])


def start(folder: Path) -> dict | None:
    return starting_state(folder, True, Processes(2, 4, 0, "xla"), Device("cpu"))


def test_a_process_of_xla_that_finds_another_state_is_refused_with_its_machine_and_the_remedy(tmp_path, others):
    save_state(tmp_path, STATE)
    assert start(tmp_path)["step"] == 500  # alone it agrees with itself
    others.append(numbers(1, 400, 7))
    with pytest.raises(ConfigError, match=r"process 2 on .+ finds phase 1, step 500 in .*a folder that all machines"):
        start(tmp_path)
    with pytest.raises(ConfigError, match="process 2 on .+ finds no state that can be used in"):
        start(tmp_path / "empty")


def test_processes_of_xla_without_any_state_start_from_scratch_together(tmp_path, others):
    others.append(torch.zeros(8, dtype=torch.int32))
    assert start(tmp_path) is None
