"""What the commands for studies have in common: listing jobs, and running those that are not done.

Nothing slow is imported here, so that `--help` and typing errors answer at once.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

INTERRUPTED = "interrupted; continue with the same command"


class Job(Protocol):
    """What is run, for messages."""

    @property
    def title(self) -> str: ...

    @property
    def folder(self) -> Path: ...


AnyJob = TypeVar("AnyJob", bound=Job)


def print_jobs(jobs: Sequence[AnyJob], progress: Callable[[AnyJob], str]) -> None:
    """A line a job: how far it is, its title, its folder."""
    for job in jobs:
        print(f"{progress(job):8} {job.title:32} {job.folder}")


def run_missing(
    jobs: Sequence[AnyJob],
    progress: Callable[[AnyJob], str],
    run_job: Callable[[AnyJob], object],
    report: Callable[[], object],
) -> int:
    """Run the jobs that are not done, one after the other, and renew the report after each.

    Args:
        progress: how far a job is; "done" is not run again.
        run_job: trains and stores the result; FloatingPointError where a job did not train.
        report: writes the report of what is done.

    Returns:
        How many of them did not train.
    """
    failed = 0
    for number, job in enumerate(jobs, start=1):
        if progress(job) == "done":
            continue
        print(f"[{number}/{len(jobs)}] {job.title}: {job.folder}", flush=True)
        try:
            run_job(job)
        except FloatingPointError as error:  # a setting that does not train is a finding; the others still count
            print(f"error: {job.title}: {error}", file=sys.stderr)
            failed += 1
        report()
    return failed
