"""The one place that knows devices: CPU, CUDA, and TPU through torch-xla."""

from contextlib import AbstractContextManager, nullcontext

import torch

from pretrain.config import ConfigError


class Device:
    """A device, its precision, and what it needs at the end of a step.

    Args:
        name: auto (CUDA where there is one, else the CPU), cpu, cuda or xla.
        precision: fp32, bf16, or auto: bf16 on CUDA and XLA hardware that has it, fp32 on the CPU (at the sizes that a
            CPU can train, bfloat16 was measured no faster).

    Raises:
        ConfigError: if the device is not there.
    """

    def __init__(self, name: str = "auto", precision: str = "auto"):
        self.kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        if self.kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError("run.device is cuda and PyTorch sees no GPU: use run.device=cpu, or check the driver")
        if self.kind == "xla":
            try:
                import torch_xla
            except ImportError as error:
                raise ConfigError(
                    "run.device is xla and torch-xla is not installed: pip install 'reclip-ovd[tpu]'"
                ) from error
            self._xla = torch_xla
            self.torch_device = torch_xla.device()
            on_tpu = torch_xla.runtime.device_type() == "TPU"
        else:
            self.torch_device = torch.device(self.kind)
            on_tpu = False
        has_bf16 = on_tpu or (self.kind == "cuda" and torch.cuda.is_bf16_supported())
        self.bf16 = precision == "bf16" or (precision == "auto" and has_bf16)

    def autocast(self) -> AbstractContextManager:
        """bfloat16 matmuls where the precision asks for them."""
        return torch.autocast(self.torch_device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def move(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy a batch to the device."""
        return {name: value.to(self.torch_device, non_blocking=True) for name, value in batch.items()}

    def end_step(self) -> None:
        """Run what XLA has traced; nothing to do elsewhere."""
        if self.kind == "xla":
            self._xla.sync()

    def describe(self) -> str:
        """For logs: the device's name and the precision."""
        name = (
            torch.cuda.get_device_name() if self.kind == "cuda" else f"{self.kind} ({torch.get_num_threads()} threads)"
        )
        return f"{name}, {'bf16' if self.bf16 else 'fp32'}"
