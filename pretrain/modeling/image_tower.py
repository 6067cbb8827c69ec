"""The image tower in steps, for training on some of the patches or with other positions than its own table's.

The plain forward pass stays timm's and open_clip's. Here, patches are dropped after their positions are added and
before the first block (FLIP, arXiv 2212.00794, section 3), so that the blocks never see them; and a position for each
patch can be given (RO-ViT's crops, `cropped_positions`). Patches can also be replaced by a mask token, and tokens read
in the joint space one by one (UTA, arXiv 2405.19009). Which patches to keep is drawn in `masking`.
"""

import torch
from open_clip.timm_model import TimmModel
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def encode_image(
    visual: TimmModel,
    images: torch.Tensor,
    keep: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Image features before normalisation; with nothing kept or replaced, `visual(images)` itself.

    Args:
        visual: open_clip's image tower around a timm vision transformer.
        images: (B, 3, H, W), normalised, at the tower's present size.
        keep: (B, K) int64 indices of the patches to encode; None: all. An average is over these only.
        positions: (B, N, D) or (1, N, D) for the N patches, in place of the tower's table; None: the table.

    Returns:
        (B, E), E dimensions of the joint space.

    Raises:
        ValueError: as `encode_tokens`.
    """
    if keep is None and positions is None:
        return visual(images)
    return visual.head(pool(visual.trunk, encode_tokens(visual.trunk, images, keep, positions)))


def encode_image_and_patches(
    visual: nn.Module,
    images: torch.Tensor,
    keep: torch.Tensor | None = None,
    masked: torch.Tensor | None = None,
    mask_token: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The image's embedding and those of its patches, before normalisation.

    Args:
        visual: an image tower with a timm `trunk` and a `head` (open_clip's `TimmModel`, or `PlainTower`).
        images: (B, 3, H, W), normalised, at the tower's present size.
        keep: (B, K) int64 indices of the patches to encode; None: all N. An average is over these only.
        masked: (B, N) bool, patches that the mask token stands for; None: none.
        mask_token: (D,), with `masked`.

    Returns:
        The image (B, E), pooled as the tower pools; its patches (B, K, E), without class and register tokens.

    Raises:
        ValueError: as `encode_tokens` and `project_tokens`.
    """
    tokens = encode_tokens(visual.trunk, images, keep, masked=masked, mask_token=mask_token)
    patches = project_tokens(visual, tokens[:, visual.trunk.num_prefix_tokens :])
    return visual.head(pool(visual.trunk, tokens)), patches


def project_tokens(visual: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, E): tokens (B, T, D) of `encode_tokens` in the joint space, each as if it were the pooled one.

    Raises:
        ValueError: for a tower that pools by attention, whose single tokens mean nothing there.
    """
    trunk = visual.trunk
    if trunk.attn_pool is not None or hasattr(visual.head, "pool"):
        raise ValueError(
            "the image tower pools by attention, so that its single tokens are not in the joint space: use one that "
            "averages or has a class token"
        )
    return visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(tokens))))


def encode_tokens(
    trunk: VisionTransformer,
    images: torch.Tensor,
    keep: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    masked: torch.Tensor | None = None,
    mask_token: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens after the last block and the final norm, those of dropped patches left out.

    Gradient checkpointing and dropout are the trunk's own. The parts of the trunk are called one by one: a wrapper that
    acts in the trunk's own `forward` (a sharded trunk, as opposed to sharded blocks) does not act here.

    Args:
        trunk: a timm vision transformer with a table of absolute positions.
        images: (B, 3, H, W), normalised.
        keep: (B, K) int64 indices of the patches to encode, in the order they shall have; None: all N.
        positions: (B, N, D) or (1, N, D) for the patches; class and register tokens keep their own.
        masked: (B, N) bool, patches whose content, not position, the mask token replaces; None: none.
        mask_token: (D,), with `masked`.

    Returns:
        (B, P + K, D), the P class and register tokens first.

    Raises:
        ValueError: for a trunk of another kind, or positions for another number of patches.
    """
    if keep is None and positions is None and masked is None:
        return trunk.forward_features(images)
    tokens = trunk.patch_embed(images)
    grid = tokens.shape[1:3] if tokens.ndim == 4 else trunk.patch_embed.grid_size
    tokens = tokens.flatten(1, -2)  # (B, N, D); timm leaves (B, H, W, D) where it takes images of any size
    prefix, table = _positions(trunk, tuple(grid))
    if positions is not None and positions.shape[1:] != tokens.shape[1:]:
        raise ValueError(
            f"positions of shape {tuple(positions.shape)} do not fit {tokens.shape[1]} patches of {tokens.shape[2]} "
            "dimensions: make them for the trunk's present grid"
        )
    if masked is not None:
        tokens = torch.where(masked.unsqueeze(-1), mask_token.to(tokens.dtype), tokens)
    tokens = tokens + (table if positions is None else positions)
    if keep is not None:
        tokens = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    if prefix is not None:
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
    tokens = trunk.norm_pre(trunk.patch_drop(trunk.pos_drop(tokens)))
    if trunk.grad_checkpointing:
        tokens = checkpoint_seq(trunk.blocks, tokens)
    else:
        tokens = trunk.blocks(tokens)
    return trunk.norm(tokens)


def pool(trunk: VisionTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """(B, D): the tokens (B, P + K, D) as timm's head pools them (average, class token or attention) and norms that."""
    return trunk.forward_head(tokens)


def patch_positions(trunk: VisionTransformer) -> torch.Tensor:
    """(1, N, D): the part of the position table that belongs to patches, at the trunk's present grid.

    Raises:
        ValueError: for a trunk without such a table.
    """
    return _positions(trunk, tuple(trunk.patch_embed.grid_size))[1]


def _positions(trunk: VisionTransformer, grid: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Prefix tokens (1, P, D) with their positions added, or None; and the positions of the patches (1, N, D)."""
    if not isinstance(trunk, VisionTransformer) or type(trunk)._pos_embed is not VisionTransformer._pos_embed:
        raise ValueError(
            f"{type(trunk).__name__} arranges its tokens in its own way: patches can be dropped, or their positions "
            "replaced, in timm's plain VisionTransformer only"
        )
    if trunk.pos_embed is None:
        raise ValueError("the image tower has no table of positions: use one with learned absolute positions")
    parts = [part for part in (trunk.cls_token, trunk.reg_token) if part is not None]
    prefix = torch.cat(parts, dim=1) if parts else None
    table = trunk.pos_embed
    rows = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    if grid != tuple(trunk.patch_embed.grid_size):
        table = resample_abs_pos_embed(table, list(grid), list(trunk.patch_embed.grid_size), num_prefix_tokens=rows)
    if rows:
        prefix = prefix + table[:, :rows]
    return prefix, table[:, rows:]
