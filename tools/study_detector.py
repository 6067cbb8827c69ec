"""Run a study of detectors (several trainings and seeds, each measured in several ways) and report it.

python tools/study_detector.py --study configs/studies/detector_mini.yaml [--only NAME …] [--list | --report]

Trainings whose result is there are skipped; a stopped one continues with the same command. The report is renewed after
every training and says what is missing.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.commands.outcome import exit_status  # noqa: E402
from pretrain.commands.study_loop import INTERRUPTED, print_jobs, run_missing  # noqa: E402


def run(options: argparse.Namespace) -> int:
    """List, run what is missing, report; 1 if a training did not work."""
    from detectron2.utils.logger import setup_logger

    from ovd.commands.quiet import quieten_libraries
    from ovd.engine.study import load_study, progress
    from ovd.engine.study_judging import run_job
    from ovd.engine.study_plots import write_report
    from pretrain.engine.study_file import choose

    study = load_study(options.study)
    jobs = choose(study.jobs, options.only, "training")
    if options.list:
        print_jobs(jobs, partial(progress, study.config))
        return 0
    quieten_libraries()
    setup_logger(name="detectron2")  # progress of the trainings
    failed = run_missing(
        [] if options.report else jobs,
        partial(progress, study.config),
        partial(run_job, study.config),
        lambda: write_report(study),
    )
    page, plots = write_report(study)
    print(page.read_text())
    print(f"report: {page}\nplots:  {', '.join(map(str, plots)) or 'none yet: no training is done'}")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, type=Path, help="YAML file; fields: ovd/engine/study.py")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="just this training; repeatable")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="say what there is and what is done; run nothing")
    what.add_argument("--report", action="store_true", help="write tables and plots from what is done; run nothing")
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
