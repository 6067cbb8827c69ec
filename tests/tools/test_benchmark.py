"""The benchmarks: both data pipelines read the same shards, both training steps compute the same; tables."""

import copy
import re
from collections.abc import Callable

import numpy as np
import open_clip
import pytest
import torch

pytest.importorskip("webdataset")
pytest.importorskip("skimage")

from pretrain.config import ImageTowerConfig, ModelConfig, PhaseConfig, PretrainConfig, TextTowerConfig
from pretrain.data.shards import ShardSource, expand_shards
from pretrain.engine import benchmark_schedule, benchmark_train
from pretrain.engine.benchmark_data import (
    DataBenchmark,
    Rates,
    make_shards,
    open_clip_batches,
    own_batches,
    to_markdown,
)
from pretrain.engine.benchmark_schedule import StepTime, compare_schedules, schedule_to_markdown, time_phases
from pretrain.engine.benchmark_train import StepRates, TrainBenchmark, device_peak, peak_flops, steps_to_markdown
from pretrain.engine.cost import describe_towers, phase_cost
from pretrain.engine.device import Device
from pretrain.modeling.clip import build_model


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    return make_shards(tmp_path_factory.mktemp("shards"), images=24, side=128, per_shard=10)


@pytest.fixture
def tool(command) -> Callable[..., int]:
    return lambda *arguments: command("benchmark")(list(arguments))


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
    for _ in range(200):  # it draws shards with replacement
        if len(theirs) == 24:
            break
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


def test_the_command_prints_the_table(tool, pattern, capsys):
    small = ["--image-size", "32", "--batch-size", "8", "--seconds", "0.01", "--repeats", "1"]
    assert tool("data", "--shards", pattern, "--workers", "0", *small) == 0
    assert re.search(r"\| 0 \(in the process\) \| wall time \| \d+ .* \*\*\d+\.\d\d\*\* \|", capsys.readouterr().out)


def test_absent_shards_are_one_sentence(tool, tmp_path, capsys):
    assert tool("data", "--shards", f"{tmp_path}/none.tar") == 1
    assert capsys.readouterr().err.startswith("error: data.shards: no file")


TINY = ModelConfig(
    image=ImageTowerConfig("test_vit4", layer_scale=1.0), embed_dim=32,
    text=TextTowerConfig(width=32, heads=2, layers=1, context_length=8, vocab_size=128),
)  # fmt: skip


def _sides(benchmark, phase, monkeypatch):
    """Both steps from the same weights; the losses that each computed are collected as they train."""
    losses = {"this project": [], "open_clip": []}

    class RecordedLoss(open_clip.ClipLoss):
        def forward(self, *arguments, **options):
            result = super().forward(*arguments, **options)
            losses["open_clip"].append(result["contrastive_loss"].item())
            return result

    own_forward = benchmark_train.InfoNCE.forward

    def recorded(self, batch):
        output = own_forward(self, batch)
        losses["this project"].append(output["loss"].item())
        return output

    monkeypatch.setattr(benchmark_train, "ClipLoss", RecordedLoss)
    monkeypatch.setattr(benchmark_train.InfoNCE, "forward", recorded)
    torch.manual_seed(3)
    ours, theirs = (m := build_model(benchmark.model)), copy.deepcopy(m)
    pairs = benchmark_train.random_pairs(benchmark.batch_size, phase, 128, seed=1)
    device = Device("cpu", "fp32")
    own = benchmark_train.own_steps(ours, benchmark, phase, pairs, device)
    other = benchmark_train.open_clip_steps(theirs, benchmark, phase, pairs, device)
    return own, other, ours, theirs, losses


def test_open_clips_step_and_ours_compute_the_same(monkeypatch):
    """Three updates: the same losses and weights, so the two are compared at the same work."""
    phase = PhaseConfig(steps=1, image_size=32, context_length=6, batch_size=12, lr=5e-4, final_lr=5e-4, warmup_steps=0)
    benchmark = TrainBenchmark(TINY, context_length=6, batch_size=12)
    own, other, ours, theirs, losses = _sides(benchmark, phase, monkeypatch)
    before = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    own(3)
    other(3)
    assert losses["this project"] == pytest.approx(losses["open_clip"], abs=1e-5) and len(losses["open_clip"]) == 3
    assert losses["open_clip"][2] < losses["open_clip"][0]
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert not torch.equal(b, before[name]), f"{name} was not trained"
        mine = a.detach().clone()
        if name.endswith(("in_proj_bias", "qkv.bias")):
            # A key's bias shifts all logits of a query alike: its gradient is only rounding, which Adam enlarges.
            keys = slice(len(a) // 3, 2 * len(a) // 3)
            mine[keys] = b.detach()[keys]
        torch.testing.assert_close(mine, b.detach(), rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_command_prints_both_steps(tool, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model: {image: {timm_model: test_vit4}, embed_dim: 32,\n"
        "        text: {width: 32, heads: 2, layers: 1, context_length: 8, vocab_size: 128}}\n"
        "phases: [{context_length: 8}]\n"
    )
    small = ["--batch-size", "4", "--context-length", "6", "--seconds", "0.01", "--repeats", "2", "--device", "cpu"]
    assert tool("train", "--config", str(config), "--image-size", "32", "48", *small) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    row = r"\| {} \| 6 \| 4 \| {} time( \| [\d.e+]+ \(.*\)){{2}} \| \*\*\d+\.\d\d\*\* \(.*\) \| [\d.]+ [GT] \|"
    expected = [(32, "wall"), (32, "cpu"), (48, "wall"), (48, "cpu")]
    for line, (size, kind) in zip(lines[2:], expected, strict=True):
        assert re.fullmatch(row.format(size, kind), line)
    assert "MFU" not in lines[0] and "fp32" in output.err  # a processor's peak is not in the table
    assert tool("train", "--config", str(config), "--image-size", "40", *small) == 1
    assert capsys.readouterr().err.rstrip().endswith("is not a multiple of the patch size 16: use 32")
    assert tool("train", "--config", str(config), *small, "--context-length", "9") == 1
    assert "context_length 9 exceeds the text tower" in capsys.readouterr().err


def test_utilisation_is_flops_over_the_peak():
    result = StepRates(64, 16, 8, flops=3 * 10**9, rates={"this project": Rates([100.0, 300.0, 200.0], [1, 1, 1])})
    lines = steps_to_markdown([result], on_cpu=False, peak=2e12).splitlines()
    # 200 images/s times 3 GFLOP are 0.6 TFLOP/s, 30 % of 2.
    assert lines[2] == "| 64 | 16 | 8 | wall time | 200 (100 to 300) | - | - | 600 G | 30.0% |"


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312), ("Tesla V100-SXM2-16GB", 125), ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165), ("v3-8", 61.5), ("v4-8", 275), ("v5litepod-8", 197), ("v5p-8", 459),
        ("NVIDIA L40S", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A1000", None), ("", None),
    ],
)  # fmt: skip
def test_peaks_are_found_by_the_drivers_names(name, tera):
    assert peak_flops(name) == (tera and tera * 1e12)


def test_a_processor_has_no_peak():
    assert device_peak(Device("cpu", "bf16")) is None


def test_hours_of_a_schedule_by_hand():
    """Measured on 10 pairs: 2 s at 64 px, 20 s at 224 px, and 1 s for an update."""
    main = PhaseConfig("main", 3600, 64, context_length=8, batch_size=100)
    finetune = PhaseConfig("finetune", 36, 224, context_length=8, batch_size=100)
    config = PretrainConfig(model=TINY, phases=[main, finetune])
    asked = []

    def timer(jobs):
        asked.extend(phase for _, phase in jobs)
        return [StepTime(10, 2.0 if phase.image_size == 64 else 20.0, 1.0) for _, phase in jobs]

    times = compare_schedules(config, None, timer)
    # A step of 100 pairs: 10 x 2 + 1 = 21 s, or 10 x 20 + 1 = 201 s. The baseline has the main steps only.
    assert [(p.image_size, p.steps) for p in asked] == [(64, 3600), (224, 36), (224, 3600)]
    assert [p.hours for p in times.schedule] == pytest.approx([21.0, 2.01])
    assert times.hours == pytest.approx((23.01, 201.0)) and times.ratio == pytest.approx(201 / 23.01)
    text = schedule_to_markdown(times)
    assert "| schedule | main | 64 | 8 | 3,600 | 100 | 10 pairs | 2 | 1 | 21 |" in text
    assert "schedule 23.01 h, baseline 201 h of this device: **8.74 times**" in text
    other = PretrainConfig(model=TINY, phases=[PhaseConfig("all", 72, 224, context_length=8, batch_size=100)])
    assert compare_schedules(config, other, timer).hours[1] == pytest.approx(72 * 201 / 3600)


def test_phases_that_compute_the_same_are_measured_once(monkeypatch):
    made = []
    real = benchmark_schedule.TrainStep

    def counted(*arguments, **options):
        made.append(real(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(benchmark_schedule, "TrainStep", counted)
    phases = [PhaseConfig("a", 5, 32, 6, 64), PhaseConfig("b", 9, 48, 8, 64), PhaseConfig("c", 7, 48, 8, 64, lr=0.1)]
    config = PretrainConfig(model=TINY, phases=phases)
    times = time_phases([(config, phase) for phase in phases], Device("cpu"), batch=4, seconds=0.01, repeats=1)
    assert len(made) == 2 and times[1] is times[2] and times[0] is not times[1]
    # 4 pairs of the dearest phase, more of the cheaper one: as many as cost the same, its batch at most.
    per_pair = [phase_cost(phase, describe_towers(TINY)).training_flops / phase.steps / 64 for phase in phases]
    assert [t.pairs for t in times] == [round(4 * per_pair[1] / per_pair[0]), 4, 4] and times[0].pairs > 4
    assert all(t.compute > 0 and t.update > 0 for t in times)
