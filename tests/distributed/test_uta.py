"""UTA over two real processes against one, and on torch-xla's CPU device against the plain CPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pretrain.config import ImageTowerConfig, ModelConfig, OptimConfig, PhaseConfig, TextTowerConfig
from pretrain.engine.device import Device
from pretrain.engine.processes import Processes
from pretrain.engine.step import TrainStep
from pretrain.modeling.checkpoint import save_checkpoint
from pretrain.modeling.clip import build_model
from pretrain.modeling.masking import keep_reversed_blocks
from pretrain.objectives import masked_features, uta
from pretrain.objectives.masked_features import MaskedFeatures, MaskedFeaturesOptions
from pretrain.objectives.uta import UTA, UTAOptions

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(
    image=ImageTowerConfig("test_vit4", 1.0), text=TextTowerConfig(32, 2, 1, context_length=8), embed_dim=32
)
STEPS = 5
SEED, STEP = 5, 3  # of the step whose masks are drawn twice
# Programs that compile in a sixth of the time; the operations in them are the same.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    torch.manual_seed(3)
    return str(save_checkpoint(tmp_path_factory.mktemp("teacher") / "checkpoint", build_model(CONFIG), CONFIG))


def make(teacher: str, kind: str = "uta", mask_ratio: float = 0.0):
    torch.manual_seed(0)
    if kind == "uta":
        objective = UTA(build_model(CONFIG), CONFIG, UTAOptions(teacher, mask_ratio))
    else:
        objective = MaskedFeatures(build_model(CONFIG), CONFIG, MaskedFeaturesOptions(teacher, mask_ratio))
    # Few blocks are quick to compile.
    objective.model.visual.trunk.blocks = objective.model.visual.trunk.blocks[:1]
    objective.teacher.visual.trunk.blocks = objective.teacher.visual.trunk.blocks[:1]
    objective.enter_phase(PhaseConfig(image_size=64, context_length=8))
    return objective.train()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (8, 3, 64, 64), generator=generator, dtype=torch.uint8)}


def loss_and_gradients(module, objective, images) -> dict[str, torch.Tensor]:
    output = module(images)
    output["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return {"loss": output["loss"].detach(), **gradients}


def in_one_of_two(teacher: str) -> dict:
    objective = make(teacher)
    own = {"image": batch()["image"].chunk(2)[dist.get_rank()]}
    results = loss_and_gradients(DistributedDataParallel(objective, broadcast_buffers=False), objective, own)
    loss = results["loss"].clone()
    dist.all_reduce(loss)
    return {**results, "loss": loss / 2}


def test_two_processes_have_the_loss_and_the_gradients_of_one(run_processes, teacher):
    objective = make(teacher)
    whole = loss_and_gradients(objective, objective, batch())
    assert any(name.startswith("model.visual") for name in whole) and not any("teacher" in name for name in whole)
    for result in run_processes(in_one_of_two, teacher):
        assert result.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(result[name], expected, atol=1e-6, rtol=1e-4, msg=name)


def masked_step_of_two(teacher: str, kind: str) -> dict:
    """One real step with what is drawn for it: the averaged loss and gradients."""
    objective, rank = make(teacher, kind, 0.4), dist.get_rank()
    phase = PhaseConfig(batch_size=8, lr=0.1, warmup_steps=0)
    optim, processes = OptimConfig(name="sgd", weight_decay=0.0), Processes(rank, 2, rank, "torch")
    step = TrainStep(objective, phase, optim, Device("cpu"), processes, seed=SEED)
    loss = step({"image": batch()["image"].chunk(2)[rank]}, STEP)["loss"].detach()
    dist.all_reduce(loss)
    return {"loss": loss / 2, **{n: p.grad for n, p in objective.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(("kind", "drawn"), [("uta", 10), ("masked_features", 6)])
def test_two_processes_with_masks_of_their_own_are_one_with_both(run_processes, teacher, monkeypatch, kind, drawn):
    """What a process draws follows from seed, step, its rank and the piece: here it is drawn again, for one process.

    Of 16 patches UTA keeps 10, and masked features hides 6.
    """
    masks = []
    for rank in range(2):
        Device("cpu").seed(SEED, STEP, rank, 0)
        masks.append(keep_reversed_blocks(4, (4, 4), drawn, "cpu"))
    assert not torch.equal(*masks)
    for module in (uta, masked_features):
        monkeypatch.setattr(module, "keep_reversed_blocks", lambda batch, grid, keep, device: torch.cat(masks))
    objective = make(teacher, kind, 0.4)
    whole = loss_and_gradients(objective, objective, batch())
    assert ("mask_token" in whole) == (kind == "masked_features")
    for result in run_processes(masked_step_of_two, teacher, kind):
        assert result.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(result[name], expected, atol=1e-6, rtol=1e-4, msg=name)


# ------------------------------------------------------------------------------------------------------- XLA

_PROCESS = """
import importlib.util, json, sys
path, name = sys.argv[1:]
specification = importlib.util.spec_from_file_location("functions", path)
module = importlib.util.module_from_spec(specification)
sys.modules["functions"] = module
specification.loader.exec_module(module)
print("result", json.dumps(getattr(module, name)(*json.load(sys.stdin))))
"""


def train(teacher: str, kind: str, mask_ratio: float, device: str) -> dict:
    """Losses of a few steps; on XLA, how many programs each step compiled, and what was left to PyTorch."""
    place = Device(device)
    objective = make(teacher, kind, mask_ratio).to(place.torch_device)
    phase = PhaseConfig(lr=1e-3, warmup_steps=2, batch_size=8, steps=STEPS)
    step = TrainStep(objective, phase, OptimConfig(), place)
    losses, compiled = [], []
    for number in range(STEPS):
        before = programs_compiled() if device == "xla" else 0
        losses.append(step(batch(), number)["loss"].detach())
        compiled.append((programs_compiled() if device == "xla" else 0) - before)
    return {"losses": torch.stack(losses).cpu().tolist(), "compiled": compiled}


def programs_compiled() -> int:
    from torch_xla.debug import metrics

    data = metrics.metric_data("CompileTime")
    return data[0] if data else 0


def everything_on_xla(teacher: str) -> dict:
    from torch_xla.debug import metrics

    torch.set_num_threads(1)
    results = {"plain": train(teacher, "uta", 0.0, "xla")}
    results["uta"] = train(teacher, "uta", 0.4, "xla")
    results["masked features"] = train(teacher, "masked_features", 0.4, "xla")
    results["left to pytorch"] = [name for name in metrics.counter_names() if name.startswith("aten::")]
    return results


@pytest.fixture(scope="module")
def on_xla(teacher) -> dict:
    environment = {
        **os.environ, "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1", "XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, __file__, "everything_on_xla"], input=json.dumps([teacher]),
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("result ")[-1])


xla = pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch-xla is not installed")


@xla
def test_xla_has_the_cpus_losses(on_xla, teacher):
    expected = train(teacher, "uta", 0.0, "cpu")["losses"]
    assert on_xla["plain"]["losses"] == pytest.approx(expected, abs=1e-4) and expected[0] - expected[-1] > 1e-3


@xla
def test_drawn_masks_train_on_xla_and_compile_each_step_once(on_xla):
    """The draws are the device's own, so that the losses are not the CPU's."""
    for name in ("uta", "masked features"):
        losses, compiled = on_xla[name]["losses"], on_xla[name]["compiled"]
        assert losses[-1] < losses[0] and all(-1 < loss < 1 for loss in losses)
        assert compiled[0] >= 1 and compiled[2:] == [0] * (STEPS - 2)
    assert on_xla["left to pytorch"] == []
