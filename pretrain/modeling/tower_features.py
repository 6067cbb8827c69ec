"""What the two towers say before their last linear map, for heads of other losses; text blocks with dropout; images of
another size than the tower's.

`project_image` and `project_text` are the towers' own last maps: after them the features are the towers' outputs.
"""

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import nn

from pretrain.modeling.image_tower import encode_tokens, patch_positions, pool
from pretrain.modeling.position_embedding import resample_grid


def feature_widths(model: CustomTextCLIP) -> tuple[int, int]:
    """Dimensions of an image's and of a text's feature."""
    return model.visual.trunk.num_features, model.text.ln_final.normalized_shape[0]


def image_features(model: CustomTextCLIP, images: torch.Tensor, resampling: torch.Tensor | None = None) -> torch.Tensor:
    """Pooled features (B, W) of normalised images (B, 3, S, S).

    Args:
        model: the towers.
        images: of the image tower's present size, or of the size that `resampling` is for.
        resampling: from `position_resampling`; None: the tower's present size.
    """
    trunk = model.visual.trunk
    if resampling is None:
        return pool(trunk, encode_tokens(trunk, images))
    embed = trunk.patch_embed
    # The patch layer refuses another size than its own: its parts do not.
    tokens = embed.norm(embed.proj(images).flatten(2).transpose(1, 2))
    tokens = tokens + resampling @ patch_positions(trunk)
    prefix = [part for part in (trunk.cls_token, trunk.reg_token) if part is not None]
    if prefix:
        prefix_tokens = torch.cat(prefix, dim=1)
        if not trunk.no_embed_class:
            prefix_tokens = prefix_tokens + trunk.pos_embed[:, : trunk.num_prefix_tokens]
        tokens = torch.cat([prefix_tokens.expand(len(tokens), -1, -1), tokens], dim=1)
    tokens = trunk.norm(trunk.blocks(trunk.norm_pre(trunk.patch_drop(trunk.pos_drop(tokens)))))
    return pool(trunk, tokens)


def position_resampling(model: CustomTextCLIP, image_size: int) -> torch.Tensor:
    """(N', N): the matrix that makes positions for images of `image_size` from the tower's N patch positions.

    Resampling a table is linear in it, so a matrix does it on any device, and with a gradient.

    Raises:
        ValueError: if the size is not a multiple of the patch size.
    """
    embed = model.visual.trunk.patch_embed
    patch, tokens = embed.patch_size[0], embed.num_patches
    if image_size < 1 or image_size % patch:
        near = image_size // patch * patch or patch
        raise ValueError(f"image_size {image_size} is not a multiple of the patch size {patch}: use {near}")
    return resample_grid(torch.eye(tokens)[None], image_size // patch)[0]


def text_features(model: CustomTextCLIP, tokens: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """Pooled features (B, W) of token rows (B, L).

    Args:
        model: the towers.
        tokens: int64.
        dropout: share of the numbers that enter each block which are zeroed while the tower is in training mode.

    Raises:
        ValueError: for a text tower of another kind than open_clip's `TextTransformer` without a class token.
    """
    text = model.text
    if not isinstance(text, TextTransformer) or text.cls_emb is not None:
        raise ValueError(f"{type(text).__name__}: only open_clip's TextTransformer without a class token is supported")
    x, mask = text._embeds(tokens)
    if dropout > 0 and text.training:
        for block in text.transformer.resblocks:
            x = block(F.dropout(x, dropout), attn_mask=mask)
    else:
        x = text.transformer(x, attn_mask=mask)
    return text_global_pool(text.ln_final(x), tokens, text.pool_type, getattr(text, "eos_id", None))


def project_image(model: CustomTextCLIP, features: torch.Tensor) -> torch.Tensor:
    """(B, E): the image tower's last map."""
    return model.visual.head(features)


def project_text(model: CustomTextCLIP, features: torch.Tensor) -> torch.Tensor:
    """(B, E): the text tower's last map."""
    projection = model.text.text_projection
    return projection(features) if isinstance(projection, nn.Linear) else features @ projection
