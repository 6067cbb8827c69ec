"""OTTER and its baselines over two real processes against one, and on torch-xla's CPU device against the plain CPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pretrain.config import ModelConfig, config_from_dict
from pretrain.engine.train import Trainer
from pretrain.losses.sinkhorn import sinkhorn
from pretrain.losses.soft_targets import true_pairs
from pretrain.objectives.distillation import Distillation, DistillationOptions
from pretrain.objectives.label_smoothing import LabelSmoothing, LabelSmoothingOptions
from pretrain.objectives.otter import Otter, OtterOptions

OBJECTIVES = {
    "label_smoothing": (LabelSmoothing, LabelSmoothingOptions(0.2)),
    "distillation": (Distillation, DistillationOptions(alpha=0.3, image_weight=0.5, teacher_scale=5.0)),
    "otter": (Otter, OtterOptions(alpha=0.3)),
    "otter with its pairs": (Otter, OtterOptions(remove_diagonal=False)),
}


class Towers(nn.Module):
    """The least that has features of two kinds and a temperature; in double precision, to compare exactly."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64))
        self.text = nn.Parameter(torch.randn(4, 5, generator=generator, dtype=torch.float64))
        self.logit_scale = nn.Parameter(torch.tensor(10.0, dtype=torch.float64).log())


def build(name: str, **options):
    """An objective over such towers, whose teacher is not its student."""
    kind, chosen = OBJECTIVES[name]
    chosen = type(chosen)(**{**vars(chosen), **options})

    class OverMatrices(kind):
        def encode(self, batch):
            def unit(values, matrix):
                return F.normalize(values @ matrix, dim=-1)

            features = {name: unit(batch[name], getattr(self.model, name)) for name in ("image", "text")}
            if hasattr(self, "teacher"):
                with torch.no_grad():
                    for name in ("image", "text"):
                        features[f"teacher_{name}"] = unit(batch[name], getattr(self.teacher.module, name))
            return features

    objective = OverMatrices(Towers(), ModelConfig(), chosen)
    with torch.no_grad():
        objective.model.image.mul_(1.5).add_(0.2)
        if hasattr(objective, "teacher"):
            objective.distillation_logit_scale.fill_(1.0)
    return objective


def batch() -> dict[str, torch.Tensor]:
    """Eight pairs."""
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(8, 6, generator=generator, dtype=torch.float64),
        "text": torch.randn(8, 4, generator=generator, dtype=torch.float64),
    }


def loss_and_gradients(module: nn.Module, given: dict) -> dict[str, torch.Tensor]:
    output = module(given)
    output["loss"].backward()
    named = {n.removeprefix("module."): p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}
    return {**{n: v.detach() for n, v in output.items() if n != "batch_accuracy"}, **named}


def cost() -> torch.Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def in_one_of_two(table: str, folder: str) -> dict:
    """What each process does; everything in one start, which takes longest."""
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")  # as torchrun would start it
    own = {name: value.chunk(2)[rank] for name, value in batch().items()}
    result = {"pairs": true_pairs(4, torch.device("cpu"), gather=True)}
    result["plan"] = sinkhorn(cost().chunk(2)[rank], 0.15, 5, gather=True)
    for name in OBJECTIVES:
        result[name] = loss_and_gradients(nn.parallel.DistributedDataParallel(build(name)), own)
    v = F.normalize(own["image"], dim=-1)
    result["targets"] = build("otter").targets(v, v)
    result["compatible"] = build("otter", compat_rank0_diagonal=True).targets(v, v)
    objective = build("otter")
    objective.after_step()
    result["teacher"] = objective.teacher.module.image.clone()
    result["sharded"] = train(configuration(table, f"{folder}/sharded", "cpu", "fsdp"))
    return result


@pytest.fixture(scope="module")
def results(run_processes, plain):
    return run_processes(in_one_of_two, plain["table"], plain["folder"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_those_of_one_process(results, name):
    whole = loss_and_gradients(build(name), batch())
    for result in results:  # gradients after DistributedDataParallel's mean
        assert result[name].keys() == whole.keys()
        for key, expected in whole.items():
            torch.testing.assert_close(result[name][key], expected, atol=1e-10, rtol=1e-10, msg=f"{name}: {key}")
    assert whole["model.logit_scale"] != 0 and whole.get("distillation_logit_scale", 1) != 0


def test_the_transport_problem_is_the_global_one(results):
    torch.testing.assert_close(torch.cat([result["plan"] for result in results]), sinkhorn(cost(), 0.15, 5))


def test_the_pairs_that_get_no_mass_are_the_true_ones_on_every_process(results):
    v = F.normalize(batch()["image"], dim=-1)
    assert torch.equal(torch.cat([result["pairs"] for result in results]), torch.eye(8, dtype=torch.bool))
    for direction in range(2):
        targets = torch.cat([result["targets"][direction] for result in results])
        assert targets.diagonal().max() < 1e-6
        torch.testing.assert_close(targets, build("otter").targets(v, v)[direction])


def test_the_compatible_option_makes_the_originals_error(results):
    first, second = (result["compatible"][0] for result in results)
    assert first.diagonal().max() < 1e-6 and second.diagonal().max() < 1e-6
    assert second[:, 4:].diagonal().min() > 0.1  # the true pairs of the second process keep their mass


def test_all_processes_have_the_same_teacher(results):
    assert torch.equal(results[0]["teacher"], results[1]["teacher"])


def test_a_sharded_teacher_follows_like_a_whole_one(results, plain):
    losses, _, whole = plain["whole"]
    assert results[0]["sharded"][0] == pytest.approx(losses, abs=1e-4)
    for result in results:
        state = result["sharded"][2]
        assert state.keys() == whole.keys() and state["teacher.updates"] == STEPS
        for name, value in state.items():
            torch.testing.assert_close(value, whole[name], atol=1e-4, rtol=0, msg=name)


# --------------------------------------------------------------------------------------- whole runs, and torch-xla

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
# Autograd does not learn of a device that is registered after its first backward pass: XLA gets its own process.
_PROCESS = """
import importlib.util, json, sys
specification = importlib.util.spec_from_file_location("functions", sys.argv[1])
module = importlib.util.module_from_spec(specification)
sys.modules["functions"] = module
specification.loader.exec_module(module)
print("result", json.dumps(module.train_on_xla(*sys.argv[2:])))
"""


def configuration(table: str, output: str, device: str, parallel: str = "auto") -> dict:
    phase = {
        "steps": STEPS, "image_size": 32, "context_length": 6, "batch_size": 8, "lr": 0.1, "warmup_steps": 2,
    }  # fmt: skip
    return {
        "model": {
            "image": {"timm_model": "test_vit4", "layer_scale": 1.0},
            "text": {"width": 32, "heads": 2, "layers": 1, "context_length": 8}, "embed_dim": 32,
        },
        "data": {"table": table, "workers": 0, "preload": True},
        "objective": {"name": "otter", "options": {"ema_decay": 0.5}},  # reached within the run: 2/11, …, 5/14, 0.4
        "optim": {"name": "sgd", "weight_decay": 0.0},
        "phases": [phase],
        "run": {"output": output, "device": device, "parallel": parallel, "log_every": 1, "checkpoint_every": 100},
    }  # fmt: skip


def train(node: dict, programs_compiled=lambda: 0, blocks: int = 9) -> tuple[list[float], list[int], dict]:
    """Losses, programs compiled by each step, and the objective's state."""
    torch.set_num_threads(1)
    trainer = Trainer(config_from_dict(node))
    for towers in (trainer.model, trainer.objective.teacher.module):
        towers.visual.trunk.blocks = towers.visual.trunk.blocks[:blocks]
    compiled, inner = [], trainer._step

    def step(live, given, number):
        before = programs_compiled()
        output = inner(live, given, number)
        compiled.append(programs_compiled() - before)
        return output

    trainer._step = step
    trainer.train()
    metrics = Path(node["run"]["output"]) / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if trainer.processes.is_main else []
    state = {name: value.cpu() for name, value in trainer.objective.state_dict().items()}
    return [line["loss"] for line in lines if "loss" in line], compiled, state


def train_on_xla(table: str, folder: str) -> dict:
    from torch_xla.debug import metrics

    def compiled() -> int:
        data = metrics.metric_data("CompileTime")
        return data[0] if data else 0

    losses, steps, state = train(configuration(table, f"{folder}/xla", "xla"), compiled, blocks=1)
    left = [name for name in metrics.counter_names() if name.startswith("aten::")]
    teacher = {name: value for name, value in state.items() if name.startswith("teacher")}
    torch.save(teacher, f"{folder}/teacher.pt")
    return {"losses": losses, "steps": steps, "left": left}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict:
    """Runs of one process on the plain CPU, their table and a folder for others."""
    folder = tmp_path_factory.mktemp("runs")
    lines = ["image,caption,split"]
    for index, name in enumerate(("red", "green", "blue", "white")):
        for size in (32, 48):
            Image.new("RGB", (size, size), (60 * index, 200 - 40 * index, 30)).save(folder / f"{name}{size}.png")
            lines += [f"{name}{size}.png,{name} of {size},{split}" for split in ("train", "val")]
    table = folder / "pairs.csv"
    table.write_text("\n".join(lines) + "\n")
    result = {"table": str(table), "folder": str(folder)}
    for name, blocks in (("whole", 9), ("quick", 1)):  # XLA compiles a single block in half the time
        result[name] = train(configuration(str(table), f"{folder}/{name}", "cpu"), blocks=blocks)
    return result


@pytest.fixture(scope="module")
def on_xla(plain) -> dict:
    environment = {
        **os.environ, "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        # Programs that compile in a sixth of the time; the operations in them are the same.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    }  # fmt: skip
    command = [sys.executable, "-c", _PROCESS, __file__, plain["table"], plain["folder"]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    teacher = torch.load(Path(plain["folder"]) / "teacher.pt")
    return {**json.loads(done.stdout.split("result ")[-1]), "teacher": teacher}


needs_xla = pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch-xla is not installed")


@needs_xla
def test_xla_has_the_plain_cpus_losses_and_teacher(on_xla, plain):
    losses, _, state = plain["quick"]
    assert len(losses) == STEPS and on_xla["losses"] == pytest.approx(losses, abs=1e-3)
    assert on_xla["teacher"]["teacher.updates"] == STEPS
    for name, value in on_xla["teacher"].items():
        torch.testing.assert_close(value, state[name], atol=1e-3, rtol=0, msg=name)


@needs_xla
def test_xla_compiles_nothing_after_the_second_step(on_xla):
    """The decay of the moving average is another at every step."""
    assert on_xla["steps"][2:] == [0] * (STEPS - 2) and on_xla["left"] == []
