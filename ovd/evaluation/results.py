"""Turn metric dictionaries into Markdown tables and JSON files; measures nothing itself.

Metrics are fractions in 0-1 with NaN where nothing could be measured; here they become percent with one decimal and
"n/a". Files are written whole or not at all.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.atomic import replacing, write_atomically

AP_COLUMNS = ("AP", "AP50", "AP75", "APr", "APc", "APf", "AR@300")


def format_percent(value: float | None, decimals: int = 1) -> str:
    """Return a fraction as percent ("31.4" for 0.314), or "n/a" for None and NaN.

    Args:
        value: fraction in 0-1, or None or NaN where there was nothing to measure.
        decimals: digits after the point.
    """
    if value is None or math.isnan(value):
        return "n/a"
    return f"{100 * value:.{decimals}f}"


def markdown_table(
    rows: Mapping[str, Mapping[str, float]], columns: Sequence[str] = AP_COLUMNS, header: str = ""
) -> str:
    """Return a Markdown table with one line per entry of `rows` and one column per metric.

    Args:
        rows: label of the row (for example "model", "control") -> metrics in 0-1. A metric that a row lacks is "n/a".
        columns: metrics to show, in this order.
        header: what the row labels are, the heading of the first column.

    Returns:
        The table's text, ending in a newline; numbers in percent with one decimal.

    Raises:
        ValueError: there is no row or no column.
    """
    if not rows or not columns:
        raise ValueError(f"a table needs rows and columns, got {len(rows)} rows and {len(columns)} columns")
    body = [[label, *(format_percent(metrics.get(column)) for column in columns)] for label, metrics in rows.items()]
    return text_table([header, *columns], body)


def text_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of ready texts: the first column to the left, the others to the right, padded.

    Args:
        head: column titles.
        body: lines, each as long as `head`.

    Raises:
        ValueError: a line has another number of cells than the head.
    """
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in [head, *body]]
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(head):
            raise ValueError(f"line {number} of the table has {len(line)} cells, the head has {len(head)}")
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]

    def join(line: Sequence[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "| " + " | ".join([line[0].ljust(widths[0]), *numbers]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([join(lines[0]), rule, *(join(line) for line in lines[1:])]) + "\n"


def category_table(categories: Sequence[Any]) -> str:
    """Return a Markdown table of per-class results, rare classes first, best AP first within a frequency.

    Args:
        categories: `lvis_evaluator.CategoryResult` objects; classes without ground truth are left out.
    """
    order = {"r": 0, "c": 1, "f": 2}
    shown = [category for category in categories if category.num_ground_truth]
    shown.sort(key=lambda c: (order.get(c.frequency, 3), -c.AP, c.name))
    body = [
        [c.name, c.frequency, str(c.num_ground_truth), *(format_percent(value) for value in (c.AP, c.AP50, c.AR))]
        for c in shown
    ]
    return text_table(["class", "frequency", "objects", "AP", "AP50", "AR"], body)


def summary(results: Mapping[str, Mapping[str, float]], title: str, columns: Sequence[str] = AP_COLUMNS) -> str:
    """Return a titled Markdown section with one row per task or per model.

    Args:
        results: for example `OpenVocabularyEvaluator.evaluate()`'s {"bbox": metrics, "segm": metrics}, or
            {"model": metrics, "control": metrics}.
        title: heading of the section.
        columns: metrics to show.
    """
    return f"## {title}\n\n{markdown_table(results, columns)}"


def write_json_atomic(path: str | Path, value: Any) -> Path:
    """Write JSON whole or not at all; NaN and infinities inside dicts and lists become null, which JSON has."""
    return write_atomically(path, json.dumps(_without_nan(value), allow_nan=False))


def write_json_list_atomic(path: str | Path, parts: Iterable[Sequence[Any]]) -> Path:
    """Write one JSON list of all the parts' entries, with a part in memory at a time, to the byte as
    `write_json_atomic` writes the whole list.

    Args:
        parts: for example the detections of each picture.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        separator = ""
        for part in parts:
            if len(part):
                file.write(separator + json.dumps(_without_nan(part), allow_nan=False)[1:-1])
                separator = ", "
        file.write("]")
    return Path(path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
