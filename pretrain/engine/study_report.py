"""What a study found, as a page: tables over seeds and a verdict on its aim, or an order where all had the same time.

A part of the runs gives a part of the table, which then says what is missing. Nothing here trains or judges; the plot
is `study_plots`'s.
"""

import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain.engine.equal_time import training_seconds
from pretrain.engine.study import Result, RunSpec, Study, StudyConfig, read_result
from pretrain.engine.study_file import machines
from pretrain.engine.study_timing import read_timing


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and the sample standard deviation (None for one seed)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 1, sign: str = "") -> str:
        """`3.1 ± 0.4`, or `3.1` for one seed."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{spread}"


@dataclass(frozen=True)
class Row:
    """One run judged at one image size.

    Attributes:
        accuracy: by split, top-1 and top-5 in percent.
        seconds: training time.
        flops: training FLOPs.
        difference: top-1 on the study's split minus the baseline's, in points, over the seeds that both have.
        time_ratio: the baseline's training time over this run's, of the means over the seeds that both have.
        flop_ratio: the same for FLOPs.
    """

    name: str
    label: str
    size: int
    seeds: list[int]
    accuracy: dict[str, tuple[Spread, Spread]]
    seconds: Spread
    flops: int
    difference: Spread | None
    time_ratio: float | None
    flop_ratio: float | None


def collect(study: Study) -> dict[str, dict[int, Result]]:
    """The results there are, by run and seed; training times from the study's timing where there is one."""
    found: dict[str, dict[int, Result]] = {spec.name: {} for spec in study.config.runs}
    timing = read_timing(study)
    for job in study.jobs:
        result = read_result(job)
        if result:
            # One way to measure for all: of phases timed on a quiet machine, or of the runs as they happened.
            seconds = training_seconds(job.config, timing.seconds) if timing else result.train_seconds
            found[job.spec.name][job.seed] = replace(result, train_seconds=seconds)
    return found


def make_rows(config: StudyConfig, results: dict[str, dict[int, Result]]) -> list[Row]:
    """One row for each run that has a result, and one for each further size it was judged at."""
    rows = []
    for spec in config.runs:
        for size in dict.fromkeys([config.image_size, *spec.also_at]) if results[spec.name] else ():
            rows.append(_make_row(config, spec, size, results[spec.name], results[config.baseline]))
    return rows


def _make_row(
    config: StudyConfig, spec: RunSpec, size: int, own: dict[int, Result], baseline: dict[int, Result]
) -> Row:
    seeds, common = sorted(own), sorted(own.keys() & baseline.keys())

    def percent(result: Result, at: int, split: str, name: str) -> float:
        return 100 * result.zero_shot[str(at)][split][name]

    difference = time_ratio = flop_ratio = None
    if common and (spec.name, size) != (config.baseline, config.image_size):
        difference = Spread.of(
            [
                percent(own[seed], size, config.split, "top1")
                - percent(baseline[seed], config.image_size, config.split, "top1")
                for seed in common
            ]
        )
    if common:
        time_ratio = sum(baseline[s].train_seconds for s in common) / sum(own[s].train_seconds for s in common)
        flop_ratio = sum(baseline[s].training_flops for s in common) / sum(own[s].training_flops for s in common)
    return Row(
        name=spec.name,
        label=(spec.label or spec.name) + (f", judged at {size} px" if size != config.image_size else ""),
        size=size,
        seeds=seeds,
        accuracy={
            split: tuple(Spread.of([percent(own[s], size, split, name) for s in seeds]) for name in ("top1", "top5"))
            for split in own[seeds[0]].zero_shot[str(size)]
        },
        seconds=Spread.of([own[s].train_seconds for s in seeds]),
        flops=own[seeds[0]].training_flops,
        difference=difference,
        time_ratio=time_ratio,
        flop_ratio=flop_ratio,
    )


def missing(study: Study, results: dict[str, dict[int, Result]]) -> list[str]:
    """`run: seeds 1, 2` for everything that has no result yet."""
    lacking: dict[str, list[str]] = {spec.name: [] for spec in study.config.runs}
    for job in study.jobs:
        if job.seed not in results[job.spec.name]:
            lacking[job.spec.name].append(str(job.seed))
    return [f"{name}: seed{'s'[: len(seeds) > 1]} {', '.join(seeds)}" for name, seeds in lacking.items() if seeds]


def verdict(config: StudyConfig, rows: list[Row]) -> str:
    """Which runs meet the aim; else the most accurate that is fast enough, and the fastest accurate enough.

    Said twice where runs were judged at sizes of their own: at the study's size, and at any (smaller images also cost
    less to use). A study of equal time, or without an aim, has its rows in order instead.
    """
    if config.seconds or not config.aim_ratio:
        return _order(config, rows)
    aim = (
        f"Aim: at most {config.aim_text} of top-1 on {config.split} below {config.baseline} at "
        f"{config.aim_ratio:g} times less measured training time."
    )
    compared = [row for row in rows if row.name != config.baseline and row.difference]
    full = [row for row in compared if row.size == config.image_size]
    if not full:
        return f"{aim} Nothing to compare yet."
    parts = [aim, *_verdict_of(config, full)]
    if len(full) < len(compared):
        parts += ["Judged at any size of their own:", *_verdict_of(config, compared)]
    return " ".join([*parts, *_caveat(config, rows)])


def _order(config: StudyConfig, rows: list[Row]) -> str:
    """All rows by their top-1, best first."""
    found = sorted(((row.accuracy[config.split][0], row.label) for row in rows), key=lambda pair: -pair[0].mean)
    listed = "; ".join(f"{number}. {label} {top1.text()}" for number, (top1, label) in enumerate(found, start=1))
    same = ", after the same training time" if config.seconds else ""
    return f"By top-1 on {config.split}{same}: {listed}."


def _verdict_of(config: StudyConfig, compared: list[Row]) -> list[str]:
    """Sentences about the rows, of which there is at least one."""
    fast = [row for row in compared if row.time_ratio >= config.aim_ratio]
    accurate = [row for row in compared if row.difference.mean >= -config.aim_points]
    if both := [row for row in fast if row in accurate]:
        return [f"Met by {'; '.join(map(_compared, both))}."]
    parts = ["Not met."]
    if fast:
        parts.append(f"Most accurate at that speed: {_compared(max(fast, key=lambda row: row.difference.mean))}.")
    else:
        parts.append(f"Fastest of all: {_compared(max(compared, key=lambda row: row.time_ratio))}.")
    if accurate:
        parts.append(f"Fastest within that accuracy: {_compared(max(accurate, key=lambda row: row.time_ratio))}.")
    return parts


def _caveat(config: StudyConfig, rows: list[Row]) -> list[str]:
    """A sentence where the aim's points are a large part of the baseline's accuracy, so that meeting it says little."""
    top1 = next(row for row in rows if row.name == config.baseline).accuracy[config.split][0].mean
    if top1 >= 10 * config.aim_points:
        return []
    return [
        f"The baseline itself reaches {top1:.1f} %, and {config.aim_text} would be a large part of that: compare top-5 "
        "and longer runs too."
    ]


def _compared(row: Row) -> str:
    return f"{row.label} ({row.difference.text(1, '+')} points at {row.time_ratio:.1f}x less time)"


def format_table(rows: list[Row], splits: list[str]) -> str:
    """The rows as a Markdown table; accuracies in percent."""
    head = ["run", "seeds", *(f"{split} {name}" for split in splits for name in ("top-1", "top-5"))]
    head += ["training time, s", "training TFLOP", "time ratio", "FLOP ratio", "top-1 minus baseline, points"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.label, str(len(row.seeds))]
        cells += [row.accuracy[split][i].text() if split in row.accuracy else "–" for split in splits for i in (0, 1)]
        cells += [row.seconds.text(0), f"{row.flops / 1e12:,.1f}"]
        cells += ["–" if ratio is None else f"{ratio:.2f}x" for ratio in (row.time_ratio, row.flop_ratio)]
        cells.append(row.difference.text(1, "+") if row.difference else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_further(config: StudyConfig, results: dict[str, dict[int, Result]]) -> str:
    """What was measured besides zero-shot accuracy, in percent, as a Markdown table."""
    found = [(spec.label or spec.name, list(results[spec.name].values())) for spec in config.runs]
    titles = list(dict.fromkeys(title for _, group in found for result in group for title in result.further))
    lines = [f"| run | {' | '.join(titles)} |", "|" + "---|" * (len(titles) + 1)]
    for label, group in found:
        values = [[100 * result.further[title] for result in group if title in result.further] for title in titles]
        if any(values):
            cells = [Spread.of(some).text() if some else "–" for some in values]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        f"On {config.split} at {config.image_size} px, in percent, mean ± sample standard deviation over seeds.",
    ]
    return "\n".join(lines)


def provenance(study: Study, results: dict[str, dict[int, Result]]) -> list[str]:
    """Command, machine, dates, seeds and code of the results there are, a line each."""
    done = [result for by_seed in results.values() for result in by_seed.values()]
    seeds = sorted({seed for by_seed in results.values() for seed in by_seed})
    dates = sorted({result.date for result in done})
    return [
        f"Command: `{_command(study)}`",
        f"Machine: {machines(result.machine for result in done)}",
        f"Date: {dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}; seeds {', '.join(map(str, seeds))}; "
        f"code {', '.join(sorted({result.git_revision.partition('+')[0][:10] for result in done}))}",
    ]


def _command(study: Study) -> str:
    """Independent of where the repository lies."""
    path = Path(os.path.relpath(study.path)) if study.path.is_absolute() else study.path
    return f"python tools/study.py --study {path.name if '..' in path.parts else path}"


def format_report(study: Study, results: dict[str, dict[int, Result]], plot: Path | None) -> str:
    """The whole page."""
    config, rows = study.config, make_rows(study.config, results)
    lines = [f"# {config.title or study.path.stem}", ""]
    for note in config.notes:
        lines += [" ".join(note.split()), ""]
    lacking = missing(study, results)
    if lacking:
        lines += ["**Not complete.** Without a result:", "", *(f"- {item}" for item in lacking), ""]
    if not rows:
        return "\n".join([*lines, f"Nothing is measured yet. Command: `{_command(study)}`", ""])
    splits = list(dict.fromkeys([config.split, *(split for row in rows for split in row.accuracy)]))
    first = next(iter(results[rows[0].name].values())).zero_shot[str(config.image_size)]
    counts = ", ".join(f"{first[split]['images']} images of {split}" for split in splits if split in first)
    lines += [format_table(rows, splits), ""]
    lines.append(
        f"Zero-shot accuracy in percent, mean ± sample standard deviation over seeds: {counts}, among "
        f"{first[config.split]['classes']} names (chance {100 * first[config.split]['chance']:.2f}), judged at "
        f"{config.image_size} px unless the row says otherwise. {_how_timed(study)} FLOPs are computed, of both "
        "towers. Ratios and differences are to the baseline, over the seeds that both have."
    )
    lines += ["", verdict(config, rows), ""]
    if config.further:
        lines += [format_further(config, results), ""]
    if plot:
        shown = "accuracy after equal time" if config.seconds else "accuracy over training time"
        lines += [f"![{shown}]({plot.name})", ""]
    lines += [f"- {line}" for line in provenance(study, results)]
    return "\n".join(lines) + "\n"


def _how_timed(study: Study) -> str:
    timing = read_timing(study)
    if timing is None:
        return (
            "Training time is measured: the sum of the steps as the runs went, waiting for data included, evaluation "
            "and the program's start not."
        )
    return (
        f"Training time is measured: steps of every phase, data included, timed in turn by `{_command(study)} --time` "
        f"({timing.date}, load average {timing.load_before:.1f} before it), medians times the number of steps; the "
        "runs themselves did not have the machine to themselves."
    )
