"""The page of a real small run: its numbers are those of the run's files, in tables and in charts."""

import json
import re
import shutil

import pytest
from matplotlib.figure import Figure

from pretrain.config import ConfigError, load_config
from pretrain.engine import html_report
from pretrain.engine.cost import PhaseCost, make_plan
from pretrain.engine.html_page import Html
from pretrain.engine.html_report import flops_until, judgements, pretraining_page
from pretrain.engine.train import Trainer

PHASES = [{"name": "small", "steps": 4}, {"name": "large <b>$", "steps": 2, "image_size": 48}]


@pytest.fixture(scope="module")
def run(module_run_config):
    """Folder of a finished run of two phases, judged every two steps."""
    config = module_run_config(phases=PHASES, evaluation={"splits": ["val"], "every": 2})
    Trainer(config).train()
    return config.run.output


@pytest.fixture
def figures(monkeypatch):
    """The figures of the page by the name of the chart, in place of their SVG."""
    drawn = {}

    def chart(name, size, draw, alt):
        drawn[name] = Figure()
        draw(drawn[name])
        return Html("")

    monkeypatch.setattr(html_report, "chart", chart)
    return drawn


def records_of(folder):
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def cells(page, title):
    """Rows of a section's first table: (text, exact value or None) of each cell."""
    content = dict(page.sections)[title]
    rows = re.findall(r"<tr>(.*?)</tr>", re.search(r"<tbody>(.*?)</tbody>", content)[1])
    return [
        [(re.sub("<.*?>", "", cell), (re.findall(r'value="(.*?)"', cell) or [None])[0])
         for cell in re.findall(r"<td.*?>(.*?)</td>", row)]
        for row in rows
    ]  # fmt: skip


def test_the_zero_shot_table_has_the_last_measurement_of_every_phase(run):
    expected = {r["phase"]: r for r in records_of(run) if "zero_shot_val_top1" in r}
    rows = cells(pretraining_page(run), "Zero-shot accuracy")
    assert len(rows) == len(expected) == 2
    for row, (phase, record) in zip(rows, expected.items(), strict=True):
        assert row[0][0] == phase.replace("<", "&lt;").replace(">", "&gt;")
        exact = [float(value) for _, value in row[2:]]
        names = ("top1", "top5", "chance", "images", "classes")
        assert exact == [record["step"], *(record[f"zero_shot_val_{name}"] for name in names)]
        assert row[3][0] == f"{100 * record['zero_shot_val_top1']:.1f}"


def test_every_exact_number_of_the_page_is_in_the_runs_files(run):
    page = pretraining_page(run)
    known = {float(v) for r in records_of(run) for v in r.values() if isinstance(v, (int, float))}
    config = load_config(f"{run}/config.yaml")
    for phase, cost in zip(config.phases, make_plan(config).phases, strict=True):
        known |= {phase.steps, phase.image_size, phase.context_length, phase.batch_size, phase.lr}
        known |= {cost.training_flops / 1e12, cost.device_flops / 1e12}
    shown = re.findall(r'<data value="(.*?)">', page.render())
    assert len(shown) > 40 and {float(value) for value in shown} <= known


def test_charts_hold_the_points_of_the_metrics(run, figures):
    records = records_of(run)
    pretraining_page(run)
    loss, accuracy, lr, speed = figures["curves"].axes
    for axes, key in ((loss, "loss"), (accuracy, "batch_accuracy"), (lr, "lr"), (speed, "pairs_per_second")):
        drawn = [point for line in axes.lines for point in zip(*line.get_data(), strict=True)]
        assert drawn == [(r["step"], r[key]) for r in records if key in r]
        assert [line.get_label() for line in axes.lines] == ["small", "large <b>$"]
    judged = [r for r in records if "zero_shot_val_top1" in r]
    minutes, compute = figures["zero-shot"].axes
    heights = [100 * r["zero_shot_val_top1"] for r in judged]
    assert list(minutes.lines[0].get_xdata()) == [r["train_seconds"] / 60 for r in judged]
    assert list(minutes.lines[0].get_ydata()) == list(compute.lines[0].get_ydata()) == heights
    # All of the first phase, then half and all of the second.
    small, large = (p.device_flops / 1e12 for p in make_plan(load_config(f"{run}/config.yaml")).phases)
    assert list(compute.lines[0].get_xdata())[-2:] == pytest.approx([small, small + large])


def test_compute_grows_by_each_phases_own_cost_of_a_step():
    def cost(steps, flops):
        return PhaseCost("x", steps, 1, 1, 1, 1, 1, 1, 1, flops, 0, 0, 1)

    phases = [cost(10, 1000), cost(4, 2000)]
    assert [flops_until(step, phases) for step in (0, 5, 10, 11, 14, 99)] == [0, 500, 1000, 1500, 3000, 3000]


def test_several_encoders_and_splits_are_told_apart():
    record = {"step": 3, "phase": "p", "zero_shot_val_ema_top1": 0.5, "zero_shot_val_ema_top5": 0.7}
    (found,) = judgements([record])
    assert (found.title, found.top1, found.top5, found.images) == ("val_ema", 0.5, 0.7, None)


def test_missing_and_broken_parts_are_left_out_and_said(run, tmp_path):
    folder = tmp_path / "part"
    folder.mkdir()
    lines = open(f"{run}/metrics.jsonl").read().splitlines()
    (folder / "metrics.jsonl").write_text(f'{lines[0]}\n{{"step": 2, "los\n[1]\n')
    page = pretraining_page(folder)
    said = " | ".join(page.missing)
    for part in ("2 lines of metrics.jsonl", "no zero-shot", "no configuration file", "about.json", "command.txt"):
        assert part in said
    assert "Left out" in page.render() and "Training curves" in dict(page.sections)


def test_a_run_without_metrics_still_shows_its_settings(run, tmp_path):
    shutil.copy(f"{run}/config.yaml", tmp_path)
    page = pretraining_page(tmp_path)
    assert "Phases" in dict(page.sections) and any("metrics.jsonl" in sentence for sentence in page.missing)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give the folder of a run"):
        pretraining_page(tmp_path)
