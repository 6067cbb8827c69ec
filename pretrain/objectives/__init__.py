"""Pretraining objectives by name."""

from typing import Any

from open_clip import CustomTextCLIP

from pretrain.config import ConfigError, PhaseConfig, PretrainConfig, options_from_dict
from pretrain.objectives.base import Objective, Passes
from pretrain.objectives.clip_rocket import ClipRocket, ClipRocketOptions
from pretrain.objectives.distillation import Distillation, DistillationOptions
from pretrain.objectives.focal import FocalContrastive, FocalOptions
from pretrain.objectives.info_nce import InfoNCE, InfoNCEOptions
from pretrain.objectives.label_smoothing import LabelSmoothing, LabelSmoothingOptions
from pretrain.objectives.masked_features import MaskedFeatures, MaskedFeaturesOptions
from pretrain.objectives.otter import Otter, OtterOptions
from pretrain.objectives.uta import UTA, UTAOptions

OBJECTIVES = {
    "info_nce": (InfoNCE, InfoNCEOptions),
    "focal": (FocalContrastive, FocalOptions),
    "label_smoothing": (LabelSmoothing, LabelSmoothingOptions),
    "distillation": (Distillation, DistillationOptions),
    "otter": (Otter, OtterOptions),
    "clip_rocket": (ClipRocket, ClipRocketOptions),
    "uta": (UTA, UTAOptions),
    "masked_features": (MaskedFeatures, MaskedFeaturesOptions),
}


def build_objective(
    config: PretrainConfig, model: CustomTextCLIP, phase: PhaseConfig | None = None, recipe: dict | None = None
) -> Objective:
    """The objective of `phase` (None: the run's), owning `model`.

    Args:
        recipe: `Objective.recipe` of the one whose state is loaded next; None or empty: a new one.

    Raises:
        ConfigError: for an unknown name, or an option that this objective does not have.
    """
    objective, options = _chosen(config, phase)
    return objective(model, config.model, options, **({"recipe": recipe} if recipe else {}))


def passes_of(config: PretrainConfig, phase: PhaseConfig | None = None) -> Passes:
    """How often the objective of `phase` (None: the run's) runs towers over a pair; nothing is built.

    Raises:
        ConfigError: as `build_objective`.
    """
    objective, options = _chosen(config, phase)
    return objective.passes(options)


def caption_reader(config: PretrainConfig) -> str:
    """The first phase whose objective embeds texts, for messages; empty: none does, and images need no captions.

    Raises:
        ConfigError: as `build_objective`.
    """
    for phase in config.phases:
        passes = passes_of(config, phase)
        if passes.texts or passes.teacher_texts:
            return f"phase {phase.name} ({config.objective_of(phase).name})"
    return ""


def _chosen(config: PretrainConfig, phase: PhaseConfig | None) -> tuple[type[Objective], Any]:
    chosen = config.objective_of(phase) if phase else config.objective
    if chosen.name not in OBJECTIVES:
        raise ConfigError(f"objective.name is {chosen.name!r}: one of {', '.join(OBJECTIVES)}")
    objective, options = OBJECTIVES[chosen.name]
    return objective, options_from_dict(options, chosen.options, "objective.options")
