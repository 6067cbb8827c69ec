"""open_clip's own vision transformer as a timm trunk with a head: one form for every image tower.

Published models hold their towers in either class. What works on tokens (the detector's backbone, a teacher of patch
features) is written for timm's, and converts the other one here.
"""

import open_clip
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn


class PlainTower(nn.Module):
    """An image tower in the form of open_clip's `TimmModel`: a timm trunk, then a head into the joint space.

    Contract: images (B, 3, H, W) normalised, at the tower's present size -> (B, E), not normalised.
    """

    def __init__(self, trunk: VisionTransformer, image_size: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Identity()  # the projection is the trunk's own head
        self.image_size = (image_size, image_size)

    def set_input_size(self, image_size: int) -> None:
        """Resample the positions for square pictures of another size."""
        self.image_size = (image_size, image_size)
        self.trunk.set_input_size(image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed pictures."""
        return self.head(self.trunk(images))


def plain_tower(visual: nn.Module) -> nn.Module:
    """Any image tower as one with a timm `trunk` and a `head`.

    Args:
        visual: `visual` of an open_clip model: a `TimmModel` (given back as it is), or open_clip's own
            VisionTransformer, as OpenAI's and most published ViTs are (converted; its weights are copied).

    Raises:
        ValueError: another kind of tower, or one whose blocks or pooling timm does not have.
    """
    if hasattr(visual, "trunk"):
        return visual
    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        raise ValueError(
            f"the image tower is a {type(visual).__name__}, but only a vision transformer, open_clip's own or a timm "
            "one, can be taken apart into tokens; choose another image-text model"
        )
    _check_convertible(visual)
    block = visual.transformer.resblocks[0]
    layer_scale = getattr(block.ls_1, "gamma", None)
    trunk = VisionTransformer(
        img_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        num_classes=visual.output_dim,
        global_pool={"tok": "token", "avg": "avg"}[visual.pool_type],
        embed_dim=visual.transformer.width,
        depth=visual.transformer.layers,
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.c_fc.out_features / visual.transformer.width,
        init_values=None if layer_scale is None else 1.0,
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        fc_norm=visual.final_ln_after_pool,
        norm_layer=lambda width, **options: nn.LayerNorm(width, eps=block.ln_1.eps, **options),
        act_layer=type(block.mlp.gelu),
        weight_init="skip",
    )
    if trunk.patch_embed.proj.bias is not None:  # open_clip's patch embedding never has one
        trunk.patch_embed.proj.bias = None
    state = {f"visual.{name.replace('ls_', 'ls')}": value for name, value in visual.state_dict().items()}
    weights = checkpoint_filter_fn(state, trunk)
    if visual.final_ln_after_pool:
        weights = {f"fc_{name}" if name.startswith("norm.") else name: value for name, value in weights.items()}
    trunk.load_state_dict(weights)
    return PlainTower(trunk.train(visual.training), visual.image_size[0])


def _check_convertible(visual: nn.Module) -> None:
    """Refuse what timm's blocks cannot express."""
    kinds = {type(block).__name__ for block in visual.transformer.resblocks}
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        reason = "pools by attention or not at all"
    elif kinds != {"ResidualAttentionBlock"}:
        reason = f"has blocks of kind {', '.join(sorted(kinds))}"
    elif visual.image_size[0] != visual.image_size[1] or visual.patch_size[0] != visual.patch_size[1]:
        reason = f"takes pictures of {visual.image_size} with patches of {visual.patch_size}, which are not square"
    else:
        return
    raise ValueError(f"open_clip's image tower {reason}, which timm's does not express; choose a plain ViT")
