"""The pretraining loop: phases in order, one objective, resumable to the bit on the CPU.

Where training starts: (1) the run folder's own state, with --resume; (2) scratch.
"""

import math
import sys
import time
from collections import Counter
from dataclasses import asdict
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
from pretrain.engine.checkpoint import first_not_finite, save_state
from pretrain.engine.data_wait import DataWait
from pretrain.engine.device import Device
from pretrain.engine.parallel import load_optimizer, plain, shard
from pretrain.engine.phases import carry_over, rehearse_phase
from pretrain.engine.processes import join_processes
from pretrain.engine.resume import check_state, identity, starting_state
from pretrain.engine.run_folder import RunFolder, trim_metrics
from pretrain.engine.step import TrainStep
from pretrain.engine.summary import gather_reports, report_to_all, summary
from pretrain.evaluation.zero_shot import ZeroShotResult, evaluate_zero_shot
from pretrain.modeling.checkpoint import initial_model, save_checkpoint
from pretrain.modeling.clip import build_model, set_context_length, set_image_size
from pretrain.modeling.head_file import save_heads
from pretrain.objectives import Objective, build_objective, caption_reader


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
        self.device = Device(config.run.device, config.run.precision, config.run.parallel)
        self.processes = join_processes(config.run.parallel, self.device.kind == "cuda", self.device.spmd)
        state = starting_state(folder, resume, self.processes, self.device)
        # Hosts of one program have no place to meet before it runs.
        together = None if self.processes.one_program else self.processes
        self.data = load_pairs(config.data, config.evaluation.splits, together, caption_reader(config))
        self.results: dict[str, dict[str, ZeroShotResult]] = {}
        self._first_phase, self._first_step, self._state = 0, 0, state
        changed = []
        if state:
            changed = check_state(state, config, self.data.fingerprints, folder)
            self._first_phase, self._first_step = state["phase"], state["step"]
            for phase, by_split in state["results"].items():
                self.results[phase] = {split: ZeroShotResult(**values) for split, values in by_split.items()}
        self._seconds = state["seconds"] if state else 0.0
        # Of samples, by kind: by the attempts until this one, and with this one's until the last state.
        self._left_out_before = self._left_out = Counter(state["left_out"] if state else {})
        self.objective: Objective = self._first_objective()
        self._check_phases()
        self.folder: RunFolder | None = None
        if self.processes.is_main:
            remove_leftovers(folder)
            # Also without a state: a run that ended before its first one is written again from the start.
            trim_metrics(folder / "metrics.jsonl", self._global_step(self._first_phase, self._first_step))
            self.folder = RunFolder(folder, to_yaml(config), self.data.fingerprints)
            for note in [*self.data.notes, *(["changed since: " + "; ".join(changed)] if changed else [])]:
                print(note)

    @property
    def model(self) -> CustomTextCLIP:
        """The towers that are trained and evaluated."""
        return self.objective.model

    def _build_objective(self, index: int, model: CustomTextCLIP, recipe: dict | None = None) -> Objective:
        """The objective of a phase; its own weights depend on the run's seed and the phase, not on what came before."""
        torch.manual_seed(self.config.run.seed * 1000 + index)
        return build_objective(self.config, model, self.config.phases[index], recipe)

    def _first_objective(self) -> Objective:
        """The objective to start with: of the first phase, of the state's, or of the one after that if it is done."""
        config, state, index = self.config, self._state, self._first_phase
        torch.manual_seed(config.run.seed)
        if state is None:
            return self._build_objective(index, initial_model(config.model))
        model, phase = build_model(config.model), config.phases[index]
        if self._first_step < phase.steps or index + 1 == len(config.phases) or not self._changes(index + 1):
            return self._build_objective(index, model, state["recipe"])
        set_image_size(model, phase.image_size)
        set_context_length(model, phase.context_length)
        prefix, before = "model.", state["objective"]
        model.load_state_dict({n.removeprefix(prefix): v for n, v in before.items() if n.startswith(prefix)})
        self._first_phase, self._first_step, self._state = index + 1, 0, None
        return self._next_objective(index + 1, model, before)

    def _changes(self, index: int) -> bool:
        """Whether a phase minimises something else than the one before."""
        own, before = (self.config.objective_of(self.config.phases[i]) for i in (index, index - 1))
        return own != before

    def _next_objective(self, index: int, model: CustomTextCLIP, before: dict[str, torch.Tensor]) -> Objective:
        """The objective of a phase that changes it; where only options change, it goes on from the state `before`."""
        # The new objective may set the scale of the towers, which `before` shares with it.
        before = {**before, "model.logit_scale": model.logit_scale.detach().clone()}
        objective, phase = self._build_objective(index, model), self.config.phases[index]
        name = self.config.objective_of(phase).name
        if name == self.config.objective_of(self.config.phases[index - 1]).name:
            afresh = carry_over(before, objective)
            if afresh and self.processes.is_main:
                print(f"phase {phase.name}: {name} has other options; these start afresh: {', '.join(afresh)}")
        return objective

    def _check_phases(self) -> None:
        """Refuse now what would otherwise stop the run when its last phase begins; phases that are done may be."""
        patch = self.model.visual.trunk.patch_embed.patch_size[0]
        for index, phase in list(enumerate(self.config.phases))[self._first_phase :]:
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
            # A phase that a state continues has begun before, and begins next.
            begun = self._state is not None and index == self._first_phase
            objective = self.objective if begun else rehearse_phase(self.config, index, self.device, self.processes)
            self._loader(index, objective, 0)

    def _loader(self, index: int, objective: Objective, first: int) -> DataLoader:
        config, phase = self.config, self.config.phases[index]
        views = objective.views(config.data, phase, self.data.backgrounds)
        return build_loader(
            self.data.training, self.data.store, views, config.data, phase, config.run.seed * 1000 + index, first,
            self.processes.rank, self.processes.world,
        )  # fmt: skip

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
            text = summary(self.data.notes, self._left_out, self.results, self._seconds, self.device.describe(), folder)
            self.folder.write_summary(text)
            self.folder.close()
        self.processes.wait()
        return folder

    def _enter(self, index: int) -> TrainStep:
        """Adapt the objective to a phase, put it on its device(s), make its optimiser; restore a state once."""
        phase, run = self.config.phases[index], self.config.run
        if index > self._first_phase and self._changes(index):
            self.objective = self._next_objective(index, self.model.cpu(), self.objective.state_dict())
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
        copy = self._build_objective(index, build_model(self.config.model), self.objective.recipe())
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
                # Before an evaluation, which weights that are not finite would only confuse.
                state = self._state_to_save(index, done, live.optimizer) if saving else None
                every = self.config.evaluation.every
                evaluating = done == phase.steps or (every and done % every == 0)
                if evaluating:
                    self._evaluate(index, done)
                if state:
                    self._save(state)
                if evaluating or saving:
                    started = time.perf_counter()
        if self.processes.is_main and (note := waiting.note(phase.name, loader.num_workers)):
            tqdm.write(note)
        self._leave(index)

    def _step(self, live: TrainStep, batch: dict, step: int) -> dict[str, torch.Tensor]:
        return live(batch, step)

    def _log(self, index: int, step: int, values: dict[str, float], live: TrainStep, rate: float, bar: tqdm) -> None:
        name = self.config.phases[index].name
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss became {values['loss']} at step {step} of phase {name}: {self._remedy()}"
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

    def _state_to_save(self, index: int, step: int, optimizer: torch.optim.Optimizer) -> dict | None:
        """The state on the CPU, for the process that writes it; every process must call it.

        Raises:
            FloatingPointError: on every process, if a number in it is not finite. The loss says nothing of the update
                that came after it.
        """
        # Putting split or global tensors together takes every process; else copying to the CPU is the main one's work.
        state, name = None, ""
        if self.processes.is_main or self.processes.one_program or self.config.run.parallel == "fsdp":
            state = {"objective": plain(self.objective.state_dict()), "optimizer": plain(optimizer.state_dict())}
            state["recipe"] = self.objective.recipe()
            numbers = {"objective": state["objective"], "optimizer": state["optimizer"]["state"]}
            name = first_not_finite(numbers, masks={f"objective.{n}" for n, _ in self.objective.named_buffers()})
        reports = self.processes.texts(report_to_all(name, self.data.left_out()), self.device)
        name, left_out = gather_reports(reports)
        if name:
            raise FloatingPointError(
                f"after step {step} of phase {self.config.phases[index].name}, {name} is not finite, though the loss "
                f"was: {self._remedy()}"
            )
        self._left_out = self._left_out_before + left_out
        return {**state, "phase": index, "step": step} if self.processes.is_main else None

    def _remedy(self) -> str:
        return (
            "lower its lr, lengthen its warm-up or set optim.grad_clip, and continue with --resume from the last state "
            f"in {self.config.run.output}, which is from before"
        )

    def _save(self, state: dict) -> None:
        results = {phase: {s: asdict(result) for s, result in found.items()} for phase, found in self.results.items()}
        state |= {
            "config": identity(self.config), "data": self.data.fingerprints, "seconds": self._seconds,
            "results": results, "left_out": dict(self._left_out),
        }  # fmt: skip
        save_state(Path(self.config.run.output), state)
