"""One training step on any device: autocast, gradient clipping, a check of the losses, draws that can be repeated.

Detectron2's `SimpleTrainer` with another `run_step`; its own `AMPTrainer` is for CUDA only.
"""

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor

from ovd.engine.loader import seed_all
from pretrain.config import ConfigError

_STEP_DRAWS = 1  # keeps the model's seeds apart from those of pictures, which have one number less
_REMEDY = "Lower optimizer.lr or set train.clip_norm, and continue from the last checkpoint with --resume"


def autocast_dtype(amp: bool | str, device: torch.device) -> torch.dtype | None:
    """Which type `train.amp` means on a device; None computes in float32.

    Args:
        amp: "auto" (or true): bfloat16 on GPUs that have it, float16 on others, float32 on the CPU; "off" (or false);
            "bfloat16": on the CPU too; "float16": with loss scaling, GPUs only.

    Raises:
        ConfigError: for another value, or float16 without a GPU.
    """
    choice = {True: "auto", False: "off"}.get(amp, amp)
    if choice not in ("auto", "off", "bfloat16", "float16"):
        raise ConfigError(f"train.amp is {amp!r}: choose auto, off, bfloat16 or float16")
    if choice == "float16" and device.type != "cuda":
        raise ConfigError(f"train.amp is float16, which needs a GPU, and the device is {device}: use bfloat16 or off")
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return None
    if choice == "auto":
        choice = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return getattr(torch, choice)


class DetectorTrainer(SimpleTrainer):
    """Steps of a detector.

    Args:
        model: batch -> dict of scalar losses, wrapped for several processes where there are.
        data_loader: endless batches; may be given later (`data_loader`), before the first step.
        optimizer: of the model's parameters.
        dtype: autocast type; None: float32.
        clip_norm: largest 2-norm of all gradients together; 0 does not clip.
        seed: with the step and the process it seeds the model's draws (the sampling of regions).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None = None,
        clip_norm: float = 0.0,
        seed: int = 0,
    ) -> None:
        if clip_norm < 0:
            raise ConfigError(f"train.clip_norm is {clip_norm}: give a norm above 0, or 0 for no clipping")
        super().__init__(model, data_loader, optimizer)
        self.dtype, self.clip_norm, self.seed = dtype, clip_norm, seed
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.means: dict[str, float] = {}  # the last step's losses
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        """Load, compute, check, update.

        Raises:
            FloatingPointError: a loss is not finite; on every process, before the weights change. Or a predicted box is
                not, on its own process.
        """
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        loading = time.perf_counter() - start
        seed_all(self.seed, self.iter, comm.get_rank(), _STEP_DRAWS)
        try:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                losses = self.model(batch)
        except FloatingPointError as error:  # Detectron2's proposals look at their boxes
            raise FloatingPointError(
                f"step {self.iter}: {error} The losses of the step before: {self.means}. {_REMEDY}"
            ) from error
        self.optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self._report(losses, loading)
        if self.clip_norm:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
            self.storage.put_scalar("gradient_norm", float(norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _report(self, losses: dict[str, Tensor], loading: float) -> None:
        """Log the losses, averaged over the processes, and the longest wait for data; stop where one is not finite."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        waited = torch.tensor(loading, device=values.device)
        if comm.get_world_size() > 1:
            dist.all_reduce(values)
            values /= comm.get_world_size()
            dist.all_reduce(waited, dist.ReduceOp.MAX)
        means = dict(zip(losses, values.tolist(), strict=True))
        if not all(math.isfinite(value) for value in means.values()):
            raise FloatingPointError(f"a loss is not finite at step {self.iter}: {means}. {_REMEDY}")
        self.means = means
        self.storage.put_scalar("data_time", float(waited))
        self.storage.put_scalar("total_loss", sum(means.values()))
        self.storage.put_scalars(**means)

    def state_dict(self) -> dict[str, Any]:
        """Step, hooks, optimiser, and the loss scale where there is one."""
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; states without a loss scale are accepted."""
        super().load_state_dict(state_dict)
        if state_dict.get("scaler"):
            self.scaler.load_state_dict(state_dict["scaler"])
