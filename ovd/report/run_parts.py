"""Sections of a detector run's page that come from the run folder alone: losses, AP tables, leak check, fusion weights.

Every number is one of the run's files. What needs the annotations as well is in `evaluation_parts`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.engine.html_page import Html, Page, chart, folded, note, number, percent, table, tag
from pretrain.parsing import check_yaml, parse_yaml

FREQUENCY_NAMES = {"r": "rare (novel)", "c": "common", "f": "frequent"}
TASKS = {"bbox": "boxes", "segm": "masks"}
MAIN_ROW = "model"
_FUSION = {
    "alpha": "α, weight of the image-text score for base words",
    "beta": "β, its weight for novel words",
    "objectness_delta": "δ, exponent of the objectness",
    "detector_temperature": "temperature of the detector's logits",
}
_SHOWN_FINDINGS = 20


def read_json_file(path: Path, page: Page, part: str) -> Any:
    """Content of a JSON file; None, and said on the page, where it is not there or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        page.leave_out(part, f"the run folder has no {path.name}")
    except (OSError, ValueError) as error:
        page.leave_out(part, f"{path.name} cannot be read ({error})")
    return None


def read_settings(folder: Path) -> dict[str, Any]:
    """config.yaml with its references resolved; empty where there is none that can be read."""
    from omegaconf import OmegaConf

    try:
        check_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        settings = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    except Exception:  # the YAML parser's and OmegaConf's errors have many types; the raw text is on the page anyway
        return {}
    return settings if isinstance(settings, dict) else {}


def read_evaluations(folder: Path, page: Page) -> dict[str, dict[str, Any]]:
    """What metrics.json holds, for every row of the evaluation ("model" first)."""
    found = {}
    paths = sorted((folder / "evaluation").glob("*/metrics.json"), key=lambda p: (p.parent.name != MAIN_ROW, p))
    for path in paths:
        content = read_json_file(path, page, f"evaluation of {path.parent.name}")
        if isinstance(content, dict) and isinstance(content.get("metrics"), dict):
            found[path.parent.name.replace("_", " ")] = content
    if not found:
        page.leave_out(
            "average precision", "the run folder has no evaluation/*/metrics.json; the run was not evaluated"
        )
    return found


def add_average_precision(page: Page, evaluations: Mapping[str, dict[str, Any]]) -> None:
    """AP by frequency (by COCO's protocol: of base and novel classes) for every row, and each class of the main one."""
    if not evaluations:
        return
    main = next(iter(evaluations.values()))
    coco = main.get("protocol") == "coco"
    parts_of_ap = ["AP50_base", "AP50_novel", "AP_base", "AP_novel"] if coco else ["APr", "APc", "APf"]
    columns = ["AP", "AP50", "AP75", *parts_of_ap, *_recalls(evaluations)]
    fixed = ["AP_fixed", "APr_fixed", "APc_fixed", "APf_fixed"]
    columns += [c for c in fixed if any(c in m for e in evaluations.values() for m in e["metrics"].values())]
    rows = [
        [row, TASKS.get(task, task), *(percent(metrics.get(column)) for column in columns)]
        for row, content in evaluations.items()
        for task, metrics in content["metrics"].items()
    ]
    parts = [
        table(["evaluation", "", *columns], rows, f"{'COCO' if coco else 'LVIS'} protocol, percent", text_columns=2)
    ]
    if "shuffled text" in evaluations:
        parts.append(
            note("Shuffled text: the same detector with every class given another class's text. What the model has "
                 "above it is what the words contribute.")
        )  # fmt: skip
    parts += [_intervals(task, found) for task, found in main.get("intervals", {}).items()]
    parts += [_classes(task, found) for task, found in main.get("categories", {}).items()]
    page.add("Average precision of base and novel classes" if coco else "Average precision by frequency", *parts)


def _recalls(evaluations: Mapping[str, dict[str, Any]]) -> list[str]:
    keys = [k for e in evaluations.values() for m in e["metrics"].values() for k in m]
    return sorted({k for k in keys if re.fullmatch(r"AR@\d+", k)})


def _intervals(task: str, found: Mapping[str, Mapping[str, float]]) -> Html:
    rows = [[name, percent(v["value"]), percent(v["low"]), percent(v["high"])] for name, v in found.items()]
    head = ["metric", "value", "low", "high"]
    return folded(f"95 % intervals over pictures, {TASKS.get(task, task)}", table(head, rows))


def _classes(task: str, categories: Sequence[Mapping[str, Any]]) -> Html:
    """All measured classes, the best of each frequency first; counts of classes and objects by frequency above."""
    measured = [c for c in categories if c["num_ground_truth"]]
    order = {f: i for i, f in enumerate(FREQUENCY_NAMES)}
    measured.sort(key=lambda c: (order.get(c["frequency"], 3), -(c["AP"] or 0.0), c["name"]))
    rows = [
        [c["name"], FREQUENCY_NAMES.get(c["frequency"], c["frequency"]), number(c["num_ground_truth"]),
         percent(c["AP"]), percent(c["AP50"]), percent(c["AR"])]
        for c in measured
    ]  # fmt: skip
    head = ["class", "frequency", "objects", "AP", "AP50", "AR"]
    title = f"{len(measured)} classes with objects, {TASKS.get(task, task)}"
    return folded(title, table(head, rows, text_columns=2))


def add_losses(page: Page, records: Sequence[dict[str, Any]]) -> None:
    """Losses, learning rate, time and accuracies over the iterations."""
    steps = [r for r in records if "iteration" in r]
    if not steps:
        if records:
            page.leave_out("losses", "metrics.jsonl has no training iteration")
        return
    # Detectron2 writes an iteration again after a resumption; the later line counts.
    steps = sorted({r["iteration"]: r for r in steps}.values(), key=lambda r: r["iteration"])
    names = sorted({key for r in steps for key in r})
    losses = [n for n in names if n == "total_loss" or n.startswith("loss_")]
    panels = {
        "losses": losses,
        "accuracies and errors of the heads": [n for n in names if re.search("accuracy|false_", n)],
        "learning rate": [n for n in names if n == "lr"],
        "seconds per iteration": [n for n in names if n in ("time", "data_time")],
    }
    panels = {title: keys for title, keys in panels.items() if keys}

    def draw(figure: Any) -> None:
        grid = figure.subplots(2, 2, sharex=True).ravel()
        for axes, (title, keys) in zip(grid, panels.items(), strict=False):
            for key in keys:
                mine = [r for r in steps if key in r]
                axes.plot([r["iteration"] for r in mine], [r[key] for r in mine], linewidth=1, label=key)
            axes.set(title=title)
            axes.grid(alpha=0.3)
            if len(keys) > 1:
                axes.legend(fontsize=7)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.supxlabel("iteration", fontsize=9)

    shown = [*losses, "lr"]
    rows = [["first", *_values(steps[0], shown)], ["last", *_values(steps[-1], shown)]]
    page.add(
        "Training curves",
        chart("losses", (10, 6), draw, "Losses, accuracies, learning rate and time over the iterations"),
        table(["logged", "iteration", *shown], rows),
    )


def _values(record: Mapping[str, Any], keys: Sequence[str]) -> list[Html]:
    return [number(record["iteration"]), *(number(record.get(key)) for key in keys)]


def add_leak_check(page: Page, folder: Path) -> None:
    """Whether novel classes were found in the training data, and what was looked at."""
    report = read_json_file(folder / "leak_check.json", page, "leak check")
    if not isinstance(report, dict):
        return
    findings = report.get("findings", [])
    verdict = tag("b", "No novel class was found in the training data.", class_="good")
    if not report.get("ok"):
        verdict = tag("b", f"{len(findings)} traces of novel classes were found.", class_="bad")
    rows = [[name.replace("_", " "), number(count)] for name, count in report.get("counts", {}).items()]
    parts = [tag("p", verdict), table(["looked at", "count"], rows)]
    if findings:
        shown = [[f.get("kind"), f.get("detail")] for f in findings[:_SHOWN_FINDINGS]]
        parts.append(table(["where", "what"], shown, f"The first {len(shown)} of {len(findings)}", text_columns=2))
    if report.get("shared_synonyms"):
        parts.append(note("Words that base and novel classes share: ", ", ".join(report["shared_synonyms"])))
    page.add("Leak check", *parts)


def add_fusion(page: Page, folder: Path, settings: Mapping[str, Any], sweep: Path | None) -> None:
    """The fusion weights of the detector, those of the evaluation, and what a sweep of them found."""
    source, architecture = "detector/config.yaml", None
    try:
        architecture = parse_yaml((folder / "detector/config.yaml").read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        source, architecture = "config.yaml", _inner(settings, "model", "architecture")
    parts = []
    if isinstance(architecture, Mapping):
        changed = _inner(settings, "evaluation", "fusion") or {}
        rows = [
            [title, number(architecture.get(name)), number(changed.get(name, architecture.get(name)))]
            for name, title in _FUSION.items()
            if name in architecture or name in changed
        ]
        parts.append(table(["", source, "in the evaluation"], rows))
    else:
        page.leave_out("fusion weights", "neither detector/config.yaml nor config.yaml names them")
    path = sweep or folder / "sweep.json"
    if sweep or path.is_file():
        content = read_json_file(path, page, "sweep of the fusion weights")
        try:
            parts += _sweep_parts(content) if content else []
        except (KeyError, TypeError, AttributeError):
            page.leave_out("sweep of the fusion weights", f"{path} is no sweep.json of tools/sweep_scores.py")
    if parts:
        page.add("Fusion weights", *parts)


def _inner(settings: Mapping[str, Any], *keys: str) -> Any:
    """A nested setting, None where a level is missing."""
    node: Any = settings
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _sweep_parts(content: Mapping[str, Any]) -> list[Html]:
    """A map of AP and of APr over both weights, all other settings at their best, and the numbers."""
    best = content["best"]["settings"]
    fixed = {k: v for k, v in best.items() if k not in ("alpha", "beta")}
    rows = [r for r in content["rows"] if all(r["settings"].get(k) == v for k, v in fixed.items())]
    alphas, betas = (sorted({r["settings"][k] for r in rows}) for k in ("alpha", "beta"))
    value = {(r["settings"]["alpha"], r["settings"]["beta"]): r["metrics"] for r in rows}

    def draw(figure: Any) -> None:
        for axes, metric in zip(figure.subplots(1, 2), ("AP", "APr"), strict=True):
            grid = [[_in_percent(value.get((a, b), {}).get(metric)) for b in betas] for a in alphas]
            image = axes.imshow(grid, origin="lower", cmap="viridis", aspect="auto")
            axes.set_xticks(range(len(betas)), [f"{b:g}" for b in betas])
            axes.set_yticks(range(len(alphas)), [f"{a:g}" for a in alphas])
            axes.set(title=f"{metric}, %", xlabel="β (novel)", ylabel="α (base)")
            figure.colorbar(image, ax=axes)

    metrics = ("AP", "APr", "APc", "APf")
    shown = [
        [
            number(r["settings"]["alpha"]),
            number(r["settings"]["beta"]),
            *(percent(r["metrics"].get(m)) for m in metrics),
        ]
        for r in rows
    ]
    chosen = ", ".join(f"{name} {v:g}" for name, v in best.items())
    return [
        note(f"Sweep: the best by {content['metric']} is {chosen}."),
        chart("sweep", (9, 3.6), draw, "AP and APr over the fusion weights"),
        folded(f"The {len(shown)} settings", table(["α", "β", *metrics], shown, "percent")),
    ]


def _in_percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value
