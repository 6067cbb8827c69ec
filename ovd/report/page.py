"""The page of a detector's run folder, also of one that still trains or holds an evaluation only."""

from pathlib import Path
from typing import Any

from ovd.report.evaluation_parts import add_evaluation_parts
from ovd.report.run_parts import (
    MAIN_ROW,
    add_average_precision,
    add_fusion,
    add_leak_check,
    add_losses,
    read_evaluations,
    read_settings,
)
from pretrain.engine.html_page import Page, cards, folded, number, percent, tag
from pretrain.engine.html_report import add_provenance, read_about, read_metrics


def detector_page(
    folder: str | Path,
    annotations: str | Path | None = None,
    image_root: str | Path | None = None,
    sweep: str | Path | None = None,
) -> Page:
    """The report of a detector run folder.

    Args:
        folder: of `tools/train_net.py`, or any with evaluation/model/ of `evaluate_detector`.
        annotations: LVIS file that was evaluated on; None: the one config.yaml names.
        image_root: folder of its pictures; None: the one config.yaml names, or else that of `annotations`.
        sweep: sweep.json of `tools/sweep_scores.py`; None: the run folder's, if it has one.

    Returns:
        The page; what could not be made is in its `missing`.
    """
    folder = Path(folder)
    page = Page(f"Detector: {folder.resolve().name}", str(read_about(folder).get("git_revision", "")))
    settings = read_settings(folder)
    evaluation, data = settings.get("evaluation") or {}, settings.get("data") or {}
    if image_root is None:
        image_root = Path(annotations).parent if annotations else (data.get("test") or {}).get("image_root")
    annotations = annotations or evaluation.get("annotations")
    records = read_metrics(folder, page)
    evaluations = read_evaluations(folder, page)
    _add_overview(page, records, evaluations)
    add_average_precision(page, evaluations)
    metrics = evaluations.get(MAIN_ROW, {}).get("metrics", {}).get("bbox")
    add_evaluation_parts(
        page, folder, metrics, Path(annotations) if annotations else None, Path(image_root) if image_root else None
    )
    add_losses(page, records)
    add_leak_check(page, folder)
    add_fusion(page, folder, settings, Path(sweep) if sweep else None)
    if (folder / "summary.md").is_file():
        summary = (folder / "summary.md").read_text(encoding="utf-8", errors="replace")
        page.add("Summary", folded("The run's own summary.md", tag("pre", summary)))
    add_provenance(page, folder)
    return page


def _add_overview(page: Page, records: list[dict[str, Any]], evaluations: dict[str, dict[str, Any]]) -> None:
    values = []
    metrics = evaluations.get(MAIN_ROW, {}).get("metrics", {})
    for task, kind in (("bbox", "box"), ("segm", "mask")):
        novel_ap = "APr" if "APr" in metrics.get(task, {}) else "AP50_novel"  # LVIS's, COCO's protocol
        for name in ("AP", novel_ap) if task in metrics else ():
            novel = ", novel words" if name == novel_ap else ""
            values.append((tag("span", percent(metrics[task].get(name)), " %"), f"{kind} {name.split('_')[0]}{novel}"))
    steps = [r for r in records if "iteration" in r]
    if steps:
        values.append((number(steps[-1]["iteration"]), "last iteration logged, counted from 0"))
        if "total_loss" in steps[-1]:
            values.append((number(steps[-1]["total_loss"]), "last total loss"))
    if values:
        page.add("", cards(values))
