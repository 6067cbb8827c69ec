"""The moving average: decays by hand, state, and what it must not do."""

import copy

import pytest
import torch
from torch import nn

from pretrain.modeling.ema import MovingAverage


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def change(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    module.train()(torch.randn(5, 3, generator=generator))  # moves the running statistics


def follow(average: MovingAverage, module: nn.Module, seeds) -> list[torch.Tensor]:
    for seed in seeds:
        change(module, seed)
        average.update(module)
    return [p.clone() for p in average.module.parameters()]


def test_three_steps_by_hand(module):
    average, expected = MovingAverage(module, 0.999), [p.detach().clone() for p in module.parameters()]
    for k, decay in enumerate((2 / 11, 3 / 12, 4 / 13), start=1):
        change(module, k)
        average.update(module)
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, module.parameters(), strict=True)]
        for found, wanted in zip(average.module.parameters(), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    assert average.updates == 3


@pytest.mark.parametrize(("limit", "warmup", "updates"), [(0.2, True, 2), (0.9, False, 0)])
def test_the_decay_has_a_limit_and_may_be_fixed(module, limit, warmup, updates):
    average = MovingAverage(module, limit, warmup)
    average.updates.fill_(updates)
    before = [p.clone() for p in average.module.parameters()]
    change(module, 1)
    average.update(module)
    for found, old, new in zip(average.module.parameters(), before, module.parameters(), strict=True):
        torch.testing.assert_close(found, limit * old + (1 - limit) * new)


def test_after_many_updates_the_decay_is_the_limit(module):
    average = MovingAverage(module, 0.999)
    average.updates.fill_(100_000)
    before = average.module[0].weight.clone()
    change(module, 1)
    average.update(module)
    torch.testing.assert_close(average.module[0].weight, 0.999 * before + 0.001 * module[0].weight)


def test_buffers_are_copied_integers_too(module):
    module.register_buffer("mask", torch.tensor([0.0, float("-inf")]), persistent=False)
    average = MovingAverage(module)
    change(module, 1)
    average.update(module)
    assert torch.equal(average.module[1].running_mean, module[1].running_mean)
    assert average.module[1].num_batches_tracked == module[1].num_batches_tracked == 1
    assert torch.equal(average.module.mask, module.mask)


def test_a_state_dict_continues_where_it_was(module):
    start = copy.deepcopy(module)
    whole = follow(MovingAverage(start), module, range(6))
    first, other = MovingAverage(start), copy.deepcopy(module)
    follow(first, other, range(3))
    second = MovingAverage(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for found, wanted in zip(follow(second, other, range(3, 6)), whole, strict=True):
        assert torch.equal(found, wanted)


def test_it_is_never_trained_nor_in_training_mode(module):
    average = nn.ModuleList([MovingAverage(module)]).train()[0]
    assert not any(m.training for m in average.modules())
    assert not any(p.requires_grad for p in average.parameters())
    assert not average(torch.randn(2, 3, requires_grad=True)).requires_grad
    assert module.training and all(p.requires_grad for p in module.parameters())


def test_a_copy_of_another_shape_is_named(module):
    average = MovingAverage(module)
    module[0].weight = nn.Parameter(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"has 0.weight as \(4, 3\), what it follows as \(4, 5\): change both alike"):
        average.update(module)
    with pytest.raises(ValueError, match="decay of a moving average is 1.5"):
        MovingAverage(module, 1.5)
