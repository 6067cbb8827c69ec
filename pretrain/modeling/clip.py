"""The two towers: a timm vision transformer (average pooling unless asked otherwise) and open_clip's text transformer.

The object is open_clip's own `CustomTextCLIP`, so that a checkpoint of ours is a checkpoint of everyone's. This file
builds it, and changes its image size and text length between phases.
"""

import timm
import torch
from open_clip import CustomTextCLIP
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pretrain.config import ConfigError, ImageTowerConfig, ModelConfig
from pretrain.modeling.position_embedding import resample_grid


def open_clip_config(config: ModelConfig) -> dict:
    """The `model_cfg` part of `open_clip_config.json` for these towers."""
    return {
        "embed_dim": config.embed_dim,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": config.image.timm_model,
            "timm_model_pretrained": False,
            "timm_pool": config.image.pool,  # "" keeps the timm model's own
            "timm_proj": "linear",
            "image_size": native_image_size(config.image.timm_model),
        },
        "text_cfg": {
            "context_length": config.text.context_length,
            "vocab_size": config.text.vocab_size,
            "width": config.text.width,
            "heads": config.text.heads,
            "layers": config.text.layers,
        },
    }


def native_image_size(timm_model: str) -> int:
    """The image size that timm builds a model with, and so the size of its position table in a checkpoint.

    Raises:
        ConfigError: if timm does not know the name (the message lists near ones).
    """
    default = timm.models.get_pretrained_cfg(timm_model) if timm.is_model(timm_model) else None
    if default is None:
        near = timm.list_models(f"*{timm_model.split('_')[1] if '_' in timm_model else timm_model}*gap*")[:5]
        raise ConfigError(
            f"model.image.timm_model: timm has no model {timm_model!r}; near ones: {', '.join(near) or '-'}"
        )
    return default.input_size[-1]


def build_model(config: ModelConfig) -> CustomTextCLIP:
    """Freshly initialised towers.

    Raises:
        ConfigError: if the image tower is not a plain vision transformer that averages over its patch tokens, or, with
            `pool` "token", has a class token.
    """
    model = construct_towers(config)
    trunk = model.visual.trunk
    plain = isinstance(trunk, VisionTransformer)
    averages = plain and trunk.global_pool == "avg" and not trunk.pool_include_prefix
    # A class token must be asked for: RECLIP averages, and the detector reads most out of towers that do.
    if not averages and not (plain and config.image.pool == "token" and trunk.cls_token is not None):
        raise ConfigError(_no_such_pooling(config.image))
    if config.image.layer_scale is not None:
        # timm's small value suits very deep towers; a shallow one trained from scratch hardly moves with it.
        for name, parameter in trunk.named_parameters():
            if name.endswith((".ls1.gamma", ".ls2.gamma")):
                nn.init.constant_(parameter, config.image.layer_scale)
    return model


def construct_towers(config: ModelConfig) -> CustomTextCLIP:
    """open_clip's object, on the default device (which may be "meta"), whatever its image tower is.

    Raises:
        ConfigError: if timm does not know the image tower, or it cannot pool as asked.
    """
    definition = open_clip_config(config)
    # On the CPU, also where the towers are to have no memory (the meta device).
    logit_scale = torch.tensor(config.init_temperature, device="cpu").reciprocal().log().item()
    towers = {name: definition[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
    try:
        return CustomTextCLIP(**towers, init_logit_scale=logit_scale)
    except AssertionError as error:
        if "pool" not in str(error).lower():
            raise
        raise ConfigError(_no_such_pooling(config.image)) from error


def _no_such_pooling(config: ImageTowerConfig) -> str:
    if config.pool == "token":
        return (
            f"model.image.pool is token, but {config.timm_model} is not a plain vision transformer with a class token: "
            "use one (for example vit_base_patch16_224), or another pooling"
        )
    return (
        f"model.image.timm_model: {config.timm_model} is not an average-pooled vision transformer; timm's names for "
        "those contain `_gap_` (for example vit_base_patch16_siglip_gap_224), and model.image.pool=avg makes one of a "
        "model with a class token, which model.image.pool=token keeps"
    )


def set_image_size(model: CustomTextCLIP, size: int) -> None:
    """Make the image tower take `size`-pixel squares: its position table is resampled, nothing else changes.

    The table becomes a new parameter, so an optimiser must be made afterwards.

    Raises:
        ValueError: if the size is not a multiple of the patch size.
    """
    trunk = model.visual.trunk
    patch = trunk.patch_embed.patch_size[0]
    if size < 1 or size % patch:
        raise ValueError(
            f"image_size {size} is not a multiple of the patch size {patch}: use {size // patch * patch or patch}"
        )
    prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    table = trunk.pos_embed.detach()
    # On the CPU: XLA has no kernel for it, and a table is small. One without memory has nothing to move.
    table = resample_grid(table if table.is_meta else table.cpu(), size // patch, prefix).to(table.device)
    trunk.pos_embed = nn.Parameter(table.clone(), requires_grad=trunk.pos_embed.requires_grad)
    trunk.patch_embed.set_input_size(img_size=size)
    model.visual.image_size = (size, size)


def set_context_length(model: CustomTextCLIP, length: int) -> None:
    """Make the text tower take token rows of `length`: it uses the first rows of its position table.

    Raises:
        ValueError: if the table is shorter than `length`.
    """
    text = model.text
    rows = text.positional_embedding.shape[0]
    if length > rows:
        raise ValueError(f"context_length {length} exceeds the text tower's {rows}: raise model.text.context_length")
    text.context_length = model.context_length = length
    device = text.positional_embedding.device
    text.attn_mask = torch.full((length, length), float("-inf"), device=device).triu_(1)  # causal, as open_clip's
