"""Devices: the CPU, what is refused, and TPU code on XLA's own CPU device (in a process of its own)."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pretrain.config import ConfigError, to_yaml
from pretrain.engine.checkpoint import load_state
from pretrain.engine.device import Device

ROOT = Path(__file__).resolve().parents[3]

# One transformer block keeps XLA's compiler within seconds. A process of its own, because autograd does not learn of a
# device that is registered after its first backward pass.
RUN = """
import sys, yaml
from pretrain.config import config_from_dict
from pretrain.engine.train import Trainer
trainer = Trainer(config_from_dict(yaml.safe_load(sys.stdin.read())))
trainer.model.visual.trunk.blocks = trainer.model.visual.trunk.blocks[:1]
inner, compiled = trainer._step, []
def step(*arguments):
    output = inner(*arguments)
    if trainer.device.kind == "xla":
        import torch_xla.debug.metrics
        compiled.append(torch_xla.debug.metrics.metric_data("CompileTime")[0])
    return output
trainer._step = step
trainer.train()
print("compiled", compiled)
"""


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


@pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch-xla is not installed")
def test_xla_gives_the_cpus_losses_and_compiles_no_step_twice(run_config):
    curves, outputs = {}, {}
    for name in ("xla", "cpu"):
        config = run_config([{"steps": 6}], output=name, run={"device": name}, optim={"grad_clip": 1.0})
        outputs[name] = subprocess.run(
            [sys.executable, "-c", RUN], input=to_yaml(config), capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert outputs[name].returncode == 0, outputs[name].stderr
        lines = [json.loads(line) for line in (Path(config.run.output) / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [line["loss"] for line in lines if "loss" in line]
        state = load_state(Path(config.run.output))  # readable here, without torch-xla
        assert {tensor.device.type for tensor in state["objective"].values()} == {"cpu"}
    assert curves["xla"] == pytest.approx(curves["cpu"], abs=1e-3) and len(curves["xla"]) == 6
    compiled = json.loads(outputs["xla"].stdout.split("compiled ")[1])
    assert compiled[0] > 0 and len(set(compiled[2:])) == 1  # the first steps make the gradients and the moments
