"""The backbone of a trained detector in tensor operations alone, for pictures of any size up to its canvas.

Source: `ovd.modeling.backbone`, whose modules are run as they are. There padding and masks are left out where a picture
needs none; here the same graph must do for all sizes, so both are always there and change nothing where not needed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovd.modeling.backbone import FEATURE, ViTFeaturePyramid, WindowedViT, run_stage, scale_mask
from pretrain.modeling.position_embedding import resample_grid


class TensorViT(nn.Module):
    """A `WindowedViT` for one picture: (1, 3, H', W') normalised and padded -> (1, D, h, w), zeros in the padding.

    Args:
        net: the trained tower; its modules are shared.
        divisor: pixels; H' and W' are multiples of it. Where it is none of the patch size (a frozen copy of patches of
            14 px), the last patches are filled up with zeros, as in the backbone.
    """

    def __init__(self, net: WindowedViT, divisor: int) -> None:
        super().__init__()
        self.net, self.fills_patches = net, divisor % net.patch_size > 0
        prefix = net.num_prefix_positions
        side = -(-net.image_size // net.patch_size)
        table = resample_grid(net.pos_embed.detach(), side, num_prefix_tokens=prefix)[:, prefix:]
        # A canvas that is no multiple of the divisor is padded beyond its positions, with zeros, as in the backbone.
        padded = -(-(-(-net.image_size // divisor) * divisor) // net.patch_size)
        table = F.pad(table.reshape(1, side, side, -1), (0, 0, 0, padded - side, 0, padded - side))
        self.register_buffer("positions", table)

    def forward(self, images: Tensor, height: int, width: int) -> Tensor:
        """Compute the last feature map; height and width are those of the picture without padding, in pixels."""
        net, patch = self.net, self.net.patch_size
        if self.fills_patches:
            right, bottom = ((side + patch - 1) // patch * patch - side for side in (images.shape[3], images.shape[2]))
            images = F.pad(images, (0, right, 0, bottom))
        grid = net.patch_norm(net.patch_embed(images).permute(0, 2, 3, 1))
        rows, columns = torch.arange(grid.shape[1]), torch.arange(grid.shape[2])
        # Not a slice: tracing would take whether it leaves anything out for a rule.
        positions = self.positions.index_select(1, rows).index_select(2, columns)
        tokens = net.norm_pre(grid + positions).flatten(1, 2)
        prefix = None
        if net.prefix_tokens is not None:
            count = net.num_prefix_positions
            prefix = net.norm_pre(net.prefix_tokens + (net.pos_embed[:, :count] if count else 0.0))
        valid = (rows < (height + patch - 1) // patch)[:, None] & (columns < (width + patch - 1) // patch)[None]
        valid = valid.flatten()
        windows = _Windows(rows, columns, net.window_size, valid) if net.window_size else None
        for index, block in enumerate(net.blocks):
            if index in net.global_blocks:
                prefix, tokens = self._global_block(block, prefix, tokens, valid)
            else:
                prefix, tokens = self._windowed_block(block, prefix, tokens, windows)
        tokens = net.norm(tokens) * valid[None, :, None]
        return tokens.reshape(grid.shape).permute(0, 3, 1, 2)

    def valid(self, last: Tensor, height: int, width: int) -> Tensor:
        """(1, 1, h, w) float: 1 for patches of a map (1, D, h, w) with some picture, 0 in the padding."""
        patch, (rows, columns) = self.net.patch_size, (torch.arange(side) for side in last.shape[2:])
        inside = (rows < (height + patch - 1) // patch)[:, None] & (columns < (width + patch - 1) // patch)[None]
        return inside[None, None].to(last.dtype)

    def _global_block(self, block: nn.Module, prefix: Tensor | None, tokens: Tensor, valid: Tensor):
        count = self.net.num_prefix_tokens
        tokens = tokens if prefix is None else torch.cat([prefix, tokens], dim=1)
        tokens = block(tokens, attn_mask=_attention_mask(valid[None], count))
        return (None if prefix is None else tokens[:, :count]), tokens[:, count:]

    def _windowed_block(self, block: nn.Module, prefix: Tensor | None, tokens: Tensor, windows: "_Windows"):
        count = self.net.num_prefix_tokens
        tokens = windows.split(tokens[0])
        if prefix is not None:
            tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = block(tokens, attn_mask=_attention_mask(windows.seen, count))
        if prefix is not None:
            # Copies in windows of pure padding saw nothing of the picture and do not count.
            prefix = (tokens[:, :count] * windows.share[:, None, None]).sum(dim=0, keepdim=True)
        return prefix, windows.join(tokens[:, count:])[None]


class _Windows:
    """Which token stands where in which window; looked up instead of padded and reshaped in every block.

    Args:
        rows, columns: 0, 1, … of the grid of patches.
        size: side of a window in patches.
        valid: (rows * columns,) bool, patches that are picture.
    """

    def __init__(self, rows: Tensor, columns: Tensor, size: int, valid: Tensor) -> None:
        height, width = rows.shape[0], columns.shape[0]
        # At least 2 each way, because tracing takes a side of 1 for a rule; a window too many is padding.
        down, across = (torch.sym_max((side + size - 1) // size, 2) for side in (height, width))
        y, x = torch.arange(down * size).reshape(down, 1, size, 1), torch.arange(across * size).reshape(across, 1, size)
        inside = (y < height) & (x < width)
        # What lies beyond the grid reads the row of zeros behind all tokens.
        self.places = torch.where(inside, y * width + x, height * width).reshape(down * across, size * size)
        window = (rows // size)[:, None] * across + columns // size
        self.back = (window * size**2 + (rows % size)[:, None] * size + columns % size).flatten()
        self.seen = F.pad(valid.float(), (0, 1))[self.places] > 0  # ONNX cannot pad booleans
        share = self.seen.any(dim=1).float()
        self.share = share / share.sum()

    def split(self, tokens: Tensor) -> Tensor:
        """(h * w, D) -> (windows, size * size, D), zeros in the padding."""
        return F.pad(tokens, (0, 0, 0, 1))[self.places]

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of `split`."""
        return windows.flatten(0, 1).index_select(0, self.back)


def _attention_mask(valid: Tensor, prefix: int) -> Tensor:
    """(N, T) validity of the patch tokens -> (N, 1, 1, prefix + T) attention mask, True = attend."""
    mask = torch.cat([valid.new_ones((valid.shape[0], prefix)), valid], dim=1)
    # A row of padding alone would make the softmax NaN; its outputs are dropped, so it may see itself.
    return (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]


class TensorPyramid(nn.Module):
    """A `ViTFeaturePyramid` for one picture: (1, 3, H', W') -> {"p2", …, "p5", "vit"}; sides multiples of 32."""

    def __init__(self, pyramid: ViTFeaturePyramid) -> None:
        super().__init__()
        self.vit = TensorViT(pyramid.net, pyramid.size_divisibility)
        self.names = list(pyramid.pyramid_features)
        self.stages = nn.ModuleList(pyramid.stages)
        self.factors = pyramid.scale_factors

    def forward(self, images: Tensor, height: int, width: int) -> dict[str, Tensor]:
        """Compute all maps; height and width are those of the picture without padding."""
        last = self.vit(images, height, width)
        features = {FEATURE: last}
        for name, stage, factor in zip(self.names, self.stages, self.factors, strict=True):
            features[name] = run_stage(stage, last, scale_mask(self.vit.valid(last, height, width), factor))
        return features
