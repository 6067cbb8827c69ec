"""Make scores mean the same for one word and for a thousand: the share of such detections that are right.

ovd-calibrate --detector DIR --annotations val.json --images FOLDER

Fits curves on the base classes of annotated pictures that were not trained on, shows on a held-out third of them what
a threshold of 0.5 means before and after, and writes DIR/calibration.json, which is used from then on.
"""

import argparse
from pathlib import Path
from typing import Any

from pretrain.commands.outcome import exit_status

SIZES = (1, 5, 20, 80, 200, 1203)


def make_parser() -> argparse.ArgumentParser:
    """Every option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--detector", required=True, type=Path, metavar="DIR", help="its folder, or the name of one that ships")
    add("--annotations", required=True, type=Path, help="LVIS or COCO file with the base classes, not trained on")
    add("--images", type=Path, help="folder of its pictures (default: the one that the file lies in)")
    add("--pictures", type=int, default=200, metavar="N", help="drawn at random (default: %(default)s)")
    add("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="words (default: 1 5 20 80 200 1203)")
    add("--exhaustive", action="store_true", help="every base object is annotated, whatever neg_category_ids say")
    add("--output", type=Path, metavar="FILE", help="default: calibration.json in the detector's folder")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Collect, fit, compare, write."""
    if options.pictures < 3 or min(options.sizes) < 1:
        raise ValueError(f"--pictures {options.pictures} and --sizes {min(options.sizes)} are at least 3 and 1")
    from functools import partial

    from tqdm import tqdm

    from ovd.calibration import CALIBRATION, save_calibration
    from ovd.calibration_data import collect_outcomes, fit_calibration, read_pictures
    from ovd.commands.demo import load_detector
    from ovd.detector_folder import detector_folder

    folder = detector_folder(options.detector)
    if folder != options.detector and options.output is None:
        raise ValueError(f"{options.detector} is a detector that ships, which stays as it is: give --output")
    detector = load_detector(str(folder.resolve()), options.device, "float32")
    pictures, num_base = read_pictures(
        detector, options.annotations, options.images or options.annotations.parent, options.pictures, options.sizes,
        options.exhaustive, options.seed, partial(tqdm, desc="pictures", unit="picture", disable=None),
    )  # fmt: skip
    outcomes = collect_outcomes(detector, pictures, num_base, options.sizes, options.seed)
    held_out = range(0, len(pictures), 3)
    fitted_on = sorted(set(range(len(pictures))) - set(held_out))
    trial = fit_calibration(detector, {key: one.of(fitted_on) for key, one in outcomes.items()})
    rows = compare(outcomes, held_out, trial)
    measured = {
        "annotations": options.annotations.name, "pictures": len(pictures), "base_classes": num_base,
        "exhaustive": options.exhaustive, "seed": options.seed, "held_out": rows,
    }  # fmt: skip
    path = options.output or folder / CALIBRATION
    save_calibration(path, fit_calibration(detector, outcomes, measured))
    print(table(rows))
    print(f"calibration: {path}")


def compare(outcomes: dict, held_out: Any, trial: Any) -> list[dict]:
    """Precision of what reaches 0.5, raw and calibrated, in pictures that the curves were not fitted on."""
    from ovd.calibration_data import precision_above

    rows = []
    for key in sorted(outcomes):
        one = outcomes[key].of(held_out)
        raw, calibrated = (precision_above(one, 0.5, key, c) for c in (None, trial))
        rows.append({"competitors": key[0], "words": key[1], "raw": raw, "calibrated": calibrated})
    return rows


def table(rows: list[dict]) -> str:
    """The comparison as a Markdown table."""
    from ovd.evaluation.results import text_table

    def cell(entry: dict) -> str:
        share = "-" if entry["precision"] is None else f"{100 * entry['precision']:.1f}"
        return f"{share} ({entry['detections']})"

    body = [[str(r["words"]), "yes" if r["competitors"] else "no", cell(r["raw"]), cell(r["calibrated"])] for r in rows]
    return text_table(["words", "base classes compete", "raw >= 0.5: % right (n)", "calibrated >= 0.5"], body)


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    options = make_parser().parse_args(arguments)
    return exit_status(lambda: run(options), "interrupted; nothing was written")
