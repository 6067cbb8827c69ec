"""Pretraining objectives by name."""

from open_clip import CustomTextCLIP

from pretrain.config import ConfigError, PretrainConfig
from pretrain.objectives.base import Objective
from pretrain.objectives.info_nce import InfoNCE

OBJECTIVES = {"info_nce": InfoNCE}


def build_objective(config: PretrainConfig, model: CustomTextCLIP) -> Objective:
    """The objective that `config.objective` names, owning `model`.

    Raises:
        ConfigError: for an unknown name.
    """
    if config.objective not in OBJECTIVES:
        raise ConfigError(f"objective is {config.objective!r}: one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[config.objective](model, config.model)
