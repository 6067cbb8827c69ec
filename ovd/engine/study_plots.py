"""Plots of a detector study (bars of every variant with intervals, precision against the fusion weights), and the page.

The numbers and the text are `study_report`'s.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot: no display, nothing global

from ovd.engine.study import Study, StudyConfig
from ovd.engine.study_report import RETENTION, Results, cell, collect, format_report, values_of, variants_of
from pretrain.atomic import replacing, write_atomically

DETECTION_BARS = {"APr (novel)": "AP:r", "APc": "AP:c", "APf": "AP:f"}


def draw_bars(config: StudyConfig, results: Results) -> Figure:
    """A group of bars for each variant, boxes; whiskers are the intervals over pictures."""
    bars = DETECTION_BARS if config.kind == "detection" else {name: RETENTION[name] for name in list(RETENTION)[:3]}
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, labels = figure.add_subplot(), []
    width = 0.8 / len(bars)
    for place, (title, metric) in enumerate(bars.items()):
        heights, whiskers, labels = [], [], []
        for variant in variants_of(config):
            found = cell(values_of(config, results, variant, "bbox", metric))
            if found:
                value, low, high = found.interval.value, found.interval.low, found.interval.high
                heights.append(100 * value)
                whiskers.append((100 * max(0.0, value - low), 100 * max(0.0, high - value)))
                labels.append(variant.label or variant.name)
        positions = np.arange(len(heights)) + (place - (len(bars) - 1) / 2) * width
        axes.bar(positions, heights, width, yerr=np.nan_to_num(np.array(whiskers).T), capsize=2, label=title)
    axes.set_xticks(np.arange(len(labels)), labels, rotation=20, ha="right", fontsize=8)
    axes.set(ylabel="box AP, %", title=config.title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def draw_sweep(config: StudyConfig, results: Results) -> Figure | None:
    """AP and APr on the validation pictures against each fusion weight, the other at its best; None without a sweep.

    A line is the mean over the seeds of one training.
    """
    swept = {name: [r.sweep for r in by_seed.values() if r.sweep] for name, by_seed in results.items()}
    swept = {name: sweeps for name, sweeps in swept.items() if sweeps}
    if not swept:
        return None
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", squeeze=False)
    for column, (weight, title) in enumerate((("alpha", "α (base classes)"), ("beta", "β (novel classes)"))):
        for row, metric in enumerate(("AP", "APr")):
            axes = grid[row][column]
            for name, sweeps in swept.items():
                curves = [_best_along(sweep, weight, metric) for sweep in sweeps]
                values = np.mean([list(curve.values()) for curve in curves], axis=0)
                axes.plot(list(curves[0]), 100 * values, marker="o", markersize=3, label=name)
            axes.set_ylabel(f"box {metric} on validation, %")
            axes.grid(alpha=0.3)
        grid[1][column].set_xlabel(f"image-text weight {title}")
    grid[0][0].legend(fontsize=8)
    figure.suptitle(f"{config.title}: the other weight at its best")
    return figure


def write_report(study: Study) -> tuple[Path, list[Path]]:
    """Write page and plots; returns their paths (no plot before the first result)."""
    page, results = Path(study.config.report), collect(study)
    plots: list[Path] = []
    if any(results.values()):
        page.parent.mkdir(parents=True, exist_ok=True)
        for name, draw in (("bars", draw_bars), ("weights", draw_sweep)):
            figure = draw(study.config, results)
            if figure is not None:
                plots.append(page.with_name(f"{page.stem}_{name}.png"))
                with replacing(plots[-1]) as temporary:
                    figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    write_atomically(page, format_report(study, results, plots))
    return page, plots


def _best_along(sweep: list[dict], weight: str, metric: str) -> dict[float, float]:
    """Value of one weight -> the highest metric over the other; NaN where it could not be measured."""
    best: dict[float, float] = {}
    for row in sweep:
        value = np.nan if row[metric] is None else row[metric]
        best[row[weight]] = float(np.fmax(best.get(row[weight], np.nan), value))
    return dict(sorted(best.items()))
