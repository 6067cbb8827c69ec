"""The pretraining loop: phases in order, one objective, resumable to the bit on the CPU.

Where training starts: (1) the run folder's own state, with --resume; (2) scratch.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from tqdm import tqdm

from pretrain.config import ConfigError, PretrainConfig, to_yaml
from pretrain.data.folder import ImageStore, read_backgrounds, read_table, select_split, withhold_words
from pretrain.data.loader import build_loader
from pretrain.engine.checkpoint import load_state, save_state
from pretrain.engine.device import Device
from pretrain.engine.run_folder import RunFolder, trim_metrics
from pretrain.engine.schedule import lr_at
from pretrain.evaluation.zero_shot import ZeroShotResult, evaluate_zero_shot
from pretrain.modeling.checkpoint import restore_full_shape, save_checkpoint
from pretrain.modeling.clip import build_model
from pretrain.objectives import Objective, build_objective


@dataclass
class PairData:
    """The table, split for training and evaluation, with its images."""

    training: list[dict[str, str]]
    evaluation: dict[str, list[dict[str, str]]]
    classes: list[str]
    store: ImageStore
    backgrounds: list
    notes: list[str] = field(default_factory=list)


def load_data(config: PretrainConfig) -> PairData:
    """Read the table, leave out withheld words and images that cannot be decoded (counted, named, reported).

    Raises:
        ConfigError: if nothing is left to train on.
    """
    data = config.data
    table = read_table(data.table)
    training = select_split(table, data.train_split, data.table)
    evaluation = {split: select_split(table, split, data.table) for split in config.evaluation.splits}
    notes = [f"{len(training)} training pairs from {data.table}"]
    if data.withhold:
        path = Path(data.withhold)
        if not path.is_file():
            raise ConfigError(f"data.withhold: no word list at {path}")
        training, dropped = withhold_words(training, path.read_text(encoding="utf-8").splitlines())
        notes.append(f"{dropped} pairs withheld: their text has a word of {path}")
    empty = sum(not row["caption"].strip() for row in training)
    training = [row for row in training if row["caption"].strip()]
    if empty:
        notes.append(f"{empty} pairs left out: empty caption")
    store = ImageStore(Path(data.root) if data.root else Path(data.table).parent, data.preload)
    broken = store.check(row["image"] for row in training) if data.preload else {}
    if broken:
        training = [row for row in training if row["image"] not in broken]
        notes.append(f"{len(broken)} pairs left out, for example: {next(iter(broken.values()))}")
    if not training:
        raise ConfigError("no training pair is left: " + "; ".join(notes))
    classes = sorted({row["caption"] for row in table})
    return PairData(training, evaluation, classes, store, read_backgrounds(data.backgrounds), notes)


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
        torch.manual_seed(config.run.seed)
        self.device = Device(config.run.device, config.run.precision)
        self.data = load_data(config)
        self.model = build_model(config.model)
        self._check_phases()
        self.objective: Objective = build_objective(config, self.model).to(self.device.torch_device)
        self.results: dict[str, dict[str, ZeroShotResult]] = {}
        self._first_phase, self._first_step, self._state = 0, 0, state
        if state:
            if state["config"] != self._identity():
                raise ConfigError(f"{folder} was started with another configuration: restore {folder}/config.yaml")
            self._first_phase, self._first_step = state["phase"], state["step"]
            for phase, by_split in state.get("results", {}).items():
                self.results[phase] = {split: ZeroShotResult(**values) for split, values in by_split.items()}
        # Also without a state: a run that ended before its first one is written again from the start.
        trim_metrics(folder / "metrics.jsonl", self._global_step(self._first_phase, self._first_step))
        self.folder = RunFolder(folder, to_yaml(config), [config.data.table])
        for note in self.data.notes:
            print(note)
        self._seconds = state["seconds"] if state else 0.0

    def _check_phases(self) -> None:
        """Refuse now what would otherwise stop the run when its last phase begins."""
        patch = self.model.visual.trunk.patch_embed.patch_size[0]
        for index, phase in enumerate(self.config.phases):
            if phase.image_size % patch:
                raise ConfigError(
                    f"phases[{index}].image_size {phase.image_size} is not a multiple of the patch size {patch}: use "
                    f"{phase.image_size // patch * patch or patch}"
                )
            build_loader(self.data.training, self.data.store, [], self.config.data, phase, seed=0)

    def _identity(self) -> str:
        """What must not change on resumption: everything but where and how often things are written."""
        keep = [line for line in to_yaml(self.config).splitlines() if not line.startswith("  ")]
        data = replace(self.config.data, workers=0, preload=False)  # how samples are made, not which
        parts = (self.config.model, data, self.config.phases, self.config.optim, self.config.run.seed)
        return "\n".join([*keep, *(repr(p) for p in parts)])

    def _global_step(self, phase: int, step: int) -> int:
        return sum(p.steps for p in self.config.phases[:phase]) + step

    def train(self) -> Path:
        """Run every phase; returns the checkpoint folder."""
        parameters = sum(p.numel() for p in self.model.parameters())
        print(f"{parameters / 1e6:.1f} M parameters on {self.device.describe()}")
        for index in range(self._first_phase, len(self.config.phases)):
            first = self._first_step if index == self._first_phase else 0
            self._run_phase(index, first)
        restore_full_shape(self.model, self.config.model)
        folder = save_checkpoint(self.folder.path / "checkpoint", self.model, self.config.model)
        self._write_summary(folder)
        self.folder.close()
        return folder

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        extra = {"betas": tuple(optim.betas)} if optim.betas else {}
        return create_optimizer_v2(
            self.objective,
            opt=optim.name,
            lr=0.0,
            weight_decay=optim.weight_decay,
            filter_bias_and_bn=True,
            **extra,
            **optim.options,
        )

    def _run_phase(self, index: int, first: int) -> None:
        phase = self.config.phases[index]
        self.objective.enter_phase(phase)
        self.objective.to(self.device.torch_device).train()
        optimizer = self._make_optimizer()
        if self._state and index == self._first_phase:
            self._restore(optimizer)
        seed = self.config.run.seed * 1000 + index
        loader = build_loader(
            self.data.training, self.data.store, self.data.backgrounds, self.config.data, phase, seed, first
        )
        text = f"phase {phase.name}: {phase.steps} steps, {phase.image_size} px, {phase.context_length} tokens"
        tqdm.write(
            f"{text}, batch {phase.batch_size}, peak lr {phase.lr:g}" + (f", from step {first}" if first else "")
        )
        forward = torch.compile(self.objective) if self.config.run.compile else self.objective
        # A log file wants a line now and then, a terminal a moving bar.
        interval = 0.2 if sys.stderr.isatty() else 20.0
        with tqdm(
            total=phase.steps, initial=first, unit="step", desc=phase.name, smoothing=0.05, mininterval=interval
        ) as bar:
            started, since = time.perf_counter(), first
            for step, batch in enumerate(loader, start=first):
                output = self._step(forward, optimizer, batch, lr_at(step, phase))
                bar.update()
                done = step + 1
                saving = done % self.config.run.checkpoint_every == 0 or done == phase.steps
                # Reading the loss before every save keeps a state with a loss that is not finite off the disk.
                if saving or done % self.config.run.log_every == 0:
                    elapsed = time.perf_counter() - started
                    self._seconds += elapsed
                    self._log(index, done, output, optimizer, (done - since) * phase.batch_size / elapsed, bar)
                    started, since = time.perf_counter(), done
                every = self.config.evaluation.every
                if done == phase.steps or (every and done % every == 0):
                    self._evaluate(index, done)
                    started = time.perf_counter()
                if saving:
                    self._save(index, done, optimizer)

    def _step(self, forward, optimizer: torch.optim.Optimizer, batch: dict, lr: float) -> dict[str, torch.Tensor]:
        for group in optimizer.param_groups:
            group["lr"] = lr
        with self.device.autocast():
            output = forward(self.device.move(batch))
        optimizer.zero_grad(set_to_none=True)
        output["loss"].backward()
        if self.config.optim.grad_clip:
            output["grad_norm"] = torch.nn.utils.clip_grad_norm_(
                self.objective.parameters(), self.config.optim.grad_clip
            )
        optimizer.step()
        self.objective.after_step()
        self.device.end_step()
        return output

    def _log(self, index: int, step: int, output: dict, optimizer, rate: float, bar: tqdm) -> None:
        # The only place that waits for the device.
        values = {name: float(value.detach()) for name, value in output.items()}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss became {values['loss']} at step {step} of phase {self.config.phases[index].name}: lower its "
                f"lr or lengthen its warm-up; the last state is in {self.folder.path}"
            )
        bar.set_postfix(loss=f"{values['loss']:.3f}", pairs_s=f"{rate:.0f}", refresh=False)
        lr = optimizer.param_groups[0]["lr"]
        self.folder.log(
            self._global_step(index, step), phase=self.config.phases[index].name, lr=lr, pairs_per_second=rate,
            train_seconds=self._seconds, **values,
        )  # fmt: skip

    def _evaluate(self, index: int, step: int) -> None:
        phase = self.config.phases[index].name
        for split, rows in self.data.evaluation.items():
            result = evaluate_zero_shot(
                self.model, rows, self.data.classes, self.data.store, self.config.evaluation.templates,
                self.device.torch_device,
            )  # fmt: skip
            self.results.setdefault(phase, {})[split] = result
            tqdm.write(
                f"zero-shot on {split} after {phase} step {step}: top-1 {result.top1:.1%}, top-5 {result.top5:.1%}"
            )
            values = {f"zero_shot_{split}_{name}": value for name, value in result.to_dict().items()}
            self.folder.log(self._global_step(index, step), phase=phase, train_seconds=self._seconds, **values)

    def _save(self, index: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        save_state(
            self.folder.path,
            {
                "config": self._identity(), "phase": index, "step": step, "seconds": self._seconds,
                "objective": self.objective.state_dict(), "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "results": {
                    phase: {split: asdict(result) for split, result in by_split.items()}
                    for phase, by_split in self.results.items()
                },
            },
        )  # fmt: skip

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        self.objective.load_state_dict(self._state["objective"])
        optimizer.load_state_dict(self._state["optimizer"])
        torch.set_rng_state(self._state["rng"])
        self._state = None

    def _write_summary(self, checkpoint: Path) -> None:
        lines = ["# Pretraining run", "", *(f"- {note}" for note in self.data.notes)]
        if self.data.store.broken:
            lines.append(f"- {self.data.store.broken} reads of broken images, replaced by the next row")
        lines.append(f"- training time: {self._seconds / 60:.1f} minutes on {self.device.describe()}")
        lines += [f"- checkpoint: {checkpoint}", "", "| phase | split | top-1 | top-5 | chance | images | classes |"]
        lines.append("|---|---|---|---|---|---|---|")
        for phase, by_split in self.results.items():
            for split, r in by_split.items():
                lines.append(
                    f"| {phase} | {split} | {r.top1:.1%} | {r.top5:.1%} | {r.chance:.2%} | {r.images} | {r.classes} |"
                )
        self.folder.write_summary("\n".join(lines) + "\n")
