"""The published settings as files: they hold what the paper says, fit what they claim, and their comments are true."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from pretrain.config import PretrainConfig, load_config
from pretrain.engine.cost import describe_towers, make_plan
from pretrain.engine.memory import optimizer_bytes, phase_memory
from pretrain.engine.schedule import lr_at

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
PRESETS = sorted(p.stem for p in FOLDER.glob("reclip_[sbl]16_*.yaml"))
NAME = re.compile(r"reclip_(?P<tower>[sbl])16_(?P<size>\d+)px_(?P<steps>\d+)k_ft(?P<fine>\d+)k(_(?P<fine_size>\d+)px)?")
WIDTHS = {"s": (384, 12), "b": (768, 12), "l": (1024, 24)}


def preset(name: str) -> PretrainConfig:
    return load_config(FOLDER / f"{name}.yaml")


@pytest.fixture(scope="module")
def described():
    """Towers and bytes of optimiser state of each size, found once."""
    found = {}

    def find(name: str):
        size = name.split("_")[1]
        if size not in found:
            config = preset(name)
            towers = describe_towers(config.model)
            found[size] = towers, optimizer_bytes(towers.module, config.optim)
        return found[size]

    return find


def test_every_published_setting_has_a_preset():
    matches = [m for m in map(NAME.fullmatch, PRESETS) if m]
    assert {m["tower"] for m in matches} == {"s", "b", "l"}
    large = [m for m in matches if m["tower"] == "l"]
    assert {m["size"] for m in large} == {"64", "80", "112"}
    assert {m["steps"] for m in large} == {"250", "550"}
    assert {m["fine"] for m in large} == {"20", "50"}
    assert {m["fine_size"] for m in large} == {None, "448"}
    assert {f"reclip_{tower}16_baseline_224px_550k" for tower in "sbl"} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_values_and_what_its_name_says(name, described):
    config = preset(name)
    towers, _ = described(name)
    assert (towers.image.width, towers.image.depth) == WIDTHS[name.split("_")[1][0]]
    assert towers.image.patch_size == 16
    assert config.optim.name.startswith("adafactor") and config.optim.weight_decay == 0.01
    for phase in config.phases:
        assert (phase.batch_size, phase.schedule, phase.final_lr) == (16384, "linear", 0)
        peak, warmup = (1e-4, 5000) if phase.name == "finetune" else (1e-3, 2500)
        assert (phase.lr, phase.warmup_steps) == (peak, warmup)
    match = NAME.match(name)
    if match:
        main, fine = config.phases
        assert (main.image_size, main.steps) == (int(match["size"]), 1000 * int(match["steps"]))
        assert (fine.image_size, fine.steps) == (int(match["fine_size"] or 224), 1000 * int(match["fine"]))
        assert (main.context_length, fine.context_length) == (64 if name.endswith("text64") else 16, 64)
    else:
        assert [(p.image_size, p.steps, p.context_length) for p in config.phases] == [(224, 550_000, 64)]
    assert config.run.output == f"runs/{name}"


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("reclip_l16_64px_550k_ft20k", 7.5, 8.1), ("reclip_l16_64px_550k_ft20k_text64", 5.0, 5.5)],
)
def test_the_saving_of_the_recipe_is_the_published_one(name, low, high):
    assert low < make_plan(preset(name)).saving < high
    baseline = preset("reclip_l16_baseline_224px_550k")
    assert make_plan(preset(name)).baseline.training_flops == make_plan(baseline).training_flops
    assert make_plan(preset(name), baseline=baseline).saving == make_plan(preset(name)).saving


def test_the_learning_rate_rises_and_falls_as_published():
    main, fine = preset("reclip_l16_64px_550k_ft20k").phases
    assert lr_at(0, main) == pytest.approx(1e-3 / 2500)
    assert lr_at(1249, main) == pytest.approx(5e-4)
    assert lr_at(2500, main) == pytest.approx(1e-3)
    assert lr_at(2500 + 547_500 // 2, main) == pytest.approx(5e-4)
    assert 0 < lr_at(549_999, main) < 2e-9
    assert lr_at(0, fine) == pytest.approx(1e-4 / 5000)
    assert lr_at(5000, fine) == pytest.approx(1e-4)
    assert lr_at(12_500, fine) == pytest.approx(5e-5)
    assert 0 < lr_at(19_999, fine) < 1e-8


@pytest.mark.parametrize("name", PRESETS)
def test_every_phase_fits_a_16_gb_device_with_room_to_spare(name, described):
    config, (towers, state) = preset(name), described(name)
    for phase in config.phases:
        memory = phase_memory(phase, towers, config, 1, state)
        assert memory.total < 16e9 / 1.15, asdict(memory)
        assert phase.batch_size % phase.micro_batch_size == 0


@pytest.mark.parametrize("name", PRESETS)
def test_the_opening_comment_gives_a_command_and_the_planned_cost(name, described):
    text = " ".join(re.findall(r"^#(.*)$", (FOLDER / f"{name}.yaml").read_text(), re.MULTILINE)).split()
    comment = " ".join(text)
    assert f"python tools/pretrain.py --config configs/pretrain/{name}.yaml" in comment
    assert "not yet measured" in comment and "(computed, not measured)" in comment
    plan = make_plan(preset(name), towers=described(name)[0])
    stated = float(re.search(r"([\d.]+) EFLOP", comment)[1])
    assert stated == pytest.approx(plan.training_flops / 1e18, rel=1e-3)
    if len(plan.phases) > 1:
        assert f"{plan.saving:.1f}x below the 224-px baseline" in comment
    rate, whole, pieces = re.search(
        r"At ([\d.]+) PFLOP/s sustained by each device ([\d,]+) device-hours, or ([\d,]+) with", comment
    ).groups()
    hours = [float(number.replace(",", "")) * 3600 * float(rate) * 1e15 for number in (whole, pieces)]
    flops = [sum(p.training_flops + p.loss_flops for p in plan.phases), sum(p.device_flops for p in plan.phases)]
    assert hours == pytest.approx(flops, rel=0.01)


def test_all_cores_load_for_published_settings_and_one_or_two_for_miniatures():
    configs = {path.name: load_config(path) for path in sorted(FOLDER.glob("*.yaml"))}
    assert {name for name, config in configs.items() if config.data.workers is None} == {
        name for name, config in configs.items() if config.data.shards
    }
    assert {config.data.workers for config in configs.values() if not config.data.shards} <= {1, 2}
