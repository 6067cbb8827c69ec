"""Training on torch-xla's own CPU device, alone and as four devices under SPMD: the losses of the plain CPU, each
program compiled once.

XLA runs in processes of its own, one for each of the two, because autograd does not learn of a device that is
registered after its first backward pass; what each does is one function, whose results many tests look at. To be quick,
towers have one block, and XLA's compiler does not optimise.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pretrain.config import config_from_dict
from pretrain.engine.checkpoint import load_state
from pretrain.engine.train import Trainer
from pretrain.modeling.checkpoint import WEIGHTS_FILE

pytestmark = pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch-xla is not installed")

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (220, 30, 30), "green": (20, 150, 40), "blue": (30, 60, 220), "white": (250, 250, 250)}
STEPS = 10  # of each phase
# Programs that compile in a sixth of the time; the operations in them are the same.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

_PROCESS = """
import importlib.util, json, sys
path, name = sys.argv[1:]
specification = importlib.util.spec_from_file_location("functions", path)
module = importlib.util.module_from_spec(specification)
sys.modules["functions"] = module
specification.loader.exec_module(module)
print("result", json.dumps(getattr(module, name)(*json.load(sys.stdin))))
"""


def on_xla(function, *arguments, devices: int = 1):
    """The function's result from a process where torch-xla has that many CPU devices."""
    environment = {
        **os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices), "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, __file__, function.__name__], input=json.dumps(arguments),
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("result ")[-1])


def configuration(table: str, output: str, **run) -> dict:
    phase = {"steps": STEPS, "image_size": 32, "context_length": 6, "batch_size": 8, "lr": 1e-3, "warmup_steps": 2}
    return {
        "model": {
            "image": {"timm_model": "test_vit4", "layer_scale": 1.0},
            "text": {"width": 32, "heads": 2, "layers": 1, "context_length": 8}, "embed_dim": 32,
        },
        "data": {"table": table, "workers": 0, "preload": True},
        # A beta2 so small makes AdamW's bias correction 1 after 8 steps, which happens late in a real phase. XLA treats
        # a 1 among a program's numbers in its own way.
        "optim": {"grad_clip": 1.0, "betas": [0.9, 0.1]},
        "phases": [
            {**phase, "name": "small"},
            {**phase, "name": "large", "image_size": 48, "context_length": 8},
        ],
        "evaluation": {"every": 4},
        "run": {"output": output, "device": "cpu", "log_every": 1, "checkpoint_every": 4, **run},
    }  # fmt: skip


def train(node: dict, resume: bool = False, stop_after: int = 0, cut_batch_at: int = -1) -> dict:
    """Train in this process; returns the losses and, on XLA, how many programs each step, each evaluation and all the
    rest (reading the losses, writing states) compiled.

    Args:
        stop_after: after so many steps the power fails; 0: never.
        cut_batch_at: the step that gets only half a batch.
    """
    torch.set_num_threads(1)
    trainer = Trainer(config_from_dict(node), resume)
    trainer.model.visual.trunk.blocks = trainer.model.visual.trunk.blocks[:1]
    compiled, evaluations, inner, evaluate = [], [], trainer._step, trainer._evaluate
    count = programs_compiled if trainer.device.kind == "xla" else lambda: 0

    def step(live, batch, number):
        if stop_after and len(compiled) == stop_after:
            raise KeyboardInterrupt
        if len(compiled) == cut_batch_at:
            batch = {name: value[: len(value) // 2] for name, value in batch.items()}
        before = count()
        output = inner(live, batch, number)
        compiled.append(count() - before)
        return output

    def counted_evaluation(*arguments):
        before = count()
        evaluate(*arguments)
        evaluations.append(count() - before)

    trainer._step, trainer._evaluate = step, counted_evaluation
    start = count()
    try:
        trainer.train()
    except KeyboardInterrupt:
        pass
    rest = count() - start - sum(compiled) - sum(evaluations)
    return {"losses": losses(node["run"]["output"]), "steps": compiled, "evaluations": evaluations, "rest": rest}


def losses(output: str) -> list[float]:
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def programs_compiled() -> int:
    from torch_xla.debug import metrics

    data = metrics.metric_data("CompileTime")
    return data[0] if data else 0


def operations_left_to_pytorch() -> list[str]:
    """What XLA could not do itself since the process began."""
    from torch_xla.debug import metrics

    return [name for name in metrics.counter_names() if name.startswith("aten::")]


# ---------------------------------------------------------------------------------------------- one device


def everything_on_one_device(table: str, folder: str) -> dict:
    def node(name, **run):
        return configuration(table, f"{folder}/{name}", device="xla", **run)

    results = {"whole": train(node("whole"))}
    results["stopped"] = train(node("stopped"), stop_after=STEPS + 6)
    results["resumed"] = train(node("stopped"), resume=True)
    pieces = node("pieces")
    pieces["objective"] = {"options": {"chunk_size": 2}}
    pieces["phases"][0]["micro_batch_size"] = 4
    results["pieces"] = train(pieces, stop_after=4)
    results["bf16"] = train(node("bf16", precision="bf16"), stop_after=4)
    results["half a batch"] = train(node("half"), stop_after=4, cut_batch_at=3)
    results["left to pytorch"] = operations_left_to_pytorch()
    return results


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    """Eight plain squares of four colours, for training, and again for evaluation."""
    root = tmp_path_factory.mktemp("squares")
    lines = ["image,caption,split"]
    for split in ("train", "val"):
        for index, (name, colour) in enumerate(COLOURS.items()):
            for size in (32, 48):
                Image.new("RGB", (size, size), tuple(c - index for c in colour)).save(root / f"{name}{size}.png")
                lines.append(f"{name}{size}.png,{name} of {size},{split}")
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    return str(root / "pairs.csv")


@pytest.fixture(scope="module")
def cpu(table, tmp_path_factory) -> dict:
    """The run of the plain CPU: its losses and its folder."""
    folder = str(tmp_path_factory.mktemp("cpu") / "whole")
    return {"losses": train(configuration(table, folder))["losses"], "folder": folder}


@pytest.fixture(scope="module")
def one_device(table, tmp_path_factory) -> dict:
    return on_xla(everything_on_one_device, table, str(tmp_path_factory.mktemp("xla")))


def test_xla_has_the_cpus_losses_through_a_phase_change(one_device, cpu):
    assert len(cpu["losses"]) == 2 * STEPS and cpu["losses"][0] != pytest.approx(cpu["losses"][-1], abs=0.1)
    assert one_device["whole"]["losses"] == pytest.approx(cpu["losses"], abs=1e-3)


def test_nothing_is_compiled_after_the_second_step_of_a_phase(one_device):
    """The learning rate changes at every step; losses are read, states written and images classified in between."""
    small, large = one_device["whole"]["steps"][:STEPS], one_device["whole"]["steps"][STEPS:]
    for phase in (small, large):
        assert phase[0] >= 1 and phase[1] == 1  # without, and with, an optimiser state
        assert phase[2:] == [0] * (STEPS - 2)
    assert one_device["whole"]["rest"] == 1  # the numbers of a step put side by side, to be read at once
    assert one_device["left to pytorch"] == []


def test_an_evaluation_compiles_its_programs_once_a_phase(one_device):
    assert one_device["whole"]["evaluations"] == [2, 0, 0, 2, 0, 0]  # a tower each; after steps 4, 8 and 10


def test_a_batch_of_another_size_is_seen_as_a_compilation(one_device):
    assert one_device["half a batch"]["steps"] == [0, 0, 0, 1]  # the first steps are known from the whole run


def test_a_resumed_run_continues_the_curve_with_known_programs(one_device):
    stopped, resumed = one_device["stopped"], one_device["resumed"]
    assert len(stopped["losses"]) == STEPS + 6 and len(resumed["steps"]) == 6  # from the state at step 4
    assert resumed["losses"] == pytest.approx(one_device["whole"]["losses"], abs=1e-5)
    assert stopped["steps"] == [0] * (STEPS + 6) and sum(resumed["steps"]) <= 1


def test_cached_embeddings_and_a_chunked_loss_are_the_whole_batch(one_device):
    pieces = one_device["pieces"]
    assert pieces["losses"] == pytest.approx(one_device["whole"]["losses"][:4], abs=1e-4) and len(pieces["losses"]) == 4
    assert pieces["steps"][0] > 1 and pieces["steps"][2:] == [0, 0]


def test_bfloat16_trains_to_nearly_the_same_losses(one_device):
    found, wanted = one_device["bf16"]["losses"], one_device["whole"]["losses"][:4]
    assert found == pytest.approx(wanted, abs=5e-2) and found != pytest.approx(wanted, abs=1e-5)
    assert one_device["bf16"]["steps"][2:] == [0, 0]


# ------------------------------------------------------------------------------- four devices, one program


def everything_on_four_devices(table: str, folder: str) -> dict:
    import torch_xla

    from pretrain.engine.device import Device
    from pretrain.engine.processes import Processes
    from pretrain.engine.step import TrainStep
    from pretrain.objectives.info_nce import InfoNCE

    shardings: dict[str, set] = {"batch": set(), "embeddings": set(), "parameters": set()}
    encode, call = InfoNCE.encode, TrainStep.__call__

    def spec(value: torch.Tensor) -> str:
        return torch_xla._XLAC._get_xla_sharding_spec(value)

    def watched_encode(self, batch):
        shardings["batch"].update(spec(value) for value in batch.values())
        return encode(self, batch)

    def watched_call(self, batch, number):
        output = call(self, batch, number)
        shardings["parameters"].update(spec(parameter) for parameter in self.objective.parameters())
        return output

    InfoNCE.encode, TrainStep.__call__ = watched_encode, watched_call
    options = {"device": "xla", "parallel": "spmd"}
    results = {"stopped": train(configuration(table, f"{folder}/four", **options), stop_after=8)}
    results["batch"], results["parameters"] = (sorted(shardings[name]) for name in ("batch", "parameters"))
    results["resumed"] = train(configuration(table, f"{folder}/one", **options), resume=True, stop_after=2)
    results["dropped"] = train(dropping(table, f"{folder}/dropped", **options), stop_after=4)
    second_of_two = Processes(1, 2, kind="spmd")
    results["texts"] = second_of_two.texts("host b: 7", Device("xla", parallel="spmd"))
    results["left to pytorch"] = operations_left_to_pytorch()
    return results


def dropping(table: str, output: str, **run) -> dict:
    """Everything that is drawn: dropped tokens and cropped positions; in pieces, which must draw the same twice."""
    node = configuration(table, output, **run)
    drawn = {"token_dropping": "random", "keep_tokens": 2, "cropped_positions": True, "micro_batch_size": 4}
    node["phases"] = [{**node["phases"][0], **drawn}]
    return node


@pytest.fixture(scope="module")
def four_devices(table, tmp_path_factory) -> dict:
    """Results, and the folder: `one` was stopped on the CPU and continued on four devices, `four` only stopped."""
    folder = tmp_path_factory.mktemp("spmd")
    train(configuration(table, str(folder / "one")), stop_after=8)
    return {**on_xla(everything_on_four_devices, table, str(folder), devices=4), "folder": folder}


def test_four_devices_have_the_losses_of_one_cpu(four_devices, cpu):
    assert four_devices["stopped"]["losses"] == pytest.approx(cpu["losses"][:8], abs=1e-3)
    assert four_devices["stopped"]["steps"][2:] == [0] * 6 and four_devices["stopped"]["rest"] == 1
    assert four_devices["left to pytorch"] == []


def test_rows_are_spread_over_four_devices_and_parameters_are_on_each(four_devices):
    assert four_devices["batch"] == ["{devices=[4,1,1,1]0,1,2,3}", "{devices=[4,1]0,1,2,3}"]
    assert four_devices["parameters"] == ["{replicated}"]


def test_a_state_of_four_devices_is_plain_and_continues_on_the_cpu(four_devices, table, cpu):
    folder = str(four_devices["folder"] / "four")
    state = load_state(Path(folder))  # here, where torch-xla is not
    moments = [value for values in state["optimizer"]["state"].values() for value in values.values()]
    assert {type(v) for v in [*state["objective"].values(), *moments]} == {torch.Tensor}
    assert {v.device.type for v in [*state["objective"].values(), *moments]} == {"cpu"}
    train(configuration(table, folder), resume=True)
    assert losses(folder) == pytest.approx(cpu["losses"], abs=1e-3)
    weights, wanted = (load_file(Path(run) / "checkpoint" / WEIGHTS_FILE) for run in (folder, cpu["folder"]))
    for name in wanted:
        torch.testing.assert_close(weights[name], wanted[name], rtol=1e-2, atol=1e-3)


def test_a_state_of_the_cpu_continues_on_four_devices(four_devices, cpu):
    resumed = four_devices["resumed"]
    assert len(resumed["steps"]) == 2 and resumed["losses"] == pytest.approx(cpu["losses"][:10], abs=1e-3)


def test_a_host_of_one_program_says_something_in_its_own_place(four_devices):
    """The other host, which is not there, says nothing."""
    assert four_devices["texts"] == ["", "host b: 7"]


def test_what_is_drawn_works_on_four_devices(four_devices):
    dropped = four_devices["dropped"]
    assert len(dropped["losses"]) == 4 and all(0 < loss < 20 for loss in dropped["losses"])
    assert dropped["steps"][2:] == [0, 0]
