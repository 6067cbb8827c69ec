"""The detector for users: load a checkpoint, say words or show pictures, get detections.

The folder it is loaded from is described in `ovd/detector_folder.py`. This file does not train or evaluate.
"""

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovd.active_vocabulary import ActiveVocabulary, VocabularyBuilder
from ovd.arguments import share, whole
from ovd.calibration import CALIBRATION, ScoreCalibration, ShownScores, read_fitting_calibration
from ovd.data.images import read_pixels
from ovd.data.mapper import ResizeLongestSide
from ovd.detections import Detections
from ovd.detector_folder import (
    CONFIG,
    IMAGE_TEXT,
    WEIGHTS,
    detector_folder,
    read_base_words,
    read_detector,
    read_prompting,
    save_detector,
)
from ovd.explanation import Explanation, explain_box, explain_detection
from ovd.image_prompts import as_crops
from ovd.modeling.rcnn import OpenVocabularyRCNN
from ovd.precision import find_device, find_dtype
from ovd.text.diagnostics import NEAR_DUPLICATE, VocabularyDiagnosis, diagnose_vocabulary
from ovd.text.embeddings import Prompting
from ovd.text.vocabulary import Vocabulary
from ovd.tiling import merge_windows, tile_windows
from pretrain.modeling.checkpoint import ImageTextModel

__all__ = ["CONFIG", "IMAGE_TEXT", "WEIGHTS", "OpenVocabularyDetector", "read_detector", "save_detector"]


class OpenVocabularyDetector:
    """Find objects named by words, or shown by pictures, in pictures.

    Example::

        detector = OpenVocabularyDetector.from_pretrained("mini")
        detector.set_vocabulary("cat, taco, fire engine")
        detections = detector.predict("street.jpg")

    Threads may share one detector: every `predict` works with the vocabulary of the moment it was called, whatever
    others set meanwhile. Pictures are read in parallel, the network runs for one call at a time.

    Args:
        model: the network; put into evaluation mode.
        image_text: the image-text model whose text tower embeds words.
        base_names: names of the categories trained on; words that read the same get the base weight in score fusion.
        precision: see `set_precision`.
        calibration: what makes scores comparable between vocabularies; None leaves them as the network gives them.
        prompting: how the words that it was trained on became prompts; None for the default.

    Attributes:
        vocabulary: the words; None before any were set.
        competitors: words that take part in the scores and are not reported.
    """

    def __init__(
        self,
        model: OpenVocabularyRCNN,
        image_text: ImageTextModel,
        base_names: Sequence[str] = (),
        precision: str = "float32",
        calibration: ScoreCalibration | None = None,
        prompting: Prompting | None = None,
    ) -> None:
        self.model = model.eval()
        self.image_text = image_text
        self.base_names = tuple(base_names)
        self.calibration = calibration
        self.prompting = prompting or Prompting()
        self._builder = VocabularyBuilder(image_text, self.base_names)
        self._active: ActiveVocabulary | None = None  # never changed, only replaced: a call keeps the one it began with
        self._applied: ActiveVocabulary | None = None  # whose matrix is in the network
        self._network_lock, self._vocabulary_lock = threading.RLock(), threading.RLock()
        self.set_precision(precision)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str | torch.device = "cpu", precision: str = "float32"
    ) -> "OpenVocabularyDetector":
        """Load a folder written by `save_detector`; its vocabulary is the base classes, if it names any.

        Args:
            path: the folder; a `calibration.json` in it is used.
            device: "cpu", "cuda", "cuda:1", …, or "auto": a GPU where there is one.
            precision: see `set_precision`.

        Raises:
            ValueError: the folder, a file in it, or a field or tensor of it is missing or not as it should be; or the
                device is not there.
        """
        device = find_device(device)
        model, image_text, base_names = read_detector(path)
        calibration = read_fitting_calibration(Path(path) / CALIBRATION, model.architecture)
        image_text.model.to(device).eval()
        detector = cls(model.to(device), image_text, base_names, precision, calibration, read_prompting(path))
        detector._builder.remember(read_base_words(path, image_text))
        if detector.base_names:
            with warnings.catch_warnings():
                # Base names that repeat or are cut were the training's concern, not this user's.
                warnings.simplefilter("ignore", UserWarning)
                detector.set_vocabulary(list(detector.base_names))
        return detector

    @classmethod
    def from_pretrained(
        cls, name: str = "mini", device: str | torch.device = "cpu", precision: str = "float32"
    ) -> "OpenVocabularyDetector":
        """Load a detector that ships with the package; arguments as for `from_checkpoint`.

        Raises:
            ValueError: there is none of that name.
        """
        return cls.from_checkpoint(detector_folder(name, shipped_only=True), device, precision)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.model.device

    def to(self, device: str | torch.device) -> "OpenVocabularyDetector":
        """Move network, towers and vocabulary to a device ("auto": a GPU where there is one); returns itself."""
        with self._vocabulary_lock, self._network_lock:
            device = find_device(device)
            self.model.to(device)
            self.image_text.model.to(device)
            self.set_precision(self.precision)
        return self

    def set_precision(self, precision: str) -> None:
        """Choose the type of matrix products; similarities, softmax, boxes and scores stay float32.

        Args:
            precision: "float32"; "bfloat16" (GPUs from Ampere on; a CPU runs it too, faster only where it has
                instructions for it, such as AMX); "float16" (any GPU, no CPU); "auto": bfloat16 on a GPU that has it,
                float16 on another, float32 on a CPU.

        Raises:
            ValueError: no such precision, or not on this device.
        """
        self.precision, self._dtype = precision, find_dtype(precision, self.device)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The words that labels of detections index."""
        return self._active.vocabulary if self._active else None

    @vocabulary.setter
    def vocabulary(self, vocabulary: Vocabulary) -> None:
        """Name the classes of a matrix that was given to the network itself."""
        self._active = ActiveVocabulary(vocabulary)

    @property
    def competitors(self) -> tuple[str, ...]:
        """Words that take part in the scores and are not reported."""
        return self._active.competitors if self._active else ()

    def set_vocabulary(
        self,
        words: "Vocabulary | str | Path | Iterable[Any] | Mapping[str, Any] | None" = None,
        base_words: Iterable[str] | None = None,
        templates: Sequence[str] | None = None,
        embeddings: Tensor | np.ndarray | str | Path | None = None,
        competitors: bool = True,
        use_synonyms: bool = False,
    ) -> Vocabulary:
        """Change what to look for; nothing is trained, and no weight changes.

        Args:
            words: "cat, dog", a list, a path to a .txt (one word a line) or .json (LVIS, COCO) file, "lvis" (its 1,203
                names) or "coco" (its 80); a .safetensors file of tools/embed_vocabulary.py, whose words and embeddings
                are taken; with pictures as queries a list in which PIL images stand among words, or {name: crop, list
                of crops, or None for the word}; None takes the words of the embedding file.
            base_words: words to treat as trained on; None takes the categories that the detector was trained on.
            templates: prompts for the text tower; None takes those that the detector was trained with.
            embeddings: use these instead of the text tower: (C, D), or a path to a file of tools/embed_vocabulary.py
                (which must have been made by this detector's text tower) or to a .npy matrix.
            competitors: let the categories trained on compete for the scores without being reported, so that a peach
                is not called a taco for want of a better word. None joins a matrix, which may be another tower's: if
                its words do not name them all, as wherever nothing competes, this tower's empty prompt does (F-VLM).
            use_synonyms: average over all phrases of a word that the vocabulary gives ("lvis" does).

        Returns:
            The vocabulary; labels of detections index its words.

        Raises:
            ValueError: no words, or embeddings that do not belong to these words or to this detector.
            ImageError: a crop cannot be read.
        """
        templates = self.prompting.templates if templates is None else templates
        with self._vocabulary_lock:
            active = self._builder.build(words, base_words, templates, embeddings, competitors, use_synonyms)
            self._set_active(active)
        return active.vocabulary

    def add_image_prompt(self, name: str, crops: Any) -> Vocabulary:
        """Look for what pictures show, besides the present words; a word of that name is replaced.

        Args:
            name: what to call it.
            crops: one picture or several (as for `predict`) that the object fills; several are averaged.

        Returns:
            The new vocabulary.

        Raises:
            ValueError: there are no crops.
            ImageError: a crop cannot be read.
        """
        with self._vocabulary_lock:
            active = self._builder.with_image_prompt(self._active, name, as_crops(crops, name))
            self._set_active(active)
        return active.vocabulary

    def _set_active(self, active: ActiveVocabulary) -> None:
        with self._network_lock:
            self._apply(active)
            self._active = active

    def _apply(self, active: ActiveVocabulary) -> None:
        """Bring a vocabulary's matrix into the network; the caller holds the lock."""
        if active.embeddings is not None and self._applied is not active:
            self._applied = None  # should the next line refuse
            reported = len(active.vocabulary)
            self.model.set_text_embeddings(active.embeddings, active.is_base, reported, None, active.background)
            self._applied = active

    @contextmanager
    def _network(self, active: ActiveVocabulary) -> Iterator[OpenVocabularyRCNN]:
        """The network with this vocabulary, for one thread at a time."""
        with self._network_lock:
            self._apply(active)
            with torch.no_grad(), self._autocast():
                yield self.model.eval()

    def _autocast(self) -> AbstractContextManager:
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)

    def _current(self) -> ActiveVocabulary:
        active = self._active
        if active is None:
            raise ValueError("the detector has no vocabulary yet; call set_vocabulary first")
        return active

    def diagnose(self, threshold: float = NEAR_DUPLICATE) -> VocabularyDiagnosis:
        """Look for words that this detector can hardly tell apart, read in full, or tell from background.

        Args:
            threshold: cosine from which two words count as near-duplicates.
        """
        active, classifier = self._current(), self.model.roi_heads.box_predictor.cls_score
        templates, use_synonyms = active.prompted or (self.prompting.templates, False)
        rows = classifier.text_embeddings if active.embeddings is None else active.embeddings.to(self.device).float()
        return diagnose_vocabulary(
            active.vocabulary,
            torch.nn.functional.normalize(rows[: len(active.vocabulary)], dim=-1),
            self.image_text.tokenizer if active.prompted else None,
            templates,
            use_synonyms,
            background=getattr(classifier, "background_embedding", None),
            threshold=threshold,
        )

    def explain(
        self, image: Any, box: Sequence[float] | None = None, index: int | None = None, top: int = 10
    ) -> Explanation:
        """Say how the scores of one region came about (before calibration); `print` the result for a table.

        Args:
            image: a picture, as for `predict`.
            box: x1 y1 x2 y2 in pixels of the upright picture: this region is scored as if it had been proposed.
            index: place of a detection of `predict`, best first, instead of a box.
            top: words to list, best first; words that only compete are among them.

        Raises:
            ValueError: neither or both of box and index, an index beyond the detections, or a box outside the picture.
        """
        if (box is None) == (index is None):
            raise ValueError("explain wants one region: give either box or index")
        active, top = self._current(), whole(top, "top", 1)
        index = None if index is None else whole(index, "index", 0)
        words, inputs = active.vocabulary.words + active.competitors, self._inputs(read_pixels(image))
        with self._network(active) as model:
            if box is not None:
                return explain_box(model, inputs, words, box, top)
            return explain_detection(model, inputs, words, index, top)

    def _inputs(self, pixels: np.ndarray) -> dict[str, Any]:
        """What the network wants of a picture: "image" (3, H, W) at its own size, "height", "width" of the original."""
        height, width = pixels.shape[:2]
        resized = ResizeLongestSide(self.model.architecture.image_size).get_transform(pixels).apply_image(pixels)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}

    def predict(
        self,
        image: Any,
        threshold: float | None = None,
        max_detections: int = 100,
        *,
        batch_size: int = 8,
        tile: int | None = None,
        overlap: float = 0.25,
        calibrated: bool = True,
        score_threshold: float | None = None,
    ) -> Detections | list[Detections]:
        """Detect what the vocabulary names.

        Args:
            image: path, bytes, PIL image, (H, W) or (H, W, 3) uint8 array, (3, H, W) uint8 tensor, or a list of these.
            threshold: lowest score to return, in 0..1; None takes 0.5 of calibrated scores and 0.3 of raw ones.
            max_detections: most detections to return for a picture.
            batch_size: pictures (or tiles), of any sizes, in memory at once; those of about the same proportions go
                through the network together.
            tile: look also at overlapping square tiles of this many pixels, for small objects in large pictures.
            overlap: share of a tile's side that neighbours have in common.
            calibrated: give each score as the share of such detections that are right, where the detector's folder has
                a calibration; False gives the network's own scores.
            score_threshold: another name of `threshold`.

        Returns:
            Detections with boxes and masks in pixels of the upright original, best first; a list for a list.

        Raises:
            ValueError: no vocabulary is set, or an argument is out of range.
            ImageError: a picture cannot be read.
        """
        active = self._current()
        batch_size, max_detections = whole(batch_size, "batch_size", 1), whole(max_detections, "max_detections", 0)
        tile = None if tile is None else whole(tile, "tile", 1)
        threshold = score_threshold if threshold is None else threshold
        threshold = None if threshold is None else share(threshold, "threshold")
        scale = ShownScores(self.calibration if calibrated else None, len(active.vocabulary), active.compete)
        least = scale.raw(threshold)
        images = image if isinstance(image, (list, tuple)) else [image]
        if tile is None:
            found = []
            for start in range(0, len(images), batch_size):
                pixels = [read_pixels(one) for one in images[start : start + batch_size]]
                found += self._detect(pixels, active, least, max_detections)
        else:
            found = [
                self._detect_tiles(read_pixels(one), active, least, max_detections, batch_size, tile, overlap)
                for one in images
            ]
        for detections in found:
            detections.scores = scale.shown(detections.scores)
        return found if isinstance(image, (list, tuple)) else found[0]

    def _detect(
        self, pictures: Sequence[np.ndarray], active: ActiveVocabulary, least: float, limit: int
    ) -> list[Detections]:
        """Raw detections of upright RGB pictures.

        Those that fill the same canvas go through the network together: more padding than a picture has alone would
        change what is found in it a little.
        """
        inputs, groups = [self._inputs(pixels) for pixels in pictures], {}
        stride = max(1, getattr(getattr(self.model, "backbone", None), "size_divisibility", 1))
        for i, one in enumerate(inputs):
            groups.setdefault(tuple(-(-side // stride) for side in one["image"].shape[1:]), []).append(i)
        found = {}
        for members in groups.values():
            with self._network(active) as model:
                outputs = model.inference([inputs[i] for i in members], min_score=least, max_detections=limit)
            for i, output in zip(members, outputs, strict=True):
                found[i] = Detections.from_instances(output["instances"], active.vocabulary.words)
        return [found[i] for i in range(len(inputs))]

    def _detect_tiles(
        self,
        pixels: np.ndarray,
        active: ActiveVocabulary,
        least: float,
        limit: int,
        batch_size: int,
        tile: int,
        overlap: float,
    ) -> Detections:
        """Raw detections of one picture and its tiles."""
        height, width = pixels.shape[:2]
        windows, found = tile_windows(height, width, tile, overlap), []
        for start in range(0, len(windows), batch_size):
            parts = [pixels[y1:y2, x1:x2] for x1, y1, x2, y2 in windows[start : start + batch_size]]
            found += self._detect(parts, active, least, limit)
        return merge_windows(found, windows, (height, width), self.model.architecture.nms_threshold, limit)
