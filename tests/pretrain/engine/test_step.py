"""One optimiser step: pieces with cached embeddings against the whole batch, gradients and memory."""

import copy

import pytest
import torch

from pretrain.config import ConfigError, OptimConfig, PhaseConfig
from pretrain.engine.device import Device
from pretrain.engine.processes import Processes
from pretrain.engine.step import TrainStep
from pretrain.objectives.focal import FocalContrastive
from pretrain.objectives.info_nce import InfoNCE, InfoNCEOptions

PAIRS, LENGTH = 24, 8


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 49000, (PAIRS, LENGTH), generator=generator)
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    images = torch.randint(0, 256, (PAIRS, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return {"image": images, "tokens": tokens}


def train_once(objective, batch, phase, step=0, **optim):
    """One step of plain SGD on a copy: returns the output and the gradients by name."""
    objective = copy.deepcopy(objective).train()
    objective.enter_phase(phase)
    live = TrainStep(objective, phase, OptimConfig(name="sgd", weight_decay=0.0, **optim), Device("cpu"))
    output = live(batch, step)
    return output, {name: p.grad.clone() for name, p in objective.named_parameters()}


def phase(**values):
    return PhaseConfig(image_size=32, context_length=LENGTH, batch_size=PAIRS, **values)


def assert_same_gradients(left, right, tolerance=1e-5):
    assert left.keys() == right.keys()
    for name in left:
        scale = right[name].abs().max().clamp(min=1e-3)
        assert (left[name] - right[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("micro", [1, 8, 12])
@pytest.mark.parametrize("kind", [InfoNCE, FocalContrastive])
def test_pieces_give_the_gradient_of_the_whole_batch(model, model_config, batch, micro, kind):
    objective = kind(model, model_config)
    whole_output, whole = train_once(objective, batch, phase())
    output, pieces = train_once(objective, batch, phase(micro_batch_size=micro))
    torch.testing.assert_close(output["loss"], whole_output["loss"])
    assert set(output) == set(whole_output)
    assert_same_gradients(pieces, whole)


def test_pieces_differ_from_accumulating_the_losses_of_small_batches(model, model_config, batch):
    """The check above can fail: the mean of losses over small batches has other negatives, and another gradient."""
    objective = InfoNCE(model, model_config)
    _, whole = train_once(objective, batch, phase())
    objective.enter_phase(phase())
    for piece in range(0, PAIRS, 8):
        (objective({name: value[piece : piece + 8] for name, value in batch.items()})["loss"] / 3).backward()
    naive = {name: p.grad for name, p in objective.named_parameters()}
    with pytest.raises(AssertionError):
        assert_same_gradients(naive, whole, tolerance=1e-2)


@pytest.mark.parametrize("kind", ["random", "block"])
def test_pieces_drop_the_same_tokens_in_both_passes(model, model_config, batch, kind):
    """Otherwise the cached embeddings would not be those that the gradient flows back through."""
    objective = InfoNCE(model, model_config)
    dropping = {"token_dropping": kind, "keep_tokens": 2, "cropped_positions": True}
    seen = []
    inner = objective.encode

    def encode(given):
        features = inner(given)
        seen.append(features["image"].detach().clone())
        return features

    objective.encode = encode
    objective.enter_phase(phase(**dropping))
    objective.train()
    live = TrainStep(
        objective, phase(**dropping, micro_batch_size=12), OptimConfig(name="sgd"), Device("cpu"), seed=3
    )  # fmt: skip
    live(batch, 0)
    first, second = seen[:2], seen[2:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    seen.clear()
    live(batch, 1)
    assert not torch.equal(seen[0], first[0])  # another step draws other tokens


def saved_bytes(objective, batch, phase) -> int:
    """The most memory that tensors saved for a backward pass take at once during a step."""
    live_bytes, peak = 0, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal live_bytes, peak
            self.tensor, self.size = tensor, tensor.untyped_storage().nbytes()
            live_bytes += self.size
            peak = max(peak, live_bytes)

        def __del__(self):
            nonlocal live_bytes
            live_bytes -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        train_once(objective, batch, phase)
    return peak


def test_the_memory_of_activations_does_not_grow_with_the_batch(model, model_config, batch):
    objective = InfoNCE(model, model_config, InfoNCEOptions(chunk_size=4))
    half = {name: value[: PAIRS // 2] for name, value in batch.items()}
    small_phase = PhaseConfig(image_size=32, context_length=LENGTH, batch_size=PAIRS // 2, micro_batch_size=4)
    small, large = saved_bytes(objective, half, small_phase), saved_bytes(objective, batch, phase(micro_batch_size=4))
    at_once = saved_bytes(objective, batch, phase())
    assert large < 1.02 * small and at_once > 2.5 * large


@pytest.mark.parametrize(
    ("values", "processes", "message"),
    [
        ({"micro_batch_size": 7}, Processes(), "micro_batch_size 7 does not cut the 24 pairs of a process into equal"),
        ({}, Processes(world=5), "batch_size 24 cannot be shared equally by 5 processes: use a multiple of them"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(model, model_config, values, processes, message):
    with pytest.raises(ConfigError, match=message):
        TrainStep(InfoNCE(model, model_config), phase(**values), OptimConfig(), Device("cpu"), processes)


def test_the_learning_rate_follows_the_schedule_and_the_factor_of_a_group(model, model_config, batch):
    objective = InfoNCE(model, model_config)
    given = phase(lr=0.1, warmup_steps=4, steps=8)
    objective.enter_phase(given)
    live = TrainStep(objective, given, OptimConfig(name="sgd"), Device("cpu"))
    live.optimizer.param_groups[0]["lr_scale"] = 0.5
    live(batch, 1)  # 0-based: the second of four warm-up steps
    rates = [group["lr"] for group in live.optimizer.param_groups]
    assert rates[0] == pytest.approx(0.025) and rates[1] == pytest.approx(0.05)
