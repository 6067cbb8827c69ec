"""Building blocks that configs name: data loaders, optimiser, learning-rate schedule. Nothing here trains.

Plain functions with plain arguments, so that a LazyConfig holds numbers and names only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.data import DatasetFromList, build_detection_test_loader, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.solver import WarmupParamScheduler
from detectron2.utils import comm
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
)
from omegaconf import OmegaConf
from torch import nn

from ovd.data.lvis import load_lvis
from ovd.data.mapper import OpenVocabularyMapper
from ovd.data.mixing import repeat_factors
from ovd.engine.loader import PositionSampler, SeededDataset
from pretrain.config import ConfigError

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.RMSNorm)
# Learned inputs of a tower, not weights that multiply anything: position tables, class and register tokens.
_INPUTS = ("pos_embed", "prefix_tokens", "cls_token", "reg_token", "positional_embedding", "class_embedding")


def build_train_loader(
    annotations: str,
    image_root: str,
    mapper: OpenVocabularyMapper,
    batch_size: int,
    workers: int = 2,
    repeat_threshold: float = 0.0,
    seed: int = 0,
    start_step: int = 0,
    shares: Sequence[float] = (),
) -> Any:
    """Endless batches of mapped pictures; the same ones from the same seed, however many workers there are.

    Args:
        annotations: LVIS file; its categories must be the ones to train on.
        image_root: what file names are relative to.
        batch_size: pictures a step, over all processes.
        repeat_threshold: LVIS repeat-factor sampling: pictures with classes rarer than this share are repeated (the
            LVIS paper uses 0.001); 0 samples uniformly.
        start_step: first step to give batches for; those before it were trained on already.
        shares: of the pictures, by their "source" in a file made by `ovd.data.mixing.merge`; empty: all pictures alike.

    Raises:
        ConfigError: the batch cannot be shared equally by the processes, or both shares and repeats are asked for.
    """
    world = comm.get_world_size()
    if batch_size < 1 or batch_size % world:
        raise ConfigError(f"a batch of {batch_size} cannot be shared equally by {world} processes: use a multiple")
    dicts, _ = load_lvis(annotations, image_root)
    if shares and repeat_threshold > 0:
        raise ConfigError(
            "repeat_threshold and shares both say how often a picture is shown: set one of them to 0 or []"
        )
    if shares:
        factors = torch.as_tensor(repeat_factors([d.get("source", 0) for d in dicts], list(shares)))
        sampler = RepeatFactorTrainingSampler(factors, seed=seed)
    elif repeat_threshold > 0:
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, repeat_threshold)
        sampler = RepeatFactorTrainingSampler(factors, seed=seed)
    else:
        sampler = TrainingSampler(len(dicts), seed=seed)
    return build_detection_train_loader(
        SeededDataset(DatasetFromList(dicts, copy=False), mapper, seed),
        mapper=None,
        sampler=PositionSampler(sampler, start=start_step * (batch_size // world)),
        total_batch_size=batch_size,
        num_workers=workers,
        aspect_ratio_grouping=False,
    )


def build_test_loader(
    annotations: str, image_root: str, mapper: OpenVocabularyMapper, batch_size: int = 1, workers: int = 1
) -> Any:
    """Every picture of an LVIS file once, in order."""
    dicts, _ = load_lvis(annotations, image_root)
    return build_detection_test_loader(dicts, mapper=mapper, batch_size=batch_size, num_workers=workers)


def scale_lr(lr: float, reference_batch: int, batch_size: int) -> float:
    """Learning rate for another batch size: in proportion (Goyal et al., "Accurate, Large Minibatch SGD", 2017)."""
    _check_batches(reference_batch, batch_size)
    return lr * batch_size / reference_batch


def scale_steps(steps: int, reference_batch: int, batch_size: int) -> int:
    """Steps that see as many pictures at another batch size, rounded up; warm-up steps scale like all others."""
    _check_batches(reference_batch, batch_size)
    return -(-steps * reference_batch // batch_size)


def _check_batches(reference_batch: int, batch_size: int) -> None:
    if reference_batch < 1 or batch_size < 1:
        raise ConfigError(f"batch sizes {reference_batch} and {batch_size}: both must be at least 1")


# In a config: "${scale_lr:0.18,256,${train.batch_size}}"; whoever overrides the field gives a number and is not scaled.
OmegaConf.register_new_resolver("scale_lr", scale_lr, replace=True)
OmegaConf.register_new_resolver("scale_steps", scale_steps, replace=True)


def parameter_groups(
    model: nn.Module, lr: float, backbone_lr_factor: float, weight_decay: float, decay_backbone: bool = True
) -> list[dict[str, Any]]:
    """Every trained parameter in one group: a lower rate for the pretrained image tower; no decay on vectors.

    Args:
        backbone_lr_factor: factor on the rate of `backbone.net` (RECLIP's family: 0.1 to 0.6).
        weight_decay: not for norms, biases and other vectors, position tables, class and register tokens.
        decay_backbone: whether the tower's matrices decay.
    """
    undecayed = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tower = name.startswith("backbone.net.")
        plain = parameter.ndim <= 1 or id(parameter) in undecayed or name.endswith(_INPUTS)
        plain = plain or (tower and not decay_backbone)
        groups.setdefault((tower, plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * (backbone_lr_factor if tower else 1.0),
            "weight_decay": 0.0 if plain else weight_decay,
        }
        for (tower, plain), parameters in groups.items()
    ]


def build_optimizer(
    model: nn.Module,
    lr: float,
    backbone_lr_factor: float = 1.0,
    weight_decay: float = 0.05,
    betas: tuple = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, lr, backbone_lr_factor, weight_decay), betas=tuple(betas))


def build_sgd(
    model: nn.Module,
    lr: float,
    backbone_lr_factor: float = 1.0,
    weight_decay: float = 1e-4,
    momentum: float = 0.9,
) -> torch.optim.SGD:
    """SGD with momentum over `parameter_groups`; the image tower does not decay (F-VLM's and DITO's setting)."""
    groups = parameter_groups(model, lr, backbone_lr_factor, weight_decay, decay_backbone=False)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def warmup_steps(
    max_iter: int,
    warmup_iters: int,
    warmup_factor: float = 0.01,
    milestones: tuple = (0.8, 0.9, 0.95),
    gamma: float = 0.1,
) -> WarmupParamScheduler:
    """Multiplier of the learning rate: linear warm-up, then times `gamma` at each share of the run in `milestones`."""
    values = [gamma**i for i in range(len(milestones) + 1)]
    steps = MultiStepParamScheduler(values, milestones=[max_iter * m for m in milestones], num_updates=max_iter)
    return WarmupParamScheduler(steps, warmup_factor, min(0.5, warmup_iters / max_iter))


def warmup_cosine(max_iter: int, warmup_iters: int) -> CompositeParamScheduler:
    """Multiplier of the learning rate: linear from 0.01 to 1, then a cosine to 0."""
    share = min(0.5, warmup_iters / max_iter)  # a run shorter than its warm-up still decays
    return CompositeParamScheduler(
        [LinearParamScheduler(0.01, 1.0), CosineParamScheduler(1.0, 0.0)],
        interval_scaling=["rescaled", "rescaled"],
        lengths=[share, 1 - share],
    )
