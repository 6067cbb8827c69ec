"""The share of the time that a run waited for data."""

import json
import time
from pathlib import Path

import pytest
import torch

from pretrain.data.loader import TrainingPairs
from pretrain.engine.data_wait import DataWait
from pretrain.engine.train import Trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def slow(count, seconds):
    for number in range(count):
        time.sleep(seconds)
        yield number


def test_waiting_is_the_loaders_part_of_the_time_and_is_counted_anew():
    waiting, shares = DataWait(torch.device("cpu")), []
    started = time.perf_counter()
    for number in waiting.over(slow(6, 0.06)):
        time.sleep(0.02 if number < 3 else 0.18)
        if number in (2, 5):
            shares.append(waiting.share(time.perf_counter() - started))
            time.sleep(0.3)  # an evaluation: neither loading nor training
            started = time.perf_counter()
    assert shares == pytest.approx([0.75, 0.25], abs=0.12)
    note = waiting.note("main", 2)
    assert "phase main waited for data" in note and "(data.workers, 2 here)" in note


def test_a_loop_that_hardly_waits_is_told_nothing():
    waiting, started = DataWait(torch.device("cpu")), time.perf_counter()
    assert waiting.note("main", 2) == ""
    for _ in waiting.over(slow(2, 0.001)):
        time.sleep(0.2)
    assert waiting.share(time.perf_counter() - started) < 0.1 and waiting.note("main", 2) == ""


@pytest.mark.parametrize(("seconds", "low", "high"), [(0.02, 0.5, 1.0), (0.0, 0.0, 0.7)])
def test_a_run_says_how_much_of_its_time_it_waited(run_config, monkeypatch, capsys, seconds, low, high):
    original = TrainingPairs.__getitem__
    monkeypatch.setattr(TrainingPairs, "__getitem__", lambda self, key: (time.sleep(seconds), original(self, key))[1])
    config = run_config([{"steps": 3, "name": "main"}], evaluation={"splits": []})
    Trainer(config).train()
    lines = [json.loads(line) for line in (Path(config.run.output) / "metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait"] for line in lines if "loss" in line]
    assert len(shares) == 3 and all(low <= share <= high for share in shares), shares
    printed = capsys.readouterr()
    if seconds:
        assert "phase main waited for data" in printed.out and "(data.workers, 0 here)" in printed.out


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
