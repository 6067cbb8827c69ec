"""The report of a study: the table's numbers are the hand-computed ones, and what is missing is said."""

import json
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from pretrain.atomic import write_atomically
from pretrain.engine import study as study_module
from pretrain.engine.study import Result, RunSpec, Study, StudyConfig
from pretrain.engine.study_plots import _draw_equal_time, write_report
from pretrain.engine.study_report import Spread, format_report, make_rows, missing, verdict


def result(top1: float, seconds: float, flops: int = 1000, top5: float = 0.5, sizes=("160",)) -> Result:
    values = {"top1": top1, "top5": top5, "images": 849, "classes": 861, "chance": 1 / 861}
    zero_shot = {size: {"val": {**values, "top1": top1 + 0.1}, "test": values} for size in sizes}
    return Result(seconds, flops, zero_shot, "", "2030-01-02", "a machine", "abcdef0123456789+changes")


@pytest.fixture
def measured():
    """(configuration, results) whose table can be computed by hand."""
    config = StudyConfig(
        title="Hand", image_size=160, seeds=[0, 1, 2],
        runs=[RunSpec("baseline"), RunSpec("fast", "the fast one"), RunSpec("odd", also_at=[64])],
    )  # fmt: skip
    results = {
        "baseline": {0: result(0.10, 1000, 6000), 1: result(0.12, 1100, 6000), 2: result(0.14, 1200, 6000)},
        "fast": {0: result(0.09, 100), 2: result(0.14, 120)},
        "odd": {1: result(0.05, 300, 2000, sizes=("160", "64"))},
    }
    return config, results


def test_the_table_is_the_one_computed_by_hand(measured):
    baseline, fast, odd, odd_small = make_rows(*measured)
    top1, top5 = baseline.accuracy["test"]
    assert (top1.mean, top1.deviation) == (pytest.approx(12), pytest.approx(2)) and top5.mean == 50
    assert baseline.accuracy["val"][0].mean == pytest.approx(22)
    assert (baseline.seconds.mean, baseline.seconds.deviation) == (1100, 100)
    assert baseline.difference is None and baseline.time_ratio == baseline.flop_ratio == 1
    # Seeds 0 and 2 only: -1 and 0 points; (1000 + 1200) / (100 + 120) = 10; 6000 / 1000 = 6.
    assert fast.seeds == [0, 2] and fast.difference.mean == pytest.approx(-0.5)
    assert fast.difference.deviation == pytest.approx(math.sqrt(0.5))
    assert (fast.time_ratio, fast.flop_ratio) == (pytest.approx(10), pytest.approx(6))
    # Seed 1 only: 5 - 12 points, 1100 / 300, and no spread.
    assert odd.difference == Spread(pytest.approx(-7), None)
    assert (odd.time_ratio, odd.flop_ratio) == (pytest.approx(11 / 3), pytest.approx(3))
    assert odd_small.label == "odd, judged at 64 px" and odd_small.difference.mean == pytest.approx(-7)


def test_spreads_are_sample_deviations_as_text():
    assert Spread.of([1.0, 2.0, 4.0]).deviation == pytest.approx(statistics.stdev([1, 2, 4]))
    assert Spread.of([3.14]).text() == "3.1" and Spread.of([1.0, 3.0]).text() == "2.0 ± 1.4"
    assert Spread.of([-0.26]).text(1, "+") == "-0.3" and Spread.of([0.26]).text(1, "+") == "+0.3"


def test_the_verdict_says_which_runs_meet_the_aim_and_how_near_the_others_come(measured):
    config, results = measured
    assert "Met by the fast one (-0.5 ± 0.7 points at 10.0x less time)" in verdict(config, make_rows(config, results))
    assert "reaches 12.0 %" not in verdict(config, make_rows(config, results)), "a point is little beside 12"
    assert "The baseline itself reaches 12.0 %" in verdict(replace(config, aim_points=2), make_rows(config, results))
    strict = verdict(replace(config, aim_points=0.1), make_rows(config, results))
    assert "Not met. Most accurate at that speed: the fast one" in strict and "within that accuracy" not in strict
    slow = verdict(replace(config, aim_ratio=20), make_rows(config, results))
    assert "Not met. Fastest of all: the fast one" in slow and "Fastest within that accuracy: the fast one" in slow
    none = verdict(config, make_rows(config, {**results, "fast": {}, "odd": {}}))
    assert "Nothing to compare yet" in none


def test_runs_judged_at_sizes_of_their_own_have_a_verdict_apart(measured):
    config, results = measured
    odd = results["odd"][1]
    small = {split: {**values, "top1": 0.13} for split, values in odd.zero_shot["64"].items()}
    better = replace(odd, train_seconds=110, zero_shot={**odd.zero_shot, "64": small})
    full, own = verdict(
        replace(config, aim_ratio=9.5), make_rows(config, {**results, "fast": {}, "odd": {1: better}})
    ).split("Judged at any size of their own:")
    assert "Not met. Most accurate at that speed: odd (-7.0 points at 10.0x less time)" in full
    assert "Met by odd, judged at 64 px (+1.0 points at 10.0x less time)" in own
    alone = make_rows(replace(config, runs=config.runs[:2]), results)
    assert "of their own" not in verdict(config, alone)


def test_a_study_of_equal_time_has_an_order_and_no_aim(measured):
    config, results = measured
    equal = replace(config, seconds=100.0)
    order = verdict(equal, make_rows(equal, results))
    places = [order.index(text) for text in ("1. baseline 12.0 ± 2.0", "2. the fast one 11.5 ± 3.5", "3. odd 5.0")]
    assert places == sorted(places) and "aim" not in order.lower()
    without = replace(config, aim_ratio=0.0)
    assert verdict(without, make_rows(without, results)) == order.replace(", after the same training time", "")


def test_the_plot_of_equal_time_has_a_bar_of_the_right_length_for_every_run(measured):
    from matplotlib.figure import Figure

    config, results = measured
    config = replace(config, seconds=100.0, runs=config.runs[:2])
    title = "unseen, of 100: top-1"
    results = {
        name: {seed: replace(r, further={title: 0.3 + 0.1 * seed}) for seed, r in results[name].items()}
        for name in ("baseline", "fast")
    }
    figure = Figure()
    _draw_equal_time(figure, Study(Path("hand.yaml"), config, []), results)
    accuracy, unseen = figure.axes
    assert [bar.get_width() for bar in accuracy.patches] == pytest.approx([12.0, 11.5])
    assert [bar.get_width() for bar in unseen.patches] == pytest.approx([40.0, 40.0])
    assert accuracy.get_xlabel() == "zero-shot top-1 on test, %" and title in unseen.get_xlabel()
    drawn = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in drawn] == ["baseline", "the fast one"]
    results["fast"][0] = replace(results["fast"][0], further={})
    without = Figure()
    _draw_equal_time(without, Study(Path("hand.yaml"), config, []), results)
    assert len(without.axes) == 1, "a run without unseen concepts leaves nothing to compare"


def test_a_partial_study_says_what_is_missing(measured):
    config, results = measured
    study = Study(Path("configs/studies/hand.yaml"), config, [])
    jobs = [study_module.Job(spec, seed, None, (160,)) for seed in config.seeds for spec in config.runs]
    study = replace(study, jobs=jobs)
    assert missing(study, results) == ["fast: seed 1", "odd: seeds 0, 2"]
    page = format_report(study, results, Path("hand.png"))
    assert "**Not complete.**" in page and "- odd: seeds 0, 2" in page and "(hand.png)" in page
    assert "| the fast one | 2 | 11.5 ± 3.5 |" in page and "| 110 ± 14 |" in page
    for words in ("a machine", "2030-01-02", "seeds 0, 1, 2", "code abcdef0123\n", "--study configs/studies/hand.yaml"):
        assert words in page
    without = format_report(study, {**results, "baseline": {}}, None)
    assert "- baseline: seeds 0, 1, 2" in without and "Nothing to compare yet" in without
    assert "Nothing is measured yet" in format_report(study, {name: {} for name in results}, None)


def test_the_plot_is_an_image_with_something_on_it(make_study):
    study = make_study(seeds=[0])
    assert write_report(study)[1] is None, "nothing to plot before the first result"
    for job in study.jobs:
        values = {"top1": 0.1, "top5": 0.2, "images": 12, "classes": 12, "chance": 1 / 12}
        zero_shot = {str(size): {"val": values} for size in job.sizes}
        done = replace(result(0, 60), zero_shot=zero_shot, judged=study_module._judged(job))
        write_atomically(job.folder / "result.json", json.dumps(asdict(done)))
    table, plot = write_report(study)
    assert "**Not complete.**" not in table.read_text() and plot.name in table.read_text()
    with Image.open(plot) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert str(plot.parent) not in table.read_text(), "a checked-in page names no folder of this machine"
