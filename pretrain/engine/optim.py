"""The optimiser of a phase, from timm's factory (which finds torch's and timm's by name)."""

from collections.abc import Callable, Sequence

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.distributed.tensor import DTensor

from pretrain.config import ConfigError, OptimConfig
from pretrain.engine.device import Device

_FUSED = ("adam", "adamw", "sgd")  # torch's own, which have a one-kernel form
_CORRECTED = ("adam", "adamw")
# timm's that use operations torch does not have for split tensors (tried with torch 2.9 and timm 1.0.31).
_WHOLE_ONLY = ("adafactor", "cadafactor", "adamp", "cadamp", "sgdp", "csgdp", "kron", "kronc", "kronw")


def build_optimizer(module: nn.Module, optim: OptimConfig, device: Device) -> torch.optim.Optimizer:
    """An optimiser over the module's trainable parameters; biases, norms and other vectors are not decayed.

    The learning rate is 0 here: the schedule sets it before every step, times a group's `lr_scale` where it has one.

    Raises:
        ConfigError: for a layer decay outside 0–1, and if the optimiser does not exist, or does not take an option
            (another one's may have stayed) or cannot work with split parameters.
    """
    if not 0 < optim.layer_decay <= 1:
        raise ConfigError(
            f"optim.layer_decay is {optim.layer_decay}: above 0, at most 1 (the same rate for all blocks)"
        )
    if any(isinstance(p, DTensor) for p in module.parameters()):
        check_splittable(optim)
    options = dict(optim.options)
    if optim.betas:
        options["betas"] = tuple(optim.betas)
    # FSDP's split tensors and whole ones do not go into one kernel; the planner's have no memory at all.
    fusible = all(not isinstance(p, DTensor) and p.device.type in ("cpu", "cuda") for p in module.parameters())
    if fusible and optim.name in _FUSED:
        options.setdefault("fused", True)
    if device.kind == "xla" and optim.name in _CORRECTED:
        # Steps are counted on the device. Else the bias corrections are numbers in the program, and XLA makes constants
        # of ones: it would compile the step again when they round to 1 (with beta2 = 0.999 after 16,000 steps).
        # timm's LAMB has no such option: it is compiled again then, once for each of its two betas.
        options.setdefault("capturable", True)
    if optim.layer_decay < 1:
        options["param_group_fn"] = _layer_groups(optim, options.pop("fallback_list", ()))
    try:
        return create_optimizer_v2(
            module, opt=optim.name, lr=0.0, weight_decay=optim.weight_decay, filter_bias_and_bn=True, **options
        )
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:  # timm's and torch's have many types
        reason = " ".join(str(error).split())[:200]
        remedy = "optim.options={} clears what another optimiser took" if optim.options else "see timm.optim"
        raise ConfigError(f"optim: {optim.name} cannot be used ({reason}): {remedy}") from error


def check_splittable(optim: OptimConfig) -> None:
    """Raise ConfigError for an optimiser that would fail at its first step under `run.parallel=fsdp`."""
    if optim.name in _WHOLE_ONLY:
        raise ConfigError(
            f"optim.name is {optim.name}, which cannot update parameters that run.parallel=fsdp splits: use "
            "adafactorbv, lamb or adamw"
        )


def _layer_groups(optim: OptimConfig, fallback_list: Sequence[str]) -> Callable[[nn.Module], list[dict]]:
    """What splits a module's trainable parameters into groups whose rate falls towards the image tower's first layer.

    As in BEiT (arXiv 2106.08254, appendix): with L blocks the embedding has the rate decay ** (L + 1), block i of 1–L
    decay ** (L + 1 - i), the final norm and all that is not the image tower's trunk (projection, text tower,
    temperature) 1.
    """

    def split(module: nn.Module) -> list[dict]:
        trunks = [part for name, part in module.named_modules() if f".{name}".endswith(".visual.trunk")]
        layered = {id(p) for trunk in trunks for p in trunk.parameters()}
        # The groups of the full rate come first: theirs is the one that is logged.
        groups = [
            {**group, "params": [p for p in group["params"] if id(p) not in layered], "lr_scale": 1.0}
            for group in param_groups_weight_decay(module, optim.weight_decay, fallback_list=fallback_list)
        ]
        for trunk in trunks:  # a frozen one has no groups
            groups += param_groups_layer_decay(
                trunk, optim.weight_decay, fallback_list=fallback_list, layer_decay=optim.layer_decay
            )
        return [group for group in groups if group["params"]]

    return split
