"""What `make demo` shows at its end: pictures of novel words, and one table of everything that was measured."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from ovd.data.lvis import normalise_name
from ovd.evaluation.results import text_table
from ovd.visualization import image_grid, write_png_atomic

HEAD = (
    "weights", "zero-shot top-1 / top-5 (chance)", "box AP / APr / APc / APf", "mask AP / APr / APc / APf",
    "shuffled text: box", "shuffled text: mask",
)  # fmt: skip


def novel_scenes(annotations: str | Path, root: str | Path, pictures: int) -> tuple[list[str], list[str]]:
    """The pictures with the most novel objects (paths), and all novel names of an LVIS file, as words."""
    truth = json.loads(Path(annotations).read_text())
    novel = {c["id"]: normalise_name(c["name"]) for c in truth["categories"] if c["frequency"] == "r"}
    count = Counter(a["image_id"] for a in truth["annotations"] if a["category_id"] in novel)
    best = sorted(count, key=lambda image: (-count[image], image))[:pictures]
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    return [str(Path(root) / files[image]) for image in best], sorted(novel.values())


def write_grid(folder: str | Path, target: str | Path, shown: int, columns: int = 3) -> Path:
    """Put the annotated pictures with the most confident detections into one PNG, right or wrong.

    Args:
        folder: output of `tools/demo.py`: pictures and `detections.json`.
        shown: at most so many pictures; those without a detection are left out where any has one.
    """
    found = json.loads((Path(folder) / "detections.json").read_text())
    confidence = {image["id"]: 0.0 for image in found["images"]}
    for annotation in found["annotations"]:
        confidence[annotation["image_id"]] = max(confidence[annotation["image_id"]], annotation["score"])
    files = {image["id"]: Path(folder) / f"{Path(image['file_name']).stem}.png" for image in found["images"]}
    found_in = [image for image in confidence if confidence[image] > 0] or list(confidence)
    best = sorted(found_in, key=lambda image: (-confidence[image], image))[:shown]
    pictures = [np.asarray(Image.open(files[image]).convert("RGB")) for image in best]
    return write_png_atomic(target, image_grid(pictures, columns))


def table(runs: dict[str, Path]) -> str:
    """Markdown table, one line per run folder with `zero_shot.json` and `evaluation/`; AP in percent."""
    lines = []
    for label, run in runs.items():
        zero_shot = json.loads((run / "zero_shot.json").read_text())
        cells = [label, f"{zero_shot['top1']:.1%} / {zero_shot['top5']:.1%} ({zero_shot['chance']:.2%})"]
        for row in ("model", "shuffled_text"):
            metrics = json.loads((run / "evaluation" / row / "metrics.json").read_text())["metrics"]
            for task in ("bbox", "segm"):
                values = [metrics[task].get(key) for key in ("AP", "APr", "APc", "APf")]
                cells.append(" / ".join("n/a" if v is None else f"{100 * v:.1f}" for v in values))
        lines.append(cells)
    return text_table(HEAD, lines)
