"""`value_attention`: MaskCLIP's reading of an image tower that pools by its class token.

Towers of open_clip's own class become timm trunks in `pretrain.modeling.plain_tower`. Windows, padding and pyramids are
in `backbone`.
"""

import copy

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class ValueAttention(nn.Module):
    """A block's attention where every token sees only itself: its value and the output projection.

    Source: MaskCLIP (Zhou et al., "Extract Free Dense Labels from CLIP", 2022, section 3.2).

    Args:
        attention: timm Attention; copied.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        attention = copy.deepcopy(attention)
        width = attention.qkv.out_features // 3
        self.value = nn.Linear(attention.qkv.in_features, width, bias=attention.qkv.bias is not None)
        with torch.no_grad():
            self.value.weight.copy_(attention.qkv.weight[-width:])
            if attention.qkv.bias is not None:
                self.value.bias.copy_(attention.qkv.bias[-width:])
        self.norm, self.proj = getattr(attention, "norm", nn.Identity()), attention.proj

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None, **_: object) -> Tensor:
        """(B, N, D) -> (B, N, D); the mask plays no part."""
        return self.proj(self.norm(self.value(tokens)))


class _ValueBlock(nn.Module):
    """A block that only does what MaskCLIP keeps of the last one: no residual, no MLP."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn = copy.deepcopy(block.norm1), ValueAttention(block.attn)
        self.ls1 = copy.deepcopy(block.ls1)

    def forward(self, tokens: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.ls1(self.attn(self.norm1(tokens)))


def value_attention(trunk: VisionTransformer) -> VisionTransformer:
    """A copy of a trunk whose last block gives every patch in the space that the class token is read in.

    A tower that pools by its class token never learnt to project its patch tokens. What the class token takes up in the
    last block is a mixture of the patches' values, so a patch's own value, through the same output projection, final
    norm and head, lies where the text embeddings are (MaskCLIP). An average over a region then stands for the class
    token of that region.
    """
    trunk = copy.deepcopy(trunk)
    trunk.blocks[-1] = _ValueBlock(trunk.blocks[-1])
    return trunk
