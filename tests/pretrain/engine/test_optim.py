"""Layer-wise learning rates by hand, and LAMB's steps by its formula."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.config import ConfigError, OptimConfig, PhaseConfig, load_config
from pretrain.engine.device import Device
from pretrain.engine.optim import build_optimizer
from pretrain.engine.step import TrainStep
from pretrain.objectives.base import Objective
from pretrain.objectives.info_nce import InfoNCE


def scales(objective: nn.Module, optim: OptimConfig) -> dict[str, tuple[float, float]]:
    """Learning-rate scale and weight decay of every trained parameter."""
    names = {id(p): name for name, p in objective.named_parameters()}
    groups = build_optimizer(objective, optim, Device("cpu")).param_groups
    found = [(names[id(p)], (g["lr_scale"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


def test_the_layer_rates_are_the_table_by_hand(model, model_config):
    """Nine blocks: the embedding has 0.75 ** 10, block i 0.75 ** (9 - i), all behind the blocks 1."""
    objective = InfoNCE(model, model_config)
    found = scales(objective, OptimConfig(name="lamb", weight_decay=0.05, layer_decay=0.75))
    table = {f"blocks.{i}.": 0.75 ** (9 - i) for i in range(9)}
    table |= {"pos_embed": 0.75**10, "reg_token": 0.75**10, "patch_embed.": 0.75**10, "fc_norm.": 1.0}
    for name, parameter in objective.named_parameters():
        scale, decay = found.pop(name)
        own = name.removeprefix("model.visual.trunk.")
        expected = next(v for k, v in table.items() if own.startswith(k)) if own != name else 1.0
        assert scale == pytest.approx(expected), name
        assert decay == (0.05 if parameter.ndim > 1 else 0.0), name
    assert found == {}
    assert table["blocks.0."] == pytest.approx(0.0750846862793) and table["blocks.8."] == 0.75


def test_the_first_group_has_the_rate_that_is_logged(model, model_config):
    optimizer = build_optimizer(InfoNCE(model, model_config), OptimConfig(layer_decay=0.8), Device("cpu"))
    assert optimizer.param_groups[0]["lr_scale"] == 1.0


def test_without_layer_decay_groups_have_no_scale(model, model_config):
    groups = build_optimizer(InfoNCE(model, model_config), OptimConfig(), Device("cpu")).param_groups
    assert all("lr_scale" not in group for group in groups)


def test_frozen_towers_and_fallback_lists_are_respected(model, model_config):
    objective = InfoNCE(model, model_config)
    model.visual.requires_grad_(False)
    assert not any("visual" in n for n in scales(objective, OptimConfig(layer_decay=0.5)))
    model.visual.requires_grad_(True)
    options = {"fallback_list": ["*token_embedding*", "*positional*", "*pos_embed*"], "fallback_lr_scale": 0.1}
    optim = OptimConfig(name="muon", layer_decay=0.5, options=options)
    groups = build_optimizer(objective, optim, Device("cpu")).param_groups
    of = {id(p): g for g in groups for p in g["params"]}
    for parameter in (model.visual.trunk.pos_embed, model.text.positional_embedding, model.text.token_embedding.weight):
        assert of[id(parameter)]["use_fallback"]
    assert not of[id(model.visual.trunk.blocks[0].mlp.fc1.weight)].get("use_fallback")


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.2])
def test_a_layer_decay_outside_its_range_is_refused(model, decay):
    with pytest.raises(ConfigError, match=f"optim.layer_decay is {decay}: above 0, at most 1"):
        build_optimizer(model, OptimConfig(layer_decay=decay), Device("cpu"))


class Weighted(Objective):
    """A matrix and a vector whose gradients are given numbers."""

    def __init__(self):
        super().__init__()
        self.model = nn.ParameterDict({"matrix": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "vector": torch.tensor([2.0])})

    def encode(self, batch):
        return batch

    def loss(self, features):
        matrix = (features["by"] * self.model["matrix"]).sum()
        return {"loss": matrix + 0.1 * self.model["vector"].sum()}


def test_lambs_first_step_is_the_formula_by_hand():
    """With corrected moments the first update is g / (|g| + eps), the sign of the gradient; then decay, then trust.

    Matrix: u = sign(g) + 0.05 w = [[1.15, 1], [-1, 1.2]], trust |w| / |u| = 5 / |u|. Vector: no decay, no trust.
    """
    objective = Weighted()
    optim = OptimConfig(name="lamb", weight_decay=0.05, options={"max_grad_norm": None})
    phase = PhaseConfig(lr=0.1, warmup_steps=0, batch_size=2, steps=10)
    by = torch.tensor([[0.5, 0.3], [-0.2, 0.1]])
    TrainStep(objective, phase, optim, Device("cpu"))({"by": by}, 0)
    update = torch.tensor([[1.15, 1.0], [-1.0, 1.2]])
    trust = 5 / (1.15**2 + 1 + 1 + 1.2**2) ** 0.5
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]]) - 0.1 * trust * update
    torch.testing.assert_close(objective.model["matrix"].detach(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(objective.model["vector"].detach(), torch.tensor([1.9]), atol=1e-5, rtol=1e-5)


def naive_lamb(weights, gradients_of_steps, decays, lr):
    """LAMB (arXiv 1904.00962, algorithm 2) with corrected moments; all gradients first scaled to a norm of 1 at most.

    Trust, the ratio of the norms of weights and update, is for what is decayed only, as in timm.
    """
    weights = [w.clone().double() for w in weights]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step, gradients in enumerate(gradients_of_steps, start=1):
        norm = sum(float((g.double() ** 2).sum()) for g in gradients) ** 0.5
        for i, gradient in enumerate(gradients):
            g = gradient.double() / max(norm, 1.0)
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            update = first[i] / (1 - 0.9**step) / ((second[i] / (1 - 0.999**step)).sqrt() + 1e-6)
            update += decays[i] * weights[i]
            trust = weights[i].norm() / update.norm() if decays[i] else 1.0
            weights[i] -= lr * trust * update
    return weights


def test_the_optimiser_of_utas_fine_tuning_is_lamb_by_its_formula():
    """Three steps of what uta_b16.yaml configures, one of them with gradients that are too long."""
    preset = Path(__file__).resolve().parents[3] / "configs/pretrain/uta_b16.yaml"
    optim = load_config(preset).phases[1].optim
    objective = Weighted()
    before = [objective.model[name].detach().clone() for name in ("matrix", "vector")]
    step = TrainStep(objective, PhaseConfig(lr=0.1, warmup_steps=0, batch_size=2), optim, Device("cpu"))
    by = [torch.tensor([[0.5, 0.3], [-0.2, 0.1]]), torch.tensor([[9.0, -4.0], [2.0, 7.0]]), torch.full((2, 2), 0.1)]
    for matrix in by:  # all at the peak rate
        step({"by": matrix}, 0)
    wanted = naive_lamb(before, [[matrix, torch.tensor([0.1])] for matrix in by], [optim.weight_decay, 0.0], 0.1)
    for name, expected in zip(("matrix", "vector"), wanted, strict=True):
        torch.testing.assert_close(objective.model[name].detach().double(), expected, atol=1e-5, rtol=1e-5)
