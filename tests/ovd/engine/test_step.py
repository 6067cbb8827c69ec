"""One step: precision, clipping, losses that are not finite."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ovd.engine.step import DetectorTrainer, autocast_dtype
from pretrain.config import ConfigError


class Quadratic(nn.Module):
    """Two losses of one weight vector; remembers the type that matrices are multiplied in."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))

    def forward(self, batch):
        product = batch @ self.weight.T
        self.dtype = product.dtype
        return {"first": product.float().mean(), "second": 0.5 * self.weight.square().sum()}


def run(batches, **settings):
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = DetectorTrainer(model, batches, optimizer, **settings)
    with EventStorage() as trainer.storage:
        for trainer.iter in range(len(batches)):
            trainer.run_step()
        return model, {name: value for name, (value, _) in trainer.storage.latest().items()}


def test_a_step_is_plain_gradient_descent_and_logs_every_loss():
    model, logged = run([torch.tensor([[1.0, 2.0]])])
    torch.testing.assert_close(model.weight.data, torch.tensor([[-1.0, -2.0]]))  # w - (x + w)
    assert model.dtype == torch.float32
    assert (logged["first"], logged["second"], logged["total_loss"]) == (11.0, 12.5, 23.5)


def test_clipping_scales_the_whole_gradient_to_the_norm():
    model, logged = run([torch.tensor([[0.0, 0.0]])], clip_norm=1.0)
    torch.testing.assert_close(model.weight.data, torch.tensor([[3.0 - 0.6, 4.0 - 0.8]]))  # gradient (3, 4), norm 5
    assert logged["gradient_norm"] == pytest.approx(5.0)
    with pytest.raises(ConfigError, match="clip_norm is -1"):
        run([], clip_norm=-1)


def test_bfloat16_on_the_cpu_multiplies_in_bfloat16_and_updates_in_float32():
    model, _ = run([torch.tensor([[1.0, 2.0]])], dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.weight.dtype == torch.float32
    torch.testing.assert_close(model.weight.data, torch.tensor([[-1.0, -2.0]]))


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = Quadratic()
    trainer = DetectorTrainer(model, [torch.tensor([[float("nan"), 1.0]])], torch.optim.SGD(model.parameters(), lr=1.0))
    trainer.iter = 17
    with EventStorage() as trainer.storage, pytest.raises(FloatingPointError, match="step 17.*'first': nan.*'second'"):
        trainer.run_step()
    torch.testing.assert_close(model.weight.data, torch.tensor([[3.0, 4.0]]))


def test_what_amp_means_on_a_cpu():
    cpu = torch.device("cpu")
    assert [autocast_dtype(amp, cpu) for amp in (True, "auto", False, "off")] == [None] * 4
    assert autocast_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ConfigError, match="needs a GPU"):
        autocast_dtype("float16", cpu)
    with pytest.raises(ConfigError, match="choose auto, off, bfloat16 or float16"):
        autocast_dtype("fp16", cpu)
