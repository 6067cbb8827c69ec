"""The data benchmark: shards that both pipelines read, the same text, a table with the ratio."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("webdataset")
pytest.importorskip("skimage")

from pretrain.data.shards import ShardSource, expand_shards
from pretrain.engine.benchmark_data import (
    DataBenchmark,
    Rates,
    make_shards,
    open_clip_batches,
    own_batches,
    to_markdown,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"), images=24, side=128, per_shard=10)


def tool(*arguments: str) -> int:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("tools_benchmark", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.main(list(arguments))
    finally:
        sys.path[:] = path


def test_made_shards_are_complete_and_repeatable(pattern, tmp_path):
    pairs = ShardSource(expand_shards(pattern))
    assert pairs.sizes.tolist() == [10, 10, 4]
    assert all(pairs.read(i)[0].size == (128, 128) for i in range(24))
    again = ShardSource(expand_shards(make_shards(tmp_path, images=24, side=128, per_shard=10)))
    assert [again.read(i)[1] for i in range(24)] == [pairs.read(i)[1] for i in range(24)]


def test_both_pipelines_show_the_same_pairs(pattern):
    """Each within its own draws: images are matched by their captions, which are the same tokens."""
    benchmark = DataBenchmark(pattern, image_size=32, batch_size=24)
    ours, theirs = next(own_batches(benchmark, 0)), {}
    iterator = open_clip_batches(benchmark, 0)
    for _ in range(6):  # it draws shards with replacement
        for image, tokens in zip(*next(iterator), strict=True):
            theirs[tuple(tokens.tolist())] = image
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]))
    differences, others = [], []
    for image, tokens in zip(ours["image"], ours["tokens"], strict=True):
        match = theirs[tuple(tokens.tolist())] * std + mean
        differences.append(float((image / 255 - match).abs().mean()))
        others.append(float((image.flip(0) / 255 - match.roll(9, 2)).abs().mean()))
    assert len(differences) == 24 and np.mean(differences) < 0.5 * np.mean(others)


def test_the_table_has_medians_and_their_ratio():
    rates = {"this project": Rates([300, 100, 500], [30, 10, 50]), "open_clip": Rates([100, 90, 150], [10, 20, 5])}
    lines = to_markdown({0: rates, 1: rates}).splitlines()
    assert lines[2] == "| 0 (in the process) | wall time | 300 (100 to 500) | 100 (90 to 150) | **3.00** |"
    assert "| cpu time | 30 (10 to 50) | 10 (5 to 20) | **3.00** |" in lines[3]
    assert lines[4].startswith("| 1 | wall time |") and len(lines) == 6


def test_the_command_prints_the_table(pattern, capsys):
    small = ["--image-size", "32", "--batch-size", "8", "--seconds", "0.01", "--repeats", "1"]
    assert tool("data", "--shards", pattern, "--workers", "0", *small) == 0
    assert re.search(r"\| 0 \(in the process\) \| wall time \| \d+ .* \*\*\d+\.\d\d\*\* \|", capsys.readouterr().out)


def test_absent_shards_are_one_sentence(tmp_path, capsys):
    assert tool("data", "--shards", f"{tmp_path}/none.tar") == 1
    assert capsys.readouterr().err.startswith("error: data.shards: no file")
