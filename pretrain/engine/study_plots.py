"""The plot of a pretraining study (accuracy over training time, or after equal time), and the page.

The numbers and the text are `study_report`'s.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.atomic import replacing, write_atomically
from pretrain.config import ConfigError
from pretrain.engine.study import Result, Study
from pretrain.engine.study_report import Spread, collect, format_report, make_rows, provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = dict[str, dict[int, Result]]


def draw_plot(study: Study, results: Results, path: Path) -> None:
    """Draw the plot that suits the study, with where the numbers come from below it.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib, which is not installed: pip install matplotlib") from error
    figure = Figure(figsize=(9, 6.2), layout="constrained")  # without pyplot: no display, nothing global
    (_draw_equal_time if study.config.seconds else _draw_over_time)(figure, study, results)
    figure.suptitle(study.config.title or study.path.stem)
    figure.supxlabel("\n".join(provenance(study, results)).replace("`", ""), fontsize=6, x=0.01, ha="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})


def _draw_over_time(figure: "Figure", study: Study, results: Results) -> None:
    """Top-1 on the study's split over measured training time (log), a marker a row, bars of one standard deviation."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    config, rows = study.config, make_rows(study.config, results)
    axes = figure.add_subplot()
    markers = "osD^vP*Xh<>pd"
    for number, row in enumerate(rows):
        top1 = row.accuracy[config.split][0]
        axes.errorbar(
            row.seconds.mean, top1.mean, xerr=row.seconds.deviation, yerr=top1.deviation, capsize=3, linestyle="none",
            marker=markers[number % len(markers)], markersize=8, label=row.label,
        )  # fmt: skip
    base = next((row for row in rows if row.name == config.baseline and row.size == config.image_size), None)
    if base and config.aim_ratio:
        time, points = base.seconds.mean / config.aim_ratio, base.accuracy[config.split][0].mean - config.aim_points
        label = f"aim: within {config.aim_text}, {config.aim_ratio:g}x less time"
        axes.axvline(time, color="grey", linestyle=":", linewidth=1, label=label)
        axes.axhline(points, color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.set(xlabel="measured training time, seconds", ylabel=f"zero-shot top-1 on {config.split}, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _draw_equal_time(figure: "Figure", study: Study, results: Results) -> None:
    """A bar a row, whiskers of one standard deviation: top-1 on the study's split, and on unseen concepts if measured.

    Unseen concepts are drawn where every result has them.
    """
    config, rows = study.config, make_rows(study.config, results)
    panels = {f"zero-shot top-1 on {config.split}, %": [row.accuracy[config.split][0] for row in rows]}
    done = [list(results[row.name].values()) for row in rows]
    shared = set.intersection(*(set(result.further) for group in done for result in group))
    for title in sorted(title for title in shared if title.startswith("unseen") and title.endswith("top-1")):
        panels[f"{title}, %"] = [Spread.of([100 * result.further[title] for result in group]) for group in done]
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, spreads) in zip(grid, panels.items(), strict=True):
        bars = axes.barh(
            [row.label for row in rows], [s.mean for s in spreads], xerr=[s.deviation or 0.0 for s in spreads],
            capsize=2, color=["C1" if row.name == config.baseline else "C0" for row in rows],
        )  # fmt: skip
        axes.bar_label(bars, labels=[s.text() for s in spreads], padding=4, fontsize=7)
        axes.set(xlabel=title)
        axes.margins(x=0.3)
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlim(left=0)
    axes.invert_yaxis()  # shared: the first row on top


def write_report(study: Study) -> tuple[Path, Path | None]:
    """Write table and plot; returns their paths (no plot before the first result)."""
    table, results = Path(study.config.report), collect(study)
    plot = table.with_suffix(".png") if any(results.values()) else None
    if plot:
        draw_plot(study, results, plot)
    write_atomically(table, format_report(study, results, plot))
    return table, plot
