"""Towers too large for one device: FSDP2 (torch's `fully_shard`), and the way back to plain tensors.

Everything that leaves a phase is plain: a state saved by sharded processes is the state that one process would have
saved, so a run may be resumed on another number of devices, and any rank can evaluate.
"""

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from pretrain.objectives import Objective

_PER_DEVICE = ("fused", "capturable", "foreach")  # options of torch's optimisers that a saved state also carries


def shard(objective: Objective) -> None:
    """Spread parameters, gradients and optimiser state over all processes, in place, one group per block.

    Scalars (the temperature) stay whole on every process: `fully_shard` cannot split them.
    """
    scalars = {p for p in objective.parameters() if p.ndim == 0}
    for module in objective.modules():
        if isinstance(module, (Block, ResidualAttentionBlock)):
            fully_shard(module)
    fully_shard(objective, ignored_params=scalars)
    for name in ("encode", "loss"):  # the step calls them directly when it works in pieces
        register_fsdp_forward_method(objective, name)


def plain(value: Any) -> Any:
    """The same nest of dictionaries and lists with whole tensors on the CPU; every process must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return value


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a plain optimiser state, cut as the parameters are; how a device computes the update stays as it is here."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    split = {}
    for index, values in state["state"].items():
        parameter = parameters[index]
        split[index] = {name: _cut_as(parameter, value) for name, value in values.items()}
    groups = [
        {**saved, **{name: here[name] for name in _PER_DEVICE if name in here}}
        for saved, here in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": split, "param_groups": groups})


def _cut_as(parameter: torch.Tensor, value: Any) -> Any:
    """A value of the optimiser's state as the optimiser itself would have it beside this parameter.

    What has the parameter's shape is split like it. What has another (Adafactor's factored moments, R x 1 and 1 x C) is
    whole on every process, as torch makes it from a split gradient, but must be of the type that computes with split
    tensors. Numbers (step counts) stay as they are.
    """
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    whole = [Replicate()] * parameter.device_mesh.ndim
    placements = parameter.placements if value.shape == parameter.shape else whole
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, placements)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that FSDP splits (and whose gradients it averages), and the others."""
    parameters = list(module.parameters())
    return [p for p in parameters if isinstance(p, DTensor)], [p for p in parameters if not isinstance(p, DTensor)]
