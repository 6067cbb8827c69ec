"""Several processes train what one would: the whole loop under torch.distributed, with DDP, in pieces, and sharded."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from pretrain.config import ConfigError, config_from_dict
from pretrain.engine.processes import join_processes
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import WEIGHTS_FILE, CheckpointError

COLOURS = {"red": (220, 30, 30), "green": (20, 150, 40), "blue": (30, 60, 220), "white": (250, 250, 250)}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Eight plain squares of four colours, for training, and again for evaluation."""
    from PIL import Image

    root = tmp_path_factory.mktemp("squares")
    lines = ["image,caption,split"]
    for split in ("train", "val"):
        for index, (name, colour) in enumerate(COLOURS.items()):
            for size in (32, 48):
                Image.new("RGB", (size, size), tuple(c - index for c in colour)).save(root / f"{name}{size}.png")
                lines.append(f"{name}{size}.png,{name} of {size},{split}")
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    return root / "pairs.csv"


def configuration(table: Path, output: Path, parallel: str = "auto", micro: int = 0, optimiser: str = "sgd") -> str:
    phase = {"steps": 2, "image_size": 32, "context_length": 6, "batch_size": 8, "lr": 1e-3, "warmup_steps": 1}
    # plain SGD would hide gradients that are wrong by a factor less well than AdamW, which divides it out
    node = {
        "model": {
            "image": {"timm_model": "test_vit4", "layer_scale": 1.0},
            "text": {"width": 32, "heads": 2, "layers": 1, "context_length": 8}, "embed_dim": 32,
        },
        "data": {"table": str(table), "workers": 0, "preload": True},
        "optim": {"name": optimiser, "weight_decay": 0.1, "grad_clip": 1.0},
        "phases": [
            {**phase, "name": "small", "micro_batch_size": micro},
            {**phase, "name": "large", "image_size": 48, "micro_batch_size": micro},
        ],
        "run": {"output": str(output), "device": "cpu", "parallel": parallel, "log_every": 1, "checkpoint_every": 1},
    }  # fmt: skip
    return yaml.safe_dump(node)


def train(config: str, stop_after: int = 0, resume: bool = False) -> list[str]:
    """Train as torchrun would start it; returns the run folder's files. `stop_after` steps the power fails."""
    if dist.is_initialized():
        os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    trainer = Trainer(config_from_dict(yaml.safe_load(config)), resume)
    inner, count = trainer._step, 0

    def step(*arguments):
        nonlocal count
        if stop_after and count == stop_after:
            raise KeyboardInterrupt
        count += 1
        return inner(*arguments)

    trainer._step = step
    try:
        trainer.train()
    except KeyboardInterrupt:
        pass
    return sorted(path.name for path in Path(trainer.config.run.output).glob("*"))


def curve(output: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def assert_same_run(output: Path, reference: Path) -> None:
    expected = curve(reference)
    assert len(expected) == 4
    for found, wanted in zip(curve(output), expected, strict=True):
        assert found == pytest.approx(wanted, rel=2e-5)
    weights, wanted = (load_file(folder / "checkpoint" / WEIGHTS_FILE) for folder in (output, reference))
    for name in wanted:
        torch.testing.assert_close(weights[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def alone(table, tmp_path_factory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train(configuration(table, output))
    return output


@pytest.mark.parametrize(("parallel", "micro"), [("ddp", 0), ("ddp", 2)])
def test_two_processes_train_what_one_would(run_processes, table, alone, tmp_path, parallel, micro):
    output = tmp_path / "run"
    files = run_processes(train, configuration(table, output, parallel, micro))
    assert files[0] == sorted(path.name for path in alone.iterdir())
    assert_same_run(output, alone)
    assert len((output / "command.txt").read_text().splitlines()) == 1  # one process writes the folder


def test_sharded_towers_train_what_one_process_would_and_resume_there(run_processes, table, alone, tmp_path):
    """FSDP2 through a phase change; then the same from a state that one process continues."""
    output = tmp_path / "run"
    run_processes(train, configuration(table, output, "fsdp", 2))
    assert_same_run(output, alone)
    stopped = tmp_path / "stopped"
    run_processes(train, configuration(table, stopped, "fsdp"), 3)
    assert len(curve(stopped)) == 3
    train(configuration(table, stopped, "one"), resume=True)
    assert_same_run(stopped, alone)


def stop_and_resume(config: str, stop_after: int) -> None:
    train(config, stop_after)
    dist.barrier()
    train(config, resume=True)


def straight_then_stopped(straight: str, stopped: str) -> None:
    train(straight)
    stop_and_resume(stopped, 3)


# Adafactor's moments are factored: they have other shapes than the parameters that are split.
@pytest.mark.parametrize("optimiser", ["adafactorbv", "adamw"])
def test_sharded_towers_resume_as_if_they_had_not_stopped(run_processes, table, tmp_path, optimiser):
    folders = [tmp_path / name for name in ("alone", "straight", "stopped")]
    train(configuration(table, folders[0], optimiser=optimiser))
    sharded = (configuration(table, folder, "fsdp", optimiser=optimiser) for folder in folders[1:])
    run_processes(straight_then_stopped, *sharded, seconds=300)
    curves = [curve(folder) for folder in folders]
    assert len(curves[0]) == 4 and curves[1] == curves[2]
    for found, wanted in zip(curves[1], curves[0], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    # Not against the one process: biases of keys have no gradient but rounding, which these optimisers blow up.
    kept, resumed = (load_file(folder / "checkpoint" / WEIGHTS_FILE) for folder in folders[1:])
    assert all(torch.equal(kept[name], resumed[name]) for name in kept)


def refusal(config: str) -> str:
    try:
        train(config)
    except ConfigError as error:
        return str(error)
    return ""


def test_an_optimiser_that_cannot_update_split_towers_is_refused_by_name(run_processes, table, tmp_path):
    found = run_processes(refusal, configuration(table, tmp_path / "run", "fsdp", optimiser="adafactor"))
    assert found[0] == found[1] and "optim.name is adafactor" in found[0] and "use adafactorbv" in found[0]


def sent() -> list:
    """What arrives of rank 0's nest."""
    nest = {
        "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16).T, "flags": torch.tensor([True, False]),
        "one": torch.tensor(7), "none": torch.empty(0, 3), "text": ["a", (1, None)],
    }  # fmt: skip
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    arrived = join_processes("ddp", False).from_main(nest if dist.get_rank() == 0 else None)
    assert all(arrived[name].dtype == nest[name].dtype for name in ("half", "flags", "one", "none"))
    return [arrived["half"].tolist(), arrived["flags"].tolist(), arrived["one"].item(), arrived["none"].shape[1],
            str(arrived["text"])]  # fmt: skip


def test_tensors_of_every_type_and_shape_arrive_at_the_other_process(run_processes):
    expected = [[[1.5], [-2.0]], [True, False], 7, 3, "['a', (1, None)]"]
    assert run_processes(sent) == [expected, expected]


def at_home(homes: list[str]) -> None:
    """Give each process a folder of its own, as on machines that share none."""
    home = Path(homes[dist.get_rank()])
    home.mkdir(exist_ok=True)
    os.chdir(home)


def stop_and_resume_at_home(config: str, homes: list[str]) -> list[str]:
    """The run folder's files when the power failed after three steps; then the rest."""
    at_home(homes)
    files = train(config, stop_after=3)
    dist.barrier()
    train(config, resume=True)
    return files


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_machines_that_share_no_folder_resume_from_the_state_of_the_first(
    run_processes, table, alone, tmp_path, parallel
):
    config, homes = configuration(table, Path("run"), parallel), [str(tmp_path / name) for name in "ab"]
    files = run_processes(stop_and_resume_at_home, config, homes)
    assert "state.pt" in files[0] and files[1] == []
    assert_same_run(tmp_path / "a" / "run", alone)


def refusals_at_home(config: str, homes: list[str]) -> list[str]:
    at_home(homes)
    found = []
    for resume in (True, False):
        try:
            train(config, resume=resume)
        except (ConfigError, CheckpointError) as error:
            found.append(str(error))
    return found


def test_a_state_that_cannot_be_used_stops_every_process_with_the_same_sentence(run_processes, table, tmp_path):
    config, homes = configuration(table, Path("run"), "ddp"), [str(tmp_path / name) for name in "ab"]
    (tmp_path / "a" / "run").mkdir(parents=True)
    (tmp_path / "a" / "run" / "state.pt").write_bytes(b"cut off")
    damaged, kept = (results := run_processes(refusals_at_home, config, homes))[0]
    assert "cannot be read; delete it to start again" in damaged and "already holds a run" in kept
    assert results[0] == results[1]


def test_left_out_samples_of_every_process_are_in_the_summary_also_after_a_stop(run_processes, tmp_path):
    """Every batch has all eight rows, a broken one among them, which the process that reads it replaces."""
    from PIL import Image

    lines = ["image,caption,split"]
    for index, (name, colour) in enumerate([*COLOURS.items()] * 2):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}{index}.png")
        lines.append(f"{name}{index}.png,{name} {index},train")
    (tmp_path / "red0.png").write_bytes(b"no picture")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    node = yaml.safe_load(configuration(tmp_path / "pairs.csv", tmp_path / "run", "ddp"))
    node["data"]["preload"], node["evaluation"] = False, {"splits": []}
    run_processes(stop_and_resume, yaml.safe_dump(node), 3)
    assert "- 4 reads of broken images, replaced by the next row\n" in (tmp_path / "run" / "summary.md").read_text()
