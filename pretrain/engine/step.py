"""One optimiser step: forward and backward over this process's part of the batch, then the update.

Two ways to the same gradient. The whole batch at once; or, with `micro_batch_size`, in pieces with cached embeddings
("Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983): (1) embed every piece
without a graph, (2) take the loss of the whole batch on those embeddings and its gradient with respect to them, (3)
embed every piece again, now with a graph, and pass it that gradient. Memory holds one piece's activations whatever the
batch; the price is a second forward pass.
"""

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pretrain.config import ConfigError, OptimConfig, PhaseConfig
from pretrain.engine.device import Device
from pretrain.engine.optim import build_optimizer
from pretrain.engine.parallel import split_parameters
from pretrain.engine.processes import Processes
from pretrain.engine.schedule import lr_at
from pretrain.objectives import Objective


def check_batch(objective: Objective, phase: PhaseConfig, device: Device, processes: Processes) -> int:
    """How many pairs a process encodes at once; 0: its whole part of the batch.

    Raises:
        ConfigError: if the batch cannot be cut into equal parts, or not at all.
    """
    local = processes.share(phase.batch_size, "batch_size")
    if local % device.devices:
        raise ConfigError(f"batch_size {local} of a process cannot be spread equally over {device.devices} devices")
    micro = phase.micro_batch_size if 0 < phase.micro_batch_size < local else 0
    if micro and (local % micro or micro % device.devices):
        raise ConfigError(
            f"micro_batch_size {micro} does not cut the {local} pairs of a process into equal parts (for "
            f"{device.devices} devices): use a divisor"
        )
    if micro and objective.whole_batch:
        raise ConfigError(
            f"micro_batch_size {micro}: a batch of {type(objective).__name__} cannot be encoded in pieces, because "
            f"{objective.whole_batch}; set it to 0"
        )
    return micro


class TrainStep:
    """Callable that trains `objective` on one batch.

    Args:
        objective: on the device, already adapted to the phase, and sharded if it is to be.
        phase: batch, micro batch and schedule.
        optim: the optimiser to make for this phase.
        device: where.
        processes: who else trains.
        seed: first number of the key that random draws inside the objective depend on.
        compile: use torch.compile.

    Raises:
        ConfigError: if the batch cannot be cut into equal parts.
    """

    def __init__(
        self, objective: Objective, phase: PhaseConfig, optim: OptimConfig, device: Device,
        processes: Processes | None = None, seed: int = 0, compile: bool = False,
    ):  # fmt: skip
        self.objective, self.phase, self.device = objective, phase, device
        self.processes = processes or Processes()
        self._seed, self._clip = seed, optim.grad_clip
        self._micro = check_batch(objective, phase, device, self.processes)
        sharded, whole = split_parameters(objective)
        # DDP averages gradients while the backward pass runs; those of pieces are averaged once, after the last one.
        wrap = self.processes.kind == "torch" and not sharded and not self._micro
        ids = [self.processes.local_rank] if device.kind == "cuda" else None
        forward = DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False) if wrap else objective
        self._to_average = [] if wrap else whole
        self._to_clip = [group for group in (sharded, whole) if group]
        self._forward = torch.compile(forward) if compile and not self._micro else forward
        self._encode = torch.compile(objective.encode) if compile and self._micro else objective.encode
        self.optimizer = build_optimizer(objective, optim, device)

    def __call__(self, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """Train on this process's part of the batch at 0-based `step` of the phase; returns the objective's output.

        Tensors stay on the device: nothing here waits for it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, self.phase) * group.get("lr_scale", 1.0)  # timm's layer-wise decay sets lr_scale
        self.optimizer.zero_grad(set_to_none=True)
        output = self._in_pieces(batch, step) if self._micro else self._at_once(batch, step)
        self.processes.average_gradients(self._to_average)
        if self._clip:
            output["grad_norm"] = self._clip_gradients()
        self.optimizer.step()
        self.objective.after_step()
        self.device.cut()
        return output

    def _clip_gradients(self) -> torch.Tensor:
        """Scale all gradients so that their norm is at most the limit; returns the norm before."""
        parts = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in self._to_clip]
        # Split tensors have a norm that is split too, and do not mix with whole ones.
        norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in parts]).norm()
        for group in self._to_clip:
            clip_grads_with_norm_(group, self._clip, norm)
        return norm

    def _draw(self, step: int, piece: int) -> None:
        self.device.seed(self._seed, step, self.processes.draw, piece)

    def _at_once(self, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        self._draw(step, 0)
        with self.device.autocast():
            output = self._forward(self.device.move(batch))
        output["loss"].backward()
        return output

    def _in_pieces(self, batch: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        cut = zip(*(value.split(self._micro) for value in batch.values()), strict=True)
        pieces = [dict(zip(batch, values, strict=True)) for values in cut]
        cached: list[dict[str, torch.Tensor]] = []
        for index, piece in enumerate(pieces):
            self._draw(step, index)
            with torch.no_grad(), self.device.autocast():
                cached.append(self._encode(self.device.move(piece)))
            self.device.cut()
        features = {name: torch.cat([part[name] for part in cached]).requires_grad_() for name in cached[0]}
        self._draw(step, len(pieces))
        with self.device.autocast():
            output = self.objective.loss(features)
        output["loss"].backward()
        # Of several hosts in one program, a piece has the rows of all.
        rows = len(next(iter(cached[0].values())))
        gradients = {name: value.grad.split(rows) for name, value in features.items() if value.grad is not None}
        self.device.cut()
        for index, piece in enumerate(pieces):
            self._draw(step, index)  # the same dropped tokens, crops and so on as in the first pass
            with self.device.autocast():
                again = self._encode(self.device.move(piece))
            torch.autograd.backward([again[n] for n in gradients], [g[index] for g in gradients.values()])
            self.device.cut()
        return output
