"""The optimiser of a phase, from timm's factory (which finds torch's and timm's by name)."""

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from pretrain.config import OptimConfig
from pretrain.engine.device import Device

_FUSED = ("adam", "adamw", "sgd")  # torch's own, which have a one-kernel CUDA form


def build_optimizer(module: nn.Module, optim: OptimConfig, device: Device) -> torch.optim.Optimizer:
    """An optimiser over the module's trainable parameters; biases, norms and other vectors are not decayed.

    The learning rate is 0 here: the schedule sets it before every step.
    """
    options = dict(optim.options)
    if optim.betas:
        options["betas"] = tuple(optim.betas)
    if device.kind == "cuda" and optim.name in _FUSED:
        options.setdefault("fused", True)
    return create_optimizer_v2(
        module, opt=optim.name, lr=0.0, weight_decay=optim.weight_decay, filter_bias_and_bn=True, **options
    )
