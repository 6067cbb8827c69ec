"""Where a run continues from: processes of torch-xla must agree, which several machines without a TPU only imitate."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pretrain.config import ConfigError, OptimConfig, PhaseConfig, PretrainConfig
from pretrain.engine.checkpoint import save_state
from pretrain.engine.device import Device
from pretrain.engine.processes import Processes
from pretrain.engine.resume import check_state, identity, starting_state

STATE = {"phase": 1, "step": 500, "config": {"run.seed": 0}, "data": {"t.csv": "ab"}}


@pytest.fixture
def others(monkeypatch):
    """A list of tables: what the other processes give to an all-reduce of sums."""
    tables = []
    xla, core, model = (ModuleType(name) for name in ("torch_xla", "torch_xla.core", "torch_xla.core.xla_model"))
    model.REDUCE_SUM = "sum"
    model.all_reduce = lambda kind, value: torch.stack([value, *tables]).sum(0)
    xla.core, core.xla_model = core, model
    for module in (xla, core, model):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return tables


def said(rank: int, text: str) -> torch.Tensor:
    table = torch.zeros(2, 1024, dtype=torch.int32)
    table[rank, : len(text)] = torch.tensor(list(text.encode()), dtype=torch.int32)
    return table


def start(folder: Path, rank: int = 0) -> dict | None:
    return starting_state(folder, True, Processes(rank, 2, 0, "xla"), Device("cpu"))


def test_processes_of_xla_that_find_different_states_are_refused_with_their_machines_and_the_remedy(tmp_path, others):
    save_state(tmp_path, STATE)
    others.append(said(1, "no state that can be used|0|machine-b"))
    with pytest.raises(
        ConfigError, match=r"process 0 on .+ finds phase 1, step 500 in .*, process 1 on machine-b finds no state"
    ):
        start(tmp_path)
    others[:] = [said(0, "phase 1, step 500|77|machine-a")]  # the same place of another run
    with pytest.raises(ConfigError, match="process 0 on machine-a .*another run.*a folder that all machines share"):
        start(tmp_path, rank=1)


def test_processes_of_xla_that_agree_go_on(tmp_path, others):
    others.append(said(1, "no state that can be used|0|machine-b"))
    assert start(tmp_path / "empty") is None


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", ["detector/model.safetensors", "last_checkpoint"])
def test_the_folder_of_a_detectors_run_is_refused(tmp_path, left, resume):
    (tmp_path / "detector").mkdir()  # alone it may be another run's folder, inside this one's
    assert starting_state(tmp_path, False, Processes(), Device("cpu")) is None
    (tmp_path / left).touch()
    with pytest.raises(ConfigError, match=rf"holds the run of a detector \({left}\): set run.output elsewhere"):
        starting_state(tmp_path, resume, Processes(), Device("cpu"))


def two_phases(**changes) -> PretrainConfig:
    optim = OptimConfig(options={"fallback_list": ["a"]})
    return replace(PretrainConfig(phases=[PhaseConfig(), PhaseConfig(optim=optim)]), **changes)


def check(before: PretrainConfig, after: PretrainConfig) -> list[str]:
    return check_state({"config": identity(before), "data": {}}, after, {}, Path("run"))


def test_the_schedule_and_the_clipping_may_change_and_are_named():
    after = two_phases(optim=OptimConfig(grad_clip=1.0))
    after.phases[0].lr, after.phases[0].schedule, after.phases[1].optim.grad_clip = 1e-4, "cosine", 2.0
    after.phases[1].micro_batch_size, after.data.workers = 64, 0
    assert set(check(two_phases(), after)) == {
        "phases[0].lr is 0.0001 (was 0.001)", "phases[0].schedule is cosine (was linear)",
        "phases[1].optim.grad_clip is 2.0 (was 0.0)", "optim.grad_clip is 1.0 (was 0.0)",
    }  # fmt: skip
    assert check(two_phases(), two_phases()) == []


@pytest.mark.parametrize("name", ["steps", "batch_size", "token_dropping", "optim"])
def test_every_other_field_of_a_phase_is_refused_and_named(name):
    after = two_phases()
    setattr(after.phases[1], name, {"optim": None, "token_dropping": "grid"}.get(name, 3))
    with pytest.raises(ConfigError, match=rf"another configuration: restore run/config.yaml \(phases\[1\]\.{name}"):
        check(two_phases(), after)


def test_a_state_of_an_earlier_version_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="earlier version of the toolkit: set run.output elsewhere"):
        check_state({"config": "a text", "data": {}}, two_phases(), {}, Path("run"))
