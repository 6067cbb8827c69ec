"""What fine-tuning did to its own words and to all others: average precision before and after, with intervals.

python tools/retention.py --before mini --after runs/finetuned/detector --annotations data/mini/mini_lvis_test.json \\
    --fine-tuned taco,violin --output runs/retention
"""

import argparse
import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.commands.outcome import exit_status  # noqa: E402


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--before", required=True, metavar="DIR", help="detector folder before fine-tuning, or a name that ships")
    add("--after", required=True, metavar="DIR", help="detector folder after it")
    add("--annotations", required=True, nargs="+", type=Path, metavar="FILE",
        help="LVIS or COCO annotations of old and new words; several files are joined")  # fmt: skip
    add("--image-root", nargs="+", type=Path, metavar="DIR", help="folders of the pictures (default: the files' own)")
    add("--fine-tuned", required=True, metavar="WORDS", help="names, separated by commas, or a file with one a line")
    add("--output", required=True, type=Path, metavar="DIR", help="for retention.md, retention.json and detections")
    add("--samples", type=int, default=1000, help="resamples of the pictures for the intervals (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N pictures")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Detect with both, compare, print where the output went."""
    import json
    from functools import partial

    from tqdm import tqdm

    from ovd.commands.quiet import quieten_libraries
    from ovd.data.mixing import Source, merge
    from ovd.detector_folder import detector_folder
    from ovd.engine.retention import compare, detect_categories, write_reports
    from pretrain.atomic import write_atomically
    from pretrain.engine.device import Device

    quieten_libraries()
    words = Path(options.fine_tuned)
    words = words.read_text().splitlines() if words.is_file() else options.fine_tuned.split(",")
    words = [word.strip() for word in words if word.strip()]
    device, interval = Device(options.device).torch_device, 0.2 if sys.stderr.isatty() else 20.0
    roots = options.image_root or [path.parent for path in options.annotations]
    if len(roots) != len(options.annotations):
        raise ValueError(f"--image-root: {len(roots)} folders for {len(options.annotations)} files; give one for each")
    joined = merge([Source(*pair) for pair in zip(options.annotations, roots, strict=True)])
    annotations = write_atomically(options.output / "ground_truth.json", json.dumps(joined))
    found = {}
    for name in ("before", "after"):
        folder = detector_folder(getattr(options, name))
        found[name] = detect_categories(
            folder, annotations, "", device,
            limit=options.limit, progress=partial(tqdm, desc=name, unit="picture", mininterval=interval),
        )  # fmt: skip
        write_atomically(options.output / f"{name}.json", json.dumps(found[name]))
    reports = compare(annotations, found["before"], found["after"], words, options.samples, options.limit)
    path = write_reports(reports, options.output)
    print(f"\n{path.read_text()}\nreport:     {path}\ndetections: {options.output}/before.json, after.json")


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    options = parse(arguments)
    return exit_status(lambda: run(options), "interrupted; nothing is lost but this run")


if __name__ == "__main__":
    sys.exit(main())
