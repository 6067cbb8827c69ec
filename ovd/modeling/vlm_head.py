"""The image-text model as a region classifier: RoIAlign on its last map, its own pooling and projection, its own words.

Source: F-VLM (section 3.3), RO-ViT for plain ViTs with average pooling, DITO for the frozen copy of the tower; ViLD
for scoring crops.
This file has nothing to train, and its background only takes probability from the words (F-VLM's softmax is over the
background too): the background that is reported is the detector's, see `score_fusion.py`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from ovd.modeling.backbone import FEATURE, WindowedViT
from ovd.modeling.text_classifier import check_text_embeddings

_VALUES_AT_ONCE = 4_000_000  # 16 MB in float32


def shrink_boxes(boxes: Tensor, factor: float) -> Tensor:
    """Scale (N, 4) xyxy boxes about their centres; factor 0.7 is F-VLM's option against context at the border."""
    if factor == 1.0:
        return boxes
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * factor
    return torch.cat([centre - half, centre + half], dim=1)


class RegionTextHead(nn.Module, ABC):
    """Score regions against the vocabulary with the image-text model.

    Contract: what `feature_map` gives and B lists of boxes -> (R, C) float32 logits; `probabilities` gives (R, 1 + C),
    the background's in column 0, which is zero where there is none. All weights are copies and frozen.

    Without a background a word's probability says only that it fits better than the other words: alone it has 1
    everywhere.

    Args:
        stride: side in pixels of a patch of what regions are read by.
        embed_dim: width of the joint space.
        scale: factor on the cosine, usually the model's own exp(logit_scale).
        box_scale: factor on the boxes about their centres.
        background: (D,) embedding of the background for every vocabulary that brings none, usually the empty prompt's.
    """

    def __init__(
        self, stride: int, embed_dim: int, scale: float, box_scale: float, background: Tensor | None = None
    ) -> None:
        super().__init__()
        self.stride, self.embed_dim = stride, embed_dim
        self.scale, self.box_scale = float(scale), box_scale
        # Not persistent: all three belong to the words and the image-text model, which are not stored with these.
        self.register_buffer("text_embeddings", torch.zeros(0, embed_dim), persistent=False)
        self.register_buffer("usual_background", self._checked_background(background), persistent=False)
        self.register_buffer("background", self.usual_background.clone(), persistent=False)

    @abstractmethod
    def feature_map(
        self, features: dict[str, Tensor], images: Tensor, image_sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """What regions are read from, of the detector's features and the normalised pixels (B, 3, H, W)."""

    @abstractmethod
    def embed_regions(self, feature_map: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Normalised joint-space embeddings (R, embed_dim) of B lists of xyxy pixel boxes."""

    def freeze(self) -> None:
        """To be called when all modules are there: nothing here is trained."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "RegionTextHead":
        """Stay in evaluation mode."""
        return super().train(False)

    def set_text_embeddings(self, embeddings: Tensor, background: Tensor | None = None) -> None:
        """Make the rows of a (C, D) matrix the classes; they are normalised here.

        Args:
            embeddings: (C, D).
            background: (D,) what else a region may be, which no word of these names; None takes the one that the head
                was built with, if any.

        Raises:
            ValueError: as documented in `check_text_embeddings`.
        """
        device = next(self.parameters()).device
        given = self.usual_background if background is None else self._checked_background(background)
        self.text_embeddings = check_text_embeddings(embeddings, self.embed_dim).to(device)
        self.background = given.to(device)

    def _checked_background(self, background: Tensor | None) -> Tensor:
        """(1, D), or (0, D) for none."""
        if background is None:
            return torch.zeros(0, self.embed_dim)
        return check_text_embeddings(background.reshape(1, -1), self.embed_dim)

    @torch.no_grad()
    def forward(self, feature_map: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Logits (R, C) of B lists of xyxy pixel boxes: scale * cosine with the text embeddings, float32."""
        self._check_vocabulary()
        return self._logits(self.embed_regions(feature_map, boxes))

    @torch.no_grad()
    def probabilities(self, feature_map: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Softmax over the vocabulary and the background, (R, 1 + C); without a background column 0 is zero."""
        self._check_vocabulary()
        regions = self.embed_regions(feature_map, boxes)
        scores = regions.new_empty(len(regions), 1 + len(self.text_embeddings))
        first = 1 - len(self.background)
        scores[:, :first] = 0
        # In parts, so that beside the result nothing grows with the vocabulary.
        rows = max(1, _VALUES_AT_ONCE // scores.shape[1])
        for part, out in zip(regions.split(rows), scores.split(rows), strict=True):
            out[:, first:] = self._logits(part, with_background=True).softmax(dim=-1)
        return scores

    def _check_vocabulary(self) -> None:
        if len(self.text_embeddings) == 0:
            raise ValueError("the detector has no vocabulary yet; call set_text_embeddings before running it")

    def _logits(self, regions: Tensor, with_background: bool = False) -> Tensor:
        with torch.autocast(device_type=regions.device.type, enabled=False):
            rows = self.text_embeddings.float()
            if with_background and len(self.background):
                rows = torch.cat([self.background.float(), rows])
            return self.scale * regions @ rows.T


class ImageTextHead(RegionTextHead):
    """Score regions by RoIAlign on a feature map, then the image-text model's own pooling and projection (F-VLM).

    Args:
        visual: image tower with a timm `trunk` and a `head`, whose pooled norm and projection are copied.
        embed_dim, scale, box_scale, background: see `RegionTextHead`.
        output_size: side of the RoIAlign grid that is averaged.
        tower: frozen copy of the pretrained tower; None scores the detector's own backbone map.
        stride: side in pixels of a patch of the map that is scored; None: the tower's own, which a backbone may have
            resampled.

    Raises:
        ValueError: if the tower does not pool by an average over patches, so that regions have no place in its space.
    """

    def __init__(
        self,
        visual: nn.Module,
        embed_dim: int,
        scale: float,
        output_size: int = 7,
        box_scale: float = 1.0,
        tower: WindowedViT | None = None,
        stride: int | None = None,
        background: Tensor | None = None,
    ) -> None:
        trunk = visual.trunk
        super().__init__(stride or trunk.patch_embed.proj.kernel_size[0], embed_dim, scale, box_scale, background)
        # A class-token tower reads regions through its copy only, whose last block MaskCLIP's reading has replaced.
        pools = ("avg",) if tower is None else ("avg", "token")
        if getattr(trunk, "attn_pool", None) is not None or trunk.global_pool not in pools:
            raise ValueError(
                f"the image tower pools by {trunk.global_pool!r}, but region scores need average pooling over patches; "
                "use vlm_mode crops (or frozen_copy for a class token), or a tower with timm's global_pool 'avg'"
            )
        self.fc_norm = copy.deepcopy(trunk.fc_norm)
        self.trunk_head = copy.deepcopy(trunk.head)
        self.projection = copy.deepcopy(visual.head)
        self.tower, self.output_size = tower, output_size
        self.freeze()

    def feature_map(
        self, features: dict[str, Tensor], images: Tensor, image_sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The (B, D, h, w) map to score: the frozen copy's own when there is one, else the backbone's."""
        return features[FEATURE] if self.tower is None else self.tower(images, image_sizes)[FEATURE]

    def embed_regions(self, feature_map: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """See `RegionTextHead`."""
        boxes = [shrink_boxes(b, self.box_scale).to(feature_map.dtype) for b in boxes]
        pooled = roi_align(
            feature_map, boxes, self.output_size, spatial_scale=1 / self.stride, sampling_ratio=2, aligned=True
        )
        embeddings = self.projection(self.trunk_head(self.fc_norm(pooled.mean(dim=(2, 3)))))
        return F.normalize(embeddings.float(), dim=-1)


def square_boxes(boxes: Tensor, factor: float) -> Tensor:
    """Squares (N, 4) around xyxy boxes: same centre, side = factor times the longer side."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True) / 2 * factor
    return torch.cat([centre - half, centre + half], dim=1)


class CropTextHead(RegionTextHead):
    """Score each region by the whole pretrained tower on the region's own square crop (ViLD, section 3.2).

    Nothing of the surroundings reaches the score, which RoIAlign on the map of a whole scene cannot promise; the price
    is one small image per proposal. Towers of any pooling will do.

    Args:
        visual: image tower with a timm `trunk` and a `head`.
        embed_dim: width of the joint space.
        scale: factor on the cosine.
        crop_size: side in pixels that crops are resized to (anti-aliased), a multiple of the patch size.
        box_scale: factor on the longer side of the box; a little above 1 keeps thin parts inside.
        batch_size: crops in one pass of the tower.
        background: see `RegionTextHead`.
    """

    def __init__(
        self,
        visual: nn.Module,
        embed_dim: int,
        scale: float,
        crop_size: int,
        box_scale: float,
        batch_size: int = 256,
        background: Tensor | None = None,
    ) -> None:
        super().__init__(visual.trunk.patch_embed.proj.kernel_size[0], embed_dim, scale, box_scale, background)
        patch = self.stride
        if crop_size < patch or crop_size % patch:
            raise ValueError(f"vlm_crop_size {crop_size} is not a multiple of the patch size {patch}; choose one")
        self.visual = copy.deepcopy(visual)
        self.visual.set_input_size(crop_size)
        self.crop_size, self.batch_size = crop_size, batch_size
        self.freeze()

    def feature_map(
        self, features: dict[str, Tensor], images: Tensor, image_sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The normalised pixels (B, 3, H, W)."""
        return images

    def embed_regions(self, feature_map: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """See `RegionTextHead`."""
        squares = [square_boxes(b, self.box_scale).to(feature_map.dtype) for b in boxes]
        # An adaptive number of samples a bin is what anti-aliases; outside the picture is the mean colour.
        crops = roi_align(feature_map, squares, self.crop_size, spatial_scale=1.0, sampling_ratio=-1, aligned=True)
        if not torch.compiler.is_compiling() and not len(crops):
            return crops.new_zeros((0, self.embed_dim), dtype=torch.float32)  # timm's towers take no empty batch
        parts = [self.visual(part) for part in crops.split(self.batch_size)]
        return F.normalize(torch.cat(parts).float(), dim=-1)
