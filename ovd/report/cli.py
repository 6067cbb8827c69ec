"""One self-contained report.html for a run folder, of pretraining or of a detector.

python tools/report.py runs/pretrain_mini
python tools/report.py runs/detector_mini --sweep runs/sweep/sweep.json
python tools/report.py FOLDER --annotations lvis_v1_val.json --image-root coco/
"""

import argparse
import sys
from pathlib import Path

from pretrain.atomic import write_atomically
from pretrain.commands.outcome import exit_status


def is_detector_run(folder: str | Path) -> bool:
    """Whether a run folder is a detector's: it has been checked for leaks, evaluated as one, or configured as one."""
    folder = Path(folder)
    if any((folder / name).exists() for name in ("leak_check.json", "evaluation", "detector")):
        return True
    config = folder / "config.yaml"
    return config.is_file() and "_target_" in config.read_text(encoding="utf-8", errors="replace")


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    annotations: str | Path | None = None,
    image_root: str | Path | None = None,
    sweep: str | Path | None = None,
) -> tuple[Path, list[str]]:
    """Write the page of a run folder.

    Args:
        output: the file; None: report.html in the run folder.
        annotations, image_root, sweep: see `ovd.report.page.detector_page`; only for a detector's run.

    Returns:
        The file, and sentences on what was left out.

    Raises:
        ValueError: no such folder, or one without anything of a run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of a run")
    if is_detector_run(folder):
        from ovd.report.page import detector_page

        page = detector_page(folder, annotations, image_root, sweep)
    else:
        from pretrain.engine.html_report import pretraining_page

        page = pretraining_page(folder)
    path = Path(output) if output else folder / "report.html"
    return write_atomically(path, page.render()), page.missing


def run(options: argparse.Namespace) -> None:
    """Write the page, print where it is and what it lacks."""
    path, missing = write_report(options.folder, options.output, options.annotations, options.image_root, options.sweep)
    for sentence in missing:
        print(f"left out: {sentence}", file=sys.stderr)
    print(f"report: {path} ({path.stat().st_size / 2**20:.1f} MB)")


def main(arguments: list[str] | None = None) -> int:
    """Parse and write; what a user can mend is one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN_FOLDER", help="run.output or train.output of a run")
    add("--output", type=Path, metavar="FILE", help="the page (default: report.html in the run folder)")
    add("--annotations", type=Path, metavar="FILE", help="what a detector was evaluated on (default: as configured)")
    add("--image-root", type=Path, metavar="DIR", help="its pictures (default: as configured)")
    add("--sweep", type=Path, metavar="FILE", help="sweep.json of tools/sweep_scores.py (default: the run folder's)")
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options), "interrupted; no page was written")
