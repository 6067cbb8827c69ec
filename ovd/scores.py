"""Region scores kept on disk, so that fusion weights, temperatures and exponents can be tried without the network.

One safetensors file a picture (memory-mapped when read) holds boxes, objectness and both models' probabilities; a
picture whose file exists is not run again, so an interrupted collection continues. Masks, where they are asked for, are
kept as run lengths: boxes and masks know no class, so a region has one mask whatever it is called in the end.
Trying settings is in `ovd/sweep.py`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_codec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ovd.data.lvis import base_novel_split, load_lvis, read_ground_truth
from ovd.data.mapper import OpenVocabularyMapper
from ovd.detector import OpenVocabularyDetector
from ovd.modeling.rcnn import OpenVocabularyRCNN
from ovd.modeling.roi_heads import RegionScores
from ovd.text.embeddings import Prompting, embed_vocabulary
from ovd.text.vocabulary import Vocabulary
from pretrain.atomic import remove_leftovers, replacing, write_atomically
from pretrain.modeling.checkpoint import fingerprint

FORMAT = 1
DESCRIPTION = "cache.json"
PICTURES = "pictures"
_EXACT = ("proposals", "boxes", "objectness")  # always float32; the others are probabilities
DTYPES = ("float32", "float16")
_MASKS_AT_ONCE = 100  # pasted into a picture of 1,024 px they are 100 MB
# What is decided after the scores and may differ from the run that cached them, and what is training's alone.
_DECIDED_LATER = (
    "alpha", "beta", "objectness_delta", "nms_threshold", "score_threshold", "detections_per_image",
    "box_smooth_l1_beta",
)  # fmt: skip
# Fields added since the first caches, and the value that these were made with: left out, they still count.
_ADDED = {"vlm_background": False}


@dataclass(frozen=True)
class CachedPicture:
    """The scores of one picture: its id, (height, width) in pixels of the original, the regions, and the mask of each
    region's refined box in the original picture (compressed run lengths; "" where it is empty), or None."""

    image_id: int
    size: tuple[int, int]
    regions: RegionScores
    masks: tuple[str, ...] | None = None


class ScoreCache:
    """A folder of cached pictures and what made them.

    Values are float32 to the bit, or float16 logarithms, whose probabilities are off by at most the factor
    exp(|log p| / 2048): 0.5 % at p = 1e-4.

    Args:
        folder: made when missing.
        description: everything the scores depend on.

    Raises:
        ValueError: the folder holds scores of something else.
    """

    def __init__(self, folder: str | Path, description: dict[str, Any]) -> None:
        self.folder, self.description = Path(folder), {"format": FORMAT, **description}
        path = self.folder / DESCRIPTION
        if path.is_file():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                known = {}
            different = sorted(k for k in {*known, *self.description} if known.get(k) != self.description.get(k))
            if different:
                raise ValueError(
                    f"{self.folder} holds scores of another run (different: {', '.join(different)}); give another "
                    "output folder, or delete this one"
                )
        else:
            write_atomically(path, json.dumps(self.description))
        (self.folder / PICTURES).mkdir(exist_ok=True)

    def path(self, image_id: int) -> Path:
        """Where a picture is, or will be."""
        return self.folder / PICTURES / f"{image_id}.safetensors"

    def __contains__(self, image_id: int) -> bool:
        return self.path(image_id).is_file()

    def write(self, picture: CachedPicture) -> None:
        """Add a picture; its file is complete or absent."""
        # Whatever `RegionScores` holds: its arrays as tensors, the rest in the header.
        parts = vars(picture.regions)
        tensors = {
            name: (value.float() if name in _EXACT else self._pack(value)).detach().cpu().contiguous()
            for name, value in parts.items()
            if isinstance(value, Tensor)
        }
        rest = {name: value for name, value in parts.items() if not isinstance(value, Tensor)}
        header = {"size": json.dumps(picture.size), "rest": json.dumps(rest), "masks": json.dumps(picture.masks)}
        with replacing(self.path(picture.image_id)) as temporary:
            save_file(tensors, temporary, header)

    def read(self, image_id: int) -> CachedPicture:
        """Read a picture on the CPU.

        Raises:
            ValueError: its file is missing or damaged.
        """
        path = self.path(image_id)
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            size, rest = json.loads(header["size"]), json.loads(header["rest"])
            masks = json.loads(header.get("masks", "null"))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it and run the same command again") from error
        tensors = {name: value if name in _EXACT else self._unpack(value) for name, value in tensors.items()}
        rest = {name: tuple(value) if isinstance(value, list) else value for name, value in rest.items()}
        return CachedPicture(
            image_id, tuple(size), RegionScores(**tensors, **rest), None if masks is None else tuple(masks)
        )

    def bytes(self) -> int:
        """Size of the pictures' files."""
        return sum(path.stat().st_size for path in (self.folder / PICTURES).glob("*.safetensors"))

    def _pack(self, probabilities: Tensor) -> Tensor:
        # float16 itself would lose everything below 6e-8; of the logarithm it keeps 11 bits.
        return probabilities.float() if self.description["dtype"] == "float32" else probabilities.float().log().half()

    def _unpack(self, values: Tensor) -> Tensor:
        return values if values.dtype == torch.float32 else values.float().exp()


def collect_scores(
    detector: OpenVocabularyDetector,
    annotations: str | Path,
    image_root: str | Path,
    folder: str | Path,
    prompting: Prompting | None = None,
    dtype: str = "float32",
    limit: int | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
    masks: bool = False,
) -> tuple[ScoreCache, dict[str, Any]]:
    """Run the network over the pictures of an annotation file, as evaluation does, and keep its scores.

    The detector's vocabulary becomes the file's categories, as `evaluate_detector` makes it.

    Args:
        detector: any vocabulary.
        annotations: LVIS annotation file.
        image_root: folder the pictures' names are relative to.
        folder: of the cache; pictures that it holds already are not run.
        prompting: how the categories become prompts; None takes the way that the detector was trained with.
        dtype: "float32", or "float16" in half the space; see `ScoreCache`.
        limit: only so many pictures, evenly spread over the file; None for all.
        progress: wraps the list of pictures for display (`tqdm`-like).
        masks: keep the mask of every region too.

    Returns:
        The cache, and the ground truth of its pictures.

    Raises:
        ValueError: bad annotations or settings, or the folder holds scores of something else.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    records, ground_truth = _pictures(annotations, image_root, limit)
    prompting = prompting or detector.prompting
    embeddings = use_categories(detector, ground_truth["categories"], prompting)
    model = detector.model.eval()
    description = {
        "dtype": dtype,
        "weights": weights_hash(model),
        "architecture": _described(model),
        "embeddings": _hash([embeddings]),
        "is_base": _hash([model.roi_heads.is_base]),
        "annotations": fingerprint(Path(annotations)),
        "templates": list(prompting.templates),
        "use_synonyms": prompting.use_synonyms,
    }
    if masks:
        if not model.architecture.mask_on:
            raise ValueError("this detector predicts no masks (mask_on is off); leave the masks out")
        description["masks"] = True
    cache = ScoreCache(folder, json.loads(json.dumps(description)))  # through JSON: tuples become lists
    remove_leftovers(cache.folder / PICTURES)
    mapper = OpenVocabularyMapper(is_train=False, image_size=model.architecture.image_size)
    missing = [record for record in records if record["image_id"] not in cache]
    for record in progress(missing) if progress else missing:
        cache.write(_score(model, mapper(record), masks))
    return cache, ground_truth


def _described(model: OpenVocabularyRCNN) -> dict[str, Any]:
    """The fields of the architecture that scores depend on."""
    known = asdict(model.architecture).items()
    return {k: v for k, v in known if k not in _DECIDED_LATER and (k not in _ADDED or v != _ADDED[k])}


def use_categories(detector: OpenVocabularyDetector, categories: Sequence[dict], prompting: Prompting) -> Tensor:
    """Make an annotation file's categories the detector's vocabulary, base by their frequency; its embeddings."""
    ordered = sorted(categories, key=lambda category: category["id"])
    base = {category["id"] for category in base_novel_split(ordered)[0]}
    is_base = torch.tensor([category["id"] in base for category in ordered])
    vocabulary = Vocabulary.from_categories(ordered)
    templates, use_synonyms = prompting.templates, prompting.use_synonyms
    embeddings = embed_vocabulary(vocabulary, detector.image_text, templates, use_synonyms)
    detector.set_vocabulary(
        vocabulary, templates=templates, embeddings=embeddings, competitors=False, use_synonyms=use_synonyms
    )
    # By frequency, not by name: the file decides, as in evaluation.
    detector.model.set_text_embeddings(embeddings, is_base)
    return embeddings


@torch.no_grad()
def _score(model: OpenVocabularyRCNN, inputs: dict[str, Any], masks: bool) -> CachedPicture:
    """The network's part of inference on one picture."""
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor, images.image_sizes)
    proposals, _ = model.proposal_generator(images, features, None)
    regions = model.roi_heads.score_regions(images, features, proposals)[0]
    size = (inputs["height"], inputs["width"])
    return CachedPicture(
        inputs["image_id"], size, regions, _region_masks(model, features, regions, size) if masks else None
    )


def clipped_boxes(regions: RegionScores) -> Tensor:
    """(R, 4) refined boxes within the network's input, as they are detected; such with values that are not finite are
    empty."""
    boxes = Boxes(regions.boxes.nan_to_num(0.0, 0.0, 0.0))
    boxes.clip(regions.image_size)
    return boxes.tensor


def _region_masks(
    model: OpenVocabularyRCNN, features: dict[str, Tensor], regions: RegionScores, size: tuple[int, int]
) -> tuple[str, ...]:
    """Run lengths of every region's mask in the original picture of `size` (height, width)."""
    boxes = clipped_boxes(regions)
    codes = [""] * len(boxes)
    for start in range(0, len(boxes), _MASKS_AT_ONCE):
        part = Instances(regions.image_size)
        part.pred_boxes = Boxes(boxes[start : start + _MASKS_AT_ONCE])
        part.pred_classes = torch.zeros(len(part), dtype=torch.int64, device=boxes.device)
        part.region = torch.arange(start, start + len(part), device=boxes.device)
        part = model.roi_heads.forward_with_given_boxes(features, [part])[0]
        part = detector_postprocess(part, *size)
        for region, mask in zip(part.region.tolist(), part.pred_masks.cpu().numpy(), strict=True):
            code = mask_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
            codes[region] = code["counts"].decode("ascii")
    return tuple(codes)


def cached_proposals(cache: ScoreCache, image_ids: Iterable[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Image id -> proposal boxes (R, 4), xyxy in pixels of the original, and their scores (R,), as `proposal_recall`
    takes them."""
    found = {}
    for image_id in image_ids:
        picture = cache.read(image_id)
        boxes = Boxes(picture.regions.proposals.clone())
        (height, width), (rows, columns) = picture.size, picture.regions.image_size
        boxes.scale(width / columns, height / rows)
        found[image_id] = (boxes.tensor.numpy(), picture.regions.objectness.numpy())
    return found


def _pictures(
    annotations: str | Path, image_root: str | Path, limit: int | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Dataset dicts and the ground truth, both of the same pictures."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but at least 1 picture is needed; raise it or leave it out")
    ground_truth = read_ground_truth(annotations)
    records = load_lvis(annotations, image_root)[0]
    if limit is not None and limit < len(records):
        records = [records[i * len(records) // limit] for i in range(limit)]
        kept = {record["image_id"] for record in records}
        ground_truth = {
            **ground_truth,
            "images": [i for i in ground_truth["images"] if i["id"] in kept],
            "annotations": [a for a in ground_truth["annotations"] if a["image_id"] in kept],
        }
    return records, ground_truth


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of all weights and saved buffers with their names; the vocabulary is none of them."""
    state = model.state_dict()
    return _hash([state[name] for name in sorted(state)], "\n".join(sorted(state)))


def _hash(tensors: Iterable[Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
