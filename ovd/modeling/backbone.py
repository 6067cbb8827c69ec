"""The image tower of an image-text model as a detection backbone: windowed attention and a simple feature pyramid.

Source: ViTDet (section 3) as used by RO-ViT and DITO: windows in all blocks but four evenly spaced global ones,
position table resampled to the detection grid, strides 4 to 32 made from the last map. timm's own blocks are reused;
norms and MLPs act on each token alone, so a whole block may run window by window. Patches whose side is no power of two
are resampled to one that is, as in FlexiViT (Beyer et al., 2023, arXiv 2212.08013, section 3.4).
This file does not load checkpoints, convert towers of other kinds (`image_tower`), or have relative positions.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.utils import window_partition, window_unpartition
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from timm.layers import resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.modeling.position_embedding import resample_grid

FEATURE = "vit"


def global_block_indices(depth: int, count: int = 4) -> tuple[int, ...]:
    """Zero-based indices of `count` evenly spaced global blocks, the last included: 12 blocks give 2, 5, 8, 11."""
    count = min(count, depth)
    return tuple((i + 1) * depth // count - 1 for i in range(count))


def next_power_of_two(side: int) -> int:
    """The smallest power of two that is at least `side`: 14 gives 16, 16 stays."""
    return 1 << (side - 1).bit_length()


def resample_patches(embed: nn.Conv2d, side: int) -> nn.Conv2d:
    """A copy of a patch embedding for patches of another side.

    Its kernel is multiplied by the pseudo-inverse of bilinear resizing, which the detector's pictures are resized with
    too (and FlexiViT's): a patch that is enlarged so has the embedding that it had before.

    Args:
        embed: non-overlapping square patches, D x 3 x P x P.
        side: new P in pixels, at least the old one for the embeddings to stay.
    """
    copied = copy.deepcopy(embed)
    if side == embed.kernel_size[0]:
        return copied
    copied.weight = nn.Parameter(resample_patch_embed(embed.weight.detach(), [side, side], interpolation="bilinear"))
    copied.kernel_size = copied.stride = (side, side)
    return copied


class WindowedViT(Backbone):
    """A plain ViT that attends within windows, with global attention in a few blocks.

    Contract: images (B, 3, H, W) normalised with the image-text model's mean and std -> {"vit": (B, D, h, w)}, h and w
    the number of patches, rounded up. Prefix tokens (class or register) are copied into every window and their copies
    averaged after each windowed block. Padding, whether it fills a batch, a patch or a window, is masked out of all
    attention and comes out as zeros; it never changes the tokens of the picture. Positions are resampled for a square
    canvas of `image_size` (a larger picture gets its own larger canvas) and read from its top left corner, so they do
    not depend on what a picture is batched with.

    Args:
        trunk: timm VisionTransformer; its modules are copied, the trunk itself is left alone.
        image_size: side in pixels of the canvas that the detector is built for.
        window_size: side of a window in patches; 0 makes every block global.
        global_blocks: number of evenly spaced global blocks, or their zero-based indices.
        frozen: no gradients, evaluation mode always.
        gradient_checkpointing: compute activations again in the backward pass, saving memory.
        power_of_two_patches: resample patches of another side, as a pyramid needs it; the copy alone changes.
    """

    def __init__(
        self,
        trunk: VisionTransformer,
        image_size: int,
        window_size: int = 5,
        global_blocks: int | Sequence[int] = 4,
        frozen: bool = False,
        gradient_checkpointing: bool = False,
        power_of_two_patches: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(trunk, VisionTransformer) or trunk.pos_embed is None:
            raise ValueError(
                f"the image tower is a {type(trunk).__name__}, but the backbone needs a timm VisionTransformer with an "
                "absolute position table; choose such a tower for pretraining"
            )
        side = trunk.patch_embed.proj.kernel_size[0]
        side = next_power_of_two(side) if power_of_two_patches else side
        self.patch_embed = resample_patches(trunk.patch_embed.proj, side)
        self.patch_norm = copy.deepcopy(trunk.patch_embed.norm)
        self.pos_embed = nn.Parameter(trunk.pos_embed.detach().clone())
        prefix = [token.detach() for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        self.prefix_tokens = nn.Parameter(torch.cat(prefix, dim=1).clone()) if prefix else None
        # Whether the position table has rows for the prefix tokens (timm's no_embed_class says it has not).
        self.num_prefix_positions = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        self.norm_pre, self.blocks, self.norm = (copy.deepcopy(m) for m in (trunk.norm_pre, trunk.blocks, trunk.norm))
        self.patch_size = side
        self.image_size = image_size
        self.window_size = window_size
        depth = len(self.blocks)
        indices = global_block_indices(depth, global_blocks) if isinstance(global_blocks, int) else global_blocks
        self.global_blocks = frozenset(range(depth) if window_size == 0 else indices)
        self.frozen = frozen
        self.gradient_checkpointing = gradient_checkpointing
        self._out_features = [FEATURE]
        self._out_feature_strides = {FEATURE: self.patch_size}
        self._out_feature_channels = {FEATURE: trunk.embed_dim}
        self.requires_grad_(not frozen)
        self.train(self.training)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class and register tokens in front of the patch tokens."""
        return 0 if self.prefix_tokens is None else self.prefix_tokens.shape[1]

    def train(self, mode: bool = True) -> "WindowedViT":
        """Set training mode; a frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None) -> dict[str, Tensor]:
        """Compute the last feature map.

        Args:
            images: (B, 3, H, W) normalised pictures, padded on the right and bottom.
            image_sizes: B sizes (height, width) in pixels without the padding; None means no padding.

        Returns:
            {"vit": (B, D, h, w)} with zeros at patches that lie wholly in the padding.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return {FEATURE: self._forward(images, image_sizes)}

    def _forward(self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None) -> Tensor:
        patch, (height, width) = self.patch_size, images.shape[-2:]
        images = F.pad(images, (0, -width % patch, 0, -height % patch))
        grid = self.patch_norm(self.patch_embed(images).permute(0, 2, 3, 1))
        sizes = [(height, width)] * len(images) if image_sizes is None else image_sizes
        grid_sizes = [(-(-h // patch), -(-w // patch)) for h, w in sizes]
        positions, prefix_positions = self._positions(grid_sizes, grid.shape[1:3])
        grid = self.norm_pre(grid + positions)
        prefix = None
        if self.prefix_tokens is not None:
            prefix = self.norm_pre(self.prefix_tokens + prefix_positions).expand(len(grid), -1, -1)
        masks = _AttentionMasks(grid_sizes, grid.shape[1:3], self.window_size, self.num_prefix_tokens, grid.device)
        for index, block in enumerate(self.blocks):
            if index in self.global_blocks:
                prefix, grid = self._global_block(block, prefix, grid, masks)
            else:
                prefix, grid = self._windowed_block(block, prefix, grid, masks)
        grid = self.norm(grid)
        if masks.valid is not None:
            grid = grid * masks.valid[..., None]
        return grid.permute(0, 3, 1, 2).contiguous()

    def _positions(self, grid_sizes: list[tuple[int, int]], padded: tuple[int, int]) -> tuple[Tensor, Tensor | float]:
        """Position rows for the patches (1 or B, h, w, D) and for the prefix tokens (1, P, D), or 0 where none."""
        prefix_rows, canvases = self.num_prefix_positions, {}
        smallest = -(-self.image_size // self.patch_size)
        sides = [max(smallest, *size) for size in grid_sizes]
        for side in set(sides):
            table = resample_grid(self.pos_embed, side, num_prefix_tokens=prefix_rows)[:, prefix_rows:]
            table = table.reshape(1, side, side, -1)[:, : padded[0], : padded[1]]
            canvases[side] = F.pad(table, (0, 0, 0, padded[1] - table.shape[2], 0, padded[0] - table.shape[1]))
        rows = canvases[sides[0]] if len(canvases) == 1 else torch.cat([canvases[side] for side in sides])
        return rows, self.pos_embed[:, :prefix_rows] if prefix_rows else 0.0

    def _run(self, block: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, tokens, mask, use_reentrant=False)
        return block(tokens, attn_mask=mask)

    def _global_block(self, block: nn.Module, prefix: Tensor | None, grid: Tensor, masks: "_AttentionMasks"):
        batch, height, width, channels = grid.shape
        tokens = grid.reshape(batch, height * width, channels)
        tokens = tokens if prefix is None else torch.cat([prefix, tokens], dim=1)
        tokens = self._run(block, tokens, masks.whole)
        count = self.num_prefix_tokens
        grid = tokens[:, count:].reshape(batch, height, width, channels)
        return (None if prefix is None else tokens[:, :count]), grid

    def _windowed_block(self, block: nn.Module, prefix: Tensor | None, grid: Tensor, masks: "_AttentionMasks"):
        batch, height, width, channels = grid.shape
        windows, padded = window_partition(grid, self.window_size)
        per_image = len(windows) // batch
        tokens = windows.reshape(len(windows), -1, channels)
        if prefix is not None:
            tokens = torch.cat([prefix.repeat_interleave(per_image, dim=0), tokens], dim=1)
        tokens = self._run(block, tokens, masks.windows)
        count = self.num_prefix_tokens
        if prefix is not None:
            copies = tokens[:, :count].reshape(batch, per_image, count, channels)
            # Copies in windows of pure padding saw nothing of the picture and do not count.
            share = masks.window_share
            prefix = copies.mean(dim=1) if share is None else (copies * share[..., None, None]).sum(dim=1)
        return prefix, window_unpartition(tokens[:, count:], self.window_size, padded, (height, width))


class _AttentionMasks:
    """Which tokens are picture and which are padding, for global blocks and for windows; None where all are picture."""

    def __init__(
        self, grid_sizes: list[tuple[int, int]], padded: tuple[int, int], window: int, prefix: int, device: torch.device
    ) -> None:
        self.valid = self.whole = self.windows = self.window_share = None
        height, width = padded
        if any(size != (height, width) for size in grid_sizes):
            rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
            sizes = torch.tensor(grid_sizes, device=device)
            self.valid = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None, :]
            self.whole = self._mask(self.valid.flatten(1), prefix)
        if window and (self.valid is not None or height % window or width % window):
            valid = self.valid
            if valid is None:
                valid = torch.ones(len(grid_sizes), height, width, dtype=torch.bool, device=device)
            windows = window_partition(valid[..., None], window)[0].flatten(1)
            self.windows = self._mask(windows, prefix)
            occupied = windows.any(dim=1).reshape(len(grid_sizes), -1).float()
            self.window_share = occupied / occupied.sum(dim=1, keepdim=True)

    @staticmethod
    def _mask(valid: Tensor, prefix: int) -> Tensor:
        """(N, T) validity of the patch tokens -> (N, 1, 1, prefix + T) attention mask, True = attend."""
        mask = torch.cat([valid.new_ones(len(valid), prefix), valid], dim=1)
        # A row of padding alone would make the softmax NaN; its outputs are dropped, so it may see itself.
        return (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]


class ViTFeaturePyramid(SimpleFeaturePyramid):
    """ViTDet's simple feature pyramid over a `WindowedViT`, which also returns the raw map for the image-text score.

    Contract: images (B, 3, H, W), sides multiples of 32 -> {"p2", "p3", "p4", "p5": (B, channels, ., .),
    "vit": (B, D, ., .)}, for patches of 16 px; other powers of two shift strides and names.
    All maps are zero in the padding, also where the pyramid's 3x3 convolutions read it: they see it as they see the
    outside of a picture, so that what a picture gives does not depend on how far it is padded.
    """

    def __init__(self, net: WindowedViT, out_channels: int = 64) -> None:
        if next_power_of_two(net.patch_size) != net.patch_size:
            raise ValueError(
                f"patches of {net.patch_size} px are no power of two, so a pyramid has no whole strides; build the "
                "WindowedViT with power_of_two_patches"
            )
        super().__init__(net, FEATURE, out_channels, scale_factors=(4.0, 2.0, 1.0, 0.5), norm="LN")
        self.pyramid_features = list(self._out_features)
        self._out_features = self.pyramid_features + [FEATURE]
        self._out_feature_strides[FEATURE] = net.patch_size
        self._out_feature_channels[FEATURE] = net.output_shape()[FEATURE].channels

    @property
    def size_divisibility(self) -> int:
        """Pictures are padded to multiples of this; Detectron2's pyramid states it where `ImageList` does not look."""
        return self._size_divisibility

    def forward(self, images: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None) -> dict[str, Tensor]:
        """Compute all maps; arguments as in `WindowedViT.forward`."""
        features = self.net(images, image_sizes)
        valid = self._valid_patches(features[FEATURE], image_sizes)
        for name, stage, factor in zip(self.pyramid_features, self.stages, self.scale_factors, strict=True):
            features[name] = run_stage(stage, features[FEATURE], None if valid is None else scale_mask(valid, factor))
        return features

    def _valid_patches(self, last: Tensor, image_sizes: Sequence[tuple[int, int]] | None) -> Tensor | None:
        """(B, 1, h, w) float: 1 for patches with some picture, 0 in the padding; None where there is no padding."""
        patch, (height, width) = self.net.patch_size, last.shape[-2:]
        sizes = [(-(-h // patch), -(-w // patch)) for h, w in image_sizes or ()]
        if all(size == (height, width) for size in sizes):
            return None
        rows, columns = torch.arange(height, device=last.device), torch.arange(width, device=last.device)
        limits = torch.tensor(sizes, device=last.device)
        valid = (rows < limits[:, :1])[:, None, :, None] & (columns < limits[:, 1:])[:, None, None, :]
        return valid.to(last.dtype)


def scale_mask(valid: Tensor, factor: float) -> Tensor:
    """(B, 1, h, w) of zeros and ones -> (B, 1, h * factor, w * factor); a place counts if one of its patches does."""
    if factor >= 1:
        return F.interpolate(valid, scale_factor=factor, mode="nearest") if factor > 1 else valid
    return F.max_pool2d(valid, round(1 / factor))


def run_stage(stage: nn.Sequential, features: Tensor, mask: Tensor | None) -> Tensor:
    """A stage of the pyramid, whose last layer alone sees its neighbours, with zeros where the mask has them."""
    features = stage[:-1](features)
    if mask is None:
        return stage[-1](features)
    return stage[-1](features * mask) * mask
