"""Choose fusion weights, temperatures and the objectness exponent; the network runs once, its scores are kept.

python tools/sweep_scores.py --detector DIR --annotations val.json --output DIR --alpha 0:1:0.1 --beta 0:1:0.1
"""

import argparse
import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from pretrain.commands.outcome import exit_status  # noqa: E402

SHOWN = 25


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    grid = "values to try: from:to:step, a comma list, or one number"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--detector", required=True, metavar="DIR", help="detector folder, or a name that ships")
    add("--annotations", required=True, type=Path, metavar="FILE", help="LVIS annotations of a validation split")
    add("--image-root", type=Path, metavar="DIR", help="folder of the pictures (default: that of the annotations)")
    add("--output", required=True, type=Path, metavar="DIR", help="tables, and the scores in cache/")
    add("--alpha", default="0:1:0.1", metavar="GRID", help=f"base weight; {grid} (default: %(default)s)")
    add("--beta", default="0:1:0.1", metavar="GRID", help="novel weight (default: %(default)s)")
    add("--delta", metavar="GRID", help="objectness exponent (default: the detector's)")
    add("--detector-temperature", default="1", metavar="GRID", help="relative to the detector's (default: %(default)s)")
    add("--image-text-temperature", default="1", metavar="GRID", help="relative to the model's (default: %(default)s)")
    add("--metric", default="AP", help="what the best is chosen by, e.g. APr or mask_APr (default: %(default)s)")
    add("--masks", action="store_true", help="measure masks too (mask_AP, …)")
    add("--templates", type=Path, metavar="FILE", help="prompts, one a line (default: those it was trained with)")
    add("--no-synonyms", action="store_true", help="embed names only")
    add("--limit", type=int, metavar="N", help="only N pictures, evenly spread")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the kept scores (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Collect, sweep, print the best and where the output went."""
    from functools import partial

    from tqdm import tqdm

    from ovd.commands.quiet import quieten_libraries
    from ovd.detector import OpenVocabularyDetector
    from ovd.evaluation.results import format_percent, write_json_atomic
    from ovd.scores import collect_scores
    from ovd.sweep import best_row, parse_grid, settings_grid, split_warning, sweep, sweep_table
    from ovd.text.embeddings import Prompting, read_templates
    from pretrain.atomic import write_atomically
    from pretrain.engine.device import Device

    quieten_libraries()
    interval = 0.2 if sys.stderr.isatty() else 20.0  # seconds; a file need not hold every step of the bar
    values = {
        name: parse_grid(getattr(options, name))
        for name in ("alpha", "beta", "detector_temperature", "image_text_temperature")
    }
    load = OpenVocabularyDetector.from_checkpoint
    if not Path(options.detector).is_dir() and "/" not in options.detector:
        load = OpenVocabularyDetector.from_pretrained
    detector = load(options.detector, Device(options.device).torch_device)
    heads, own = detector.model.roi_heads, detector.prompting
    templates = read_templates(options.templates) if options.templates else own.templates
    prompting = Prompting(templates, own.use_synonyms and not options.no_synonyms)
    values["delta"] = (heads.objectness_delta,) if options.delta is None else parse_grid(options.delta)
    grid = settings_grid(**values)
    warning = split_warning(options.annotations, options.detector)
    if warning:
        print(f"note: {warning}", file=sys.stderr)
    cache, ground_truth = collect_scores(
        detector, options.annotations, options.image_root or options.annotations.parent, options.output / "cache",
        prompting, options.dtype, options.limit,
        progress=partial(tqdm, desc="network", unit="picture", mininterval=interval), masks=options.masks,
    )  # fmt: skip
    rows = sweep(cache, heads, ground_truth, grid[:1])
    best_row(rows, options.metric)  # a mistyped metric should not have to wait for the rest
    rows += sweep(
        cache, heads, ground_truth, grid[1:], partial(tqdm, desc="settings", unit="setting", mininterval=interval)
    )
    best = best_row(rows, options.metric)
    ordered = sorted(rows, key=lambda row: -row.metrics[options.metric])
    write_json_atomic(
        options.output / "sweep.json",
        {"metric": options.metric, "note": warning, "best": _plain(best), "rows": [_plain(row) for row in rows]},
    )
    write_atomically(options.output / "sweep.md", sweep_table(rows))
    print(f"\n{sweep_table(ordered[:SHOWN])}")
    if len(rows) > SHOWN:
        print(f"the best {SHOWN} of {len(rows)} settings by {options.metric}; all of them in sweep.md\n")
    chosen = ", ".join(f"{name} {value:g}" for name, value in vars(best.settings).items())
    print(f"best {options.metric} {format_percent(best.metrics[options.metric])} (boxes): {chosen}")
    print(f"table:  {options.output}/sweep.md, sweep.json")
    print(f"scores: {cache.folder} ({cache.bytes() / 1e6:.0f} MB, {len(ground_truth['images'])} pictures swept)")


def _plain(row) -> dict:
    return {"settings": vars(row.settings), "metrics": row.metrics}


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    options = parse(arguments)
    return exit_status(
        lambda: run(options), "interrupted; the same command continues with the pictures it has not run yet"
    )


if __name__ == "__main__":
    sys.exit(main())
