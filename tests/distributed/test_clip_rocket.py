"""clip-rocket over two real processes against one, batch norm and all terms included; and on torch-xla's CPU device."""

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
from torch import nn

from pretrain.config import ImageTowerConfig, ModelConfig, PhaseConfig, TextTowerConfig, options_from_dict
from pretrain.modeling.clip import build_model
from pretrain.objectives.clip_rocket import ClipRocket, ClipRocketOptions
from pretrain.objectives.clip_rocket_terms import TermSizes, ViewFeatures, build_term

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "redundancy_hidden": 24, "redundancy_outputs": 16, "siamese_hidden": 24, "siamese_outputs": 16,
    "assignment_hidden": 24, "assignment_outputs": 16, "prototypes": 12,
}  # fmt: skip
CASES = {
    "pairs": {},
    "batch norm terms": {"terms": {"barlip": 1.0, "siamlip": 1.0, "byolip": 1.0}},
    "assignments": {"terms": {"swalip": 0.2, "swalip_v1": 0.2}, "smoothing": 0.0},
}
XLA_CASE = {"num_augmented": 1, "terms": {"byolip": 1.0, "swalip_v1": 0.2}}


def make(chosen: dict) -> ClipRocket:
    torch.manual_seed(0)
    config = ModelConfig(
        image=ImageTowerConfig(timm_model="test_vit4", layer_scale=1.0),
        text=TextTowerConfig(width=32, heads=2, layers=1, context_length=8, vocab_size=64), embed_dim=16,
    )  # fmt: skip
    options = {"projector_hidden": 24, "sizes": SIZES, **chosen}
    model = build_model(config)
    model.visual.trunk.blocks = model.visual.trunk.blocks[:1]  # XLA compiles for as long as there are blocks
    built = ClipRocket(model, config, options_from_dict(ClipRocketOptions, options, ""))
    built.enter_phase(PhaseConfig(image_size=32, context_length=8))
    return built.train()


def batch(pairs: int = 8) -> dict[str, torch.Tensor]:
    generator, made = torch.Generator().manual_seed(1), {}
    for prefix, suffix in (("", ""), ("augmented_", "_1"), ("augmented_", "_2")):
        images = torch.randint(0, 256, (pairs, 3, 32, 32), generator=generator, dtype=torch.uint8)
        tokens = torch.randint(1, 62, (pairs, 8), generator=generator)
        tokens[:, -1] = 63
        made |= {f"{prefix}image{suffix}": images, f"{prefix}tokens{suffix}": tokens}
    return made


def outcome(objective: ClipRocket, wrapped: nn.Module, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, gradients, and the buffers after the step (running statistics, counters, averages)."""
    output = wrapped(given)
    output["loss"].backward()
    objective.after_step()
    result = {f"gradient {n}": p.grad for n, p in objective.named_parameters() if p.grad is not None}
    result |= {f"buffer {n}": b for n, b in objective.named_buffers() if "attn_mask" not in n}
    return {**result, **{name: value.detach() for name, value in output.items()}}


def in_one_of_two() -> dict[str, dict[str, torch.Tensor]]:
    rank, results = dist.get_rank(), {}
    for case in CASES:
        objective = make(CASES[case])
        wrapped = nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)
        part = {name: value.chunk(2)[rank] for name, value in batch().items()}
        results[case] = outcome(objective, wrapped, part)
    return results


@pytest.fixture(scope="module")
def results(run_processes):
    return run_processes(in_one_of_two)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(results, case):
    objective = make(CASES[case])
    whole = outcome(objective, objective, batch())
    assert results[0][case].keys() == results[1][case].keys() == whole.keys()
    for name, expected in whole.items():
        parts = [result[case][name] for result in results]
        if name.endswith("_loss") or name in ("loss", "batch_accuracy"):
            if name == "batch_accuracy":  # of the process's own pairs: a metric
                continue
            torch.testing.assert_close(sum(parts) / 2, expected, atol=1e-5, rtol=1e-5, msg=f"{case}: {name}")
            continue
        for part in parts:
            torch.testing.assert_close(part, expected, atol=2e-5, rtol=1e-3, msg=f"{case}: {name}")


def train(objective: ClipRocket, given: dict[str, torch.Tensor], after_step) -> list[float]:
    """Losses of three steps."""
    optimizer, losses = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(3):
        optimizer.zero_grad()
        output = objective(given)
        output["loss"].backward()
        optimizer.step()
        objective.after_step()
        after_step()
        losses.append(output["loss"].item())
    return losses


def on_xla() -> dict:
    """Losses, how many programs XLA had compiled after each step, and the values of further terms."""
    import torch_xla
    import torch_xla.debug.metrics as metrics

    device, compiled = torch_xla.device(), []

    def cut() -> None:
        torch_xla.sync()
        compiled.append(metrics.metric_data("CompileTime")[0])

    given = {name: value.to(device) for name, value in batch().items()}
    losses = train(make(XLA_CASE).to(device), given, cut)
    return {"losses": losses, "compiled": compiled, "terms": term_values(device)}


def term_values(device: torch.device | str) -> dict[str, list[float]]:
    """Of the terms that `XLA_CASE` does not have: the loss, and the norms of its gradients to the towers' features."""
    results = {}
    for name in ("barlip", "siamlip", "swalip"):
        torch.manual_seed(0)
        term = build_term(name, None, (12, 10), TermSizes(**SIZES)).to(device).train()
        images, texts = ([torch.randn(8, width).to(device).requires_grad_() for _ in range(3)] for width in (12, 10))
        augmented = [F.normalize(v[:, :10], dim=1) for v in images[1:]], [F.normalize(v, dim=1) for v in texts[1:]]
        value = term(ViewFeatures(images, texts, augmented, torch.tensor(8.0, device=device)))
        value.backward()
        gradients = [v.grad for v in (*images, *texts) if v.grad is not None]
        results[name] = [value.item(), *(gradient.norm().item() for gradient in gradients)]
    return results


@pytest.fixture(scope="module")
def xla_results():
    """What `on_xla` returns, from a process of its own: the import of torch-xla is most of the time."""
    if find_spec("torch_xla") is None:
        pytest.skip("torch-xla is not installed")
    code = (
        "import importlib.util, json, sys\n"
        "specification = importlib.util.spec_from_file_location('functions', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(specification)\n"
        "sys.modules['functions'] = module\n"
        "specification.loader.exec_module(module)\n"
        "print('result', json.dumps(module.on_xla()))"
    )
    environment = {
        **os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("result ")[-1])


def test_xla_has_the_cpus_losses_and_gradients_of_barlip_siamlip_and_swalip(xla_results):
    found, expected = xla_results["terms"], term_values("cpu")
    assert {name: len(values) for name, values in found.items()} == {"barlip": 7, "siamlip": 7, "swalip": 5}
    for name, values in expected.items():
        assert min(values) > 1e-4
        assert found[name] == pytest.approx(values, rel=1e-4), name


def test_xla_has_the_cpus_losses_and_compiles_no_step_twice(xla_results):
    compiled = xla_results["compiled"]
    assert compiled[2] == compiled[1]  # the first step also makes the buffers' first values
    expected = train(make(XLA_CASE), batch(), lambda: None)
    assert xla_results["losses"] == pytest.approx(expected, rel=2e-3)
