"""Losses over two real processes against one: the same number and the same gradients."""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pretrain.losses.contrastive import info_nce
from pretrain.losses.focal import focal_contrastive
from pretrain.losses.gather import gather_features, process_count, process_index, rank_offset

LOSSES = {
    "info_nce": info_nce,
    "info_nce in chunks of 3": partial(info_nce, chunk_size=3),
    "info_nce in chunks of 1": partial(info_nce, chunk_size=1),
    "focal": partial(focal_contrastive, gamma=2.0, alpha=0.4),
    "focal in chunks of 3": partial(focal_contrastive, gamma=2.0, alpha=0.4, chunk_size=3),
}


class Towers(nn.Module):
    """The least that has features of two kinds and a temperature; in double precision, to compare exactly."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64))
        self.text = nn.Parameter(torch.randn(4, 5, generator=generator, dtype=torch.float64))
        self.logit_scale = nn.Parameter(torch.tensor(10.0, dtype=torch.float64).log())

    def forward(self, loss, images, texts):
        image, text = F.normalize(images @ self.image, dim=-1), F.normalize(texts @ self.text, dim=-1)
        return loss(image, text, self.logit_scale.exp(), gather=True)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight pairs."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(8, 6, generator=generator, dtype=torch.float64),
        torch.randn(8, 4, generator=generator, dtype=torch.float64),
    )


def loss_and_gradients(towers: nn.Module, loss, images, texts) -> dict[str, torch.Tensor]:
    towers.zero_grad()
    value = towers(loss, images, texts)
    value.backward()
    named = {name.removeprefix("module."): p.grad.clone() for name, p in towers.named_parameters()}
    return {"loss": value.detach(), **named}


def fake_xla() -> dict[str, ModuleType]:
    """torch-xla's interface over torch.distributed: several processes on XLA need a TPU."""
    xla, runtime, core, model = (ModuleType(name) for name in ("torch_xla", "runtime", "core", "xla_model"))
    runtime.is_spmd, runtime.world_size, runtime.global_ordinal = lambda: False, dist.get_world_size, dist.get_rank
    model.REDUCE_SUM = "sum"

    def all_gather(value, dim):
        assert dim == 0
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    def reduce_scatter(reduce_type, value, scale, scatter_dim, shard_count):
        assert (reduce_type, scatter_dim, shard_count) == ("sum", 0, dist.get_world_size())
        total = value.clone()
        dist.all_reduce(total)
        return scale * total.chunk(shard_count)[dist.get_rank()]

    model.all_gather, model.reduce_scatter = all_gather, reduce_scatter
    xla.runtime, xla.core, core.xla_model = runtime, core, model
    names = ("torch_xla", "torch_xla.runtime", "torch_xla.core", "torch_xla.core.xla_model")
    return dict(zip(names, (xla, runtime, core, model), strict=True))


def in_one_of_two() -> dict:
    """What each process does; everything in one start, which takes longest."""
    rank = dist.get_rank()
    result = {"where": (process_count(), process_index(), rank_offset(4))}
    result["rows"] = gather_features(torch.full((2, 3), float(rank)))
    images, texts = (half.chunk(2)[rank] for half in batch())
    towers = nn.parallel.DistributedDataParallel(Towers())
    for name, loss in LOSSES.items():
        result[name] = loss_and_gradients(towers, loss, images, texts)
        with mock.patch.dict(sys.modules, fake_xla()):
            result[f"xla {name}"] = loss_and_gradients(towers, loss, images, texts)
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(8, 16), dim=-1).chunk(2)[rank] for _ in range(2))
    result["single precision"] = info_nce(image, text, 10.0, gather=True)
    result["without gather"] = info_nce(image, text, 10.0)
    result["own rows"] = (image, text)
    return result


@pytest.fixture(scope="module")
def results(run_processes):
    return run_processes(in_one_of_two)


def test_processes_know_their_place_and_gather_in_order(results):
    assert [result["where"] for result in results] == [(2, 0, 0), (2, 1, 4)]
    for result in results:
        assert torch.equal(result["rows"], torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None].expand(4, 3))


@pytest.mark.parametrize("name", [*LOSSES, *(f"xla {name}" for name in LOSSES)])
def test_loss_and_gradients_are_those_of_one_process(results, name):
    whole = loss_and_gradients(Towers(), LOSSES[name.removeprefix("xla ").split(" in chunks")[0]], *batch())
    for result in results:  # gradients after DistributedDataParallel's mean
        for key, expected in whole.items():
            torch.testing.assert_close(result[name][key], expected, atol=1e-10, rtol=1e-10, msg=f"{name}: {key}")
    assert whole["logit_scale"] != 0


def test_single_precision_is_near_enough(results):
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(8, 16), dim=-1) for _ in range(2))
    for result in results:
        torch.testing.assert_close(result["single precision"], info_nce(image, text, 10.0), atol=1e-6, rtol=1e-6)


def test_without_gather_each_process_sees_its_own_pairs(results):
    losses = [info_nce(*result["own rows"], 10.0) for result in results]
    assert [result["without gather"].item() for result in results] == [loss.item() for loss in losses]
    assert losses[0] != losses[1]


def test_one_process_gathers_itself():
    features = torch.randn(3, 2)
    assert gather_features(features) is features and (process_count(), process_index(), rank_offset(5)) == (1, 0, 0)


def test_xlas_single_program_mode_is_one_process(monkeypatch):
    runtime = SimpleNamespace(is_spmd=lambda: True, world_size=lambda: 4, global_ordinal=lambda: 2)
    monkeypatch.setitem(sys.modules, "torch_xla", SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "torch_xla.runtime", runtime)
    assert process_count() == 1


def test_a_failure_in_one_process_is_shown_and_ends_the_others(run_processes):
    with pytest.raises(AssertionError, match=r"(?s)exit codes \[None, 1\].*division by zero"):
        run_processes(divide_by_rank_less_one)


def divide_by_rank_less_one():
    1 / (dist.get_rank() - 1)
    dist.barrier()
