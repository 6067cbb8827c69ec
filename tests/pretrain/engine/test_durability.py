"""A run survives what happens to long runs: kill -9 at any moment, mid-checkpoint included, and a full disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.config import to_yaml
from pretrain.engine.checkpoint import load_state
from pretrain.modeling.checkpoint import WEIGHTS_FILE

ROOT = Path(__file__).resolve().parents[3]
KILLS = 20
STEPS = 20  # of each of two phases: an attempt that gets as far as a step is killed within two

# One process imports everything; each attempt is a fork of it, so that 20 restarts take seconds. `moment` kills the
# attempt from within, at a place that chance may miss; else the parent kills it at a random time.
DRIVER = """
import json, os, random, resource, signal, sys, time
import torch, yaml
from pathlib import Path
from pretrain.config import config_from_dict
from pretrain.engine.train import Trainer

torch.set_num_threads(1)
config = config_from_dict(yaml.safe_load(sys.stdin.read()))
state = Path(config.run.output) / "state.pt"

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def kill_before_the_rename(count=[0]):
    inner = os.replace
    def replace(source, target):
        count[0] += str(target).endswith("state.pt")
        if count[0] == 3: die()
        inner(source, target)
    os.replace = replace

def kill_in_the_middle_of_a_state(count=[0]):
    inner = torch.save
    def save(value, path):
        inner(value, path)
        count[0] += 1
        if count[0] == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    torch.save = save

def fill_the_disk():
    # Files of this process cannot grow past 100 kB: writing fails as on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

def attempt(moment=None):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            if moment: moment()
            Trainer(config, resume=state.exists()).train()
            code = 0
        except BaseException as error:
            Path(config.run.output, "error.txt").write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(code)
    return child

def outcome(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

task, result = sys.argv[1], {}
if task == "random":
    rng, kills, parts = random.Random(0), 0, 0
    started = time.time()
    child = attempt(lambda: None)
    while not state.exists(): time.sleep(0.002)  # how long a start takes here and now
    start = time.time() - started
    time.sleep(rng.uniform(0, 0.01))
    while True:
        os.kill(child, signal.SIGKILL)
        if outcome(child) == 0: break
        kills += 1
        parts += any(Path(config.run.output).glob(".state.pt.*.part"))
        child = attempt()
        if kills >= int(sys.argv[2]): break
        # At a random moment, but before the run is done, however fast the machine has become meanwhile.
        before, until = state.stat().st_mtime_ns, time.time() + rng.uniform(0.2, 1.6) * start
        while time.time() < until and state.stat().st_mtime_ns == before: time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
    result = {"kills": kills, "in_a_save": parts, "last": outcome(child) if kills >= int(sys.argv[2]) else 0}
else:
    first = outcome(attempt(globals()[task]))
    step = torch.load(state, weights_only=True)["step"] if state.exists() else 0
    leftovers = [p.name for p in Path(config.run.output).glob(".*.part")]
    error = Path(config.run.output, "error.txt")
    told = error.read_text() if error.exists() else ""
    error.unlink(missing_ok=True)
    result = {"first": first, "step": step, "leftovers": len(leftovers), "told": told, "then": outcome(attempt())}
print("RESULT" + json.dumps(result))
"""


def drive(config, *arguments) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments], input=to_yaml(config), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.split("RESULT")[1])


PHASES = [
    {"name": "small", "steps": STEPS, "image_size": 16, "context_length": 6},
    {"name": "large", "steps": STEPS, "image_size": 48, "token_dropping": "random", "keep_tokens": 4},
]


def make(run_config, name):
    return run_config(
        PHASES, output=name, run={"checkpoint_every": 1}, evaluation={"splits": []},
        optim={"name": "adamw"}, model={
            "image": {"timm_model": "test_vit4", "layer_scale": 1.0},
            "text": {"width": 16, "heads": 2, "layers": 1, "context_length": 12, "vocab_size": 49408}, "embed_dim": 16,
        },
    )  # fmt: skip


def curve(config) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (Path(config.run.output) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.fixture(scope="module")
def straight(module_run_config):
    """The same run without a failure, in a process like the others'."""
    config = make(module_run_config, "straight")
    assert drive(config, "random", "0")["last"] == 0
    return config


def assert_same_run(config, straight):
    assert curve(config) == curve(straight) and len(curve(config)) == 2 * STEPS
    found, wanted = (load_file(Path(c.run.output) / "checkpoint" / WEIGHTS_FILE) for c in (config, straight))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not list(Path(config.run.output).glob(".*.part"))


def test_kill_9_at_twenty_random_moments_changes_nothing(run_config, straight):
    """Steps since the last state are done again, to the bit, whatever the kill interrupted."""
    config = make(run_config, "killed")
    result = drive(config, "random", str(KILLS))
    assert result["kills"] == KILLS and result["last"] == 0, result
    assert_same_run(config, straight)


@pytest.mark.parametrize("moment", ["kill_before_the_rename", "kill_in_the_middle_of_a_state"])
def test_kill_9_within_a_save_leaves_the_previous_state(run_config, straight, moment):
    config = make(run_config, moment)
    result = drive(config, moment)
    assert (result["first"], result["step"], result["leftovers"], result["then"]) == (-9, 2, 1, 0)
    assert_same_run(config, straight)


def test_a_full_disk_is_one_sentence_and_the_run_continues_when_there_is_space(run_config, straight):
    config = make(run_config, "full")
    result = drive(config, "fill_the_disk")
    assert result["first"] == 1 and result["step"] == 0 and result["leftovers"] == 0
    assert result["told"].startswith("OSError: ") and "cannot be written" in result["told"]
    assert "make space, then continue with --resume" in result["told"] and "\n" not in result["told"]
    assert result["then"] == 0
    assert_same_run(config, straight)
    assert load_state(Path(config.run.output))["phase"] == 1
