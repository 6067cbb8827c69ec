"""The presets hold clip-rocket's published table, and a short run of the mini preset's objective would start."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.config import load_config, options_from_dict
from pretrain.data.wordnet import SYNONYMS_FILE
from pretrain.engine.cost import describe_towers, phase_cost
from pretrain.engine.schedule import lr_at
from pretrain.modeling.clip import build_model
from pretrain.objectives import OBJECTIVES, build_objective, passes_of
from pretrain.objectives.clip_rocket import ClipRocketOptions, check_options

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "pretrain"
# Weight decay, text layers, text dropout, reduction, repair, peak rate, augmented size of 224 px, captions, epochs.
TABLE = {
    "cc3m": (0.5, 6, 0.2, "avg", False, 3e-3, 224, "single", 32),
    "cc12m": (0.1, 12, 0.05, "sum", False, 3e-3, 224, "single", 32),
    "yfcc15m": (0.1, 12, 0.0, "sum", True, 3e-3, 224, "single", 25),
    "29m": (0.1, 12, 0.0, "sum", True, 2e-3, 192, "multi", 32),
}


def options_of(config) -> ClipRocketOptions:
    assert OBJECTIVES[config.objective.name][1] is ClipRocketOptions
    options = options_from_dict(ClipRocketOptions, config.objective.options, "objective.options")
    check_options(options)
    return options


def augmented_size(config) -> int:
    """Pixels that the objective's views have, for the preset's towers."""
    phase, objective = config.phases[0], replace(config.objective, options={**config.objective.options, "text": {}})
    with torch.device("meta"):
        built = build_objective(replace(config, objective=objective), build_model(config.model))
    return built.views(config.data, phase, []).images["augmented_image_1"].size


def test_a_plan_counts_the_smaller_augmented_images():
    """Against one pass at 224 px and two at 192."""
    config = load_config(FOLDER / "clip_rocket_29m.yaml")
    (phase,), image = config.phases, (towers := describe_towers(config.model)).image
    passes = [image.forward_flops(image.patches(size) + 1, image.patches(size)) for size in (224, 192, 192)]
    pair = sum(passes) + 3 * towers.text.forward_flops(phase.context_length)
    cost = phase_cost(phase, towers, passes=passes_of(config, phase))
    assert cost.training_flops == pytest.approx(3 * cost.samples * pair, rel=0.002)
    plain = replace(config, objective=replace(config.objective, options={}))
    whole = phase_cost(phase, towers, passes=passes_of(plain, phase)).training_flops
    assert cost.training_flops < 0.9 * whole


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_has_the_published_row(name):
    config = load_config(FOLDER / f"clip_rocket_{name}.yaml")
    options, (phase,) = options_of(config), config.phases
    row = (
        config.optim.weight_decay, config.model.text.layers, options.text_dropout, options.reduction,
        options.text.repair, phase.lr, augmented_size(config), options.text.captions,
        phase.steps // phase.warmup_steps,
    )  # fmt: skip
    assert row == TABLE[name] and phase.steps % phase.warmup_steps == 0


@pytest.mark.parametrize("name", TABLE)
def test_what_all_published_rows_share(name):
    config = load_config(FOLDER / f"clip_rocket_{name}.yaml")
    options, phase = options_of(config), config.phases[0]
    assert (config.optim.name, config.optim.betas, config.optim.options) == ("adamw", [0.9, 0.98], {"eps": 1e-8})
    assert (phase.batch_size, phase.image_size, phase.context_length, phase.schedule) == (4096, 224, 77, "cosine")
    assert (config.model.embed_dim, config.model.text.width, config.model.text.heads) == (256, 512, 8)
    assert (options.num_augmented, options.smoothing, options.projector_hidden) == (2, 0.1, 4096)
    assert (options.text.stop_word_probability, options.strong.crop_scale) == (0.8, [0.08, 1.0])
    assert options.text.synonyms == str(Path("data/wordnet") / SYNONYMS_FILE)  # where prepare_data.py writes it
    assert options.augmented_temperature == 0.1 and config.model.init_temperature == 0.07
    assert config.run.output == f"runs/clip_rocket_{name}"
    assert lr_at(phase.warmup_steps - 1, phase) == pytest.approx(phase.lr)
    assert lr_at(0, phase) == pytest.approx(1e-6 + phase.lr / phase.warmup_steps, rel=1e-2)
    assert lr_at(phase.steps, phase) == pytest.approx(1e-5)


def test_the_mini_preset_is_read():
    config = load_config(FOLDER / "clip_rocket_mini.yaml")
    options = options_of(config)
    assert [p.image_size for p in config.phases] == [32, 64] and options.text.keywords_as_synonyms
    assert options.strong.jitter_probability == 0.8 and options.strong.blur_probability == 0.5  # not said: published
