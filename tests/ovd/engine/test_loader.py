"""The stream of training pictures: what a position sees, over processes and restarts."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

from ovd.engine import loader
from ovd.engine.loader import PositionSampler, SeededDataset, seed_all

DICTS = [{"file_name": f"{i}.png", "number": i} for i in range(7)]


def draw(record):
    return {"number": record["number"], "numpy": np.random.rand(), "torch": torch.rand(()).item()}


def first(sampler, count):
    return list(itertools.islice(iter(sampler), count))


@pytest.mark.parametrize("kind", ["uniform", "repeat factor"])
def test_a_restarted_sampler_continues_where_the_first_one_stopped(kind):
    def make():
        if kind == "uniform":
            return TrainingSampler(7, seed=3)
        return RepeatFactorTrainingSampler(torch.tensor([1.0, 2.5, 1.3, 1.0, 3.7]), seed=3)

    whole = first(PositionSampler(make()), 60)
    assert [position for position, _ in whole] == list(range(60))
    assert [index for _, index in whole] == first(make(), 60)
    for start in (0, 1, 13, 41):
        assert first(PositionSampler(make(), start), 60 - start) == whole[start:]


def test_processes_share_the_stream_of_one(monkeypatch):
    alone = first(PositionSampler(TrainingSampler(7, seed=3)), 24)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(loader.comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(loader.comm, "get_world_size", lambda: 2)
        parts.append(first(PositionSampler(TrainingSampler(7, seed=3)), 12))
    assert [place for pair in zip(*parts, strict=True) for place in pair] == alone


def test_the_position_alone_decides_every_draw():
    data = SeededDataset(DICTS, draw, seed=5)
    expected = data[(11, 2)]
    data[(12, 3)], np.random.rand(9), torch.rand(9)
    assert data[(11, 2)] == expected
    assert data[(12, 2)]["numpy"] != expected["numpy"] and data[(12, 2)]["torch"] != expected["torch"]
    assert SeededDataset(DICTS, draw, seed=6)[(11, 2)]["numpy"] != expected["numpy"]


def test_a_refused_picture_is_replaced_by_the_same_one_every_time():
    data = SeededDataset(DICTS, lambda record: None if record["number"] < 4 else record, seed=0)
    chosen = [data[(position, 0)]["number"] for position in range(40)]
    assert chosen == [data[(position, 0)]["number"] for position in range(40)]
    assert set(chosen) == {4, 5, 6}
    with pytest.raises(ValueError, match="100 training pictures in a row .*image_root"):
        SeededDataset(DICTS, lambda record: None, seed=0)[(0, 0)]


def test_near_keys_seed_unrelated_streams():
    draws = []
    for key in itertools.product(range(3), repeat=3):
        seed_all(*key)
        draws.append((np.random.rand(), torch.rand(()).item()))
    assert len(set(draws)) == 27
