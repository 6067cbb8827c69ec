"""Images and texts to normalised features, with a checkpoint's own preprocessing; images that do not decode are named.

This file does not know tasks; `zero_shot.py` and `retrieval.py` do.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose
from tqdm import tqdm

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore
from pretrain.modeling.clip import set_image_size
from pretrain.modeling.position_embedding import resample_grid

# How this package trains and so evaluates towers that come without a preprocessing of their own.
OWN_PREPROCESS = {"interpolation": "bicubic", "resize_mode": "squash"}


def evaluation_transform(preprocess: Mapping) -> Callable[[Image.Image], torch.Tensor]:
    """What a checkpoint wants done to an image of any size and mode: open_clip's own transform; cut-outs on white.

    Args:
        preprocess: the fields of open_clip's `PreprocessCfg` (size, mean, std, interpolation, resize_mode, fill_color).

    Returns:
        PIL image to normalised float32 (3, H, W).

    Raises:
        ConfigError: if a field has a value that open_clip does not know.
    """
    allowed = {"resize_mode": ("squash", "shortest", "longest"), "interpolation": ("bicubic", "bilinear", "random")}
    for name, values in allowed.items():
        if preprocess.get(name, values[0]) not in values:
            raise ConfigError(
                f"preprocess_cfg.{name} {preprocess[name]!r} is not one of open_clip's: use {', '.join(values)}"
            )
    known = {name: value for name, value in preprocess.items() if name in PreprocessCfg.__dataclass_fields__}
    return Compose([on_white, image_transform_v2(PreprocessCfg(**known), is_train=False)])


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def resize_image_tower(model: nn.Module, size: int) -> None:
    """Make the image tower of any open_clip model take `size`-pixel squares.

    Position tables are resampled as open_clip's `force_image_size` does.

    Raises:
        ValueError: if the size does not fit the patches, or the tower has a fixed size.
    """
    visual = model.visual
    if isinstance(getattr(visual, "trunk", None), VisionTransformer):
        set_image_size(model, size)
    elif hasattr(visual, "set_input_size"):
        visual.set_input_size(size)
    elif hasattr(visual, "grid_size") and hasattr(visual, "positional_embedding"):
        patch, table = visual.patch_size[0], visual.positional_embedding
        if size < 1 or size % patch:
            near = size // patch * patch or patch
            raise ValueError(f"image_size {size} is not a multiple of the patch size {patch}: use {near}")
        resampled = resample_grid(table.detach()[None], size // patch, 1)[0].clone()
        visual.positional_embedding = nn.Parameter(resampled, requires_grad=table.requires_grad)
        visual.image_size, visual.grid_size = (size, size), (size // patch, size // patch)
    else:
        raise ValueError(
            f"image_size {size}: a {type(visual).__name__} image tower has a fixed size; leave the size as it is"
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; its mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class _Images(Dataset):
    """(place, image or None, reason it could not be read)."""

    def __init__(self, names: Sequence[str], store: ImageStore, transform: Callable):
        self.names, self.store, self.transform = names, store, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> tuple[int, torch.Tensor | None, str]:
        try:
            return place, self.transform(self.store.read(self.names[place])), ""
        except OSError as error:
            return place, None, str(error)


def _collate(samples: list[tuple]) -> tuple[list[int], torch.Tensor | None, list[str]]:
    whole = [(place, image) for place, image, _ in samples if image is not None]
    images = torch.stack([image for _, image in whole]) if whole else None
    return [place for place, _ in whole], images, [reason for _, image, reason in samples if image is None]


@dataclass
class Encoder:
    """Feeds images and texts to the towers in batches. Use it inside `evaluation_mode(encoder.model)`.

    Attributes:
        model: open_clip towers, at the image size and text length that they are to be judged at.
        tokenizer: texts to (N, context_length) int64.
        preprocess: fields of open_clip's `PreprocessCfg`; its size is set to the image tower's.
        autocast: makes the context that the towers run in; the features are float32 in any case.
        progress: show a bar with a rate.
        broken: what could not be read so far, one sentence each.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], torch.Tensor]
    preprocess: Mapping
    device: torch.device
    autocast: Callable[[], AbstractContextManager] = nullcontext
    batch_size: int = 256
    workers: int = 0
    progress: bool = False
    broken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.preprocess = {**self.preprocess, "size": self.model.visual.image_size}
        self._transform = evaluation_transform(self.preprocess)

    @property
    def feature_device(self) -> torch.device:
        """Where features and what is made of them live. XLA runs only the towers: it would trace all batches into one
        program, and compile it again for every number of readable images."""
        return torch.device("cpu") if self.device.type == "xla" else self.device

    def texts(self, texts: Sequence[str], bar: tqdm | None = None) -> torch.Tensor:
        """(N, D) normalised float32 features on `feature_device`."""
        parts = []
        for start in range(0, len(texts), self.batch_size):
            tokens = self.tokenizer(list(texts[start : start + self.batch_size]))
            parts.append(self._features(self.model.encode_text, tokens))
            if bar is not None:
                bar.update(len(tokens))
        return torch.cat(parts)

    def images(self, names: Sequence[str], store: ImageStore) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each batch: places in `names` (B,) int64 and normalised float32 features (B, D), on `feature_device`.

        An image that cannot be read is left out and noted in `broken`.

        Raises:
            ValueError: at the end, if not one image could be read.
        """
        first_broken, some = len(self.broken), False
        loader = DataLoader(
            _Images(names, store, self._transform), self.batch_size, num_workers=self.workers, collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        with self.bar(len(names), "image") as bar:
            for places, images, reasons in loader:
                if reasons and len(self.broken) == first_broken:
                    tqdm.write(f"left out: {reasons[0]}", file=sys.stderr)
                self.broken += reasons
                bar.update(len(places) + len(reasons))
                if images is not None:
                    some = True
                    yield (
                        torch.tensor(places, device=self.feature_device),
                        self._features(self.model.encode_image, images),
                    )
        if not some:
            example = f"; for example: {self.broken[first_broken]}" if len(self.broken) > first_broken else ""
            raise ValueError(f"none of the {len(names)} images could be read{example}")

    def bar(self, total: int, unit: str) -> tqdm:
        """A progress bar with rate and remaining time; silent unless `progress`."""
        # A log file wants a line now and then, a terminal a moving bar.
        interval = 0.2 if sys.stderr.isatty() else 20.0
        return tqdm(total=total, unit=f" {unit}s", desc=f"{unit}s", mininterval=interval, disable=not self.progress)

    def _features(self, tower: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        rows = len(batch)
        if self.device.type == "xla" and rows < self.batch_size:  # another shape would be another compilation
            batch = torch.cat([batch, batch[:1].expand(self.batch_size - rows, *batch.shape[1:])])
        with self.autocast():
            features = tower(batch.to(self.device, non_blocking=True))
        return F.normalize(features.to(self.feature_device)[:rows].float(), dim=-1)
