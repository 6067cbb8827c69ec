"""How fast a training step is: images/s beside open_clip's own step, and the share of the device's peak.

Loading data is not measured here (see benchmark_data.py): each step gets random pairs as its loader would hand them
over, uint8 pixels in this project's case, normalised float32 in open_clip's. Schedules are in benchmark_schedule.py.
"""

import copy
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from open_clip import ClipLoss, CustomTextCLIP
from open_clip_train.scheduler import const_lr
from open_clip_train.train import train_one_epoch
from PIL import Image

from pretrain.config import ConfigError, ModelConfig, OptimConfig, PhaseConfig, PretrainConfig
from pretrain.data.transforms import normalise
from pretrain.engine.benchmark_data import Rates
from pretrain.engine.cost import describe_towers, phase_cost
from pretrain.engine.device import Device
from pretrain.engine.step import TrainStep
from pretrain.modeling.clip import build_model, set_context_length, set_image_size
from pretrain.objectives import Objective
from pretrain.objectives.info_nce import InfoNCE

OWN, OPEN_CLIP = "this project", "open_clip"

# open_clip's defaults for vision transformers (open_clip_train.params), for both.
_LR, _BETAS, _EPS, _WEIGHT_DECAY = 5e-4, (0.9, 0.98), 1e-6, 0.2

# Public dense peaks of one PyTorch device in bfloat16, FLOP/s; the first pattern found in the device's name counts.
PEAKS = (
    (r"\bH[12]00 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bG?H[12]00\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bV100\b", 125e12),  # float16: it has no bfloat16
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090$", 165e12),
    (r"^v3-", 123e12 / 2),  # a chip is two devices
    (r"^v4-", 275e12),
    (r"^v5litepod-", 197e12),
    (r"^v5p-", 459e12),
)


def peak_flops(name: str) -> float | None:
    """Peak of the device called `name` (as the driver or, for TPUs, TPU_ACCELERATOR_TYPE has it); None: not known."""
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name)), None)


def device_peak(device: Device) -> float | None:
    """Peak FLOP/s in bfloat16 of all devices that share a batch; None where it is unknown or precision is another."""
    if not device.bf16 or device.kind == "cpu":
        return None
    cuda = device.kind == "cuda"
    peak = peak_flops(torch.cuda.get_device_name() if cuda else os.environ.get("TPU_ACCELERATOR_TYPE", ""))
    return peak and peak * device.devices


@dataclass(frozen=True)
class TrainBenchmark:
    """What is measured: whole steps on `batch_size` random pairs."""

    model: ModelConfig
    context_length: int = 16
    batch_size: int = 256
    compile: bool = False
    seconds: float = 4.0  # of each measurement, roughly
    repeats: int = 5  # of each step, alternating
    seed: int = 0


@dataclass
class StepRates:
    """Images a second at one image size, by who made the step; `flops` of a pair, forward and backward."""

    image_size: int
    context_length: int
    batch_size: int
    flops: int
    rates: dict[str, Rates] = field(default_factory=dict)


def random_pairs(batch_size: int, phase: PhaseConfig, vocab_size: int, seed: int) -> dict[str, torch.Tensor]:
    """A batch as this project's loader hands it over: uint8 (B, 3, S, S) and int64 (B, L)."""
    rng = torch.Generator().manual_seed(seed)
    size = (batch_size, 3, phase.image_size, phase.image_size)
    batch = {
        "image": torch.randint(0, 256, size, dtype=torch.uint8, generator=rng),
        "tokens": torch.randint(1, vocab_size, (batch_size, phase.context_length), generator=rng),
    }
    return {name: _pinned(value) for name, value in batch.items()}


def random_batch(
    objective: Objective, config: PretrainConfig, phase: PhaseConfig, seed: int
) -> dict[str, torch.Tensor]:
    """As `random_pairs`, with the views that `objective` trains on."""
    views = objective.views(config.data, phase, [])
    blank, draws = Image.new("RGB", (8, 8)), np.random.default_rng(seed)
    rng = torch.Generator().manual_seed(seed)
    batch = {}
    for key, view in views.images.items():
        size = (phase.batch_size, *view(blank, draws).shape)
        batch[key] = torch.randint(0, 256, size, dtype=torch.uint8, generator=rng)
    for key in views.captions:
        shape = (phase.batch_size, phase.context_length)
        batch[key] = torch.randint(1, config.model.text.vocab_size, shape, generator=rng)
    return {name: _pinned(value) for name, value in batch.items()}


def _pinned(value: torch.Tensor) -> torch.Tensor:
    """Where both projects' loaders put batches on machines with GPUs."""
    return value.pin_memory() if torch.cuda.is_available() else value


def own_steps(
    model: CustomTextCLIP, benchmark: TrainBenchmark, phase: PhaseConfig, pairs: dict[str, torch.Tensor], device: Device
) -> Callable[[int], None]:
    """A function that trains `model` for so many of this project's steps and returns when they are done."""
    objective = InfoNCE(model, benchmark.model)
    objective.enter_phase(phase)
    objective.to(device.torch_device).train()
    optim = OptimConfig("adamw", _WEIGHT_DECAY, list(_BETAS), options={"eps": _EPS})
    step = TrainStep(objective, phase, optim, device, compile=benchmark.compile)

    def run(steps: int) -> None:
        for index in range(steps):
            step(pairs, index)
        wait_for(model)

    return run


def open_clip_steps(
    model: CustomTextCLIP, benchmark: TrainBenchmark, phase: PhaseConfig, pairs: dict[str, torch.Tensor], device: Device
) -> Callable[[int], None]:
    """The same for open_clip's `train_one_epoch` with its ClipLoss, its AdamW groups and a constant learning rate."""
    set_image_size(model, phase.image_size)
    set_context_length(model, phase.context_length)
    model.to(device.torch_device).output_dict = True  # as open_clip's own main asks of models that it trains
    # The rule of open_clip_train.main, where it cannot be called apart from the rest.
    undecayed = ("bn", "ln", "bias", "logit_scale")
    named = [(p.ndim < 2 or any(part in name for part in undecayed), p) for name, p in model.named_parameters()]
    groups = [
        {"params": [p for excluded, p in named if excluded], "weight_decay": 0.0},
        {"params": [p for excluded, p in named if not excluded], "weight_decay": _WEIGHT_DECAY},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_LR, betas=_BETAS, eps=_EPS)
    batch = (_pinned(normalise(pairs["image"])), pairs["tokens"])
    arguments = SimpleNamespace(
        device=str(device.torch_device), precision="amp_bf16" if device.bf16 else "fp32", distill=False, accum_freq=1,
        skip_scheduler=False, horovod=False, grad_clip_norm=None, rank=0, local_rank=0, world_size=1, wandb=False,
        batch_size=len(batch[0]), log_every_n_steps=100,
    )  # fmt: skip
    trained = torch.compile(model) if benchmark.compile else model
    schedule, loss = const_lr(optimizer, _LR, 0, 0), ClipLoss()

    def run(steps: int) -> None:
        data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=_Repeated(batch, steps))}
        train_one_epoch(trained, data, loss, 0, optimizer, None, schedule, None, arguments)
        wait_for(model)

    return run


class _Repeated:
    """What `train_one_epoch` needs of a loader: the same batch again and again."""

    def __init__(self, batch: tuple, count: int):
        self.batch, self.num_batches, self.num_samples = batch, count, count * len(batch[0])

    def __iter__(self):
        return iter([self.batch] * self.num_batches)


def wait_for(module: torch.nn.Module) -> None:
    """Return when the last update has happened: reading an updated value waits on every kind of device."""
    float(next(module.parameters()).detach().flatten()[0])


def _clock(work: Callable[[int], None], steps: int) -> tuple[float, float]:
    """Seconds of wall time and of CPU time (all threads) that so many steps take."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(steps)
    return time.perf_counter() - wall, time.process_time() - cpu


def alternate(works: dict[str, Callable[[int], None]], seconds: float, repeats: int) -> dict[str, list[tuple]]:
    """Time everything in turn, in the opposite order every second time: (steps, wall, CPU seconds) of each repeat."""
    counts = {}
    for name, work in works.items():
        work(1)  # allocates and compiles
        counts[name] = max(1, round(seconds / _clock(work, 1)[0]))
    times = {name: [] for name in works}
    for repeat in range(repeats):
        for name in list(works)[:: -1 if repeat % 2 else 1]:
            times[name].append((counts[name], *_clock(works[name], counts[name])))
    return times


def compare_steps(benchmark: TrainBenchmark, image_size: int, device: Device) -> StepRates:
    """Measure both steps at one image size; on XLA, where open_clip does not train, only this project's.

    Raises:
        ConfigError: for an image size or a text length that the towers cannot take.
    """
    limit = benchmark.model.text.context_length
    if benchmark.context_length > limit:
        raise ConfigError(
            f"context_length {benchmark.context_length} exceeds the text tower's {limit}: use at most that"
        )
    phase = PhaseConfig(
        "benchmark", 1, image_size, benchmark.context_length, benchmark.batch_size, lr=_LR, final_lr=_LR, warmup_steps=0
    )
    cost = phase_cost(phase, describe_towers(benchmark.model))
    torch.manual_seed(benchmark.seed)
    model = build_model(benchmark.model)
    pairs = random_pairs(benchmark.batch_size, phase, benchmark.model.text.vocab_size, benchmark.seed)
    makers = {OWN: own_steps} if device.kind == "xla" else {OWN: own_steps, OPEN_CLIP: open_clip_steps}
    works = {name: make(copy.deepcopy(model), benchmark, phase, pairs, device) for name, make in makers.items()}
    result = StepRates(image_size, benchmark.context_length, benchmark.batch_size, cost.training_flops)
    result.flops //= benchmark.batch_size
    for name, times in alternate(works, benchmark.seconds, benchmark.repeats).items():
        pairs_done = [steps * benchmark.batch_size for steps, _, _ in times]
        wall = [count / seconds for count, (_, seconds, _) in zip(pairs_done, times, strict=True)]
        cpu = [count / max(seconds, 1e-9) for count, (_, _, seconds) in zip(pairs_done, times, strict=True)]
        result.rates[name] = Rates(wall, cpu)
    return result


def steps_to_markdown(results: Iterable[StepRates], on_cpu: bool, peak: float | None = None) -> str:
    """Medians (and ranges), the ratio of medians (and the range of the repeats' ratios), FLOP/s of this project's.

    Args:
        results: one for each image size.
        on_cpu: also show rates in CPU time.
        peak: FLOP/s of the device; adds the model FLOPs utilisation.
    """
    head = ["px", "text", "batch", "measured in", f"{OWN}, images/s", f"{OPEN_CLIP}, images/s", "ratio", "FLOP/s"]
    lines = table_header(head + ["MFU"] * bool(peak))
    for result in results:
        for kind in ("wall", "cpu") if on_cpu else ("wall",):
            ours = getattr(result.rates[OWN], kind)
            theirs = getattr(result.rates[OPEN_CLIP], kind) if OPEN_CLIP in result.rates else []
            done = statistics.median(ours) * result.flops
            row = [result.image_size, result.context_length, result.batch_size, f"{kind} time", _spread(ours)]
            row += [_spread(theirs), _ratio(ours, theirs)] if theirs else ["-", "-"]
            row += [f"{done / 1e12:.3g} T" if done >= 1e12 else f"{done / 1e9:.3g} G"]
            lines.append(table_line(row + [f"{done / peak:.1%}"] if peak else row))
    return "\n".join(lines)


def table_header(names: list[str]) -> list[str]:
    return [table_line(names), "|" + "---|" * len(names)]


def table_line(cells: Iterable) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def _ratio(ours: list[float], theirs: list[float]) -> str:
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"**{statistics.median(ours) / statistics.median(theirs):.2f}** ({min(each):.2f} to {max(each):.2f})"
