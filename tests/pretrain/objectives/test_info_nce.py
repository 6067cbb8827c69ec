"""RECLIP's objective: its contract, its phases and its temperature."""

import math

import pytest
import torch
from open_clip.loss import ClipLoss

from pretrain.config import ConfigError, ObjectiveConfig, PhaseConfig, PretrainConfig
from pretrain.data.transforms import normalise
from pretrain.objectives import build_objective
from pretrain.objectives.info_nce import InfoNCE


@pytest.fixture
def objective(model, model_config):
    return InfoNCE(model, model_config)


def batch(pairs=4, size=32, length=8):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 49000, (pairs, length), generator=generator)
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    return {
        "image": torch.randint(0, 256, (pairs, 3, size, size), generator=generator, dtype=torch.uint8),
        "tokens": tokens,
    }


def test_loss_equals_open_clips_own_forward_and_loss(objective, model):
    objective.enter_phase(PhaseConfig(image_size=32, context_length=8))
    given = batch()
    output = objective(given)
    image, text, scale = model(normalise(given["image"]), given["tokens"])
    torch.testing.assert_close(output["loss"], ClipLoss()(image, text, scale))
    expected = ((image @ text.T).argmax(1) == torch.arange(4)).float().mean()
    assert output["batch_accuracy"] == expected and output["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert set(output) == {"loss", "batch_accuracy", "logit_scale"}


def test_every_parameter_is_trained(objective):
    objective.enter_phase(PhaseConfig(image_size=32, context_length=8))
    objective(batch())["loss"].backward()
    idle = {n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert idle == set()


def test_entering_a_phase_changes_both_lengths(objective, model):
    for size, length in ((32, 8), (160, 16)):
        objective.enter_phase(PhaseConfig(image_size=size, context_length=length))
        prefix = model.visual.trunk.num_prefix_tokens * (not model.visual.trunk.no_embed_class)
        assert model.visual.trunk.pos_embed.shape[1] == (size // 16) ** 2 + prefix
        assert model.context_length == length
        assert objective(batch(2, size, length))["loss"].isfinite()


@pytest.mark.parametrize(("log_scale", "expected"), [(9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)])
def test_the_scale_is_clamped_after_a_step(objective, model, log_scale, expected):
    with torch.no_grad():
        model.logit_scale.fill_(log_scale)
    objective.after_step()
    assert model.logit_scale.item() == pytest.approx(expected)


def test_an_unknown_objective_is_named(model):
    with pytest.raises(ConfigError, match="objective.name is 'otters': one of info_nce"):
        build_objective(PretrainConfig(objective=ObjectiveConfig("otters")), model)


def test_an_option_that_the_objective_does_not_have_names_the_nearest(model):
    config = PretrainConfig(objective=ObjectiveConfig("info_nce", {"chunk_sizes": 4}))
    with pytest.raises(ConfigError, match="unknown field 'objective.options.chunk_sizes': did you mean 'chunk_size'"):
        build_objective(config, model)
