"""What the opening comments of the objectives' mini configurations say was measured is what the study's page says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "label_smoothing_mini": "label smoothing, RECLIP",
    "distillation_mini": "distillation, RECLIP",
    "otter_mini": "OTTER, RECLIP",
    "clip_rocket_mini": "clip-rocket, RECLIP",
    "uta_mini": "UTA and fine-tuning, full size",
    "masked_features_mini": "masked features and fine-tuning, full size",
}


@pytest.fixture(scope="module")
def top1():
    """Name of a row -> its top-1 as the page writes it, "6.4 +- 0.5"."""
    page = (ROOT / "studies" / "objectives_mini.md").read_text()
    return {name: value.replace("±", "+-") for name, value in re.findall(r"^\| (.+?) \| 3 \| (.+?) \|", page, re.M)}


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_the_opening_comment_quotes_the_studys_table(name, row, top1):
    lines = (ROOT / "configs" / "pretrain" / f"{name}.yaml").read_text().splitlines()
    comment = " ".join(line[1:].strip() for line in lines if line.startswith("#"))
    assert "studies/objectives_mini.md" in comment
    for value in (top1[row], top1["InfoNCE, RECLIP"]):
        # "1.1 +- 0.4 against 6.4 +- 0.5 %" has one unit for both.
        assert re.search(rf"(?<![\d.]){re.escape(value)} (%|against)", comment), f"{value} of {row}"
