"""The planner's command line: its JSON adds up, its table is readable, mistakes get one sentence."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "configs" / "pretrain"
SMALL = """
model:
  image: {timm_model: test_vit4}
  text: {width: 32, heads: 2, layers: 2, context_length: 16, vocab_size: 500}
  embed_dim: 32
phases:
  - {name: main, steps: 1000, image_size: 32, context_length: 8, batch_size: 64, micro_batch_size: 16}
  - {name: fine, steps: 10, image_size: 64, context_length: 16, batch_size: 32}
run: {device: cpu}
"""


@pytest.fixture(scope="module")
def main(command):
    return command("plan")


@pytest.fixture
def plan(main, tmp_path, capsys):
    """Run on the small configuration (or `config`); returns the JSON object, which must be all of stdout."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)

    def call(*arguments, config: Path = path) -> dict:
        assert main(["--config", str(config), "--json", *map(str, arguments)]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_the_preset_saves_what_the_paper_says(plan):
    report = plan(config=PRESETS / "reclip_l16_64px_550k_ft20k.yaml")
    main, fine = report["phases"]
    assert (main["image_tokens"], main["text_tokens"], fine["image_tokens"], fine["text_tokens"]) == (16, 16, 196, 64)
    assert f"{main['image_forward_flops'] / 1e9:.3g} {fine['image_forward_flops'] / 1e9:.4g}" == "9.71 122.5"
    assert main["samples"] == 550_000 * 16384
    assert 7.5 < report["saving"] < 8.1
    assert main["memory_bytes"] < 16e9


def test_phases_add_up_to_the_totals(plan):
    report = plan("--flops", 1e12)
    for phase in report["phases"]:
        forward = phase["image_forward_flops"] + phase["text_forward_flops"]
        assert phase["training_flops"] == 3 * phase["steps"] * phase["batch_size"] * forward
        assert phase["memory_bytes"] == sum(phase["memory"].values())
        all_flops = phase["training_flops"] + phase["recompute_flops"] + phase["loss_flops"]
        assert phase["device_hours"] == pytest.approx(all_flops / 1e12 / 3600)
    assert report["training_flops"] == sum(p["training_flops"] for p in report["phases"])
    assert report["saving"] == pytest.approx(report["baseline_training_flops"] / report["training_flops"])
    assert report["device_hours"] == pytest.approx(sum(p["device_hours"] for p in report["phases"]))


def test_every_phase_holds_the_state_of_its_own_optimiser(plan, tmp_path):
    """Of AdamW two numbers a parameter, of plain SGD none; the run's own optimiser counts in no phase here."""
    path = tmp_path / "optimisers.yaml"
    path.write_text(SMALL.replace("size: 64, mic", "size: 64, optim: {name: adamw}, mic").replace(
        "batch_size: 32}", "batch_size: 32, optim: {name: sgd, options: {momentum: 0, nesterov: false}}}"
    ) + "optim: {name: adafactor}\n")  # fmt: skip
    report = plan("--memory", 1e9, config=path)
    main, fine = (phase["memory"]["optimizer"] for phase in report["phases"])
    assert main == pytest.approx(8 * report["parameters"], rel=1e-3) and fine == 0


def test_a_throughput_counts_in_the_first_phase_and_is_scaled_in_others(plan):
    report = plan("--throughput", 100)
    main, fine = report["phases"]
    assert main["device_hours"] == pytest.approx(64_000 / 100 / 3600)
    per_pair = [(p["training_flops"] + p["recompute_flops"] + p["loss_flops"]) / p["samples"] for p in report["phases"]]
    assert fine["device_hours"] == pytest.approx(320 / (100 * per_pair[0] / per_pair[1]) / 3600)


def test_measuring_gives_hours_and_the_ratio_of_times(plan):
    report = plan("--measure", "--measure-batch", 2, "--measure-seconds", 0.01, "--baseline-image-size", 96)
    rates = [item["measured"] for item in (*report["phases"], report["baseline"])]
    assert [rate["batch"] for rate in rates] == [2, 2, 2] and all(rate["pairs_per_second"] > 0 for rate in rates)
    fine = report["phases"][1]  # at once: only the similarities are beside the measured work
    assert fine["device_hours"] == pytest.approx(320 / rates[1]["pairs_per_second"] / 3600, rel=0.01)
    assert report["time_saving"] == pytest.approx(report["baseline_device_hours"] / report["device_hours"])


def test_overrides_and_baseline_options_count(plan, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(SMALL.replace("image_size: 32", "image_size: 128"))
    from_file = plan("--baseline", other)
    assert (from_file["baseline"]["image_size"], from_file["baseline"]["context_length"]) == (128, 8)
    given = plan("--baseline-image-size", 128, "--baseline-context-length", 8)
    assert given["baseline"] == from_file["baseline"]
    assert plan("phases[0].image_size=64")["phases"][0]["image_tokens"] == 17  # 16 patches and a register


def test_without_a_smaller_phase_there_is_no_baseline_and_no_saving(main, plan, capsys):
    preset = PRESETS / "uta_b16.yaml"
    report = plan("--flops", 1e12, config=preset)
    of_baseline = ("baseline", "baseline_training_flops", "saving", "baseline_device_hours", "time_saving")
    assert [report[name] for name in of_baseline] == [None] * 5 and report["device_hours"] > 0
    assert main(["--config", str(preset), "--flops", "1e12"]) == 0
    printed = capsys.readouterr().out
    assert "baseline" not in printed and "saving" not in printed and "device-hours" in printed
    full = ("phases[0].image_size=224", "phases[1].image_size=224")
    assert plan(*full)["baseline"]["context_length"] == 16  # texts of 8 alone are compared with whole ones
    asked = plan("--baseline-image-size", 224, config=preset)
    assert asked["baseline_training_flops"] == report["phases"][0]["training_flops"]


def test_devices_share_the_batch(plan):
    one, four = plan(), plan("--devices", 4)
    assert four["phases"][0]["recompute_flops"] == 0 < one["phases"][0]["recompute_flops"]
    assert four["phases"][1]["memory"]["activations"] * 4 == one["phases"][1]["memory"]["activations"]
    assert four["training_flops"] == one["training_flops"]


def test_the_table_shows_phases_totals_and_the_finetune_apart(main, tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(SMALL)
    options = ["--baseline-image-size", "64", "--memory", "2", "--flops", "1e12"]
    assert main(["--config", str(tmp_path / "small.yaml"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["image", "text"] and lines[1].split()[:3] == ["phase", "steps", "px"]
    assert [line.split()[:5] for line in lines[3:5]] == [
        ["main", "1,000", "32", "5", "8"],
        ["fine", "10", "64", "17", "16"],
    ]
    assert max(map(len, lines)) <= 160
    text = "\n".join(lines)
    for expected in ("saving", "finetune at 64 px", "second forward pass", "similarity matrices", "device-hours"):
        assert expected in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "5"], "batch_size 64 cannot be shared equally by 5 devices"),
        (["phases[0].image_size=40"], "40 is not a multiple of the patch size 16: use 32"),
        (["--baseline-image-size", "100"], "100 is not a multiple"),
        (["optim.name=admaw"], "admaw"),
        (["phases[0].stesp=4"], "steps"),
        (["--baseline", "missing.yaml"], "missing.yaml"),
    ],
)
def test_mistakes_get_one_sentence(main, tmp_path, capsys, arguments, message):
    (tmp_path / "small.yaml").write_text(SMALL)
    assert main(["--config", str(tmp_path / "small.yaml"), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = captured.err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]


@pytest.mark.parametrize("wrong", [["--devices", "0"], ["--flops", "-1"], ["--throughput", "nan"], ["--memory", "x"]])
def test_values_out_of_range_are_usage_errors(main, wrong):
    with pytest.raises(SystemExit) as stop:
        main(["--config", "any.yaml", *wrong])
    assert stop.value.code == 2


def test_two_sources_of_speed_are_a_usage_error(main):
    with pytest.raises(SystemExit) as stop:
        main(["--config", "any.yaml", "--flops", "1e12", "--measure"])
    assert stop.value.code == 2
