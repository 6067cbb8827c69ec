"""The processes of one training: who this one is, and the few things they do together.

One process is the common case, and then nothing here costs anything. `torchrun` starts the processes of GPU machines;
`torch_xla.launch` those of TPUs that are not driven by SPMD (see `Device`).
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import ConfigError
from pretrain.engine.device import Device

_LONGEST_TEXT = 1024  # bytes


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them.

    Attributes:
        rank: 0-based; rank 0 writes files and prints.
        world: how many there are; each takes its part of every batch.
        local_rank: which of this machine's devices is this process's.
        kind: one, torch (torch.distributed), xla (torch_xla.launch), or spmd: the hosts of torch-xla's single-program
            mode. There a process loads its part of every batch, but tensors, losses and gradients on the device are the
            global ones already, so that nothing needs gathering or averaging; and what one process computes, all must.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    kind: str = "one"

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    @property
    def one_program(self) -> bool:
        """Whether the devices wait for every process to start the same computation, evaluation included."""
        return self.kind == "spmd"

    @property
    def draw(self) -> int:
        """Part of the key of random draws: each process draws its own rows, one program draws the global ones."""
        return 0 if self.one_program else self.rank

    def share(self, batch_size: int, name: str) -> int:
        """This process's part of a batch.

        Raises:
            ConfigError: if the parts would not be equal (static shapes need that).
        """
        if batch_size % self.world:
            raise ConfigError(
                f"{name} {batch_size} cannot be shared equally by {self.world} processes: use a multiple of them"
            )
        return batch_size // self.world

    def wait(self) -> None:
        """Return when every process is here; hosts of one program meet in its next computation anyway."""
        if self.kind == "torch":
            dist.barrier()
        elif self.kind == "xla":
            import torch_xla.core.xla_model as xm

            xm.rendezvous("wait")

    def mean(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Scalars averaged over the processes (the same keys everywhere); waits for the device."""
        if not values:
            return {}
        stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        if self.kind == "torch":
            dist.all_reduce(stacked)
            stacked /= self.world
        elif self.kind == "xla":
            import torch_xla.core.xla_model as xm

            stacked = xm.all_reduce(xm.REDUCE_SUM, stacked, scale=1 / self.world)
        return dict(zip(values, stacked.tolist(), strict=True))

    def from_main(self, value: Any) -> Any:
        """Rank 0's value on every process of torch.distributed; theirs is ignored.

        Tensors go one by one: a state of many gigabytes needs, beside itself, only its largest tensor on the device.

        Args:
            value: a nest of dictionaries and lists of CPU tensors and of what can be pickled.
        """
        if self.kind != "torch" or self.world == 1:
            return value
        # NCCL only sends what is on a GPU.
        device = torch.device("cuda", self.local_rank) if dist.get_backend() == "nccl" else torch.device("cpu")
        tensors: list[torch.Tensor] = []
        outline = [_take_tensors(value, tensors) if self.is_main else None]
        dist.broadcast_object_list(outline, src=0, device=device)
        return _send_tensors(outline[0], tensors, device)

    def texts(self, text: str, device: Device) -> list[str]:
        """What every process says, by rank; at most 1,024 bytes each (on torch-xla the rest is cut off)."""
        if self.kind == "one":
            return [text]
        if self.kind == "torch":
            everyone: list[str] = [""] * self.world
            dist.all_gather_object(everyone, text)
            return everyone
        # torch-xla adds numbers up: each process fills its own row of zeros.
        own, content = torch.zeros(self.world, _LONGEST_TEXT, dtype=torch.int32), text.encode()[:_LONGEST_TEXT]
        own[self.rank, : len(content)] = torch.tensor(list(content), dtype=torch.int32)
        if self.kind == "xla":
            import torch_xla.core.xla_model as xm

            table = xm.all_reduce(xm.REDUCE_SUM, own.to(device.torch_device)).cpu()
        else:
            table = device.move({"texts": torch.stack([own, *[own * 0] * (device.devices - 1)])})["texts"].sum(0).cpu()
        return [bytes(row[row > 0].tolist()).decode(errors="ignore") for row in table]

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Average gradients that no wrapper has averaged; a parameter without one is without one everywhere."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.kind == "torch" and gradients:
            flat = torch._utils._flatten_dense_tensors(gradients)
            dist.all_reduce(flat)
            flat /= self.world
            for gradient, value in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(value)
        elif self.kind == "xla" and gradients:
            import torch_xla.core.xla_model as xm

            xm.all_reduce(xm.REDUCE_SUM, gradients, scale=1 / self.world)


@dataclass(frozen=True)
class _Place:
    """Where a tensor stood in a nest that is sent without its tensors."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _take_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The nest with places for its tensors, which are appended to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1, tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _take_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_take_tensors(item, tensors) for item in value)
    return value


def _send_tensors(outline: Any, tensors: list[torch.Tensor], device: torch.device) -> Any:
    """Rank 0 sends its tensors in the order of the outline, which all have; the others put theirs in its places."""
    if isinstance(outline, _Place):
        own = tensors[outline.number] if tensors else torch.empty(outline.shape, dtype=outline.dtype)
        if own.numel():
            # Bytes, because not every backend sends every type.
            content = own.contiguous().reshape(-1).view(torch.uint8).to(device)
            dist.broadcast(content, src=0)
            own = own if tensors else content.cpu().view(outline.dtype).reshape(outline.shape)
        return own
    if isinstance(outline, dict):
        return {key: _send_tensors(item, tensors, device) for key, item in outline.items()}
    if isinstance(outline, (list, tuple)):
        return type(outline)(_send_tensors(item, tensors, device) for item in outline)
    return outline


def start_processes(function: Callable, *arguments: Any) -> None:
    """Call `function(number, *arguments)` in a process for each TPU core of this host, and wait for them.

    Args:
        function: at the top level of a module: the processes import it again.
        arguments: that can be pickled.

    Raises:
        ConfigError: if torch-xla is not installed, or sees no TPU (on its CPU device the processes would wait for each
            other for ever).
    """
    try:
        import torch_xla
        import torch_xla.runtime as xr
    except ImportError as error:
        raise ConfigError(
            "run.parallel is processes and torch-xla is not installed: pip install -e '.[tpu]'"
        ) from error
    if (kind := xr.device_type()) != "TPU":  # read from the environment: the device itself is the processes' to open
        raise ConfigError(f"run.parallel is processes, which needs a TPU, and torch-xla runs on {kind} here: use spmd")
    torch_xla.launch(function, args=arguments)


def join_processes(parallel: str, on_cuda: bool, spmd: bool = False) -> Processes:
    """Join the other processes of this training, if the launcher started any.

    Args:
        parallel: `run.parallel`.
        on_cuda: whether the devices are GPUs (NCCL; gloo otherwise).
        spmd: whether the device is torch-xla's in single-program mode (`Device.spmd`).

    Raises:
        ConfigError: if the launcher and `run.parallel` disagree.
    """
    if spmd:
        import torch_xla.runtime as xr

        return Processes(xr.process_index(), xr.process_count(), kind="spmd" if xr.process_count() > 1 else "one")
    if parallel == "processes":
        import torch_xla.runtime as xr

        return Processes(xr.global_ordinal(), xr.world_size(), xr.local_ordinal(), "xla")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        if parallel in ("ddp", "fsdp") and "RANK" not in os.environ:
            raise ConfigError(
                f"run.parallel is {parallel}: start with `torchrun --nproc-per-node N tools/pretrain.py …`"
            )
        if "RANK" not in os.environ:
            return Processes()
    if parallel == "one":
        raise ConfigError(f"run.parallel is one, but torchrun started {world} processes: use auto, ddp or fsdp")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if on_cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_cuda else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank, "torch")


def leave_processes() -> None:
    """Undo `join_processes`; harmless where there was nothing to join."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
