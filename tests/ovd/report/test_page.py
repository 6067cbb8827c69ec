"""The page of a detector's run folder: the evaluation's own numbers, hostile names as text, whole without a network."""

import importlib.util
import json
import os
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from ovd.evaluation.coco_evaluator import CocoEvaluator
from ovd.evaluation.lvis_evaluator import OpenVocabularyEvaluator
from ovd.report.cli import is_detector_run, main, write_report
from ovd.report.page import detector_page

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
NAMES = {1: HOSTILE, 2: "tin_can", 3: "mug"}
SIZE = 120


def make_truth(folder: Path, pictures: int = 6) -> dict:
    """Pictures with one object of each class; the classes are r, c and f."""
    rng = np.random.default_rng(1)
    images, annotations = [], []
    for i in range(1, pictures + 1):
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE,
                       "neg_category_ids": [], "not_exhaustive_category_ids": []})  # fmt: skip
        for c in NAMES:
            box = [5 + 38 * (c - 1), int(rng.integers(5, 60)), 30, 40]
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": c, "bbox": box, "area": 1200,
                                "iscrowd": 0})  # fmt: skip
    categories = [{"id": i, "name": n, "frequency": "rcf"[i - 1], "synonyms": [n]} for i, n in NAMES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def evaluate(truth: dict, output: Path, seed: int, coco: bool = False) -> None:
    """What an evaluation leaves, of detections with some noise in box, word and score."""
    rng = np.random.default_rng(seed)
    evaluator = OpenVocabularyEvaluator(truth, output, samples=5)
    if coco:
        evaluator = CocoEvaluator(truth, output, {1: False, 2: True, 3: True}, samples=5)
    for image in truth["images"]:
        boxes = np.array([a["bbox"] for a in truth["annotations"] if a["image_id"] == image["id"]], float)
        boxes = np.concatenate([boxes, [[0, 0, 20, 4]]])
        boxes[:, :2] += rng.normal(0, 4, (4, 2)).clip(-5, 5) * [[1], [1], [1], [0]]
        found = Instances((SIZE, SIZE))
        found.pred_boxes = Boxes(torch.tensor(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)))
        found.scores = torch.tensor(rng.uniform(0.1, 1, 4))
        found.pred_classes = torch.tensor([*np.where(rng.random(3) < 0.7, range(3), rng.integers(0, 3, 3)), 1])
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    evaluator.evaluate()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with everything that the report reads."""
    folder, data = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("data")
    truth = make_truth(data)
    (data / "truth.json").write_text(json.dumps(truth))
    evaluate(truth, folder / "evaluation/model", seed=0)
    evaluate(truth, folder / "evaluation/shuffled_text", seed=1)
    lines = [{"iteration": i, "total_loss": 3.5 / (i + 1), "loss_cls": 2 / (i + 1), "lr": 1e-3 / (i + 1), "time": 0.5,
              "fast_rcnn/cls_accuracy": 0.1 * i} for i in (0, 1, 2)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(
        f"evaluation:\n  annotations: {data}/truth.json\n  fusion: {{beta: 0.75}}\n"
        f"data:\n  test:\n    image_root: {data}\n    _target_: x\n"
        "model:\n  architecture: {alpha: 0.3, beta: 0.4, objectness_delta: 0.0}\n"
    )
    leak = {"ok": False, "findings": [{"kind": "vocabulary", "detail": HOSTILE}], "counts": {"images": 2417},
            "shared_synonyms": [HOSTILE]}  # fmt: skip
    (folder / "leak_check.json").write_text(json.dumps(leak))
    (folder / "about.json").write_text(json.dumps({"git_revision": "abc", "environment": {"torch": HOSTILE},
                                                   "data": {HOSTILE: "0f"}}))  # fmt: skip
    (folder / "summary.md").write_text(f"# Detector evaluation\n\n- detector: {HOSTILE}\n")
    (folder / "command.txt").write_text(f"now  python {HOSTILE}\n")
    rows = [{"settings": {"alpha": a, "beta": b, "delta": 0.0}, "metrics": {"AP": a * b, "APr": a, "APc": None,
             "APf": b}} for a in (0.1, 0.2) for b in (0.3, 0.4)]  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps({"metric": "AP", "best": rows[-1], "rows": rows}))
    return folder


@pytest.fixture(scope="module")
def page(run):
    return detector_page(run)


def metrics_of(run: Path, row: str = "model") -> dict:
    return json.loads((run / f"evaluation/{row}/metrics.json").read_text())


def first_table(page, title: str) -> list[list[tuple[str, str | None]]]:
    """Body of a section's first table: (text, exact value) of every cell."""
    body = re.search(r"<tbody>(.*?)</tbody>", dict(page.sections)[title])[1]
    return [
        [(unescape(re.sub("<.*?>", "", c)), (re.findall(r'value="(.*?)"', c) or [None])[0])
         for c in re.findall(r"<td.*?>(.*?)</td>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", body)
    ]  # fmt: skip


def test_nothing_is_left_out_of_a_whole_run(page):
    assert not page.missing
    assert [title for title, _ in page.sections] == [
        "", "Average precision by frequency", "Precision over recall by frequency", "Confusion between words",
        "Best and worst detections", "Training curves", "Leak check", "Fusion weights", "Summary", "Environment",
        "Data", "Settings",
    ]  # fmt: skip


def test_the_ap_table_has_the_evaluations_numbers(run, page):
    rows = first_table(page, "Average precision by frequency")
    assert [row[0][0] for row in rows] == ["model", "shuffled text"]
    for row, name in zip(rows, ("model", "shuffled_text"), strict=True):
        measured = metrics_of(run, name)["metrics"]["bbox"]
        for (text, exact), key in zip(row[2:], ("AP", "AP50", "AP75", "APr", "APc", "APf", "AR@300"), strict=True):
            assert float(exact) == measured[key] and text == f"{100 * measured[key]:.1f}"


def test_an_evaluation_by_cocos_protocol_is_called_so_and_has_base_and_novel_words(tmp_path):
    truth = make_truth(tmp_path)
    evaluate(truth, tmp_path / "evaluation/model", 0, coco=True)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    page = detector_page(tmp_path, tmp_path / "truth.json")
    measured = metrics_of(tmp_path)["metrics"]["bbox"]
    (row,) = first_table(page, "Average precision of base and novel classes")
    keys = ("AP", "AP50", "AP75", "AP50_base", "AP50_novel", "AP_base", "AP_novel", "AR@100")
    assert [float(exact) for _, exact in row[2:]] == [measured[key] for key in keys]
    html = page.render()
    assert "COCO protocol, percent" in html and "LVIS protocol, percent" not in html
    assert f"{100 * measured['AP50_novel']:.1f}" in html and "box AP50, novel words" in html
    assert any("metrics.json is of COCO" in str(missing) for missing in page.missing)


def test_every_exact_number_is_in_the_runs_files_or_counted_from_them(run, page):
    def numbers(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return {n for item in value for n in numbers(item)}
        return {float(value)} if isinstance(value, (int, float)) else set()

    known = numbers([json.loads(p.read_text()) for p in run.rglob("*.json")])
    known |= numbers([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
    known |= {0.3, 0.4, 0.75}  # fusion weights in config.yaml
    for title, content in page.sections:
        if title in ("Precision over recall by frequency", "Confusion between words"):
            continue  # tested on their own
        for value in re.findall(r'<data value="(.*?)"', content):
            assert float(value) in known, (title, value)


def test_precision_over_recall_has_the_evaluations_ap(run, page):
    measured = metrics_of(run)
    rows = first_table(page, "Precision over recall by frequency")
    by_class = {c["frequency"]: c for c in measured["categories"]["bbox"]}  # one class of each
    for row, frequency in zip(rows, "rcf", strict=True):
        assert float(row[3][1]) == measured["metrics"]["bbox"][f"AP{frequency}"]
        assert float(row[2][1]) == pytest.approx(by_class[frequency]["AP50"], abs=1e-12)


def test_outcomes_of_every_frequency_sum_to_its_objects(page):
    for row in first_table(page, "Confusion between words"):
        counts = [int(text.split(" ")[0]) for text, _ in row[2:]]
        assert sum(counts) == int(row[1][1]) == 6


def test_fusion_weights_are_the_detectors_and_the_evaluations(page):
    rows = {row[0][0][0]: [float(exact) for _, exact in row[1:]] for row in first_table(page, "Fusion weights")}
    assert rows == {"α": [0.3, 0.3], "β": [0.4, 0.75], "δ": [0.0, 0.0]}


def test_names_of_the_data_are_text(page):
    content = page.render()
    assert "<img src=x" not in content and content.count("&lt;img src=x") > 8
    assert set(re.findall(r'<img src="(.{22})', content)) == {"data:image/png;base64,"}


def test_annotations_other_than_the_evaluated_ones_are_refused(run, tmp_path):
    truth = make_truth(tmp_path)
    for annotation in truth["annotations"][:9]:
        annotation["bbox"][1] += 15
    (tmp_path / "other.json").write_text(json.dumps(truth))
    made = detector_page(run, annotations=tmp_path / "other.json")
    assert "Precision over recall by frequency" not in dict(made.sections)
    assert any("give the annotations that were evaluated" in sentence for sentence in made.missing)


def test_pictures_that_are_gone_are_counted_and_the_rest_stays(run, tmp_path):
    made = detector_page(run, image_root=tmp_path)
    assert any(re.search(r"pictures: \d+ cannot be read, the first: .*no such file", s) for s in made.missing)
    assert "Confusion between words" in dict(made.sections)


def test_a_run_that_only_trained_says_what_is_missing(run, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    (tmp_path / "leak_check.json").write_text('{"ok": true, "counts": {"images": 3}}')
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "report.html" in said.out and "was not evaluated" in said.err and "config.yaml" in said.err
    content = (tmp_path / "report.html").read_text()
    assert "No novel class was found" in content and "Training curves" in content


def test_a_broken_sweep_and_a_missing_folder_are_one_sentence(run, tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("[1]")
    _, missing = write_report(run, tmp_path / "r.html", sweep=tmp_path / "sweep.json")
    assert any("is no sweep.json" in sentence for sentence in missing)
    assert main([str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_kinds_of_run_folders_are_told_apart(run, tmp_path):
    (tmp_path / "config.yaml").write_text("phases: []\n")
    assert is_detector_run(run) and not is_detector_run(tmp_path)


def test_a_browser_without_a_network_or_scripts_shows_it_whole(run, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    spec = importlib.util.spec_from_file_location("install_chromium", ROOT / "requirements/install_chromium.py")
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    if not install.PROGRAM.exists():
        if os.environ.get("CI") and install.is_supported():
            pytest.fail("headless Chromium is not installed: python requirements/install_chromium.py")
        pytest.skip("headless Chromium is not installed: python requirements/install_chromium.py (make test does it)")
    path, _ = write_report(run, tmp_path / "report.html")
    asked, complaints = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=install.PROGRAM, args=["--disable-gpu"])
        opened = browser.new_page()  # scripts may run here: there must be none
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("console", lambda message: complaints.append(message.text))
        opened.goto(path.as_uri())
        images = opened.eval_on_selector_all("img", "all => all.map(i => i.complete && i.naturalWidth > 0)")
        charts = opened.eval_on_selector_all("svg", "all => all.map(s => s.getBoundingClientRect().width)")
        title = opened.title()
        text = opened.inner_text("body")
        browser.close()
    assert len(images) > 4 and all(images)
    assert len(charts) == 3 and min(charts) > 300
    assert title.startswith("Detector: ") and HOSTILE in text
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()] and not complaints
