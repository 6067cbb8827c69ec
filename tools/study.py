"""Run a study (several settings, several seeds) and report it: one table, one plot of accuracy over training time.

python tools/study.py --study configs/studies/reclip_mini.yaml [--only NAME …] [--list | --time | --report]

Runs whose result is there are skipped; a stopped one continues with the same command. The report is renewed after every
run and says what is missing.
"""

import argparse
import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.commands.outcome import exit_status  # noqa: E402
from pretrain.commands.study_loop import INTERRUPTED, print_jobs, run_missing  # noqa: E402


def run(options: argparse.Namespace) -> int:
    """List, time, run what is missing, report; 1 if a run did not train."""
    from pretrain.engine.study import load_study, progress, run_job
    from pretrain.engine.study_file import choose
    from pretrain.engine.study_plots import write_report
    from pretrain.engine.study_timing import time_study

    if options.time:
        time_study(load_study(options.study, timed=False))
    study = load_study(options.study)
    jobs = choose(study.jobs, options.only, "run")
    if options.list:
        print_jobs(jobs, progress)
        return 0
    wanted = [] if options.report or options.time else jobs
    failed = run_missing(wanted, progress, run_job, lambda: write_report(study))
    table, plot = write_report(study)
    print(table.read_text())
    print(f"table: {table}\nplot:  {plot or 'none yet: no run is done'}")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, type=Path, help="YAML file; fields: pretrain/engine/study.py")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="just this run; can be repeated")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="say what there is and what is done; run nothing")
    what.add_argument("--time", action="store_true", help="time every phase (leave the machine alone), then report")
    what.add_argument("--report", action="store_true", help="write table and plot from what is done; run nothing")
    options = parser.parse_args(arguments)

    # Imported here so that --help and typing errors answer at once.
    from pretrain.config import ConfigError
    from pretrain.modeling.checkpoint import CheckpointError

    return exit_status(lambda: run(options), INTERRUPTED, mendable=(ConfigError, CheckpointError, OSError))


if __name__ == "__main__":
    sys.exit(main())
