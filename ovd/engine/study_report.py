"""What a detector study found: tables over seeds with intervals over pictures.

A part of the runs gives a part of the page, which then says what is missing. Plots are in `study_plots`. Nothing here
trains or measures.
"""

import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ovd.engine.study import BEFORE, Result, Study, StudyConfig, VariantSpec, read_result
from ovd.evaluation.bootstrap import Interval, interval
from ovd.evaluation.results import format_percent, text_table
from pretrain.engine.study_file import machines

Results = dict[str, dict[int, Result]]  # by training and seed
Columns = dict[str, str]  # title: metric of `resampled`

DETECTION: Columns = {
    "AP": "AP", "APr": "AP:r", "APc": "AP:c", "APf": "AP:f", "AR base": "AR:base", "AR novel": "AR:novel",
}  # fmt: skip
RETENTION: Columns = {
    "fine-tuned": "AP:fine-tuned", "untouched": "AP:untouched", "untouched rare": "AP:untouched, rare",
    "untouched common": "AP:untouched, common", "untouched frequent": "AP:untouched, frequent",
}  # fmt: skip
TASKS = {"bbox": "Boxes", "segm": "Masks"}


@dataclass(frozen=True)
class Cell:
    """A metric of a variant, 0-1: the mean over seeds with its interval over pictures, and each seed's value."""

    interval: Interval
    seeds: list[float]

    def text(self, sign: bool = False) -> str:
        """`16.7 ± 0.4 (14.0 to 19.1)`, in percent; the deviation over seeds is left out for one seed."""
        value, low, high = (100 * v for v in (self.interval.value, self.interval.low, self.interval.high))
        if np.isnan(value):
            return "n/a"
        deviation = f" ± {100 * statistics.stdev(self.seeds):.1f}" if len(self.seeds) > 1 else ""
        form = "{:+.1f}" if sign else "{:.1f}"
        return f"{form.format(value)}{deviation} ({form.format(low)} to {form.format(high)})"


def collect(study: Study) -> Results:
    """The results there are."""
    found: Results = {spec.name: {} for spec in study.config.trainings}
    for job in study.jobs:
        result = read_result(study.config, job)
        if result:
            found[job.spec.name][job.seed] = result
    return found


def variants_of(config: StudyConfig) -> list[VariantSpec]:
    """The rows of the tables; in a retention study the detector before comes first."""
    first = [VariantSpec(BEFORE, "before fine-tuning", "")] if config.kind == "retention" else []
    return first + config.variants


def values_of(config: StudyConfig, results: Results, variant: VariantSpec, task: str, metric: str) -> dict[int, list]:
    """Seed -> value and resampled values of one metric; for `before`, which all results have, of any one training."""
    trainings = [variant.training] if variant.training else [spec.name for spec in config.trainings]
    found: dict[int, list] = {}
    for training in trainings:
        for seed, result in results[training].items():
            if task in result.values[variant.name]:
                found.setdefault(seed, result.values[variant.name][task][metric])
    return found


def cell(own: dict[int, list], others: dict[int, list] | None = None) -> Cell | None:
    """Mean over seeds, or that of the differences to others over the seeds that both have; None without any."""
    seeds = sorted(own if others is None else own.keys() & others.keys())
    if not seeds:
        return None
    values = np.array([own[seed] for seed in seeds], float)
    if others is not None:
        values -= np.array([others[seed] for seed in seeds], float)
    least = 0.0 if others is None else -math.inf
    return Cell(interval(values.mean(axis=0), least=least), values[:, 0].tolist())


def baseline_of(config: StudyConfig) -> VariantSpec:
    """The variant that the others are compared with."""
    name = BEFORE if config.kind == "retention" else config.baseline
    return next(variant for variant in variants_of(config) if variant.name == name)


def metric_table(config: StudyConfig, results: Results, task: str, difference: bool) -> str:
    """One line a variant; with `difference` minus the baseline, paired by seed and resample. Empty without any."""
    columns, baseline, body = DETECTION if config.kind == "detection" else RETENTION, baseline_of(config), []
    for variant in variants_of(config):
        if difference and variant.name == baseline.name:
            continue
        cells = []
        for metric in columns.values():
            others = values_of(config, results, baseline, task, metric) if difference else None
            cells.append(cell(values_of(config, results, variant, task, metric), others))
        if any(cells):
            seeds = max(len(c.seeds) for c in cells if c)
            texts = [c.text(difference) if c else "–" for c in cells]
            extra = [_ratio(cells[1], cells[3])] if config.kind == "detection" and not difference else []
            body.append([variant.label or variant.name, str(seeds), *texts, *extra])
    extra = ["APr / APf"] if config.kind == "detection" and not difference else []
    return text_table(["percent", "seeds", *columns, *extra], body) if body else ""


def _ratio(rare: Cell | None, frequent: Cell | None) -> str:
    if not rare or not frequent or not frequent.interval.value > 0:
        return "–"
    return f"{rare.interval.value / frequent.interval.value:.2f}"


def proposal_table(config: StudyConfig, results: Results) -> str:
    """Recall of proposals by training, mean over seeds; empty where none was measured."""
    names = [f"AR@{n}{group}" for n in config.proposals for group in ("_base", "_novel")]
    body = []
    for spec in config.trainings:
        done = [result.proposals for result in results[spec.name].values() if result.proposals]
        if done:
            means = [np.mean([np.nan if p[name] is None else p[name] for p in done]) for name in names]
            body.append([spec.name, str(len(done)), *(format_percent(float(mean)) for mean in means)])
    return text_table(["proposals, percent", "seeds", *(n.replace("_", " ") for n in names)], body) if body else ""


def settings_lines(config: StudyConfig, results: Results) -> list[str]:
    """Which fusion weights each variant was measured with."""
    lines = []
    for variant in config.variants:
        found = {
            f"α {s['alpha']:g}, β {s['beta']:g}": None
            for result in results[variant.training].values()
            if (s := result.settings.get(variant.name))
        }
        if found:
            lines.append(f"- {variant.label or variant.name}: {'; '.join(found)}")
    return lines


def missing(study: Study, results: Results) -> list[str]:
    """`training: seeds 1, 2` for everything that has no result yet."""
    lacking: dict[str, list[str]] = {}
    for job in study.jobs:
        if job.seed not in results[job.spec.name]:
            lacking.setdefault(job.spec.name, []).append(str(job.seed))
    return [f"{name}: seed{'s'[: len(seeds) > 1]} {', '.join(seeds)}" for name, seeds in lacking.items()]


def provenance(study: Study, results: Results) -> list[str]:
    """Command, machine, dates, seeds, code and times of the results there are, a line each."""
    done = [result for by_seed in results.values() for result in by_seed.values()]
    seeds = sorted({seed for by_seed in results.values() for seed in by_seed})
    dates = sorted({result.date for result in done})
    times = ", ".join(
        f"{name} {statistics.mean(r.train_seconds for r in by_seed.values()):.0f} s"
        for name, by_seed in results.items()
        if by_seed
    )
    return [
        f"Command: `{_command(study)}`",
        f"Machine: {machines(result.machine for result in done)}",
        f"Date: {dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}; seeds {', '.join(map(str, seeds))}; "
        f"code {', '.join(sorted({result.git_revision.partition('+')[0][:10] for result in done}))}",
        f"Training, mean over seeds, other work on the machine included: {times}",
    ]


def _command(study: Study) -> str:
    """Independent of where the repository lies."""
    path = Path(os.path.relpath(study.path)) if study.path.is_absolute() else study.path
    return f"python tools/study_detector.py --study {path.name if '..' in path.parts else path}"


def format_report(study: Study, results: Results, plots: list[Path]) -> str:
    """The whole page."""
    config = study.config
    lines = [f"# {config.title or study.path.stem}", ""]
    for note in config.notes:
        lines += [" ".join(note.split()), ""]
    lacking = missing(study, results)
    if lacking:
        lines += ["**Not complete.** Without a result:", "", *(f"- {item}" for item in lacking), ""]
    if not any(results.values()):
        return "\n".join([*lines, f"Nothing is measured yet. Command: `{_command(study)}`", ""])
    baseline = baseline_of(config)
    for task, title in TASKS.items():
        for difference, text in ((False, title), (True, f"{title}: minus “{baseline.label or baseline.name}”")):
            table = metric_table(config, results, task, difference)
            lines += [f"## {text}", "", table] if table else []
    lines += [
        f"Mean over seeds ± standard deviation over seeds (95 % interval of the mean over {config.samples} resamples of"
        f" the pictures of {config.annotations}). Differences are paired by seed and picture.", "",
    ]  # fmt: skip
    if table := proposal_table(config, results):
        lines += ["## Proposals", "", table, "Are novel objects proposed at all? Recall over IoU 0.50 to 0.95.", ""]
    if settings := settings_lines(config, results):
        lines += [f"Fusion weights, chosen on {config.validation} where they are chosen:", "", *settings, ""]
    for plot in plots:
        lines += [f"![{plot.stem}]({plot.name})", ""]
    lines += [f"- {line}" for line in provenance(study, results)]
    return "\n".join(lines) + "\n"
