"""Pretraining objectives by name."""

from open_clip import CustomTextCLIP

from pretrain.config import ConfigError, PretrainConfig, options_from_dict
from pretrain.objectives.base import Objective
from pretrain.objectives.focal import FocalContrastive, FocalOptions
from pretrain.objectives.info_nce import InfoNCE, InfoNCEOptions

OBJECTIVES = {"info_nce": (InfoNCE, InfoNCEOptions), "focal": (FocalContrastive, FocalOptions)}


def build_objective(config: PretrainConfig, model: CustomTextCLIP) -> Objective:
    """The objective that `config.objective` names, owning `model`.

    Raises:
        ConfigError: for an unknown name, or an option that this objective does not have.
    """
    chosen = config.objective
    if chosen.name not in OBJECTIVES:
        raise ConfigError(f"objective.name is {chosen.name!r}: one of {', '.join(OBJECTIVES)}")
    objective, options = OBJECTIVES[chosen.name]
    return objective(model, config.model, options_from_dict(options, chosen.options, "objective.options"))
