"""The evaluation benchmark measures the same numbers on both sides, and answers --help without the models."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lvis")

from ovd.evaluation import benchmark_memory
from ovd.evaluation.benchmark import EvaluationBenchmark, as_list, make_detections, make_ground_truth, run, to_markdown

ROOT = Path(__file__).resolve().parents[3]
SMALL = EvaluationBenchmark(images=5, detections=9, classes=20)


def test_all_three_runs_measure_the_same_and_the_table_says_so(monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)
    runs = run(SMALL, with_lvis=True, with_list=True)
    assert runs[0].metrics["AP"] == runs[1].metrics["AP"] == pytest.approx(runs[2].metrics["AP"], abs=1e-12)
    text = to_markdown(SMALL, runs)
    assert "5 pictures x 9, 20 classes" in text and "lvis takes" in text and "seed 0" in text
    assert "lvis takes" not in to_markdown(SMALL, run(SMALL, with_lvis=False, with_list=False))


def test_generated_data_are_as_asked_and_one_seed_gives_one_set():
    ground_truth = make_ground_truth(SMALL)
    columns = make_detections(SMALL, ground_truth)
    assert len(ground_truth["images"]) == 5 and len(ground_truth["categories"]) == 20
    assert np.bincount(columns["image_ids"])[1:].tolist() == [9] * 5
    assert {c["frequency"] for c in ground_truth["categories"]} == {"r", "c", "f"}
    for image in ground_truth["images"]:
        present = {a["category_id"] for a in ground_truth["annotations"] if a["image_id"] == image["id"]}
        assert not present & set(image["neg_category_ids"])
    again = as_list(make_detections(SMALL, make_ground_truth(SMALL)))
    assert again == as_list(columns)


@pytest.mark.parametrize("masks", [False, True])
def test_columns_are_held_and_written_in_a_fraction_of_the_dictionaries_memory(masks):
    benchmark = EvaluationBenchmark(images=8, detections=60, classes=20)
    columns, dictionaries = benchmark_memory.run(benchmark, masks, with_list=True)
    assert columns.held < dictionaries.held / (2 if masks else 6)
    assert columns.writing < dictionaries.writing / 2
    text = benchmark_memory.to_markdown(benchmark, masks, [columns, dictionaries])
    assert f"8 pictures x 60, {'boxes and masks' if masks else 'boxes'}" in text and "19,809 pictures, GB" in text


def test_help_imports_neither_torch_nor_detectron2_and_a_bad_size_is_named():
    code = (
        "import runpy, sys\nsys.argv = ['benchmark.py', 'evaluation', '--help']\n"
        "try:\n    runpy.run_path('tools/benchmark.py', run_name='__main__')\n"
        "except SystemExit:\n    print([name for name in ('torch', 'detectron2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--skip-lvis-api" in done.stdout and done.stdout.rstrip().endswith("[]")
    command = [sys.executable, "tools/benchmark.py", "evaluation", "--images", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "--images is 0; give at least 1" in done.stderr
