"""The pretraining loop: phases in order, one objective, resumable to the bit on the CPU.

Where training starts: (1) the run folder's own state, with --resume; (2) scratch.
"""

import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from open_clip import CustomTextCLIP
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pretrain.atomic import remove_leftovers
from pretrain.config import ConfigError, PretrainConfig, to_yaml
from pretrain.data.loader import build_loader
from pretrain.data.pairs import load_pairs
from pretrain.engine.checkpoint import load_state, save_state
from pretrain.engine.data_wait import DataWait
from pretrain.engine.device import Device
from pretrain.engine.parallel import load_optimizer, plain, shard
from pretrain.engine.processes import join_processes
from pretrain.engine.run_folder import RunFolder, trim_metrics
from pretrain.engine.step import TrainStep
from pretrain.evaluation.zero_shot import ZeroShotResult, evaluate_zero_shot
from pretrain.modeling.checkpoint import initial_model, save_checkpoint
from pretrain.modeling.clip import build_model
from pretrain.modeling.head_file import save_heads
from pretrain.objectives import Objective, build_objective


class Trainer:
    """Runs a configuration in a run folder.

    Args:
        config: checked configuration.
        resume: continue from the folder's last state; without it, a folder that already has one is refused.

    Raises:
        ConfigError: for data or settings that cannot be used.
    """

    def __init__(self, config: PretrainConfig, resume: bool = False):
        self.config = config
        folder = Path(config.run.output)
        state = load_state(folder) if resume else None
        if not resume and (folder / "state.pt").exists():
            raise ConfigError(f"{folder} already holds a run: add --resume to continue it, or set run.output elsewhere")
        self.device = Device(config.run.device, config.run.precision, config.run.parallel)
        self.processes = join_processes(config.run.parallel, self.device.kind == "cuda", self.device.spmd)
        # Hosts of one program have no place to meet before it runs.
        together = None if self.processes.one_program else self.processes
        self.data = load_pairs(config.data, config.evaluation.splits, together)
        self.results: dict[str, dict[str, ZeroShotResult]] = {}
        self._first_phase, self._first_step, self._state = 0, 0, state
        if state:
            if state["config"] != self._identity():
                raise ConfigError(f"{folder} was started with another configuration: restore {folder}/config.yaml")
            if state["data"] != self.data.fingerprints:
                raise ConfigError(f"{folder} was started with other data: see {folder}/about.json for what it was")
            self._first_phase, self._first_step = state["phase"], state["step"]
            for phase, by_split in state.get("results", {}).items():
                self.results[phase] = {split: ZeroShotResult(**values) for split, values in by_split.items()}
        self._seconds = state["seconds"] if state else 0.0
        torch.manual_seed(config.run.seed)
        model = build_model(config.model) if state else initial_model(config.model)
        self._minimised = config.objective_of(config.phases[self._first_phase])
        self.objective: Objective = self._build_objective(self._first_phase, model)
        self._check_phases()
        self.folder: RunFolder | None = None
        if self.processes.is_main:
            remove_leftovers(folder)
            # Also without a state: a run that ended before its first one is written again from the start.
            trim_metrics(folder / "metrics.jsonl", self._global_step(self._first_phase, self._first_step))
            self.folder = RunFolder(folder, to_yaml(config), self.data.fingerprints)
            for note in self.data.notes:
                print(note)

    @property
    def model(self) -> CustomTextCLIP:
        """The towers that are trained and evaluated."""
        return self.objective.model

    def _build_objective(self, index: int, model: CustomTextCLIP) -> Objective:
        """The objective of a phase; its own weights depend on the run's seed and the phase, not on what came before."""
        torch.manual_seed(self.config.run.seed * 1000 + index)
        return build_objective(self.config, model, self.config.phases[index])

    def _check_phases(self) -> None:
        """Refuse now what would otherwise stop the run when its last phase begins."""
        patch = self.model.visual.trunk.patch_embed.patch_size[0]
        for index, phase in enumerate(self.config.phases):
            if phase.image_size % patch:
                raise ConfigError(
                    f"phases[{index}].image_size {phase.image_size} is not a multiple of the patch size {patch}: use "
                    f"{phase.image_size // patch * patch or patch}"
                )
            if phase.keep_tokens > (tokens := (phase.image_size // patch) ** 2):
                raise ConfigError(
                    f"phases[{index}].keep_tokens {phase.keep_tokens} exceeds the {tokens} tokens of an image of "
                    f"{phase.image_size} px"
                )
            objective = self.objective
            if self.config.objective_of(phase) != self._minimised:
                objective = self._build_objective(index, build_model(self.config.model))
            self._loader(index, objective, 0)

    def _loader(self, index: int, objective: Objective, first: int) -> DataLoader:
        config, phase = self.config, self.config.phases[index]
        views = objective.views(config.data, phase, self.data.backgrounds)
        return build_loader(
            self.data.training, self.data.store, views, config.data, phase, config.run.seed * 1000 + index, first,
            self.processes.rank, self.processes.world,
        )  # fmt: skip

    def _identity(self) -> str:
        """What must not change on resumption: everything but where, how widely and how often things are written."""
        keep = [line for line in to_yaml(self.config).splitlines() if not line.startswith("  ")]
        data = replace(self.config.data, workers=0, preload=False)  # how samples are made, not which
        phases = [replace(phase, micro_batch_size=0) for phase in self.config.phases]
        config = self.config
        parts = (config.model, data, config.objective, phases, config.optim, config.run.seed)
        return "\n".join([*keep, *(repr(p) for p in parts)])

    def _global_step(self, phase: int, step: int) -> int:
        return sum(p.steps for p in self.config.phases[:phase]) + step

    def train(self) -> Path:
        """Run every phase; returns the checkpoint folder."""
        parameters = sum(p.numel() for p in self.model.parameters())
        if self.processes.is_main:
            others = f" x {self.processes.world} processes" if self.processes.world > 1 else ""
            print(f"{parameters / 1e6:.1f} M parameters on {self.device.describe()}{others}")
        for index in range(self._first_phase, len(self.config.phases)):
            first = self._first_step if index == self._first_phase else 0
            self._run_phase(index, first)
        folder = Path(self.config.run.output) / "checkpoint"
        if self.processes.is_main:
            save_checkpoint(folder, self.model, self.config.model)
            save_heads(folder, self.objective.heads())
            self._write_summary(folder)
            self.folder.close()
        self.processes.wait()
        return folder

    def _enter(self, index: int) -> TrainStep:
        """Adapt the objective to a phase, put it on its device(s), make its optimiser; restore a state once."""
        phase, run = self.config.phases[index], self.config.run
        if self.config.objective_of(phase) != self._minimised:
            self._minimised = self.config.objective_of(phase)
            self.objective = self._build_objective(index, self.model.cpu())
        self.objective.enter_phase(phase)
        state, self._state = self._state, None
        if state:
            self.objective.load_state_dict(state["objective"])
        if run.parallel == "fsdp":
            shard(self.objective)  # before the move: one device need not hold it whole
        self.objective.to(self.device.torch_device).train()
        step = TrainStep(
            self.objective, phase, self.config.optim_of(phase), self.device, self.processes,
            seed=run.seed * 1000 + index, compile=run.compile,
        )  # fmt: skip
        if state:
            load_optimizer(step.optimizer, state["optimizer"])
        return step

    def _leave(self, index: int) -> None:
        """After a phase: a sharded objective becomes a plain one again, for the next phase's sizes."""
        if self.config.run.parallel == "fsdp":
            self.objective = self._whole_objective(index)

    def _whole_objective(self, index: int) -> Objective:
        """An unsharded copy of the objective in phase `index`; every process must call it."""
        state = plain(self.objective.state_dict())
        copy = self._build_objective(index, build_model(self.config.model))
        copy.enter_phase(self.config.phases[index])
        copy.load_state_dict(state)
        return copy

    def _run_phase(self, index: int, first: int) -> None:
        phase, run = self.config.phases[index], self.config.run
        live = self._enter(index)
        loader = self._loader(index, self.objective, first)
        if self.processes.is_main:
            text = f"phase {phase.name}: {phase.steps} steps, {phase.image_size} px, {phase.context_length} tokens"
            resumed = f", from step {first}" if first else ""
            tqdm.write(f"{text}, batch {phase.batch_size}, peak lr {phase.lr:g}{resumed}")
        # A log file wants a line now and then, a terminal a moving bar.
        interval = 0.2 if sys.stderr.isatty() else 20.0
        with tqdm(
            total=phase.steps, initial=first, unit="step", desc=phase.name, smoothing=0.05, mininterval=interval,
            disable=not self.processes.is_main,
        ) as bar:  # fmt: skip
            started, since, waiting = time.perf_counter(), first, DataWait(self.device.torch_device)
            for step, batch in enumerate(waiting.over(loader), start=first):
                output = self._step(live, batch, step)
                bar.update()
                done = step + 1
                saving = done % run.checkpoint_every == 0 or done == phase.steps
                # Reading the loss before every save keeps a state with a loss that is not finite off the disk.
                if saving or done % run.log_every == 0:
                    values = self.processes.mean(output)  # waits for the device
                    elapsed = time.perf_counter() - started
                    self._seconds += elapsed
                    values["data_wait"] = waiting.share(elapsed)
                    self._log(index, done, values, live, (done - since) * phase.batch_size / elapsed, bar)
                    started, since = time.perf_counter(), done
                every = self.config.evaluation.every
                if done == phase.steps or (every and done % every == 0):
                    self._evaluate(index, done)
                    started = time.perf_counter()
                if saving:
                    self._save(index, done, live.optimizer)
        if self.processes.is_main and (note := waiting.note(phase.name, loader.num_workers)):
            tqdm.write(note)
        self._leave(index)

    def _step(self, live: TrainStep, batch: dict, step: int) -> dict[str, torch.Tensor]:
        return live(batch, step)

    def _log(self, index: int, step: int, values: dict[str, float], live: TrainStep, rate: float, bar: tqdm) -> None:
        name = self.config.phases[index].name
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss became {values['loss']} at step {step} of phase {name}: lower its lr or lengthen its "
                f"warm-up; the last state is in {self.config.run.output}"
            )
        if self.folder:
            shown = {"loss": f"{values['loss']:.3f}", "pairs_s": f"{rate:.0f}", "waiting": f"{values['data_wait']:.0%}"}
            bar.set_postfix(shown, refresh=False)
            lr = live.optimizer.param_groups[0]["lr"]
            self.folder.log(
                self._global_step(index, step), phase=name, lr=lr, pairs_per_second=rate, train_seconds=self._seconds,
                **values,
            )  # fmt: skip

    def _evaluate(self, index: int, step: int) -> None:
        """Zero-shot on every split, by the main process; the others wait, or compute the same in one program."""
        takes_part = self.processes.is_main or self.processes.one_program
        # Whole on the evaluating device only; putting it together takes every process.
        objective = self._whole_objective(index) if self.config.run.parallel == "fsdp" else self.objective
        if takes_part:
            for name, encoder in objective.to(self.device.torch_device).encoders().items():
                for split in self.data.evaluation:
                    self._judge(index, step, f"{split}_{name}" if name else split, split, encoder)
        self.processes.wait()

    def _judge(self, index: int, step: int, title: str, split: str, encoder: nn.Module) -> None:
        phase = self.config.phases[index].name
        result = evaluate_zero_shot(
            encoder, self.data.evaluation[split], self.data.classes, self.data.store, self.config.evaluation.templates,
            self.device.torch_device,
        )  # fmt: skip
        if not self.processes.is_main:
            return
        self.results.setdefault(phase, {})[title] = result
        tqdm.write(f"zero-shot on {title} after {phase} step {step}: top-1 {result.top1:.1%}, top-5 {result.top5:.1%}")
        values = {f"zero_shot_{title}_{name}": value for name, value in result.to_dict().items()}
        self.folder.log(self._global_step(index, step), phase=phase, train_seconds=self._seconds, **values)

    def _save(self, index: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        # Putting split or global tensors together takes every process; else copying to the CPU is the main one's work.
        if not (self.processes.is_main or self.processes.one_program or self.config.run.parallel == "fsdp"):
            return
        state = {
            "config": self._identity(), "data": self.data.fingerprints,
            "phase": index, "step": step, "seconds": self._seconds,
            "objective": plain(self.objective.state_dict()), "optimizer": plain(optimizer.state_dict()),
            "results": {
                phase: {split: asdict(result) for split, result in by_split.items()}
                for phase, by_split in self.results.items()
            },
        }  # fmt: skip
        if self.processes.is_main:
            save_state(Path(self.config.run.output), state)

    def _write_summary(self, checkpoint: Path) -> None:
        lines = ["# Pretraining run", "", *(f"- {note}" for note in self.data.notes)]
        lines += [f"- {note}" for note in self.data.left_out()]
        lines += [
            f"- {result.broken} broken images of {split} left out of the evaluation after {phase}"
            for phase, by_split in self.results.items()
            for split, result in by_split.items()
            if result.broken
        ]
        lines.append(f"- training time: {self._seconds / 60:.1f} minutes on {self.device.describe()}")
        lines += [f"- checkpoint: {checkpoint}", "", "| phase | split | top-1 | top-5 | chance | images | classes |"]
        lines.append("|---|---|---|---|---|---|---|")
        for phase, by_split in self.results.items():
            for split, r in by_split.items():
                lines.append(
                    f"| {phase} | {split} | {r.top1:.1%} | {r.top5:.1%} | {r.chance:.2%} | {r.images} | {r.classes} |"
                )
        self.folder.write_summary("\n".join(lines) + "\n")
