"""Counts of left-out samples, summed over processes that name different kinds."""

from pretrain.engine.summary import count_left_out, gather_reports, report_to_all, summary

KINDS = ["reads of pairs broken, replaced by the next pair", "reads of pairs withheld, replaced by the next pair"]


def test_counts_of_all_processes_and_of_the_attempts_before_add_up_by_kind():
    reports = [report_to_all("", [f"3 {KINDS[0]}"]), report_to_all("", [f"4 {KINDS[0]}", f"10 {KINDS[1]}"])]
    name, counts = gather_reports(reports)
    assert name == "" and counts == {KINDS[0]: 7, KINDS[1]: 10}
    total = count_left_out([f"1 {KINDS[1]}"]) + counts
    lines = summary(["36 pairs"], total, {}, 90.0, "cpu", "run/checkpoint").splitlines()
    assert {f"- 7 {KINDS[0]}", f"- 11 {KINDS[1]}", "- 36 pairs", "- training time: 1.5 minutes on cpu"} <= set(lines)


def test_one_process_with_a_number_that_is_not_finite_stops_all():
    assert gather_reports([report_to_all("", []), report_to_all("objective.x", [])]) == ("objective.x", {})
