"""What happens to objectives between phases, and a look at all phases before the first begins."""

import warnings

import torch

from pretrain.config import ConfigError, PretrainConfig
from pretrain.engine.device import Device
from pretrain.engine.optim import build_optimizer, check_splittable
from pretrain.engine.processes import Processes
from pretrain.engine.step import check_batch
from pretrain.modeling.clip import build_model
from pretrain.objectives import Objective, build_objective


def rehearse_phase(config: PretrainConfig, index: int, device: Device, processes: Processes) -> Objective:
    """Do all that could fail when a phase begins, on modules without memory; returns the objective, to be thrown away.

    Raises:
        ConfigError: for a phase that cannot run.
    """
    phase, optim = config.phases[index], config.optim_of(config.phases[index])
    objective = _without_memory(config, index)
    try:
        objective.enter_phase(phase)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"phases[{index}] cannot begin: {error}") from error
    check_batch(objective, phase, device, processes)
    build_optimizer(objective, optim, device)
    if config.run.parallel == "fsdp":
        check_splittable(optim)
    return objective


def _without_memory(config: PretrainConfig, index: int) -> Objective:
    """An objective on the meta device; on the CPU, where its constructor needs numbers."""
    phase = config.phases[index]
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weights that are copied into tensors without memory are lost, of course
            return build_objective(config, build_model(config.model), phase)
    except RuntimeError:  # of any kind: what is really wrong with the phase is raised again here
        return build_objective(config, build_model(config.model), phase)


def carry_over(before: dict[str, torch.Tensor], objective: Objective) -> list[str]:
    """Give an objective the state that one of the same name had, where names and shapes are the same.

    Args:
        before: the state dictionary of the phase before.
        objective: of the next phase, changed in place. What it lists in `not_carried` and not in
            `carried` stays as its options made it.

    Returns:
        What starts afresh, by the names of whole modules where all of one does.
    """
    own = {
        n: v
        for n, v in objective.state_dict().items()
        if n in objective.carried or not n.startswith(objective.not_carried)
    }
    kept = {n: before[n] for n, v in own.items() if n in before and before[n].shape == v.shape}
    objective.load_state_dict(kept, strict=False)
    return list(dict.fromkeys(_module(name, kept) for name in own if name not in kept))


def _module(name: str, kept: dict[str, torch.Tensor]) -> str:
    """The shortest prefix of a name that nothing kept has."""
    parts = name.split(".")
    prefixes = (".".join(parts[: count + 1]) for count in range(len(parts)))
    return next((p for p in prefixes if p not in kept and not any(n.startswith(f"{p}.") for n in kept)), name)
