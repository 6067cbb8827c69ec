"""Tables: the text that a reader sees, and files that are whole or absent."""

import json
import math

import pytest

from ovd.evaluation.lvis_evaluator import CategoryResult
from ovd.evaluation.results import (
    category_table,
    format_percent,
    markdown_table,
    summary,
    text_table,
    write_json_atomic,
)


def test_fractions_become_percent_and_nothing_measured_becomes_na():
    assert [format_percent(value) for value in (0.3141, 0.0, 1.0, math.nan, None)] == [
        "31.4",
        "0.0",
        "100.0",
        "n/a",
        "n/a",
    ]


def test_the_table_of_two_models_reads_as_written_here():
    rows = {"model": {"AP": 0.314, "APr": 0.2}, "control": {"AP": 0.05, "APr": math.nan}}
    assert markdown_table(rows, ("AP", "APr", "AR@300"), header="run") == (
        "| run     |   AP |  APr | AR@300 |\n"
        + "| ------- | ---: | ---: | -----: |\n"
        + "| model   | 31.4 | 20.0 |    n/a |\n"
        + "| control |  5.0 |  n/a |    n/a |\n"
    )


def test_a_bar_in_a_name_does_not_break_the_table():
    assert "a\\|b" in text_table(["name", "x"], [["a|b", "1"]])


def test_ragged_or_empty_tables_are_refused():
    with pytest.raises(ValueError, match="line 1 of the table has 1 cells, the head has 2"):
        text_table(["a", "b"], [["c"]])
    with pytest.raises(ValueError, match="0 rows"):
        markdown_table({})


def test_classes_are_listed_rare_first_then_by_ap_without_those_that_have_no_objects():
    def make(name, frequency, objects, ap):
        return CategoryResult(1, name, frequency, objects, ap, ap, ap)

    table = category_table(
        [make("cat", "f", 3, 0.9), make("owl", "r", 1, 0.1), make("eel", "r", 2, 0.4), make("emu", "r", 0, math.nan)]
    )
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["eel", "owl", "cat"]


def test_a_summary_has_a_heading_and_a_row_per_task():
    text = summary({"bbox": {"AP": 0.5}, "segm": {"AP": 0.25}}, "Miniature", ("AP",))
    assert text.startswith("## Miniature\n\n|") and "50.0" in text and "25.0" in text


def test_json_has_null_for_nan_and_is_strict(tmp_path):
    path = write_json_atomic(tmp_path / "new" / "metrics.json", {"AP": math.nan, "list": [1.5, (math.inf, "x")]})
    assert json.loads(path.read_text()) == {"AP": None, "list": [1.5, [None, "x"]]}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]
