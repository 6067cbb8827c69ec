"""Are novel objects proposed at all? Recall of the class-agnostic proposals, base and novel apart.

python tools/proposal_recall.py --detector mini --annotations data/mini/mini_lvis_test.json
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
    add("--detector", required=True, metavar="DIR", help="detector folder, or a name that ships")
    add("--annotations", required=True, type=Path, metavar="FILE", help="LVIS annotations")
    add("--image-root", type=Path, metavar="DIR", help="folder of the pictures (default: that of the annotations)")
    add("--limits", type=int, nargs="+", default=[20, 60, 300], metavar="N", help="proposals a picture")
    add("--output", type=Path, metavar="FILE", help="JSON file for the numbers")
    add("--limit", type=int, metavar="N", help="only N pictures, evenly spread")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Propose, measure, print."""
    import tempfile
    from functools import partial

    from tqdm import tqdm

    from ovd.commands.quiet import quieten_libraries
    from ovd.detector import OpenVocabularyDetector
    from ovd.detector_folder import detector_folder
    from ovd.evaluation.proposal_recall import proposal_recall
    from ovd.evaluation.results import markdown_table, write_json_atomic
    from ovd.scores import cached_proposals, collect_scores
    from pretrain.engine.device import Device

    quieten_libraries()
    detector = OpenVocabularyDetector.from_checkpoint(
        detector_folder(options.detector), Device(options.device).torch_device
    )
    interval = 0.2 if sys.stderr.isatty() else 20.0
    with tempfile.TemporaryDirectory() as folder:
        cache, ground_truth = collect_scores(
            detector, options.annotations, options.image_root or options.annotations.parent, folder, dtype="float16",
            limit=options.limit, progress=partial(tqdm, unit="picture", mininterval=interval),
        )  # fmt: skip
        found = cached_proposals(cache, [image["id"] for image in ground_truth["images"]])
    metrics = proposal_recall(ground_truth, found, options.limits)
    groups = {"all": "AR@{}", "base": "AR@{}_base", "novel": "AR@{}_novel"} | {
        name: f"AR{letter}@{{}}" for letter, name in (("f", "frequent"), ("c", "common"), ("r", "rare"))
    }
    rows = {group: {f"AR@{n}": metrics[key.format(n)] for n in options.limits} for group, key in groups.items()}
    print(f"\n{markdown_table(rows, [f'AR@{n}' for n in options.limits], 'objects, percent')}")
    most = max(len(scores) for _, scores in found.values())
    print(f"this detector gives at most {most} proposals a picture ({len(ground_truth['images'])} pictures)")
    if options.output:
        print(f"numbers: {write_json_atomic(options.output, metrics)}")


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; what a user can mend is one sentence on stderr."""
    options = parse(arguments)
    return exit_status(lambda: run(options), "interrupted")


if __name__ == "__main__":
    sys.exit(main())
