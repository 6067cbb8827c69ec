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


def main(arguments: list[str] | None = None) -> int:
    """Parse, run what is missing, report."""
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
    from pretrain.engine.study import choose, load_study, progress, run_job
    from pretrain.engine.study_report import write_report
    from pretrain.engine.study_timing import time_study
    from pretrain.modeling.checkpoint import CheckpointError

    failed = 0
    try:
        if options.time:
            time_study(load_study(options.study, timed=False))
        study = load_study(options.study)
        jobs = choose(study, options.only)
        if options.list:
            for job in jobs:
                print(f"{progress(job):8} {job.title:32} {job.folder}")
            return 0
        for number, job in enumerate([] if options.report or options.time else jobs, start=1):
            if progress(job) == "done":
                continue
            print(f"[{number}/{len(jobs)}] {job.title}: {job.folder}", flush=True)
            try:
                run_job(job)
            except FloatingPointError as error:  # a setting that does not train is a finding; the others still count
                print(f"error: {job.title}: {error}", file=sys.stderr)
                failed += 1
            write_report(study)
        table, plot = write_report(study)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; continue with the same command", file=sys.stderr)
        return 130
    print(table.read_text())
    print(f"table: {table}\nplot:  {plot or 'none yet: no run is done'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
