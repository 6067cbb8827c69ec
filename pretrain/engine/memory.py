"""How much memory of one device a phase needs, from the shapes of its towers: an estimate to plan with.

Counted: what lives at the peak of a training step. Not counted: the allocator's fragmentation, the device's own
context and library workspaces (leave 10 to 15 % for them), and attention kernels that store the whole n x n matrix
(the fused ones, which both towers ask for, do not).
"""

import warnings
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from pretrain.config import OptimConfig, PhaseConfig, PretrainConfig
from pretrain.engine.cost import Tower, Towers, local_batch, phase_cost
from pretrain.engine.device import Device
from pretrain.engine.optim import build_optimizer
from pretrain.objectives import passes_of

FLOAT = 4  # bytes
# Of the similarities that exist at once: their logarithmic softmax in both directions, and the gradients of those.
LOSS_COPIES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parameters: float32; a teacher's too.
        gradients: float32.
        optimizer: its state.
        weight_copies: the bfloat16 weights that autocast keeps during a step.
        activations: what the forward pass of one piece saves for the backward pass, both towers.
        working: the largest intermediate results of a block's backward pass.
        embeddings: the whole batch's, with their gradients, on every device.
        loss: rows of the similarity matrix.
        batch: uint8 images and int64 tokens of one piece; the other pieces wait in main memory.
    """

    parameters: int
    gradients: int
    optimizer: int
    weight_copies: int
    activations: int
    working: int
    embeddings: int
    loss: int
    batch: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, item.name) for item in fields(self))


def block_activation_bytes(tower: Tower, tokens: int, bf16: bool) -> int:
    """What one block saves for the backward pass of one sample.

    In elements a token, d the width and m the hidden size: two norms save their inputs (2d, always float32) and their
    statistics; in the precision of the matmuls, the linear layers save their inputs (d, d, d, m), attention q, k, v
    and (shared with the last linear's input) its output (3d), the GELU its input (m). Text: nn.MultiheadAttention
    copies its output into another layout, so both are saved (d more). LayerScale: its inputs (2d more). Blocks with
    RMS norms save up to a fifth more.
    """
    d, m, e = tower.width, tower.mlp_ratio * tower.width, 2 if bf16 else FLOAT
    elements = 6 * d + 2 * m + (0 if tower.patch_size else d) + (2 * d if tower.has_layer_scale else 0)
    statistics = FLOAT * (4 + tower.heads)  # mean and deviation of two norms, logarithmic sums of attention
    return round(tokens * (2 * d * FLOAT + elements * e + statistics))


def activation_bytes(tower: Tower, tokens: int, patches: int, bf16: bool) -> int:
    """What a tower saves for the backward pass of one sample: its blocks, its last norm and, for images, the pixels."""
    pixels = patches * 3 * tower.patch_size**2 * (2 if bf16 else FLOAT)
    return tower.depth * block_activation_bytes(tower, tokens, bf16) + tokens * tower.width * FLOAT + pixels


def working_bytes(tower: Tower, tokens: int, bf16: bool) -> int:
    """Gradients that live at once in a block's backward pass: of the residual stream and of the hidden layer, twice."""
    hidden = tower.mlp_ratio * tower.width * (2 if bf16 else FLOAT)
    return round(2 * tokens * (tower.width * FLOAT + hidden))


def optimizer_bytes(module: nn.Module, optim: OptimConfig) -> int:
    """State of the configured optimiser: one step of the real one is taken on the meta device, which is exact; one that
    cannot step there is taken for an Adam, with a warning.

    Raises:
        ConfigError: if the optimiser does not exist or cannot be made with its options.
    """
    parameters = list(module.parameters())
    try:
        optimizer = build_optimizer(module, optim, Device("cpu"))
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    except RuntimeError:  # it reads values (novograd, adamp, kron …), of which the meta device has none
        warnings.warn(f"optim: the state of {optim.name} is estimated as that of an Adam", stacklevel=2)
        return 2 * FLOAT * sum(p.numel() for p in parameters)
    finally:
        for parameter in parameters:
            parameter.grad = None
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def uses_bf16(config: PretrainConfig) -> bool:
    """Whether matmuls run in bfloat16; `auto` is taken to on anything but a CPU, since plans are for accelerators."""
    return config.run.precision == "bf16" or (config.run.precision == "auto" and config.run.device != "cpu")


def phase_memory(
    phase: PhaseConfig, towers: Towers, config: PretrainConfig, devices: int = 1, optimizer_state: int | None = None
) -> Memory:
    """Estimate the peak of a training step on one of `devices`.

    Args:
        phase: its batch is shared by the devices; a micro batch is what one device encodes at a time.
        towers: from `describe_towers`.
        config: for the optimiser, the precision, the rows of similarities held at once (`chunk_size` of the phase's
            objective) and whether FSDP spreads parameters, gradients and optimiser state over the devices.
        devices: how many share each batch.
        optimizer_state: from `optimizer_bytes`, where already known.

    Raises:
        ConfigError: if the batch cannot be shared or the towers cannot take the phase.
    """
    bf16 = uses_bf16(config)
    local = local_batch(phase, devices)
    piece = min(phase.micro_batch_size or local, local)
    rows = min(config.objective_of(phase).options.get("chunk_size", 0) or local, local)
    passes, patches = passes_of(config, phase), towers.image.patches(phase.image_size)
    tokens = phase_cost(phase, towers, devices, passes).image_tokens
    saved = passes.images * activation_bytes(towers.image, tokens, patches, bf16)
    saved += passes.texts * activation_bytes(towers.text, phase.context_length, 0, bf16)
    image_work = working_bytes(towers.image, tokens, bf16)
    text_work = working_bytes(towers.text, phase.context_length, bf16)
    count = sum(p.numel() for p in towers.module.parameters())
    # Autocast does not copy tables that are looked up or added: positions, words, class and register tokens.
    tables = ("pos_embed", "positional_embedding", "token")
    multiplied = sum(
        p.numel() for n, p in towers.module.named_parameters() if p.ndim > 1 and not any(t in n for t in tables)
    )
    parts = devices if config.run.parallel == "fsdp" else 1
    state = optimizer_bytes(towers.module, config.optim_of(phase)) if optimizer_state is None else optimizer_state
    return Memory(
        parameters=FLOAT * count * (2 if passes.teacher_images else 1) // parts,
        gradients=FLOAT * count // parts,
        optimizer=state // parts,
        weight_copies=2 * multiplied // parts if bf16 else 0,
        activations=piece * saved,
        working=piece * max(image_work, text_work),
        embeddings=2 * (passes.images + passes.texts) * phase.batch_size * towers.embed_dim * FLOAT,
        loss=LOSS_COPIES * rows * phase.batch_size * FLOAT,
        batch=piece * (passes.images * 3 * phase.image_size**2 + passes.texts * 8 * phase.context_length),
    )


def largest_micro_batch(
    phase: PhaseConfig, towers: Towers, config: PretrainConfig, limit: float, devices: int = 1,
    optimizer_state: int | None = None,
) -> int:  # fmt: skip
    """The largest micro batch that halves the device's share of the batch some times and stays under `limit` bytes.

    Returns:
        Pairs; 0 if not even the smallest fits.
    """
    state = optimizer_bytes(towers.module, config.optim_of(phase)) if optimizer_state is None else optimizer_state
    piece = local_batch(phase, devices)
    while True:
        tried = replace(phase, micro_batch_size=piece)
        if phase_memory(tried, towers, config, devices, state).total <= limit:
            return piece
        if piece % 2:
            return 0
        piece //= 2
