"""clip-rocket ("Improved baselines for vision-language pre-training", arXiv 2305.08675): CLIP with augmented views of
both images and texts, smoothed labels, and a projector of their own for the augmented pairs.

loss = (G + n L) / (1 + n) + sum of weight * term.
G: InfoNCE of the clean (weakly augmented) pair, in the joint space z of the towers' own last maps.
L: mean of InfoNCE with smoothed labels over the n x n pairs of augmented views, in the space h of the projectors.
Terms: self-supervised losses to compare with (`clip_rocket_terms`).

Batch norm in the projectors makes rows depend on each other; therefore `encode` ends at the towers, and projectors are
part of `loss`, which sees the whole batch also where it was encoded in pieces.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from PIL import Image
from torch import nn

from pretrain.config import ConfigError, DataConfig, ModelConfig, PhaseConfig
from pretrain.data.strong_views import StrengthView, ViewStrength, asymmetric, check_strength, strong_view
from pretrain.data.text_views import TextView, TextViewOptions, check_text_options
from pretrain.data.transforms import normalise
from pretrain.data.views import Views
from pretrain.losses.augmented_pairs import augmented_pairs_loss
from pretrain.losses.gather import gather_features
from pretrain.modeling.clip import set_context_length, set_image_size
from pretrain.modeling.head_encoder import Heads
from pretrain.modeling.projector import GlobalBatchNorm, Projector
from pretrain.modeling.tower_features import (
    feature_widths,
    image_features,
    position_resampling,
    project_image,
    project_text,
    text_features,
)
from pretrain.objectives.base import Objective, Passes
from pretrain.objectives.clip_rocket_terms import TERMS, TermSizes, ViewFeatures, build_term
from pretrain.objectives.info_nce import check_chunk_size

_ACCURACY_PAIRS = 1024  # as in `info_nce`: a metric must not cost the memory that a chunked loss saves


@dataclass
class ClipRocketOptions:
    """Options of `clip_rocket`; the defaults are the published ones where the data sets do not differ in them."""

    num_augmented: int = 2  # n, augmented views of the image and of the text; 0: plain InfoNCE
    smoothing: float = 0.1  # of the augmented pairs' labels
    reduction: str = "avg"  # avg: mean of both directions; sum: twice that (the larger sets)
    separate_projectors: bool = True  # False: the augmented pairs use the towers' own last maps
    projector_layers: int = 3
    projector_hidden: int = 4096
    separate_scales: bool = True  # False: the augmented pairs use the clean pairs' temperature
    augmented_temperature: float = 0.1  # initial; learned
    text_dropout: float = 0.0  # at the input of each text block, augmented views only; 0.2 on CC3M, 0.05 on CC12M
    # Side of the augmented images over the phase's, then rounded to whole patches; .857 (192 of 224) on the 29M set.
    augmented_image_scale: float = 1.0
    weak: ViewStrength = field(default_factory=ViewStrength)  # of the clean image
    strong: ViewStrength = field(default_factory=strong_view)  # of the augmented images
    asymmetric: bool = False  # augmented views differ as in BYOL (see `strong_views.asymmetric`)
    text: TextViewOptions = field(default_factory=TextViewOptions)
    # Self-supervised terms and their weights. Published: barlip, siamlip, byolip 1, swalip 0.2, swalip_v1 0.2 (the
    # code's default; no run of it is published).
    terms: dict[str, float] = field(default_factory=dict)
    sizes: TermSizes = field(default_factory=TermSizes)
    ensemble_weight: float = 0.5  # w of the evaluated "ensemble", w z + (1 - w) h; fixed, not chosen on results
    chunk_size: int = 0  # rows of a similarity matrix held at once; 0: all


class ClipRocket(Objective):
    """Owns the towers, the projectors of the augmented pairs and the terms. See `Objective` for the contract.

    A batch is {"image", "tokens"} and, for k in 1..n, {"augmented_image_k", "augmented_tokens_k"}.
    """

    def __init__(self, model: CustomTextCLIP, config: ModelConfig, options: ClipRocketOptions | None = None):
        super().__init__()
        self.model = model.requires_grad_(True)  # the phase before may have frozen a tower
        self.options = options or ClipRocketOptions()
        check_options(self.options)
        self._max_log_scale = math.log(1 / config.min_temperature)
        widths, views = feature_widths(model), self.options.num_augmented
        self.image_projector = self.text_projector = self.augmented_logit_scale = None
        if views and self.options.separate_projectors:
            shape = (self.options.projector_hidden, config.embed_dim, self.options.projector_layers)
            self.image_projector, self.text_projector = (
                Projector(width, *shape, gather=gather_features) for width in widths
            )
        if views and self.options.separate_scales:
            self.augmented_logit_scale = nn.Parameter(torch.tensor(-math.log(self.options.augmented_temperature)))
        self.terms = nn.ModuleDict({n: build_term(n, model, widths, self.options.sizes) for n in self.options.terms})
        self.register_buffer("_resampling", None, persistent=False)

    @classmethod
    def passes(cls, options: ClipRocketOptions) -> Passes:
        """Every view; BYOLIP's momentum encoder sees them too, and is counted as if all were as large as the clean one.

        What augmented views are smaller by, before rounding to whole patches, is a share of patches that is dropped,
        averaged over all views.
        """
        check_options(options)
        views = 1 + options.num_augmented
        slow = views if "byolip" in options.terms else 0
        dropped = options.num_augmented * (1 - options.augmented_image_scale**2) / views
        return Passes(images=views, texts=views, teacher_images=slow, teacher_texts=slow, dropped=dropped)

    def views(self, data: DataConfig, phase: PhaseConfig, backgrounds: Sequence[Image.Image]) -> Views:
        """One weak view of image and text, n strong ones of each."""
        options = self.options
        size = self._augmented_size(phase)
        augmentation = phase.augmentation or data.augmentation
        images = {"image": StrengthView(phase.image_size, options.weak, augmentation, backgrounds)}
        captions = {"tokens": TextView(options.text, False, data.caption)}
        strong_text = TextView(options.text, True, data.caption)  # one for all: it holds the synonyms
        for k in range(1, options.num_augmented + 1):
            strength = asymmetric(options.strong, k) if options.asymmetric else options.strong
            images[f"augmented_image_{k}"] = StrengthView(size, strength, augmentation, backgrounds)
            captions[f"augmented_tokens_{k}"] = strong_text
        return Views(images, captions)

    def encoders(self) -> dict[str, nn.Module]:
        """The towers; with projectors also "h" (what these see) and "ensemble" (both, at the fixed weight)."""
        found: dict[str, nn.Module] = {"": self.model}
        if heads := self.heads():
            for name in ("h", "ensemble"):
                found[name] = heads.encoder(self.model, name)
                found[name].training = self.training  # the mode that evaluation puts back
        return found

    def heads(self) -> Heads | None:
        """The projectors; None where the augmented pairs use the towers' own last maps."""
        if self.image_projector is None:
            return None
        scale = None if self.augmented_logit_scale is None else self.augmented_logit_scale.detach()
        return Heads(self.image_projector, self.text_projector, self.options.ensemble_weight, scale)

    def enter_phase(self, phase: PhaseConfig) -> None:
        """Resample the image positions and set the text length, of averaged towers too."""
        if phase.token_dropping != "none" or phase.cropped_positions:
            raise ConfigError(
                f"phase {phase.name}: clip_rocket does not drop tokens or crop positions; set token_dropping=none and "
                "cropped_positions=false, or use the objective info_nce"
            )
        if phase.batch_size < 2 and any(isinstance(module, GlobalBatchNorm) for module in self.modules()):
            raise ConfigError(
                f"phase {phase.name}: batch_size is {phase.batch_size}; batch norm in clip_rocket's projectors needs 2 "
                "pairs or more"
            )
        set_image_size(self.model, phase.image_size)
        set_context_length(self.model, phase.context_length)
        size = self._augmented_size(phase)
        self._resampling = None
        if size != phase.image_size:
            self._resampling = position_resampling(self.model, size).to(self.model.logit_scale.device)
        if "byolip" in self.terms:
            self.terms["byolip"].enter_phase(phase.image_size, phase.context_length)

    def encode(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Pooled tower features of every view, "image_0", "text_0" (clean), "image_1" …; with BYOLIP those of the
        averaged towers, "average_image_0" …"""
        views, average = self.options.num_augmented, self.terms["byolip"] if "byolip" in self.terms else None
        numbers = range(1, views + 1)
        inputs = [(normalise(batch["image"]), batch["tokens"], None, 0.0)]
        if views:
            images = normalise(torch.cat([batch[f"augmented_image_{k}"] for k in numbers]))
            tokens = torch.cat([batch[f"augmented_tokens_{k}"] for k in numbers])
            inputs.append((images, tokens, self._resampling, self.options.text_dropout))
        features: dict[str, torch.Tensor] = {}
        for first, (images, tokens, resampling, dropout) in enumerate(inputs):
            parts = {
                "image": image_features(self.model, images, resampling),
                "text": text_features(self.model, tokens, dropout),
            }
            if average is not None:
                averaged = average.average_features(images, tokens, resampling)
                parts |= {"average_image": averaged[0], "average_text": averaged[1]}
            for name, value in parts.items():
                cut = value.chunk(views) if first else [value]
                features |= {f"{name}_{first + k}": part for k, part in enumerate(cut)}
        return features

    def loss(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss and its parts, the share of clean images whose own text is the nearest of (at most 1,024), and both
        scales."""
        options, views = self.options, 1 + self.options.num_augmented
        images, texts = ([features[f"{name}_{k}"] for k in range(views)] for name in ("image", "text"))
        image, text = _unit(project_image(self.model, images[0])), _unit(project_text(self.model, texts[0]))
        augmented = [self._embed_image(v) for v in images[1:]], [self._embed_text(v) for v in texts[1:]]
        scale = self.model.logit_scale.exp()
        other_scale = scale if self.augmented_logit_scale is None else self.augmented_logit_scale.exp()
        pairs = augmented_pairs_loss(
            (image, text), *augmented, scale, other_scale, options.smoothing, options.reduction, options.chunk_size,
            gather=True,
        )  # fmt: skip
        output = {"loss": pairs.loss, "clean_loss": pairs.clean.detach(), "logit_scale": scale.detach()}
        if pairs.augmented is not None:
            output |= {"augmented_loss": pairs.augmented.detach(), "augmented_logit_scale": other_scale.detach()}
        given = ViewFeatures(images, texts, augmented, other_scale)
        if "byolip" in self.terms:
            names = ("average_image", "average_text")
            given.average = tuple([features[f"{name}_{k}"] for k in range(views)] for name in names)
        for name, term in self.terms.items():
            value = term(given)
            output["loss"] = output["loss"] + options.terms[name] * value
            output[f"{name}_loss"] = value.detach()
        with torch.no_grad():
            nearest = (image[:_ACCURACY_PAIRS] @ text[:_ACCURACY_PAIRS].T).argmax(1)
            right = nearest == torch.arange(len(nearest), device=nearest.device)
        return {**output, "batch_accuracy": right.float().mean()}

    def _augmented_size(self, phase: PhaseConfig) -> int:
        scale, patch = self.options.augmented_image_scale, self.model.visual.trunk.patch_embed.patch_size[0]
        return phase.image_size if scale == 1 else patch * max(1, round(scale * phase.image_size / patch))

    def _embed_image(self, features: torch.Tensor) -> torch.Tensor:
        own = self.image_projector is None
        return _unit(project_image(self.model, features) if own else self.image_projector(features))

    def _embed_text(self, features: torch.Tensor) -> torch.Tensor:
        own = self.text_projector is None
        return _unit(project_text(self.model, features) if own else self.text_projector(features))

    def after_step(self) -> None:
        """Keep both temperatures in 0.01 to 1; update the terms' averages and counters."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, self._max_log_scale)
            if self.augmented_logit_scale is not None:
                self.augmented_logit_scale.clamp_(0, self._max_log_scale)
            for term in self.terms.values():
                if hasattr(term, "after_step"):
                    term.after_step(self.model)


def _unit(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=-1)


def check_options(options: ClipRocketOptions) -> None:
    """Raise ConfigError for options that cannot be used."""
    where = "objective.options"
    _check_ranges(options, where)
    if options.reduction not in ("avg", "sum"):
        raise ConfigError(f"{where}.reduction is {options.reduction!r}: avg or sum")
    for name, weight in options.terms.items():
        if name not in TERMS:
            raise ConfigError(f"{where}.terms has {name!r}: one of {', '.join(TERMS)}")
        if not 0 <= weight < math.inf:
            raise ConfigError(f"{where}.terms.{name} is {weight}: it must be at least 0; leave it out for none")
    if "swalip" in options.terms and options.num_augmented != 2:
        raise ConfigError(
            f"{where}: the term swalip swaps two augmented views, num_augmented is {options.num_augmented}; set it to 2"
        )
    if "swalip" in options.terms and options.smoothing != 0:
        raise ConfigError(
            f"{where}: the term swalip makes soft labels itself, smoothing is {options.smoothing}; set smoothing=0"
        )
    check_strength(options.weak, f"{where}.weak")
    check_strength(options.strong, f"{where}.strong")
    check_text_options(options.text, f"{where}.text")


def _check_ranges(options: ClipRocketOptions, where: str) -> None:
    if options.num_augmented < 0:
        raise ConfigError(f"{where}.num_augmented is {options.num_augmented}: it must not be negative")
    if not 0 <= options.ensemble_weight <= 1:
        raise ConfigError(f"{where}.ensemble_weight is {options.ensemble_weight}: it must be in 0 to 1")
    for name in ("smoothing", "text_dropout"):
        if not 0 <= (value := getattr(options, name)) < 1:
            raise ConfigError(f"{where}.{name} is {value}: it must be at least 0 and below 1")
    if not 0 < options.augmented_temperature <= 1:
        raise ConfigError(
            f"{where}.augmented_temperature is {options.augmented_temperature}: it must be above 0 and at most 1"
        )
    if not 0 < options.augmented_image_scale <= 1:
        raise ConfigError(
            f"{where}.augmented_image_scale is {options.augmented_image_scale}: it must be above 0 and at most 1, the "
            "phase's own image size"
        )
    counts = {name: getattr(options, name) for name in ("projector_layers", "projector_hidden")}
    for name, value in {**counts, **{f"sizes.{name}": value for name, value in asdict(options.sizes).items()}}.items():
        if value < 1:
            raise ConfigError(f"{where}.{name} is {value}: it must be at least 1")
    check_chunk_size(options.chunk_size)
