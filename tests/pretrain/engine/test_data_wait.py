"""The share of the time that a run waited for data."""

import json
import time
from pathlib import Path

import pytest
import torch

from pretrain.data.loader import TrainingPairs
from pretrain.engine import data_wait, train
from pretrain.engine.data_wait import DataWait
from pretrain.engine.train import Trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Clock:
    """Stands for the module `time`: it moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(data_wait, "time", clock)
    monkeypatch.setattr(train, "time", clock)
    return clock


def slow(count, seconds, sleep=time.sleep):
    for number in range(count):
        sleep(seconds)
        yield number


def test_waiting_is_the_loaders_part_of_the_time_and_is_counted_anew(clock):
    waiting, started, shares = DataWait(torch.device("cpu")), 0.0, []
    for number in waiting.over(slow(6, 6.0, clock.sleep)):
        clock.sleep(2.0 if number < 3 else 18.0)
        if number in (2, 5):
            shares.append(waiting.share(clock.now - started))
            clock.sleep(30.0)  # an evaluation: neither loading nor training
            started = clock.now
    assert shares == pytest.approx([18 / 24, 18 / 72])
    note = waiting.note("main", 2)  # 36 of 96 seconds
    assert "phase main waited for data 38% of its time" in note and "(data.workers, 2 here)" in note


def test_a_loop_that_hardly_waits_is_told_nothing(clock):
    waiting = DataWait(torch.device("cpu"))
    assert waiting.note("main", 2) == ""
    for _ in waiting.over(slow(2, 1.0, clock.sleep)):
        clock.sleep(10.0)
    assert waiting.share(clock.now) == pytest.approx(2 / 22) and waiting.note("main", 2) == ""


@pytest.mark.parametrize("loading", [0.5, 0.0])
def test_a_run_says_how_much_of_its_time_it_waited(run_config, monkeypatch, capsys, clock, loading):
    """12 pairs a step that take `loading` seconds each to load, and 4 seconds to train on."""
    load, step = TrainingPairs.__getitem__, Trainer._step
    monkeypatch.setattr(TrainingPairs, "__getitem__", lambda self, key: (clock.sleep(loading), load(self, key))[1])
    monkeypatch.setattr(Trainer, "_step", lambda self, *given: (clock.sleep(4.0), step(self, *given))[1])
    config = run_config([{"steps": 3, "name": "main"}], evaluation={"splits": []})
    Trainer(config).train()
    lines = [json.loads(line) for line in (Path(config.run.output) / "metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait"] for line in lines if "loss" in line]
    assert shares == pytest.approx([12 * loading / (12 * loading + 4.0)] * 3)
    printed = capsys.readouterr()
    assert ("phase main waited for data 60% of its time" in printed.out) == bool(loading)
    assert ("(data.workers, 0 here)" in printed.out) == bool(loading)


@needs_gpu
@pytest.mark.parametrize(("loading", "low", "high"), [(0.02, 0.0, 0.1), (0.1, 0.4, 0.7)])
def test_on_a_gpu_only_the_devices_own_waiting_counts(loading, low, high):
    """The loop waits in both cases, since it runs ahead of steps of about 40 ms; the device in the second one alone."""
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)

    def step(repeats):
        for _ in range(repeats):
            torch.matmul(matrix, matrix)

    step(3)
    torch.cuda.synchronize()
    started = time.perf_counter()
    step(100)
    torch.cuda.synchronize()
    repeats = max(1, round(0.04 / (time.perf_counter() - started) * 100))
    waiting, started = DataWait(device), time.perf_counter()
    for _ in waiting.over(slow(20, loading)):
        step(repeats)
    torch.cuda.synchronize()
    share = waiting.share(time.perf_counter() - started)
    assert low <= share <= high
