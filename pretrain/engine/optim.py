"""The optimiser of a phase, from timm's factory (which finds torch's and timm's by name)."""

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.tensor import DTensor

from pretrain.config import ConfigError, OptimConfig
from pretrain.engine.device import Device

_FUSED = ("adam", "adamw", "sgd")  # torch's own, which have a one-kernel form
_CORRECTED = ("adam", "adamw")


def build_optimizer(module: nn.Module, optim: OptimConfig, device: Device) -> torch.optim.Optimizer:
    """An optimiser over the module's trainable parameters; biases, norms and other vectors are not decayed.

    The learning rate is 0 here: the schedule sets it before every step.

    Raises:
        ConfigError: if the optimiser does not exist, or does not take an option (another one's may have stayed).
    """
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
        options.setdefault("capturable", True)
    try:
        return create_optimizer_v2(
            module, opt=optim.name, lr=0.0, weight_decay=optim.weight_decay, filter_bias_and_bn=True, **options
        )
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:  # timm's and torch's have many types
        reason = " ".join(str(error).split())[:200]
        remedy = "optim.options={} clears what another optimiser took" if optim.options else "see timm.optim"
        raise ConfigError(f"optim: {optim.name} cannot be used ({reason}): {remedy}") from error
