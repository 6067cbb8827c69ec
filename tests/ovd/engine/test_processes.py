"""Two real processes train one detector, started as torchrun starts them; what comes back of one that fails."""

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from ovd.engine import processes, trainer
from ovd.engine.lazy_config import load_config
from ovd.engine.processes import run_in_processes
from pretrain.config import ConfigError

_PROCESS = """
import sys, torch
from detectron2.utils import comm
from ovd.engine import trainer
from ovd.engine.lazy_config import load_config
from ovd.engine.processes import run_in_processes

def work(config, overrides, folder):
    loop = trainer._run_loop
    def kept(cfg, model, output, *rest):
        loop(cfg, model, output, *rest)
        torch.save(model.state_dict(), f"{folder}/{comm.get_rank()}.pt")
    trainer._run_loop = kept
    cfg = load_config(config, overrides)
    trainer.evaluate(cfg, trainer.train(cfg))

torch.set_num_threads(1)
run_in_processes(work, 1, (sys.argv[1], sys.argv[3:], sys.argv[2]))
"""


def spawned(function, count, dist_url, args):
    """As Detectron2's launcher ends when the first process fails: with the text of its traceback."""
    try:
        function(*args)
    except Exception:
        text = f"\n\n-- Process 0 terminated with the following error:\n{traceback.format_exc()}"
        raise ProcessRaisedException(text, 0, 1) from None


def raises(error: Exception) -> None:
    raise error


def test_what_a_user_can_mend_in_a_started_process_is_its_sentence_alone(monkeypatch):
    monkeypatch.setattr(processes, "launch", spawned)
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError) as caught:
        run_in_processes(raises, 2, (FileNotFoundError("a.json does not exist: make it"),), (OSError,))
    assert str(caught.value) == "a.json does not exist: make it"
    with pytest.raises(ProcessRaisedException, match="Traceback(.|\n)*KeyError: 'x'"):
        run_in_processes(raises, 2, (KeyError("x"),), (OSError,))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def detections(run: Path) -> list[dict]:
    found = json.loads((run / "evaluation" / "model" / "detections.json").read_text())
    return sorted(found, key=lambda d: (d["image_id"], -d["score"], d["category_id"], d["bbox"]))


def test_two_processes_average_losses_keep_equal_weights_and_measure_like_one(config_overrides, tmp_path, write):
    root = str(Path(__file__).resolve().parents[3])
    common = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    pictures = write("odd", 3, pictures=5)  # one process has one more
    overrides = [
        *config_overrides, "train.max_iter=3", "train.amp=bfloat16", "train.clip_norm=1.0",
        f"evaluation.annotations={pictures}", "evaluation.control=False", "data.test.batch_size=1",
    ]  # fmt: skip
    command = [sys.executable, "-c", _PROCESS, "configs/ovd/mini_lvis.py", str(tmp_path), *overrides]
    started = []
    try:
        for rank in range(2):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (tmp_path / f"{rank}.log").open("wb") as log:
                started.append(subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=log))
        codes = [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["iteration"] for line in lines] == [0, 1, 2]  # one process writes
    for line in lines:
        parts = [value for name, value in line.items() if name.startswith("loss_")]
        assert abs(sum(parts) - line["total_loss"]) < 1e-4 and line["gradient_norm"] > 0
    together = detections(tmp_path / "run")
    config = load_config("configs/ovd/mini_lvis.py", [*overrides, f"train.output={tmp_path}/alone"])
    trainer.evaluate(config, tmp_path / "run" / "detector")
    alone = detections(tmp_path / "alone")
    assert [d["image_id"] for d in together] == [d["image_id"] for d in alone]
    assert {d["image_id"] for d in together} == {1, 2, 3, 4, 5}
    np.testing.assert_allclose([d["score"] for d in together], [d["score"] for d in alone], rtol=1e-4)
