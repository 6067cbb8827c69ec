"""Run a study of detectors (several trainings and seeds, each measured in several ways) and report it.

python tools/study_detector.py --study configs/studies/detector_mini.yaml [--only NAME …] [--list | --report]

Trainings whose result is there are skipped; a stopped one continues with the same command. The report is renewed after
every training and says what is missing.
"""

import argparse
import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])


def quieten() -> None:
    """Progress of the trainings, without the notes of libraries about each other."""
    import logging
    import warnings

    from detectron2.utils.logger import setup_logger

    setup_logger(name="detectron2")
    logging.getLogger("fvcore.common.checkpoint").setLevel(logging.WARNING)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="torch.meshgrid")


def main(arguments: list[str] | None = None) -> int:
    """Parse, run what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True, type=Path, help="YAML file; fields: ovd/engine/study.py")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="just this training; repeatable")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="say what there is and what is done; run nothing")
    what.add_argument("--report", action="store_true", help="write tables and plots from what is done; run nothing")
    options = parser.parse_args(arguments)

    # Imported here so that --help and typing errors answer at once.
    from ovd.engine.study import choose, load_study, progress
    from ovd.engine.study_judging import run_job
    from ovd.engine.study_plots import write_report

    failed = 0
    try:
        study = load_study(options.study)
        jobs = choose(study, options.only)
        if options.list:
            for job in jobs:
                print(f"{progress(study.config, job):8} {job.title:32} {job.folder}")
            return 0
        quieten()
        for number, job in enumerate([] if options.report else jobs, start=1):
            if progress(study.config, job) == "done":
                continue
            print(f"[{number}/{len(jobs)}] {job.title}: {job.folder}", flush=True)
            try:
                run_job(study.config, job)
            except FloatingPointError as error:  # a setting that does not train is a finding; the others still count
                print(f"error: {job.title}: {error}", file=sys.stderr)
                failed += 1
            write_report(study)
        page, plots = write_report(study)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; continue with the same command", file=sys.stderr)
        return 130
    print(page.read_text())
    print(f"report: {page}\nplots:  {', '.join(map(str, plots)) or 'none yet: no training is done'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
