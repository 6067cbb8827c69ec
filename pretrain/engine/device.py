"""The one place that knows devices: CPU, CUDA, and TPU through torch-xla."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from pretrain.config import ConfigError


class Device:
    """A device, its precision, and what it needs around a step.

    Args:
        name: auto (CUDA where there is one, else the CPU), cpu, cuda or xla.
        precision: fp32, bf16, or auto: bf16 on CUDA and XLA hardware that has it, fp32 on the CPU (at the sizes that a
            CPU can train, bfloat16 was measured no faster).
        parallel: `run.parallel`. On XLA, spmd (and auto, where there are several devices) makes one program of all
            devices: batches are split over them, the loss is the whole batch's, and no gather is needed.

    Raises:
        ConfigError: if the device is not there.
    """

    def __init__(self, name: str = "auto", precision: str = "auto", parallel: str = "auto"):
        self.kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        if self.kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError("run.device is cuda and PyTorch sees no GPU: use run.device=cpu, or check the driver")
        self._mesh = None
        self._row_shardings: dict[int, Any] = {}
        on_tpu = False
        if self.kind == "xla":
            on_tpu = self._open_xla(parallel)
        elif parallel in ("spmd", "processes"):
            raise ConfigError(f"run.parallel is {parallel}, which needs run.device=xla: use ddp or fsdp")
        else:
            self.torch_device = torch.device(self.kind)
        has_bf16 = on_tpu or (self.kind == "cuda" and torch.cuda.is_bf16_supported())
        self.bf16 = precision == "bf16" or (precision == "auto" and has_bf16)

    def _open_xla(self, parallel: str) -> bool:
        """Take the XLA device; returns whether it is a TPU."""
        try:
            import torch_xla
            import torch_xla.runtime as xr
        except ImportError as error:
            raise ConfigError("run.device is xla and torch-xla is not installed: pip install -e '.[tpu]'") from error
        if parallel in ("ddp", "fsdp"):
            raise ConfigError(f"run.parallel is {parallel}, which needs CPU or CUDA: use spmd or processes")
        on_tpu = xr.device_type() == "TPU"
        if parallel == "processes" and not on_tpu:
            raise ConfigError(
                f"run.parallel is processes, which needs a TPU, and torch-xla runs on {xr.device_type()} here: use spmd"
            )
        if parallel == "spmd" or (parallel == "auto" and on_tpu):
            import torch_xla.distributed.spmd as xs

            xr.use_spmd()  # must come before the first tensor
            count = xr.global_runtime_device_count()
            self._mesh = xs.Mesh(np.arange(count), (count,), ("data",))
        self._xla = torch_xla
        self.torch_device = torch_xla.device()
        return on_tpu

    def autocast(self) -> AbstractContextManager:
        """bfloat16 matmuls where the precision asks for them."""
        return torch.autocast(self.torch_device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def move(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy a batch to the device; under SPMD its rows are spread over all devices.

        With several hosts under SPMD each gives its own rows, which go to its own devices, and the result has the rows
        of all hosts.
        """
        if self._mesh is None:
            return {name: value.to(self.torch_device, non_blocking=True) for name, value in batch.items()}
        from torch_xla.core import xla_model as xm

        return {
            name: xm.send_cpu_data_to_device(value, self.torch_device, self._row_sharding(value.ndim))[0]
            for name, value in batch.items()
        }

    def _row_sharding(self, dimensions: int):
        """Rows over devices, all else whole."""
        if dimensions not in self._row_shardings:
            import torch_xla.distributed.spmd as xs

            # minibatch: what a process gives are its rows, not a copy of all rows. The order of hosts along the mesh
            # does not matter: images and tokens take the same way, so that pairs stay pairs.
            spec = xs.ShardingSpec(self._mesh, ("data", *[None] * (dimensions - 1)), minibatch=True)
            self._row_shardings[dimensions] = spec
        return self._row_shardings[dimensions]

    @property
    def spmd(self) -> bool:
        """Whether all devices, of all hosts, run one program over global tensors."""
        return self._mesh is not None

    @property
    def devices(self) -> int:
        """How many devices share a batch of this process."""
        if self._mesh is None:
            return 1
        import torch_xla.runtime as xr

        return xr.addressable_runtime_device_count()

    def seed(self, *key: int) -> None:
        """Make what is drawn next on any device a function of `key` alone: resuming needs no saved generator."""
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])
        torch.manual_seed(seed)
        if self.kind == "xla":
            self._xla.manual_seed(seed)

    def cut(self) -> None:
        """End a stretch of work: run what XLA has traced so far; nothing to do elsewhere."""
        if self.kind == "xla":
            self._xla.sync()

    def describe(self) -> str:
        """For logs: the device's name and the precision."""
        if self.kind == "cuda":
            name = torch.cuda.get_device_name()
        elif self.kind == "xla":
            name = "xla" if self._mesh is None else f"xla ({self._mesh.size()} devices, SPMD)"
        else:
            name = f"cpu ({torch.get_num_threads()} threads)"
        return f"{name}, {'bf16' if self.bf16 else 'fp32'}"
