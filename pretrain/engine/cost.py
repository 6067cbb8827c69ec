"""What a curriculum costs before it runs: tokens, FLOPs and samples of every phase, and the saving against training the
same main steps at full resolution (RECLIP, arXiv 2304.06028, complexity equations).

Counted as in the paper: a multiply-add is 2 FLOPs, training is 3 forward passes; norms, activations, biases and the
projections into the joint space are left out (well under 1 %). Memory is in memory.py, measured speed in measure.py.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from pretrain.config import ConfigError, ModelConfig, PhaseConfig, PretrainConfig
from pretrain.modeling.clip import construct_towers
from pretrain.objectives import passes_of
from pretrain.objectives.base import Passes

TRAINING_PASSES = 3  # a backward pass costs two forward passes
BASELINE_IMAGE_SIZE = 224  # pixels; the full resolution that RECLIP compares with


def tower_flops(width: int, depth: int, tokens: int, patch_size: int | None = None, mlp_ratio: float = 4.0) -> int:
    """Forward FLOPs of a transformer on one sample, a multiply-add counted as 2.

    depth · ((8 + 4 r)·n·d² + 4·n²·d), which for r = 4 is depth · (24·n·d² + 4·n²·d); with patches, 2·n·(3p²)·d more.

    Args:
        width: d, the embedding size.
        depth: blocks.
        tokens: n, the sequence length.
        patch_size: p in pixels, for a tower on RGB images; None or 0 for a text tower.
        mlp_ratio: r, the hidden size of the block's perceptron over d.

    Raises:
        ValueError: if a count is below 1.
    """
    for name, value in (("width", width), ("depth", depth), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    blocks = depth * ((8 + 4 * mlp_ratio) * tokens * width**2 + 4 * tokens**2 * width)
    return round(blocks) + (patchify_flops(width, tokens, patch_size) if patch_size else 0)


def patchify_flops(width: int, patches: int, patch_size: int) -> int:
    """Forward FLOPs of the linear map from `patches` RGB patches to embeddings."""
    return 2 * patches * 3 * patch_size**2 * width


@dataclass(frozen=True)
class Tower:
    """The shape of one transformer.

    Attributes:
        width: d.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden size of a block's perceptron over d, from its number of weights (so gated ones count right).
        patch_size: in pixels; 0 for text.
        prefix_tokens: class or register tokens beside the patches.
        has_layer_scale: whether blocks scale their outputs.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    patch_size: int = 0
    prefix_tokens: int = 0
    has_layer_scale: bool = False

    def patches(self, image_size: int) -> int:
        """Patches of a square image.

        Raises:
            ConfigError: if the size is not a multiple of the patch size.
        """
        if image_size < 1 or image_size % self.patch_size:
            raise ConfigError(
                f"image_size {image_size} is not a multiple of the patch size {self.patch_size}: use "
                f"{max(1, image_size // self.patch_size) * self.patch_size}"
            )
        return (image_size // self.patch_size) ** 2

    def image_tokens(self, phase: PhaseConfig) -> int:
        """Sequence length in a phase: the kept patches and the prefix tokens.

        Raises:
            ConfigError: for a size that the patches do not divide, or more tokens to keep than there are.
        """
        patches = self.patches(phase.image_size)
        if phase.keep_tokens > patches:
            raise ConfigError(
                f"phase {phase.name}: keep_tokens {phase.keep_tokens} exceeds the {patches} tokens of "
                f"{phase.image_size} px: use at most {patches}"
            )
        kept = phase.keep_tokens if phase.token_dropping != "none" else patches
        return kept + self.prefix_tokens

    def forward_flops(self, tokens: int, patches: int = 0) -> int:
        """FLOPs of one sample: all `patches` are embedded, `tokens` go through the blocks."""
        flops = tower_flops(self.width, self.depth, tokens, None, self.mlp_ratio)
        return flops + (patchify_flops(self.width, patches, self.patch_size) if patches else 0)


@dataclass(frozen=True)
class Towers:
    """Both towers of a configuration, and the modules themselves on torch's meta device (shapes without memory)."""

    image: Tower
    text: Tower
    embed_dim: int
    module: nn.Module


def describe_towers(config: ModelConfig) -> Towers:
    """Read the shapes from the real modules, built without memory: a ViT-L takes a fraction of a second.

    Raises:
        ConfigError: if timm does not know the image tower, or it cannot pool as asked.
    """
    with torch.device("meta"):
        module = construct_towers(config)
    trunk = module.visual.trunk
    if not hasattr(trunk, "blocks") or not hasattr(trunk, "patch_embed"):
        raise ConfigError(
            f"model.image.timm_model: {config.image.timm_model} is no plain vision transformer, which is what the cost "
            "model knows; take a vit_… of timm"
        )
    image = Tower(
        width=trunk.embed_dim,
        depth=len(trunk.blocks),
        heads=trunk.blocks[0].attn.num_heads,
        mlp_ratio=_mlp_ratio(trunk.blocks[0], trunk.embed_dim),
        patch_size=trunk.patch_embed.patch_size[0],
        prefix_tokens=trunk.num_prefix_tokens,
        has_layer_scale=any(name.endswith("ls1.gamma") for name, _ in trunk.blocks[0].named_parameters()),
    )
    text = Tower(
        width=config.text.width,
        depth=config.text.layers,
        heads=config.text.heads,
        mlp_ratio=_mlp_ratio(module.text.transformer.resblocks[0], config.text.width),
    )
    return Towers(image, text, config.embed_dim, module)


def _mlp_ratio(block: nn.Module, width: int) -> float:
    """r, from 4d² attention weights and 2rd² others."""
    weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    return (weights / width**2 - 4) / 2


@dataclass(frozen=True)
class PhaseCost:
    """What one phase costs; FLOPs of a sample are forward only, those of a phase are for all its samples.

    Attributes:
        image_tokens: sequence length in the image tower, prefix tokens included, dropped ones not.
        text_tokens: sequence length in the text tower.
        training_flops: both towers, forward and backward, all passes of the objective.
        recompute_flops: the second encoding of accumulation with cached embeddings; 0 without accumulation.
        loss_flops: the matrix of similarities, forward and backward.
        samples: image–text pairs seen.
    """

    name: str
    steps: int
    image_size: int
    context_length: int
    batch_size: int
    image_tokens: int
    text_tokens: int
    image_forward_flops: int
    text_forward_flops: int
    training_flops: int
    recompute_flops: int
    loss_flops: int
    samples: int
    teacher_flops: int = 0  # forward passes of a teacher beside the trained towers

    @property
    def device_flops(self) -> int:
        """Everything that devices compute."""
        return self.training_flops + self.recompute_flops + self.loss_flops + self.teacher_flops


def phase_cost(phase: PhaseConfig, towers: Towers, devices: int = 1, passes: Passes | None = None) -> PhaseCost:
    """Tokens, FLOPs and samples of a phase whose batch `devices` share.

    Args:
        passes: how often the phase's objective runs the towers (`objectives.passes_of`); None: each of them once.

    Raises:
        ConfigError: if the towers cannot take the phase's image size or kept tokens, or the batch cannot be shared.
    """
    passes, patches = passes or Passes(), towers.image.patches(phase.image_size)
    whole = towers.image.image_tokens(phase)
    tokens = whole - round(passes.dropped * (whole - towers.image.prefix_tokens))
    image = towers.image.forward_flops(tokens, patches)
    text = towers.text.forward_flops(phase.context_length)
    pair = passes.images * image + passes.texts * text
    teacher = passes.teacher_images * towers.image.forward_flops(patches + towers.image.prefix_tokens, patches)
    teacher += passes.teacher_texts * text
    samples = phase.steps * phase.batch_size
    local = local_batch(phase, devices)
    in_pieces = 0 < phase.micro_batch_size < local
    return PhaseCost(
        name=phase.name,
        steps=phase.steps,
        image_size=phase.image_size,
        context_length=phase.context_length,
        batch_size=phase.batch_size,
        image_tokens=tokens,
        text_tokens=phase.context_length,
        image_forward_flops=image,
        text_forward_flops=text,
        training_flops=TRAINING_PASSES * samples * pair,
        recompute_flops=samples * (pair + teacher) if in_pieces else 0,
        # One B x B matrix of D-long products a step, and its two gradients.
        loss_flops=TRAINING_PASSES * phase.steps * 2 * phase.batch_size**2 * towers.embed_dim,
        samples=samples,
        teacher_flops=samples * teacher,
    )


def local_batch(phase: PhaseConfig, devices: int) -> int:
    """Pairs of one device.

    Raises:
        ConfigError: if the batch cannot be shared equally.
    """
    if devices < 1 or phase.batch_size % devices:
        raise ConfigError(
            f"phase {phase.name}: batch_size {phase.batch_size} cannot be shared equally by {devices} devices: use a "
            "divisor of it"
        )
    return phase.batch_size // devices


@dataclass(frozen=True)
class Baseline:
    """Training at full resolution with the same main steps, and nothing after it."""

    image_size: int
    context_length: int
    steps: int
    samples: int
    training_flops: int
    device_flops: int


@dataclass(frozen=True)
class Plan:
    """The cost of every phase, and of the baseline; None where nothing stands in for full-resolution training."""

    phases: list[PhaseCost]
    baseline: Baseline | None

    @property
    def training_flops(self) -> int:
        """Both towers, forward and backward, all phases."""
        return sum(phase.training_flops for phase in self.phases)

    @property
    def saving(self) -> float | None:
        """How many times cheaper than the baseline, in training FLOPs of the towers."""
        return self.baseline.training_flops / self.training_flops if self.baseline else None


def main_phases(phases: list[PhaseConfig], full_size: int) -> list[PhaseConfig]:
    """The phases that stand in for full-resolution training: those on smaller images, or else the longest."""
    small = [phase for phase in phases if phase.image_size < full_size]
    return small or [max(phases, key=lambda phase: phase.steps)]


def make_plan(
    config: PretrainConfig,
    devices: int = 1,
    baseline: PretrainConfig | None = None,
    baseline_image_size: int | None = None,
    baseline_context_length: int | None = None,
    towers: Towers | None = None,
) -> Plan:
    """Cost of a configuration and its saving against a full-resolution baseline of the same main steps.

    Args:
        config: checked configuration.
        devices: how many share each batch.
        baseline: takes towers, image size and text length from this configuration's longest phase instead of from
            `config` with 224 px and the text tower's full length. The steps and batches are always `config`'s.
        baseline_image_size: pixels, instead of either.
        baseline_context_length: tokens, instead of either.
        towers: of `config`, if already described.

    Without any of the three, a configuration whose phases all have full images, texts and tokens has no baseline: it
    would be compared with its own longest phase.

    Raises:
        ConfigError: for sizes that the towers cannot take.
    """
    towers = towers or describe_towers(config.model)
    full_towers, size, length = towers, BASELINE_IMAGE_SIZE, config.model.text.context_length
    if baseline:
        longest = max(baseline.phases, key=lambda phase: phase.steps)
        full_towers, size, length = describe_towers(baseline.model), longest.image_size, longest.context_length
    asked = bool(baseline or baseline_image_size or baseline_context_length)
    size, length = baseline_image_size or size, baseline_context_length or length
    phases = [phase_cost(phase, towers, devices, passes_of(config, phase)) for phase in config.phases]
    if not asked and not any(_is_reduced(phase, size, length) for phase in config.phases):
        return Plan(phases, None)
    full = {"image_size": size, "context_length": length, "token_dropping": "none", "keep_tokens": 0}
    main = [
        phase_cost(replace(phase, **full), full_towers, devices, passes_of(config, phase))
        for phase in main_phases(config.phases, size)
    ]
    whole = Baseline(
        image_size=size,
        context_length=length,
        steps=sum(phase.steps for phase in main),
        samples=sum(phase.samples for phase in main),
        training_flops=sum(phase.training_flops for phase in main),
        device_flops=sum(phase.device_flops for phase in main),
    )
    return Plan(phases, whole)


def _is_reduced(phase: PhaseConfig, full_size: int, full_length: int) -> bool:
    return phase.image_size < full_size or phase.context_length < full_length or phase.token_dropping != "none"
