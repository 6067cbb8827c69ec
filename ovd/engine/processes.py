"""Start or join the processes of one training: torchrun's, Detectron2's own launcher's, or just this one.

GPUs talk through NCCL, CPU processes through gloo. What the processes compute is not known here.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessRaisedException

from pretrain.config import ConfigError

_MARK = "a user can mend this: "


def run_in_processes(
    function: Callable[..., None],
    count: int,
    arguments: tuple[Any, ...] = (),
    mendable: tuple[type[Exception], ...] = (ConfigError,),
) -> None:
    """Call `function(*arguments)` in every process of this training.

    Args:
        function: at the top level of a module.
        count: processes to start on this machine; ignored where torchrun has started them.
        mendable: errors of a started process that come back as a ConfigError with the same sentence; of others the
            traceback comes back.

    Raises:
        ConfigError: more processes than GPUs, on a machine that has GPUs; or see `mendable`.
    """
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _join_torchrun(function, arguments)
        return
    gpus = torch.cuda.device_count()
    if gpus and count > gpus:
        raise ConfigError(f"{count} processes were asked for and this machine has {gpus} GPU(s): use --num-gpus {gpus}")
    if count <= 1:
        function(*arguments)
        return
    # Its warning that it ends the other processes says nothing that the error does not.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        launch(_call_marking_errors, count, dist_url="auto", args=(function, arguments, mendable))
    except ProcessRaisedException as error:
        _, mark, sentence = str(error).rpartition(_MARK)
        if not mark:
            raise
        raise ConfigError(sentence.strip()) from error


def _call_marking_errors(
    function: Callable[..., None], arguments: tuple[Any, ...], mendable: tuple[type[Exception], ...]
) -> None:
    """Call a function; only the text of a traceback reaches the process that started this one."""
    try:
        function(*arguments)
    except mendable as error:
        raise RuntimeError(f"{_MARK}{error}") from None


def _join_torchrun(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        # Detectron2 asks for the group of this machine's processes, which its own launcher makes.
        comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
        comm.synchronize()
        function(*arguments)
    finally:
        dist.destroy_process_group()


def wrap_for_processes(model: torch.nn.Module) -> torch.nn.Module:
    """The model, averaging gradients over the processes where there are several."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    devices = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
