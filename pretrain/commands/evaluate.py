"""Zero-shot accuracy or retrieval of any open_clip folder.

python tools/evaluate.py --checkpoint runs/pretrain_mini/checkpoint
python tools/evaluate.py --checkpoint DIR --task imagenet-r --data FOLDER
python tools/evaluate.py --checkpoint DIR --task folder --data FOLDER --names names.txt
python tools/evaluate.py --checkpoint DIR --task retrieval --captions dataset_coco.json --data FOLDER

table: a CSV or Parquet of images and captions, whose classes are all its distinct captions. folder: one sub-folder a
class. ImageNet's: sub-folders named by WordNet id (-V2: or by number). retrieval: Flickr30K or COCO, Karpathy's JSON.
hits: flat hit@K on a table whose images may have several labels, and classes several names. noise: how probable the
model finds pairs of random batches of a table, and pairs that are none.
Images are resized or cropped as the checkpoint's own preprocessing says.
--space h judges clip-rocket's projectors, ensemble the mean similarity of both spaces, at the run's ensemble_weight.
"""

import argparse
import json
import sys
from pathlib import Path

from pretrain.commands.outcome import exit_status

TASKS = (
    "table", "folder", "imagenet", "imagenet-a", "imagenet-r", "imagenet-v2", "imagenet-sketch", "retrieval",
    "hits", "noise",
)  # fmt: skip
SPACES = ("z", "h", "ensemble")
LEAST = {"batch_size": 1, "workers": 0, "image_size": 1, "captions_per_image": 0, "pairs": 2, "batches": 0}


def evaluate(options: argparse.Namespace) -> dict:
    """The result and what it was measured on."""
    from pretrain.engine.device import Device
    from pretrain.evaluation.tasks import TaskOptions, build_encoder, run_task
    from pretrain.modeling.checkpoint import load_checkpoint
    from pretrain.modeling.head_file import in_space

    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is below {least}")
    device = Device(options.device or "auto", options.precision)
    checkpoint = in_space(load_checkpoint(options.checkpoint), options.checkpoint, options.space)
    encoder = build_encoder(
        checkpoint, device.torch_device, options.image_size, options.batch_size, options.workers,
        progress=not options.quiet, autocast=device.autocast,
    )  # fmt: skip
    result = run_task(
        encoder,
        TaskOptions(
            options.task, options.data, options.table, options.split, options.names, options.captions,
            options.captions_per_image, options.templates, options.template, options.labels, options.pairs,
            options.batches,
        ),
    )  # fmt: skip
    about = {
        "checkpoint": str(options.checkpoint), "weights_sha256": checkpoint.fingerprint, "space": options.space
    }  # fmt: skip
    return {**about, "device": device.describe(), **result, "broken_examples": encoder.broken[:5]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder in open_clip's format")
    space = "h, ensemble: for a checkpoint with heads, as clip_rocket's (default: %(default)s, the towers' own)"
    parser.add_argument("--space", choices=SPACES, default="z", help=space)
    parser.add_argument("--task", choices=TASKS, default="table", help="(default: %(default)s)")
    parser.add_argument("--data", "--root", type=Path, help="the images' folder (table: default is the table's folder)")
    parser.add_argument("--table", type=Path, default=Path("data/mini/pairs.csv"), help="(default: %(default)s)")
    parser.add_argument("--split", default="test", help="of a table or of the captions (default: %(default)s)")
    names = "folder: class names, a list in folder order or folder<TAB>name; hits: class<TAB>name|synonym"
    parser.add_argument("--names", type=Path, help=names)
    parser.add_argument("--labels", help="hits: the table's column, several labels as a|b (default: labels or caption)")
    parser.add_argument("--pairs", type=int, default=512, help="noise: pairs of a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=10, help="noise: at most; 0: all (default: %(default)s)")
    parser.add_argument("--captions", type=Path, help="retrieval: dataset_flickr30k.json or dataset_coco.json")
    parser.add_argument("--captions-per-image", type=int, default=5, help="retrieval; 0: all (default: %(default)s)")
    parser.add_argument("--template", action="append", help="a prompt with {} for the name; repeat for an ensemble")
    parser.add_argument("--templates", type=Path, help="a file of them, one a line (default for folders: CLIP's 80)")
    parser.add_argument("--image-size", type=int, help="evaluate at another size, in pixels")
    parser.add_argument("--batch-size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, xla (default: the GPU where there is one)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help="write that JSON object to a file as well")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Evaluate, print, write."""
    try:
        result = evaluate(options)
    except (ValueError, RuntimeError) as error:  # open_clip's and the image readers' own messages have several lines
        raise ValueError(" ".join(str(error).split())) from error
    if options.output:
        from pretrain.atomic import write_atomically

        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output, json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))
    else:
        from pretrain.evaluation.tasks import describe

        print(describe(result))
    if options.output:
        print(f"written to {options.output}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Parse, evaluate; what a user can mend is one sentence on stderr."""
    options = parse(arguments)
    return exit_status(lambda: run(options), "interrupted; nothing was written")
