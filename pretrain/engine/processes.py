"""The processes of one training: who this one is, and the few things they do together.

One process is the common case, and then nothing here costs anything. `torchrun` starts the processes of GPU machines;
`torch_xla.launch` those of TPUs that are not driven by SPMD (see `Device`).
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.config import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process among `world` of them.

    Attributes:
        rank: 0-based; rank 0 writes files and prints.
        world: how many there are; each takes its part of every batch.
        local_rank: which of this machine's devices is this process's.
        kind: one, torch (torch.distributed) or xla (torch_xla.launch).
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    kind: str = "one"

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

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
        """Return when every process is here."""
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


def join_processes(parallel: str, on_cuda: bool) -> Processes:
    """Join the other processes of this training, if the launcher started any.

    Args:
        parallel: `run.parallel`.
        on_cuda: whether the devices are GPUs (NCCL; gloo otherwise).

    Raises:
        ConfigError: if the launcher and `run.parallel` disagree.
    """
    if parallel == "processes":
        import torch_xla.runtime as xr

        return Processes(xr.global_ordinal(), xr.world_size(), xr.local_ordinal(), "xla")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or parallel == "spmd":
        if parallel in ("ddp", "fsdp") and "RANK" not in os.environ:
            raise ConfigError(
                f"run.parallel is {parallel}: start with `torchrun --nproc-per-node N tools/pretrain.py …`"
            )
        if "RANK" not in os.environ or parallel == "spmd":
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
