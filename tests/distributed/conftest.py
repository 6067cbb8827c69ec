"""Run a function in several processes that talk to each other through gloo."""

import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Functions of a test file cannot be pickled by name (test folders are no packages): the file itself is loaded.
_PROCESS = """
import importlib.util, sys, torch
import torch.distributed as dist
path, name, rank, count, folder = sys.argv[1:]
torch.set_num_threads(1)
specification = importlib.util.spec_from_file_location("functions", path)
module = importlib.util.module_from_spec(specification)
sys.modules["functions"] = module
specification.loader.exec_module(module)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=int(count))
result = getattr(module, name)(*torch.load(f"{folder}/arguments.pt"))
torch.save(result, f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def _run(folder: Path, function: Callable, count: int, arguments: tuple, seconds: float) -> list[Any]:
    folder.mkdir()
    torch.save(arguments, folder / "arguments.pt")
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    source = inspect.getsourcefile(function)
    processes, logs = [], [folder / f"{rank}.log" for rank in range(count)]
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-c", _PROCESS, source, function.__name__, str(rank), str(count), str(folder)]
            with log.open("wb") as output:
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        codes = _wait(processes, seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * count, f"exit codes {codes}\n" + "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _wait(processes: list[subprocess.Popen], seconds: float) -> list[int | None]:
    """Exit codes once all have ended, or one has failed (the others may wait for it for ever), or time is over."""
    end = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes) or time.monotonic() > end:
            return codes
        time.sleep(0.02)


@pytest.fixture(scope="module")
def run_processes(tmp_path_factory) -> Callable[..., list[Any]]:
    """A function `run_processes(function, *arguments, count=2, seconds=120)`: the function's results, by rank.

    The function must be at the top level of the test file, whose imports every process makes again. Arguments and
    results are tensors, numbers, texts, and lists, tuples and dictionaries of them. In the function torch.distributed
    is ready, with one thread a process.
    """

    def run(function: Callable, *arguments: Any, count: int = 2, seconds: float = 120) -> list[Any]:
        return _run(tmp_path_factory.mktemp("processes") / "run", function, count, arguments, seconds)

    return run
