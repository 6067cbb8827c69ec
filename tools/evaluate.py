"""Zero-shot accuracy of any open_clip folder: `python tools/evaluate.py --checkpoint runs/pretrain_mini/checkpoint`.

The classes are all distinct captions of the table. Images are resized to squares without a crop, as in training.
"""

import argparse
import json
import sys
from pathlib import Path

# Python puts this folder first on the path, where `pretrain.py` would pass for the package `pretrain`.
sys.path[0] = str(Path(__file__).resolve().parents[1])


def evaluate(options: argparse.Namespace) -> dict:
    """The result and what it was measured on."""
    import torch

    from pretrain.config import ConfigError
    from pretrain.data.folder import ImageStore, read_table, select_split
    from pretrain.evaluation.zero_shot import evaluate_zero_shot
    from pretrain.modeling.checkpoint import load_checkpoint

    templates = options.template or ["{}", "a {}", "a drawing of a {}", "a picture of a {}"]
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"--template {template!r} has no {{}}: it marks the place of the class name")
    table = read_table(options.table)
    rows = select_split(table, options.split, str(options.table))
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = load_checkpoint(options.checkpoint, device)
    classes = sorted({row["caption"] for row in table})
    result = evaluate_zero_shot(
        checkpoint.model, rows, classes, ImageStore(options.root or options.table.parent),
        templates, device, tokenizer=checkpoint.tokenizer, mean=checkpoint.mean, std=checkpoint.std,
    )  # fmt: skip
    return {
        "checkpoint": str(options.checkpoint), "weights_sha256": checkpoint.fingerprint, "table": str(options.table),
        "split": options.split, "templates": templates, "image_size": checkpoint.image_size, **result.to_dict(),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Parse, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder in open_clip's format")
    parser.add_argument("--table", type=Path, default=Path("data/mini/pairs.csv"), help="(default: %(default)s)")
    parser.add_argument("--root", type=Path, help="what image paths are relative to (default: the table's folder)")
    parser.add_argument("--split", default="test", help="value of the column `split` (default: %(default)s)")
    parser.add_argument("--template", action="append", help="a prompt with {} for the name; repeat for an ensemble")
    parser.add_argument("--device", help="cpu, cuda … (default: the GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)

    try:
        result = evaluate(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{result['images']} images of split {result['split']}, {result['classes']} classes")
        print(f"top-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   chance {result['chance']:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
