"""Turn a Detectron2 dataset dict into what the detector trains or tests on.

Training uses large-scale jitter to a fixed size (Ghiasi et al., "Simple Copy-Paste", 2021; every picture of a batch has
the same shape, which XLA needs) and light colour jitter. Testing scales the longer side to the same size, which is what
`ovd.detector` does too. Copy-paste and mosaic are not here.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, polygons_to_bitmask
from PIL import Image
from pycocotools import mask as mask_tools

from ovd.data.annotation_check import check_mask
from ovd.data.images import ImageError, read_image
from ovd.data.regions import place_regions, read_regions

logger = logging.getLogger(__name__)


class ResizeLongestSide(T.Augmentation):
    """Scale a picture so that its longer side has `image_size` pixels; the one rule for every picture not trained on.

    With it a picture fits the square canvas that the detector's position table is made for, whatever its shape.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Return the bilinear scaling for a picture (H, W, 3); the shorter side keeps at least 1 pixel."""
        height, width = image.shape[:2]
        scale = self.image_size / max(height, width)
        new = (max(1, int(side * scale + 0.5)) for side in (height, width))
        return T.ResizeTransform(height, width, *new, Image.Resampling.BILINEAR)


class OpenVocabularyMapper:
    """Map a dataset dict to a model input; picklable, so that it works with worker processes of any start method.

    In: `file_name`, `height`, `width`, `image_id`, `annotations` (`bbox`, `bbox_mode`, contiguous `category_id`,
    `segmentation` as polygons or RLE).
    Out: the same keys without `annotations`, `image` (uint8 (3, H, W), RGB), and in training `instances` with
    `gt_boxes` (xyxy pixels), `gt_classes`, `gt_masks` (BitMasks; only when `with_masks`).

    A picture that cannot be read, or whose size contradicts its annotation, gives None in training: Detectron2's
    `MapDataset` then takes another one. It is counted in `skipped` and logged once. In testing it raises, since a
    result over fewer pictures would look complete.

    Args:
        is_train: augment and give `instances`.
        image_size: training: side of the square output; testing: length of the longer side, in pixels.
        scale_range: training: picture size relative to `image_size`.
        colour_jitter: largest relative change of brightness, contrast and saturation; 0 switches it off.
        with_masks: give `gt_masks`.
        regions: training: folder of regions to distil, made by `tools/prepare_data.py regions`; given as "regions".
            Empty: none, and distillation makes them from the picture.
        regions_teacher: fingerprint of the image-text model that must have made them, which the trainer fills in;
            empty: any.
    """

    def __init__(
        self,
        is_train: bool,
        image_size: int = 320,
        scale_range: tuple[float, float] = (0.5, 1.6),
        colour_jitter: float = 0.2,
        with_masks: bool = True,
        regions: str = "",
        regions_teacher: str = "",
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size {image_size} must be at least 1")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range {scale_range} must be two positive numbers, the smaller first")
        if not 0 <= colour_jitter < 1:
            raise ValueError(f"colour_jitter {colour_jitter} must lie in [0, 1)")
        if regions and not Path(regions).is_dir():
            raise ValueError(f"regions {regions!r} is no folder: make it with tools/prepare_data.py regions")
        self.is_train, self.with_masks = is_train, with_masks
        self.regions, self.regions_teacher = regions, regions_teacher or None
        self.skipped = 0
        if is_train:
            augmentations = [
                T.RandomFlip(),
                T.ResizeScale(*scale_range, image_size, image_size),
                # Detectron2 pads masks with 255 (its "ignore" label), which a binary mask would read as "object".
                T.FixedSizeCrop((image_size, image_size), seg_pad_value=0),
            ]
            if colour_jitter:
                low, high = 1 - colour_jitter, 1 + colour_jitter
                augmentations += [
                    T.RandomBrightness(low, high),
                    T.RandomContrast(low, high),
                    T.RandomSaturation(low, high),
                ]
        else:
            augmentations = [ResizeLongestSide(image_size)]
        self.augmentations = T.AugmentationList(augmentations)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Map one dict; it is not modified. None: skip this picture (training only)."""
        record = copy.copy(dataset_dict)
        annotations = record.pop("annotations", [])
        try:
            image = self._read(record)
        except ImageError as error:
            if not self.is_train:
                raise
            self.skipped += 1
            if self.skipped == 1:
                logger.warning("Skipped a training picture: %s. Further ones are counted, not shown.", error)
            return None
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        record["image"] = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if self.is_train:
            size = augmented.image.shape[:2]
            record["instances"] = self._instances(annotations, transforms, image.shape[:2], size)
            if self.regions:
                boxes, embeddings = read_regions(self.regions, record["image_id"], self.regions_teacher)
                record["regions"] = place_regions(boxes, embeddings, transforms, size)
        return record

    @staticmethod
    def _read(record: dict[str, Any]) -> np.ndarray:
        """The upright picture, or its pixels as stored where the annotation's size says that it was made on those."""
        image = read_image(record["file_name"])
        height, width = image.shape[:2]
        expected = (record.setdefault("height", height), record.setdefault("width", width))
        if expected != (height, width) and expected == (width, height):
            # A camera's turned picture, annotated with a tool that does not look at EXIF: its boxes are as stored.
            image = read_image(record["file_name"], upright=False)
            height, width = image.shape[:2]
        if expected != (height, width):
            raise ImageError(
                f"picture {record['file_name']} is {width} x {height} pixels, "
                f"its annotation says {expected[1]} x {expected[0]}"
            )
        return image

    def _instances(
        self, annotations: list[dict], transforms: T.TransformList, before: tuple[int, int], after: tuple[int, int]
    ) -> Instances:
        """Transform boxes and masks; a box is drawn again around what its mask has left after the crop."""
        kept = [a for a in annotations if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in kept]
        boxes = transforms.apply_box(np.asarray(boxes, dtype=np.float64).reshape(-1, 4))
        instances = Instances(after)
        instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.gt_boxes.clip(after)
        instances.gt_classes = torch.tensor([a["category_id"] for a in kept], dtype=torch.int64)
        if not self.with_masks:
            return detection_utils.filter_empty_instances(instances)
        masks = torch.zeros((len(kept), *after), dtype=torch.bool)
        for i, a in enumerate(kept):
            masks[i] = torch.from_numpy(transforms.apply_segmentation(_bitmask(a, before)).astype(bool))
        instances.gt_masks = BitMasks(masks)
        if kept:
            instances = instances[instances.gt_masks.nonempty()]
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        return detection_utils.filter_empty_instances(instances)


def _bitmask(annotation: dict, size: tuple[int, int]) -> np.ndarray:
    """Rasterise polygons or RLE to uint8 (H, W); polygons are not transformed as such, cropping them needs shapely."""
    segmentation = annotation.get("segmentation")
    if not segmentation:
        raise ValueError(
            f"annotation {annotation.get('id')} has no segmentation: train without masks, with data.masks=False in "
            "fine-tuning, else with data.train.mapper.with_masks=False and model.architecture.mask_on=False"
        )
    check_mask(segmentation, size, f"annotation {annotation.get('id')}")
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = mask_tools.frPyObjects(segmentation, *size)
        return mask_tools.decode(segmentation)
    return polygons_to_bitmask(segmentation, *size).astype(np.uint8)
