"""The regions that a run will distil, computed before it: what `tools/prepare_data.py regions` does.

Source: ViLD (Gu et al., 2022, section 3.3). Boxes are the proposals of a detector that was trained before, embeddings
those that the run's own image-text model gives their crops. What a file holds is in `ovd/data/regions.py`.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from torch import Tensor

from ovd.data.images import ImageError
from ovd.data.lvis import load_lvis
from ovd.data.mapper import OpenVocabularyMapper
from ovd.data.regions import precompute_regions
from ovd.detector_folder import WEIGHTS, detector_folder, read_detector
from ovd.engine.trainer import resolve_device
from ovd.modeling.rcnn import build_detector, crop_size
from pretrain.atomic import write_atomically
from pretrain.config import ConfigError
from pretrain.engine.run_folder import file_fingerprint
from pretrain.modeling.checkpoint import load_checkpoint

SETTINGS = "settings.json"


@dataclass
class RegionCounts:
    """What `write_regions` did.

    Attributes:
        pictures: in the annotation file.
        written: files of them written now.
        unreadable: pictures without a file because they cannot be read; training leaves them out too.
        regions: in the files written now.
    """

    pictures: int
    written: int = 0
    unreadable: int = 0
    regions: int = 0


def write_regions(
    cfg: Any,
    detector: str | Path,
    output: str | Path,
    limit: int = 300,
    progress: Callable[[list], Iterable] = iter,
) -> RegionCounts:
    """Write the regions of a configuration's training pictures; what is there already stays, so it can be resumed.

    Reads cfg.model.{architecture, image_text}, cfg.data.train.{annotations, image_root}, cfg.train.device, and
    cfg.data.train.mapper.image_size, the longer side of the pictures that proposals and crops are taken from.

    Args:
        detector: whose proposals they are: its folder, or the name of one that ships.
        output: folder of the files.
        limit: regions of a picture, at most; the detector's own number of proposals bounds them too.
        progress: wraps the list of pictures.

    Raises:
        ConfigError: the configuration fine-tunes a detector, or there is no detector of that name.
        ValueError: `limit` is below 1, or `output` holds files that were made with something else.
    """
    if limit < 1:
        raise ValueError(f"a limit of {limit} leaves no region: give at least 1")
    if "image_text" not in cfg.model:
        raise ConfigError(
            "this configuration fine-tunes a detector and reads no regions: give one with model.image_text"
        )
    device, image_size = resolve_device(cfg.train.device), cfg.data.train.mapper.image_size
    image_text = load_checkpoint(cfg.model.image_text)
    # Only its teacher is used, which is the same for all kinds of distillation; no other copy of the tower is needed.
    fields = {"distillation": "shared", "vlm_mode": "off"}
    run = build_detector(instantiate(cfg.model.architecture), image_text, **fields).to(device).eval()
    proposals_of = detector_folder(detector)
    proposer = read_detector(proposals_of)[0].to(device).eval()
    settings = {
        "image_text": image_text.fingerprint,
        "detector": file_fingerprint(proposals_of / WEIGHTS),
        "annotations": file_fingerprint(cfg.data.train.annotations),
        "image_size": image_size,
        "crop_size": crop_size(run.architecture, image_text),
        "box_scales": list(run.architecture.distillation_box_scales),
        "limit": limit,
    }
    _keep_settings(Path(output), settings)
    records, _ = load_lvis(cfg.data.train.annotations, cfg.data.train.image_root)
    mapper, counts = OpenVocabularyMapper(False, image_size), RegionCounts(len(records))

    def embed(record: dict) -> tuple[Tensor, Tensor] | None:
        try:
            inputs = mapper(record)
        except ImageError:
            counts.unreadable += 1
            return None
        boxes, embeddings = run.embed_proposals(inputs, limit, proposer)
        counts.regions += len(boxes)
        return boxes, embeddings

    counts.written = precompute_regions(progress(records), embed, output, image_text.fingerprint)
    return counts


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the files of a folder are made with, beside them, or compare it with what is written there.

    Raises:
        ValueError: some of it differs, or there are files without it.
    """
    path, remedy = folder / SETTINGS, f"remove {folder}, or give another --output"
    if path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise ValueError(f"{folder} holds regions made with another {', '.join(changed)}; {remedy}")
    elif any(folder.glob("*.npz")):
        raise ValueError(f"{folder} holds regions and no {SETTINGS}, so nothing tells how they were made; {remedy}")
    else:
        write_atomically(path, json.dumps(settings, indent=1))
