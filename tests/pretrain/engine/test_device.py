"""Devices and processes: the CPU, what is refused, and what several hosts and TPU processes would see.

What torch-xla computes is tested in tests/distributed/test_xla.py.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.config import ConfigError, OptimConfig, PhaseConfig, to_yaml
from pretrain.engine.device import Device
from pretrain.engine.optim import build_optimizer
from pretrain.engine.parallel import load_optimizer
from pretrain.engine.processes import join_processes, start_processes
from pretrain.engine.step import TrainStep
from pretrain.objectives.info_nce import InfoNCE

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def xla(monkeypatch) -> SimpleNamespace:
    """A stand-in for torch-xla's runtime and launcher: one TPU; what is launched is noted only. The real one would
    change this process for the tests that follow."""
    runtime = SimpleNamespace(
        device_type=lambda: "TPU", is_spmd=lambda: False, world_size=lambda: 1, process_index=lambda: 0,
        process_count=lambda: 1,
    )  # fmt: skip
    launched = []
    stand_in = SimpleNamespace(
        runtime=runtime, launched=launched, launch=lambda function, args: launched.append((function, args))
    )
    monkeypatch.setitem(sys.modules, "torch_xla", stand_in)
    monkeypatch.setitem(sys.modules, "torch_xla.runtime", runtime)
    return stand_in


def test_the_cpu_is_float32_unless_asked():
    assert not Device("cpu").bf16 and Device("cpu", "bf16").bf16 and not Device("cpu", "fp32").bf16
    with Device("cpu", "bf16").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with Device("cpu").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="run.device is cuda and PyTorch sees no GPU: use run.device=cpu"):
        Device("cuda")
    assert Device("auto").kind == "cpu"


def test_xla_without_torch_xla_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ConfigError, match="run.device is xla and torch-xla is not installed"):
        Device("xla")


@pytest.mark.parametrize("parallel", ["spmd", "processes"])
def test_ways_of_the_tpu_are_refused_elsewhere(parallel):
    with pytest.raises(ConfigError, match=f"run.parallel is {parallel}, which needs run.device=xla: use ddp or fsdp"):
        Device("cpu", parallel=parallel)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [("ddp", "ddp, which needs CPU or CUDA: use spmd"), ("processes", "which needs a TPU, and torch-xla runs on CPU")],
)
def test_what_xla_cannot_do_on_its_cpu_device_is_refused(xla, parallel, message):
    xla.runtime.device_type = lambda: "CPU"
    with pytest.raises(ConfigError, match=message):
        Device("xla", parallel=parallel)


# ------------------------------------------------------------------------------------- several hosts, SPMD


def test_a_host_of_one_program_loads_its_part_and_averages_nothing(xla):
    """The second of four hosts: its rows of the batch, everyone's random draws, and global losses already."""
    xla.runtime.process_index, xla.runtime.process_count = lambda: 1, lambda: 4
    host = join_processes("auto", on_cuda=False, spmd=True)
    assert (host.rank, host.world, host.is_main, host.share(64, "batch_size")) == (1, 4, False, 16)
    assert host.one_program and host.draw == 0
    assert host.mean({"loss": torch.tensor(3.0)}) == {"loss": 3.0}
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    host.average_gradients([parameter])
    host.wait()
    assert parameter.grad.tolist() == [1, 1]


def test_one_host_of_one_program_is_one_process(xla):
    host = join_processes("spmd", on_cuda=False, spmd=True)
    assert (host.rank, host.world, host.one_program) == (0, 1, False)


class TwoHosts(Device):
    """The device of one of two hosts under SPMD, whose tensors have the rows of both: the other's equal ours."""

    def move(self, batch):
        return {name: torch.cat([value, value]) for name, value in batch.items()}


@pytest.mark.parametrize("micro", [0, 2])
def test_a_step_trains_on_the_rows_of_all_hosts(model_config, monkeypatch, micro):
    """Six rows of a host, twelve on the device: the gradient is that of one process with the twelve."""
    from pretrain.modeling.clip import build_model

    generator = torch.Generator().manual_seed(0)
    half = {
        "image": torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "tokens": torch.randint(1, 1000, (6, 8), generator=generator),
    }
    weights = []
    for device, batch in ((TwoHosts("cpu"), half), (Device("cpu"), TwoHosts("cpu").move(half))):
        torch.manual_seed(0)
        objective = InfoNCE(build_model(model_config), model_config)
        own = isinstance(device, TwoHosts)
        phase = PhaseConfig(
            name="p", steps=1, image_size=32, context_length=8, batch_size=len(batch["image"]), lr=0.1, warmup_steps=0,
            micro_batch_size=micro if own else 0,
        )  # fmt: skip
        objective.enter_phase(phase)
        TrainStep(objective, phase, OptimConfig(name="sgd", weight_decay=0.0), device)(batch, 0)
        weights.append({name: value.detach() for name, value in objective.named_parameters()})
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------ TPU processes


def test_the_command_starts_a_process_for_each_core(xla, run_config, tmp_path, monkeypatch, capsys):
    from pretrain.commands import pretrain as command

    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run_config([{"steps": 1}], output="alone")))
    arguments = ["--config", str(path), "run.device=xla", "run.parallel=processes"]
    assert command.main([*arguments, "--resume"]) == 0
    overrides = ["run.device=xla", "run.parallel=processes"]
    assert xla.launched == [(command.train, (str(path), overrides, True))]
    assert capsys.readouterr().out == ""  # the first process prints

    # What each process then does, here in this one and on the CPU.
    command.train(0, str(path), [], False)
    assert (tmp_path / "alone" / "checkpoint").is_dir() and "checkpoint: " in capsys.readouterr().out


def test_processes_without_a_tpu_are_refused_before_they_start(xla, monkeypatch):
    xla.runtime.device_type = lambda: "CPU"
    with pytest.raises(ConfigError, match="processes, which needs a TPU, and torch-xla runs on CPU here: use spmd"):
        start_processes(print)
    assert xla.launched == []
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ConfigError, match="torch-xla is not installed"):
        start_processes(print)


# ---------------------------------------------------------------------------------- optimisers of devices


def test_a_state_from_another_device_leaves_this_ones_way_of_updating():
    """A state from XLA says `capturable` and not `fused`: the CPU's optimiser stays as it is here."""
    layer = torch.nn.Linear(2, 2)

    def optimizer():
        return build_optimizer(layer, OptimConfig(name="adamw"), Device("cpu"))

    before = optimizer()
    layer(torch.ones(1, 2)).sum().backward()
    before.step()
    state = before.state_dict()
    for group in state["param_groups"]:
        group.update(capturable=True, fused=False)
    after = optimizer()
    load_optimizer(after, state)
    assert {(group["capturable"], group["fused"]) for group in after.param_groups} == {(False, True)}
    after.step()
    assert {values["step"].item() for values in after.state.values()} == {2}
