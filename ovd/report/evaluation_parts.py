"""Sections of a detector run's page that need its detections and the annotations: precision over recall by frequency,
confusion between words, best and worst detections.

They are left out where the annotations are not the ones that metrics.json was measured with: every number of the page
then is the run's.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovd.data.lvis import read_ground_truth
from ovd.evaluation.matching import match
from ovd.evaluation.tables import FREQUENCIES, DetectionTable, GroundTruth, best_per, read_lvis, read_results
from ovd.report.curves import RECALLS, group_curves, precision_curves
from ovd.report.findings import Findings, confusions, find, outcomes
from ovd.report.pictures import Example, crop_png, examples
from ovd.report.run_parts import FREQUENCY_NAMES, MAIN_ROW
from pretrain.engine.html_page import Html, Page, chart, note, number, percent, picture, table, tag

_PARTS = "precision over recall, confusion between words, best and worst detections"
_GALLERIES = {
    "right": ("Right and sure", "The word with the highest score on the object is its own; surest first."),
    "wrong word": ("Sure of the wrong word", "Another word has the highest score on the object; surest first."),
    "nowhere": (
        "Found where nothing is annotated",
        "The detection overlaps no annotated object, in a picture where its class was checked; surest first.",
    ),
    "missed": ("Missed", "No detection of any word covers the object with an IoU of 0.5; largest first."),
}


def add_evaluation_parts(
    page: Page, folder: Path, metrics: Mapping[str, float] | None, annotations: Path | None, image_root: Path | None
) -> None:
    """Add the three sections, or say why not.

    Args:
        metrics: of boxes, as metrics.json has them.
        annotations: LVIS file that was evaluated on.
        image_root: folder that its pictures' names are relative to.
    """
    if metrics is None:
        page.leave_out(_PARTS, f"there is no evaluation/{MAIN_ROW}/metrics.json with boxes")
        return
    if not any(f"AP{frequency}" in metrics for frequency in FREQUENCIES):
        page.leave_out(_PARTS, "they are of the LVIS protocol, and metrics.json is of COCO's")
        return
    path = folder / "evaluation" / MAIN_ROW / "detections.json"
    if not path.is_file():
        page.leave_out(_PARTS, f"the run folder has no evaluation/{MAIN_ROW}/detections.json")
        return
    if annotations is None:
        page.leave_out(_PARTS, "config.yaml names no evaluation.annotations; give the file with --annotations")
        return
    try:
        content = read_ground_truth(annotations)
        truth = read_lvis(content, "bbox")
        detections = read_results(str(path), truth, "bbox")
    except (ValueError, OSError) as error:
        page.leave_out(_PARTS, str(error))
        return
    detections = detections.take(best_per(detections.image_ids, detections.scores, _limit(metrics)))
    if not _add_curves(page, truth, detections, metrics, annotations):
        return
    findings = find(truth, detections)
    _add_confusion(page, findings)
    _add_pictures(page, findings, content, image_root)


def _limit(metrics: Mapping[str, float]) -> int:
    """Detections counted per picture: the N of AR@N."""
    found = [int(m[1]) for m in (re.fullmatch(r"AR@(\d+)", key) for key in metrics) if m]
    return found[0] if found else 300


def _add_curves(
    page: Page, truth: GroundTruth, detections: DetectionTable, metrics: Mapping[str, float], annotations: Path
) -> bool:
    """False where the curves are not those of the metrics."""
    groups = {f: truth.frequencies == f for f in FREQUENCIES}
    curves = group_curves(precision_curves(match(truth, detections)), groups)
    for name, (_, all_ious) in curves.items():
        measured = metrics.get(f"AP{name}")
        if measured is None or not math.isclose(all_ious.mean(), measured, abs_tol=1e-9):
            page.leave_out(
                _PARTS,
                f"detections.json measured on {annotations} gives AP{name} {all_ious.mean():.6f}, metrics.json has "
                f"{measured}; give the annotations that were evaluated with --annotations",
            )
            return False

    def draw(figure: Any) -> None:
        grid = figure.subplots(1, 2, sharey=True)
        titles = ("IoU 0.5", "mean over IoU 0.5, 0.55, …, 0.95: the area is the AP")
        for place, (axes, title) in enumerate(zip(grid, titles, strict=True)):
            for index, (name, pair) in enumerate(curves.items()):
                axes.plot(RECALLS, pair[place], color=f"C{index}", label=FREQUENCY_NAMES[name])
            axes.set(title=title, xlabel="recall", xlim=(0, 1), ylim=(0, 1))
            axes.grid(alpha=0.3)
        grid[0].set_ylabel("precision, mean over classes")
        grid[0].legend(fontsize=8)

    shown = (0, 10, 25, 50, 75, 90)
    rows = [
        [FREQUENCY_NAMES[name], number(int(groups[name].sum())), percent(float(at_50.mean())),
         percent(metrics[f"AP{name}"]), *(percent(float(at_50[i])) for i in shown)]
        for name, (at_50, _) in curves.items()
    ]  # fmt: skip
    head = ["classes", "number", "AP50", "AP", *(f"at recall {i} %" for i in shown)]
    page.add(
        "Precision over recall by frequency",
        chart("precision-recall", (10, 3.8), draw, "Precision over recall for rare, common and frequent classes"),
        table(head, rows, "Boxes, percent; precision at IoU 0.5, the highest at a recall or above"),
    )
    return True


def _add_confusion(page: Page, findings: Findings) -> None:
    parts = [
        note(
            "On each annotated box the word wins that has the highest score among the detections, of any class, with "
            "an IoU of at least 0.5. Where labels are incomplete another word may be right too. Average precision asks "
            "something else: how the boxes of one word rank over the pictures where that word was checked."
        )
    ]  # fmt: skip
    head = [
        "annotated as",
        "objects",
        "right word",
        *(f"another, {FREQUENCY_NAMES[f]}" for f in FREQUENCIES),
        "nothing",
    ]
    rows = []
    for frequency, counts in outcomes(findings).items():
        cells = [counts[key] for key in ("right", *FREQUENCIES, "none")]
        shares = [Html(f"{number(c)} ({percent(c / counts['objects'], 0)} %)") for c in cells]
        rows.append([FREQUENCY_NAMES[frequency], number(counts["objects"]), *shares])
    parts.append(table(head, rows, "Objects by what wins on them"))
    pairs = [
        [c.truth, FREQUENCY_NAMES.get(c.truth_frequency, ""), c.winner, FREQUENCY_NAMES.get(c.winner_frequency, ""),
         number(c.count), number(c.objects), number(c.score, ".2f")]
        for c in confusions(findings)
    ]  # fmt: skip
    head = ["annotated as", "", "word that wins", "", "times", "of objects", "mean score"]
    if pairs:
        parts.append(table(head, pairs, "The most frequent confusions", text_columns=4))
    page.add("Confusion between words", *parts)


def _add_pictures(page: Page, findings: Findings, content: Mapping[str, Any], image_root: Path | None) -> None:
    if image_root is None:
        page.leave_out("pictures", "config.yaml names no data.test.image_root; give the folder with --image-root")
        return
    images = {image["id"]: image for image in content["images"]}
    parts, unreadable = [], []
    for kind, found in examples(findings).items():
        title, meaning = _GALLERIES[kind]
        figures = []
        for example in found:
            try:
                png = crop_png(example, images[example.image_id], image_root)
            except ValueError as error:
                unreadable.append(str(error))
                continue
            alt = f"{example.word or 'nothing'} found on {example.truth or 'nothing'}"
            figures.append(picture(png, _caption(example), alt))
        if figures:
            parts += [tag("h3", title), note(meaning), tag("div", *figures, class_="gallery")]
        elif not found:
            parts += [tag("h3", title), note("There are none.")]
    if unreadable:
        page.leave_out("pictures", f"{len(unreadable)} cannot be read, the first: {unreadable[0]}")
    if parts:
        legend = "Orange: the detection. Blue: the annotation. At most one of a word in each group."
        page.add("Best and worst detections", note(legend), *parts)


def _caption(example: Example) -> Html:
    """Words and score: found and annotated."""
    parts: list[Any] = []
    if example.word is not None:
        parts += [tag("b", example.word), " ", number(example.score, ".2f")]
    if example.truth is not None and example.truth != example.word:
        parts += ["; " if parts else "", "annotated: ", tag("b", example.truth)]
    return tag("span", *parts, f" (picture {example.image_id})")
