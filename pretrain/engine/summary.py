"""The summary that a pretraining run ends with, and how many samples all its processes left out."""

import json
from collections import Counter
from collections.abc import Sequence

from pretrain.evaluation.zero_shot import ZeroShotResult


def count_left_out(lines: Sequence[str]) -> Counter[str]:
    """Counts by kind, from lines such as "3 reads of broken images, replaced by the next row"."""
    counts: Counter[str] = Counter()
    for line in lines:
        number, _, kind = line.partition(" ")
        counts[kind] += int(number)
    return counts


def report_to_all(not_finite: str, left_out: Sequence[str]) -> str:
    """What a process says of itself before a state is saved."""
    return json.dumps({"not_finite": not_finite[:100], "left_out": count_left_out(left_out)})


def gather_reports(reports: Sequence[str]) -> tuple[str, Counter[str]]:
    """The first tensor that is not finite in any process ("": none), and the counts of all of them together."""
    parsed = [json.loads(report) for report in reports]
    total = sum((Counter(report["left_out"]) for report in parsed), Counter())
    return next((report["not_finite"] for report in parsed if report["not_finite"]), ""), total


def summary(
    notes: Sequence[str], left_out: dict[str, int], results: dict[str, dict[str, ZeroShotResult]], seconds: float,
    device: str, checkpoint: object,
) -> str:  # fmt: skip
    """Markdown: what was found in the data and left out, the training time, and zero-shot results.

    Args:
        notes: sentences on the data.
        left_out: reads of training samples that could not be used, by kind, over the whole run and all processes.
        results: by phase and split.
        seconds: of training.
        device: in words.
        checkpoint: the folder that the run leaves.
    """
    lines = ["# Pretraining run", "", *(f"- {note}" for note in notes)]
    lines += [f"- {count} {kind}" for kind, count in left_out.items()]
    lines += [
        f"- {result.broken} broken images of {split} left out of the evaluation after {phase}"
        for phase, by_split in results.items()
        for split, result in by_split.items()
        if result.broken
    ]
    lines.append(f"- training time: {seconds / 60:.1f} minutes on {device}")
    lines += [f"- checkpoint: {checkpoint}", "", "| phase | split | top-1 | top-5 | chance | images | classes |"]
    lines.append("|---|---|---|---|---|---|---|")
    for phase, by_split in results.items():
        for split, r in by_split.items():
            lines.append(
                f"| {phase} | {split} | {r.top1:.1%} | {r.top5:.1%} | {r.chance:.2%} | {r.images} | {r.classes} |"
            )
    return "\n".join(lines) + "\n"
