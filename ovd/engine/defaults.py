"""Building blocks that configs name: data loaders, optimiser, learning-rate schedule. Nothing here trains.

Plain functions with plain arguments, so that a LazyConfig holds numbers and names only.
"""

from typing import Any

import torch
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler, LinearParamScheduler
from torch import nn

from ovd.data.lvis import load_lvis
from ovd.data.mapper import OpenVocabularyMapper

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.RMSNorm)


def build_train_loader(
    annotations: str,
    image_root: str,
    mapper: OpenVocabularyMapper,
    batch_size: int,
    workers: int = 2,
    repeat_threshold: float = 0.0,
    seed: int = 0,
) -> Any:
    """Endless batches of mapped pictures.

    Args:
        annotations: LVIS file; its categories must be the ones to train on.
        image_root: what file names are relative to.
        batch_size: pictures a step, over all processes.
        repeat_threshold: LVIS repeat-factor sampling: pictures with classes rarer than this share are repeated (the
            LVIS paper uses 0.001); 0 samples uniformly.
    """
    dicts, _ = load_lvis(annotations, image_root)
    if repeat_threshold > 0:
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, repeat_threshold)
        sampler = RepeatFactorTrainingSampler(factors, seed=seed)
    else:
        sampler = TrainingSampler(len(dicts), seed=seed)
    return build_detection_train_loader(
        dicts,
        mapper=mapper,
        sampler=sampler,
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


def build_optimizer(
    model: nn.Module,
    lr: float,
    backbone_lr_factor: float = 1.0,
    weight_decay: float = 0.05,
    betas: tuple = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW; a lower rate for the pretrained image tower; no decay on norms, biases, positions and other vectors.

    Args:
        backbone_lr_factor: factor on the rate of `backbone.net` (RECLIP's family: 0.1 to 0.6).
    """
    undecayed = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or id(parameter) in undecayed or name.endswith(("pos_embed", "reg_token"))
        groups.setdefault((name.startswith("backbone.net."), plain), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": lr * (backbone_lr_factor if tower else 1.0),
                "weight_decay": 0.0 if plain else weight_decay,
            }
            for (tower, plain), parameters in groups.items()
        ],
        betas=tuple(betas),
    )


def warmup_cosine(max_iter: int, warmup_iters: int) -> CompositeParamScheduler:
    """Multiplier of the learning rate: linear from 0.01 to 1, then a cosine to 0."""
    share = min(0.5, warmup_iters / max_iter)  # a run shorter than its warm-up still decays
    return CompositeParamScheduler(
        [LinearParamScheduler(0.01, 1.0), CosineParamScheduler(1.0, 0.0)],
        interval_scaling=["rescaled", "rescaled"],
        lengths=[share, 1 - share],
    )
