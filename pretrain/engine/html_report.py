"""The page of a pretraining run: curves by phase, zero-shot accuracy over time and over compute, settings, environment.

`read_metrics` and `add_provenance` serve the page of a detector run too. All numbers are those of the run's files, but
for the FLOPs, which are `cost.phase_cost`'s. The form of a page is in `html_page`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import ConfigError, PretrainConfig, load_config
from pretrain.engine.cost import PhaseCost, describe_towers, phase_cost
from pretrain.engine.html_page import Page, cards, chart, folded, note, number, percent, table, tag
from pretrain.objectives import passes_of

_ZERO_SHOT = re.compile(r"zero_shot_(.+)_top1")
_CURVES = {
    "loss": "loss", "batch_accuracy": "accuracy within the batch", "lr": "learning rate",
    "pairs_per_second": "pairs per second",
}  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """One zero-shot measurement, as the run's metrics.jsonl has it; accuracies are fractions in 0-1.

    Attributes:
        title: the split, with the encoder's name where a run has several.
        step: counted over all phases.
        seconds: training time until then.
    """

    title: str
    phase: str
    step: int
    seconds: float
    top1: float
    top5: float | None
    chance: float | None
    images: int | None
    classes: int | None


def read_metrics(folder: Path, page: Page) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; what cannot be read is left out and said on the page."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        page.leave_out("curves", "the run folder has no metrics.jsonl")
        return []
    records, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            bad += 1
    if bad:
        page.leave_out("curves", f"{bad} lines of metrics.jsonl are no JSON object")
    return records


def read_about(folder: Path) -> dict[str, Any]:
    """What about.json holds; empty without one that can be read."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def add_provenance(page: Page, folder: Path) -> None:
    """Sections that every run folder has: command, settings, data and environment."""
    about = read_about(folder)
    if about:
        rows = [("code revision", about.get("git_revision")), *sorted(about.get("environment", {}).items())]
        page.add("Environment", table([], rows, text_columns=2))
        notes = _summary_notes(folder)
        found = [tag("ul", *(tag("li", line) for line in notes))] if notes else []
        data = about.get("data") or {}
        if data:
            found.append(table(["file", "SHA-256"], data.items(), "What the data were", text_columns=2))
        if found:
            page.add("Data", *found)
        else:
            page.leave_out("data notes", "about.json names no data, and summary.md has no notes")
    else:
        page.leave_out("environment and data", "the run folder has no readable about.json")
    parts = []
    for name, summary in (("command.txt", "Commands, with the time each began"), ("config.yaml", "All settings")):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            parts.append(folded(f"{summary} ({name})", tag("pre", text)))
        else:
            page.leave_out(summary.split(",")[0].lower(), f"the run folder has no {name}")
    if parts:
        page.add("Settings", *parts)


def _summary_notes(folder: Path) -> list[str]:
    """The notes at the head of summary.md: counts of pairs, what was left out, where it ran."""
    path = folder / "summary.md"
    if not path.is_file():
        return []
    return [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]


def judgements(records: Sequence[dict[str, Any]]) -> list[Judgement]:
    """Every zero-shot measurement of a run, in the order of the file."""
    found = []
    for record in records:
        for match in filter(None, (_ZERO_SHOT.fullmatch(key) for key in record)):
            prefix = f"zero_shot_{match[1]}_"
            values = {name: record.get(prefix + name) for name in ("top1", "top5", "chance", "images", "classes")}
            found.append(
                Judgement(match[1], str(record.get("phase", "")), record["step"], record.get("train_seconds", 0.0),
                          **values)
            )  # fmt: skip
    return found


def flops_until(step: int, phases: Sequence[PhaseCost]) -> float:
    """Everything that devices computed in training up to a step counted over all phases, in FLOPs."""
    total, left = 0.0, step
    for phase in phases:
        done = min(left, phase.steps)
        total += phase.device_flops * done / phase.steps
        left -= done
    return total


def pretraining_page(folder: str | Path) -> Page:
    """The report of a pretraining run folder, also of one that still runs.

    Raises:
        ConfigError: the folder holds neither metrics nor a configuration.
    """
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file() and not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} has neither metrics.jsonl nor config.yaml; give the folder of a run")
    page = Page(f"Pretraining: {folder.resolve().name}")
    page.subtitle = str(read_about(folder).get("git_revision", ""))
    records = read_metrics(folder, page)
    records = [r for r in records if isinstance(r.get("step"), int)]
    steps = [r for r in records if isinstance(r.get("loss"), float)]
    judged = judgements(records)
    try:
        config: PretrainConfig | None = load_config(folder / "config.yaml")
        towers = describe_towers(config.model)
        costs = [phase_cost(phase, towers, passes=passes_of(config, phase)) for phase in config.phases]
    except (ConfigError, RuntimeError) as error:
        config, costs = None, []
        page.leave_out("phases and accuracy over compute", f"config.yaml is none of this version ({error})")
    _add_overview(page, steps, judged, config)
    _add_zero_shot(page, judged, costs)
    _add_curves(page, steps)
    if config:
        _add_phases(page, config, costs)
    add_provenance(page, folder)
    return page


def _add_overview(page: Page, steps: list[dict], judged: list[Judgement], config: PretrainConfig | None) -> None:
    values = []
    last = {j.title: j for j in judged}
    values += [(tag("span", percent(j.top1), " %"), f"top-1, {j.title}, step {j.step:,}") for j in last.values()]
    if steps:
        total = sum(p.steps for p in config.phases) if config else None
        unfinished = f" of {total:,}" if total and steps[-1]["step"] < total else ""
        values.append((number(steps[-1]["step"]), f"steps{unfinished}"))
        values.append((number(steps[-1]["loss"]), "last loss"))
        if "train_seconds" in steps[-1]:
            seconds = steps[-1]["train_seconds"]
            values.append((tag("data", f"{seconds / 60:.1f}", value=repr(seconds)), "minutes of training"))
    if values:
        page.add("", cards(values))


def _add_zero_shot(page: Page, judged: list[Judgement], costs: Sequence[PhaseCost]) -> None:
    if not judged:
        page.leave_out("zero-shot accuracy", "metrics.jsonl has no zero-shot measurement yet")
        return
    ends = {(j.phase, j.title): j for j in judged}
    head = ["after phase", "split", "step", "top-1 %", "top-5 %", "chance %", "images", "classes"]
    rows = [_judgement_row(j) for j in ends.values()]
    parts = [table(head, rows, "The last measurement of every phase", text_columns=2)]
    parts.append(
        chart("zero-shot", (10, 3.6), lambda figure: _draw_zero_shot(figure, judged, costs),
              "Zero-shot accuracy over training time and over training FLOPs")
    )  # fmt: skip
    if costs:
        parts.append(
            note("FLOPs are computed from the configuration, a multiply-add counted as 2, forward and backward passes "
                 "of both towers, similarity matrices and any teacher included.")
        )  # fmt: skip
    every = [[*_judgement_row(j), number(j.seconds)] for j in judged]
    parts.append(folded("Every measurement", table([*head, "seconds of training"], every, text_columns=2)))
    page.add("Zero-shot accuracy", *parts)


def _judgement_row(j: Judgement) -> list:
    return [j.phase, j.title, number(j.step), percent(j.top1), percent(j.top5), percent(j.chance, 2),
            number(j.images), number(j.classes)]  # fmt: skip


def _draw_zero_shot(figure: Any, judged: list[Judgement], costs: Sequence[PhaseCost]) -> None:
    places = {"minutes of training": lambda j: j.seconds / 60}
    if costs:
        places["training TFLOP"] = lambda j: flops_until(j.step, costs) / 1e12
    grid = figure.subplots(1, len(places), squeeze=False, sharey=True)[0]
    titles = list(dict.fromkeys(j.title for j in judged))
    for axes, (label, place) in zip(grid, places.items(), strict=True):
        for index, title in enumerate(titles):
            mine = [j for j in judged if j.title == title]
            for name, style in (("top1", "-"), ("top5", "--")):
                shown = [j for j in mine if getattr(j, name) is not None]
                values = [100 * getattr(j, name) for j in shown]
                label_ = f"{title}, top-{name[3:]}"
                axes.plot([place(j) for j in shown], values, style, color=f"C{index}", marker=".", label=label_)
        chances = [j.chance for j in judged if j.chance is not None]
        if chances:
            axes.axhline(100 * max(chances), color="grey", linestyle=":", label="chance")
        axes.set(xlabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("zero-shot accuracy, %")
    grid[0].legend(fontsize=8)


def _add_curves(page: Page, steps: list[dict]) -> None:
    shown = {key: title for key, title in _CURVES.items() if any(key in r for r in steps)}
    if not shown:
        page.leave_out("training curves", "metrics.jsonl has no training step yet")
        return

    def draw(figure: Any) -> None:
        grid = figure.subplots(-(-len(shown) // 2), 2, squeeze=False, sharex=True).ravel()
        for axes, (key, title) in zip(grid, shown.items(), strict=False):
            for index, phase in enumerate(dict.fromkeys(r.get("phase") for r in steps)):
                mine = [r for r in steps if r.get("phase") == phase and key in r]
                axes.plot(
                    [r["step"] for r in mine], [r[key] for r in mine], color=f"C{index}", linewidth=1, label=phase
                )
            axes.set(title=title)
            axes.grid(alpha=0.3)
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        grid[0].legend(fontsize=8)
        figure.supxlabel("step", fontsize=9)

    others = sorted({key for r in steps for key, v in r.items() if isinstance(v, float)} - {*shown, "train_seconds"})
    head = ["phase", "step", *shown, *others]
    lines = [[r.get("phase"), number(r["step"]), *(number(r.get(k)) for k in head[2:])] for r in _ends(steps)]
    page.add(
        "Training curves",
        chart("curves", (10, 5.6), draw, "Loss, batch accuracy, learning rate and speed over the steps, by phase"),
        table(head, lines, "The last logged step of every phase"),
    )


def _ends(steps: list[dict]) -> list[dict]:
    return list({r.get("phase"): r for r in steps}.values())


def _add_phases(page: Page, config: PretrainConfig, costs: Sequence[PhaseCost]) -> None:
    rows = [
        [p.name, config.objective_of(p).name, config.optim_of(p).name, number(p.steps), number(p.image_size),
         number(p.context_length), number(p.batch_size), number(p.lr), number(cost.training_flops / 1e12),
         number(cost.device_flops / 1e12)]
        for p, cost in zip(config.phases, costs, strict=True)
    ]  # fmt: skip
    head = ["phase", "objective", "optimiser", "steps", "px", "text tokens", "batch", "peak lr", "TFLOP, towers",
            "TFLOP, all"]  # fmt: skip
    page.add("Phases", table(head, rows, text_columns=3))
