"""The training loop, end to end on generated drawings: files, learning, phases, and resumption to the bit."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import webdataset
import yaml
from PIL import Image
from safetensors.torch import load_file

from pretrain.config import ConfigError, load_config, to_yaml
from pretrain.data.folder import read_table
from pretrain.data.pairs import load_pairs
from pretrain.engine.step import TrainStep
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import WEIGHTS_FILE, load_checkpoint

ROOT = Path(__file__).resolve().parents[3]
TWO_PHASES = [
    {"name": "small", "steps": 4, "image_size": 32, "context_length": 6},
    {"name": "large", "steps": 3, "image_size": 160, "context_length": 12},
]


class Stopped(Exception):
    """Stands for the power failing."""


def stop_after(trainer: Trainer, steps: int) -> None:
    """Let the trainer die right before its step number `steps` (0-based, over all phases)."""
    inner, count = trainer._step, 0

    def step(*arguments):
        nonlocal count
        if count == steps:
            raise Stopped
        count += 1
        return inner(*arguments)

    trainer._step = step


def metrics(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder: str | Path) -> dict[int, float]:
    lines = [line for line in metrics(folder) if "loss" in line]
    assert len({line["step"] for line in lines}) == len(lines), "a step was logged twice"
    return {line["step"]: line["loss"] for line in lines}


def assert_equal_weights(left: str | Path, right: str | Path) -> None:
    a, b = (load_file(Path(f) / "checkpoint" / WEIGHTS_FILE) for f in (left, right))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def straight(run_config):
    """Two phases without interruption."""
    config = run_config(TWO_PHASES, output="straight")
    Trainer(config).train()
    return config


def test_a_run_leaves_a_folder_that_explains_itself(straight):
    folder = Path(straight.run.output)
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "about.json", "checkpoint", "command.txt", "config.yaml", "metrics.jsonl", "state.pt", "summary.md",
        "tensorboard",
    ]  # fmt: skip
    assert load_config(folder / "config.yaml") == straight
    about = json.loads((folder / "about.json").read_text())
    assert about["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    digest = subprocess.run(["sha256sum", straight.data.table], capture_output=True, text=True, check=True).stdout
    assert about["data"] == {straight.data.table: digest.split()[0]} and about["git_revision"]
    assert len((folder / "command.txt").read_text().splitlines()) == 1
    found = losses(folder)
    assert list(found) == list(range(1, 8)) and all(math.isfinite(value) for value in found.values())
    lines = [line for line in metrics(folder) if "zero_shot_val_top1" in line]
    assert [(line["phase"], line["step"]) for line in lines] == [("small", 4), ("large", 7)]
    summary = (folder / "summary.md").read_text()
    assert "36 training pairs" in summary and "| small | val |" in summary and "| large | val |" in summary
    assert load_checkpoint(folder / "checkpoint").image_size == 160


def test_a_phase_changes_image_and_text_lengths(run_config):
    trainer, seen = Trainer(run_config(TWO_PHASES)), []
    inner = trainer._step

    def step(live, batch, number):
        trunk = trainer.model.visual.trunk
        output = inner(live, batch, number)
        groups = live.optimizer.param_groups
        owned = any(p is trunk.pos_embed for group in groups for p in group["params"])
        shapes = (batch["image"].shape[-1], batch["tokens"].shape[1], trunk.pos_embed.shape[1])
        seen.append((*shapes, owned, groups[0]["lr"]))
        return output

    trainer._step = step
    trainer.train()
    prefix = 0 if trainer.model.visual.trunk.no_embed_class else trainer.model.visual.trunk.num_prefix_tokens
    assert [s[:4] for s in seen] == [(32, 6, 4 + prefix, True)] * 4 + [(160, 12, 100 + prefix, True)] * 3
    assert [s[4] for s in seen] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 5e-4, 1e-3, 1e-3])  # its own warm-up each


def test_it_learns_a_small_set_and_knows_unseen_drawings(run_config, tmp_path):
    (tmp_path / "white").mkdir()
    Image.new("RGB", (8, 8), "white").save(tmp_path / "white" / "white.png")
    mild = {
        "rotation": 5.0, "colour": 0.0, "grey_probability": 0.0, "cutout_scale": [0.8, 1.0],
        "photo_background_probability": 1.0,
    }  # fmt: skip
    config = run_config(
        [{"steps": 300, "image_size": 32, "context_length": 6, "lr": 1e-3, "warmup_steps": 10}],
        run={"log_every": 10}, data={"augmentation": mild, "backgrounds": str(tmp_path / "white")},
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.train()
    lines = [line for line in metrics(config.run.output) if "loss" in line]
    last = lines[-3:]
    assert lines[0]["loss"] > math.log(12) / 2  # where it starts, nothing is known: log(12) for 12 pairs
    assert sum(line["batch_accuracy"] for line in last) / 3 > 0.9 and last[-1]["loss"] < 0.5
    assert trainer.results["main"]["val"].top1 > 0.7  # drawings of a size it never saw; chance is 1/12


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_stopping_and_resuming_equals_running_straight_to_the_bit(straight, run_config, stop):
    """In the first phase, at its end (the next phase's first step), and within the second phase."""
    config = run_config(TWO_PHASES, output="resumed", run={"checkpoint_every": 1})
    trainer = Trainer(config)
    stop_after(trainer, stop)
    with pytest.raises(Stopped):
        trainer.train()
    torch.manual_seed(999)  # a new process would not have the old one's random state
    Trainer(config, resume=True).train()
    assert losses(config.run.output) == losses(straight.run.output)
    assert_equal_weights(config.run.output, straight.run.output)
    summary = (Path(config.run.output) / "summary.md").read_text()
    assert "| small | val |" in summary and "| large | val |" in summary
    assert len((Path(config.run.output) / "command.txt").read_text().splitlines()) == 2


def test_steps_after_the_last_state_are_written_again_not_twice(straight, run_config):
    config = run_config(TWO_PHASES, output="resumed", run={"checkpoint_every": 3}, evaluation={"every": 1})
    trainer = Trainer(config)
    stop_after(trainer, 6)  # states exist after steps 3 and 4 (the end of the phase)
    with pytest.raises(Stopped):
        trainer.train()
    assert max(losses(config.run.output)) == 6
    Trainer(config, resume=True).train()
    assert losses(config.run.output) == losses(straight.run.output)
    evaluated = [line["step"] for line in metrics(config.run.output) if "zero_shot_val_top1" in line]
    assert evaluated == list(range(1, 8))


def test_a_run_that_died_before_its_first_state_starts_again(straight, run_config):
    config = run_config(TWO_PHASES, output="resumed")
    trainer = Trainer(config)
    stop_after(trainer, 2)
    with pytest.raises(Stopped):
        trainer.train()
    Trainer(config, resume=True).train()
    assert losses(config.run.output) == losses(straight.run.output)


def test_the_seed_decides_the_run(run_config, straight):
    again, other = run_config(TWO_PHASES, output="again"), run_config(TWO_PHASES, output="other", run={"seed": 1})
    Trainer(again).train()
    Trainer(other).train()
    assert_equal_weights(again.run.output, straight.run.output)
    assert losses(other.run.output)[1] != losses(straight.run.output)[1]


def test_an_existing_run_is_not_overwritten(straight):
    with pytest.raises(
        ConfigError, match="already holds a run: add --resume to continue it, or set run.output elsewhere"
    ):
        Trainer(straight)


def test_resuming_a_finished_run_changes_nothing(straight):
    before = (Path(straight.run.output) / "checkpoint" / WEIGHTS_FILE).read_bytes()
    Trainer(straight, resume=True).train()
    assert (Path(straight.run.output) / "checkpoint" / WEIGHTS_FILE).read_bytes() == before
    assert list(losses(straight.run.output)) == list(range(1, 8))


@pytest.mark.parametrize(
    "changed", ["optim.weight_decay=0.5", "phases.0.image_size=48", "run.seed=4", "model.embed_dim=48"]
)
def test_resuming_with_another_configuration_is_refused(straight, changed):
    path = Path(straight.run.output) / "config.yaml"
    with pytest.raises(ConfigError, match="was started with another configuration: restore .*config.yaml"):
        Trainer(load_config(path, [changed]), resume=True)


def test_resuming_with_other_data_is_refused(run_config, tmp_path, pairs_table):
    for name in ("a.csv", "b.csv"):
        (pairs_table.parent / name).write_text(pairs_table.read_text())
    config = run_config([{"steps": 1}], data={"table": str(pairs_table.parent / "a.csv")})
    Trainer(config).train()
    with (pairs_table.parent / "a.csv").open("a") as file:
        file.write("red_circle_0.png,again,shape,again,train\n")
    with pytest.raises(ConfigError, match="was started with other data: see .*about.json"):
        Trainer(config, resume=True)


@pytest.fixture
def shards(tmp_path, pairs_table):
    """The table's training pairs as two tar shards."""
    rows = [row for row in read_table(pairs_table) if row["split"] == "train"]
    for number, part in enumerate((rows[:20], rows[20:])):
        with webdataset.TarWriter(str(tmp_path / f"{number:05}.tar")) as writer:
            for index, row in enumerate(part):
                content = io.BytesIO()
                Image.open(pairs_table.parent / row["image"]).convert("RGB").save(content, "JPEG")
                writer.write({"__key__": f"{number}{index:04}", "jpg": content.getvalue(), "txt": row["caption"]})
    return str(tmp_path / "{00000..00001}.tar")


def test_shards_train_and_resume_to_the_bit(run_config, shards):
    data = {"shards": shards, "unique_by": None, "preload": False, "shuffle_window": 9}
    straight = run_config(TWO_PHASES, output="straight", data=data)
    Trainer(straight).train()
    assert "36 pairs in 2 shards" in (Path(straight.run.output) / "summary.md").read_text()
    resumed = run_config(TWO_PHASES, output="resumed", data=data, run={"checkpoint_every": 1})
    trainer = Trainer(resumed)
    stop_after(trainer, 2)
    with pytest.raises(Stopped):
        trainer.train()
    Trainer(resumed, resume=True).train()
    assert losses(resumed.run.output) == losses(straight.run.output)
    assert_equal_weights(resumed.run.output, straight.run.output)


def test_resuming_may_log_more_often(straight):
    path = Path(straight.run.output) / "config.yaml"
    Trainer(load_config(path, ["run.log_every=5", "run.checkpoint_every=7"]), resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_with_a_remedy(run_config):
    config = run_config([{"name": "hot", "steps": 6}], run={"checkpoint_every": 1, "log_every": 4})
    trainer = Trainer(config)
    inner = trainer._step

    def step(*arguments):
        output = inner(*arguments)
        if (Path(config.run.output) / "state.pt").exists():
            output["loss"] = output["loss"] * float("nan")
        return output

    trainer._step = step
    with pytest.raises(
        FloatingPointError, match="the loss became nan at step 2 of phase hot: lower its lr, lengthen its warm-up"
    ):
        trainer.train()
    state = torch.load(Path(config.run.output) / "state.pt", weights_only=True)
    assert state["step"] == 1  # the state before the damage is kept


def spoil_a_gradient(monkeypatch, number: int) -> None:
    """From the step of this number (1-based) on, the loss is finite and one gradient is not."""
    inner, done = TrainStep._at_once, []

    def at_once(self, *arguments):
        output = inner(self, *arguments)
        done.append(1)
        if len(done) >= number:
            self.objective.model.text.ln_final.bias.grad[0] = float("inf")
        return output

    monkeypatch.setattr(TrainStep, "_at_once", at_once)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_an_update_that_is_not_finite_does_not_replace_the_last_good_state(run_config, monkeypatch, optimiser):
    config = run_config([{"name": "hot", "steps": 3}], run={"checkpoint_every": 1}, optim={"name": optimiser})
    spoil_a_gradient(monkeypatch, 2)
    with pytest.raises(FloatingPointError, match="after step 2 of phase hot, .*bias is not finite.*optim.grad_clip"):
        Trainer(config).train()
    state = torch.load(Path(config.run.output) / "state.pt", weights_only=True)
    assert state["step"] == 1 and all(v.isfinite().all() for n, v in state["objective"].items() if "mask" not in n)
    assert math.isfinite(losses(config.run.output)[2])  # the loss alone would have let it pass


def test_the_remedy_of_a_diverged_run_works(run_config, monkeypatch, capsys):
    config = run_config([{"name": "hot", "steps": 3}], run={"checkpoint_every": 1})
    with monkeypatch.context() as patch:
        spoil_a_gradient(patch, 2)
        with pytest.raises(FloatingPointError, match="lower its lr, lengthen its warm-up or set optim.grad_clip"):
            Trainer(config).train()
    milder = ["phases.0.lr=1e-4", "phases.0.warmup_steps=3", "optim.grad_clip=1.0"]
    Trainer(load_config(Path(config.run.output) / "config.yaml", milder), resume=True).train()
    assert "changed since: " in (printed := capsys.readouterr().out)
    assert "phases[0].lr is 0.0001 (was 0.001)" in printed and "optim.grad_clip is 1.0 (was 0.0)" in printed
    lines = [line for line in metrics(config.run.output) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"image_size": 40}, r"phases\[1\].image_size 40 is not a multiple of the patch size 16: use 32"),
        ({"batch_size": 13}, r"36 rows of 12 distinct values do not fill one batch of 13: lower phases\[0\]"),
    ],
)
def test_a_later_phase_that_cannot_run_is_refused_at_the_start(run_config, phase, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(run_config([{"steps": 1}, {"steps": 1, **phase}]))


def load_run_pairs(config):
    return load_pairs(config.data, config.evaluation.splits)


def write_table(folder, rows):
    lines = ["image,caption,split", *(",".join(row) for row in rows)]
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "t.csv")


def test_broken_images_and_empty_captions_are_left_out_counted_and_named(tmp_path, run_config):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [("good.png", "a", "train"), ("bad.png", "b", "train"), ("good.png", " ", "train"), ("good.png", "a", "val")]
    data = load_run_pairs(run_config(data={"table": write_table(tmp_path, rows), "unique_by": None}))
    assert [row["caption"] for row in data.training] == ["a"]
    notes = "; ".join(data.notes)
    assert (
        "1 pairs left out: empty caption" in notes and "1 pairs left out, for example: " in notes and "bad.png" in notes
    )


def test_a_broken_evaluation_image_is_counted_in_the_summary(tmp_path, run_config, pairs_table):
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken, table = os.path.relpath(tmp_path / "broken.png", pairs_table.parent), tmp_path / "one_broken.csv"
    table.write_text(pairs_table.read_text() + f"{broken},red circle,shape,red-circle,val\n")
    config = run_config([{"name": "only", "steps": 1}], data={"table": str(table), "root": str(pairs_table.parent)})
    Trainer(config).train()
    summary = (Path(config.run.output) / "summary.md").read_text()
    assert "- 1 broken images of val left out of the evaluation after only" in summary and "| 12 | 12 |" in summary


def test_options_of_another_optimiser_are_one_sentence_with_the_remedy(run_config, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(run_config([{"steps": 1}], optim={"name": "muon", "options": {"fallback_lr_scale": 0.1}})))
    wrong = ["optim.name=adamw", "optim.options={fallback_lr_scale: 0.1}"]
    with pytest.raises(ConfigError, match="adamw cannot be used .*fallback_lr_scale.*options={} clears") as e:
        Trainer(load_config(path, wrong)).train()
    assert "\n" not in str(e.value)
    # Another name leaves the options of the one before behind.
    Trainer(load_config(path, ["optim.name=adamw", f"run.output={tmp_path / 'other'}"])).train()
    with pytest.raises(ConfigError, match="optim: adamww cannot be used .*see timm.optim"):
        Trainer(load_config(path, ["optim.name=adamww", "optim.options={}", f"run.output={tmp_path / 'o'}"])).train()


def test_nothing_left_to_train_on_is_an_error_with_the_reasons(tmp_path, run_config):
    (tmp_path / "bad.png").write_bytes(b"no image")
    table = write_table(tmp_path, [("bad.png", "a", "train"), ("bad.png", "a", "val")])
    with pytest.raises(ConfigError, match="no training pair is left: 1 training pairs from .*bad.png"):
        load_run_pairs(run_config(data={"table": table, "unique_by": None}))


def test_withheld_words_leave_the_training_rows_only(tmp_path, run_config, pairs_table):
    (tmp_path / "words.txt").write_text("circle\n\nyellow square\n")
    data = load_run_pairs(run_config(data={"withhold": str(tmp_path / "words.txt")}))
    left = {row["caption"] for row in data.training}
    assert left == {row["caption"] for row in read_table(pairs_table)} - {
        "red circle", "green circle", "blue circle", "yellow circle", "yellow square"
    }  # fmt: skip
    assert len(data.evaluation["val"]) == 12 and any(note.startswith("15 pairs withheld") for note in data.notes)
    with pytest.raises(ConfigError, match="data.withhold: no word list at"):
        load_run_pairs(run_config(data={"withhold": str(tmp_path / "gone.txt")}))


def test_the_command_line_trains_and_refuses_on_one_line(run_config, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(to_yaml(run_config([{"steps": 2}])))
    command = [sys.executable, str(ROOT / "tools" / "pretrain.py"), "--config", str(config)]
    done = subprocess.run([*command, "phases.0.steps=1"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint: {tmp_path / 'run' / 'checkpoint'}" in done.stdout
    again = subprocess.run([*command, "phases.0.steps=1"], capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ") and len(again.stderr.strip().splitlines()) == 1


def test_a_run_does_not_import_the_detector(run_config):
    source = yaml.safe_dump(yaml.safe_load(to_yaml(run_config([{"steps": 1}]))))
    code = (
        "import sys, yaml; from pretrain.config import config_from_dict; from pretrain.engine.train import Trainer\n"
        "Trainer(config_from_dict(yaml.safe_load(sys.stdin.read()))).train()\n"
        "assert not {'ovd', 'detectron2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=source, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_gradient_clipping_is_reported_and_limits_the_step(run_config):
    config = run_config([{"steps": 2}], optim={"grad_clip": 1e-3, "name": "sgd", "weight_decay": 0.0})
    trainer = Trainer(config)
    before = {name: p.detach().clone() for name, p in trainer.objective.named_parameters() if "pos_embed" not in name}
    trainer.train()
    moved = sum((p.detach() - before[n]).square().sum() for n, p in trainer.objective.named_parameters() if n in before)
    assert all(line["grad_norm"] > 1e-3 for line in metrics(config.run.output) if "loss" in line)
    # Two steps of at most lr * clip each; momentum (timm's sgd has 0.9) at most doubles the second.
    assert 0 < math.sqrt(float(moved)) < 4 * 1e-3 * 1e-3


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_optimisers_of_the_configuration_exist(run_config, name):
    config = run_config([{"steps": 2}], optim={"name": name})
    Trainer(config).train()
    assert all(math.isfinite(value) for value in losses(config.run.output).values())
