"""The detector for users: load a checkpoint, say words, get detections; and the checkpoint folder it is saved in.

A folder holds `config.yaml` (format, architecture, names of the base classes), `model.safetensors` (what training
changed) and `image_text/` (the image-text model in open_clip's format: text tower, projection, and the image tower
where it is frozen).
This file does not train or evaluate.
"""

import json
import shutil
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ovd.data.images import read_image
from ovd.data.mapper import ResizeLongestSide
from ovd.detections import Detections
from ovd.explanation import Explanation, explain_box, explain_detection
from ovd.modeling.detector_config import DetectorConfig
from ovd.modeling.rcnn import OpenVocabularyRCNN, build_detector
from ovd.text.diagnostics import NEAR_DUPLICATE, VocabularyDiagnosis, diagnose_vocabulary
from ovd.text.embedding_file import SUFFIX, load_embeddings, read_info
from ovd.text.embeddings import DEFAULT_TEMPLATES, embed_vocabulary
from ovd.text.vocabulary import Vocabulary, normalize_word, prompt_phrase
from pretrain.atomic import replacing, write_atomically
from pretrain.modeling.checkpoint import ImageTextModel, load_checkpoint

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
IMAGE_TEXT = "image_text"


class OpenVocabularyDetector:
    """Find objects named by words in pictures.

    Example::

        detector = OpenVocabularyDetector.from_pretrained("mini")
        detector.set_vocabulary("cat, taco, fire engine")
        detections = detector.predict("street.jpg")

    Args:
        model: the network; put into evaluation mode.
        image_text: the image-text model whose text tower embeds words.
        base_names: names of the categories trained on; words that read the same get the base weight in score fusion.
    """

    def __init__(self, model: OpenVocabularyRCNN, image_text: ImageTextModel, base_names: Sequence[str] = ()) -> None:
        self.model = model.eval()
        self.image_text = image_text
        self.base_names = tuple(base_names)
        self.vocabulary: Vocabulary | None = None
        self.competitors: tuple[str, ...] = ()  # words that take part in the scores and are not reported
        self._prompted: tuple[tuple[str, ...], bool] | None = None  # templates and synonyms, None for given embeddings
        self._memory: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | torch.device = "cpu") -> "OpenVocabularyDetector":
        """Load a folder written by `save_detector`; its vocabulary is the base classes, if it names any.

        Raises:
            ValueError: the folder, a file in it, or a field or tensor of it is missing or not as it should be.
        """
        model, image_text, base_names = read_detector(path)
        image_text.model.to(device).eval()
        detector = cls(model.to(device), image_text, base_names)
        if detector.base_names:
            with warnings.catch_warnings():
                # Base names that repeat or are cut were the training's concern, not this user's.
                warnings.simplefilter("ignore", UserWarning)
                detector.set_vocabulary(list(detector.base_names))
        return detector

    @classmethod
    def from_pretrained(cls, name: str = "mini", device: str | torch.device = "cpu") -> "OpenVocabularyDetector":
        """Load a detector that ships with the package.

        Raises:
            ValueError: there is none of that name.
        """
        folder = Path(__file__).parent / "weights"
        if not (folder / name / CONFIG).is_file():
            there = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
            raise ValueError(
                f"no detector named {name!r} ships with this installation (there is: {', '.join(there) or 'none'}); "
                "train one with tools/train_net.py and give its folder"
            )
        return cls.from_checkpoint(folder / name, device)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.model.device

    def set_vocabulary(
        self,
        words: "Vocabulary | str | Path | Iterable[str] | None" = None,
        base_words: Iterable[str] | None = None,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        embeddings: Tensor | np.ndarray | str | Path | None = None,
        competitors: bool = True,
        use_synonyms: bool = False,
    ) -> Vocabulary:
        """Change the words to look for; nothing is trained, and no weight changes.

        Args:
            words: "cat, dog", a list, or a path to a .txt (one word a line) or .json (LVIS, COCO) file; None takes the
                words of the embedding file.
            base_words: words to treat as trained on; None takes the categories that the detector was trained on.
            templates: prompts for the text tower.
            embeddings: use these instead of the text tower: (C, D), or a path to a file of tools/embed_vocabulary.py
                (which must have been made by this detector's text tower) or to a .npy matrix.
            competitors: let the categories trained on compete for the scores without being reported, so that a peach
                is not called a taco for want of a better word. Not with given matrices, which may come from elsewhere.
            use_synonyms: average over all phrases of a word that the .json file gives.

        Returns:
            The vocabulary; labels of detections index its words.

        Raises:
            ValueError: no words, or embeddings that do not belong to these words or to this detector.
        """
        own_file = isinstance(embeddings, (str, Path)) and Path(embeddings).suffix.lower() == SUFFIX
        if words is None:
            if not own_file:
                raise ValueError(f"no words were given; give some, or a {SUFFIX} file of embeddings that names its own")
            words = read_info(embeddings).vocabulary
        vocabulary = Vocabulary.parse(words)
        competitors = competitors and (embeddings is None or own_file)
        if own_file:
            info = read_info(embeddings)
            templates, use_synonyms = info.templates, info.use_synonyms
        prompted = (tuple(templates), use_synonyms) if embeddings is None or own_file else None
        rows = self._embeddings(vocabulary, embeddings, templates, use_synonyms)
        names = self.base_names if base_words is None else base_words
        known = {form for name in names for form in (normalize_word(name), normalize_word(prompt_phrase(name)))}
        is_base = torch.tensor([normalize_word(word) in known for word in vocabulary.words])
        forms = self._forms(vocabulary)
        others = [n for n in self.base_names if normalize_word(prompt_phrase(n)) not in forms] if competitors else []
        others = list(Vocabulary.from_words(others).words) if others else []
        if others:
            rest = embed_vocabulary(
                Vocabulary.from_words(others), self.image_text, templates, use_synonyms, memory=self._memory
            )
            rows = torch.cat([rows.to(rest), rest])
            is_base = torch.cat([is_base, torch.ones(len(rest), dtype=torch.bool)])
        self.model.set_text_embeddings(rows, is_base, num_reported=len(vocabulary))
        self.vocabulary, self.competitors, self._prompted = vocabulary, tuple(others), prompted
        return vocabulary

    def _embeddings(
        self,
        vocabulary: Vocabulary,
        given: Tensor | np.ndarray | str | Path | None,
        templates: Sequence[str],
        use_synonyms: bool,
    ) -> Tensor:
        """(C, D) embeddings of the words: those given, or the text tower's."""
        if given is None:
            return embed_vocabulary(vocabulary, self.image_text, templates, use_synonyms, memory=self._memory)
        if isinstance(given, (str, Path)):
            return load_embeddings(given, vocabulary, self.image_text)
        given = torch.as_tensor(given)
        if len(given) != len(vocabulary):
            raise ValueError(f"{len(given)} embeddings for {len(vocabulary)} words; give one row for each word")
        return given

    def diagnose(self, threshold: float = NEAR_DUPLICATE) -> VocabularyDiagnosis:
        """Look for words that this detector can hardly tell apart, read in full, or tell from background.

        Args:
            threshold: cosine from which two words count as near-duplicates.
        """
        vocabulary, classifier = self._vocabulary(), self.model.roi_heads.box_predictor.cls_score
        templates, use_synonyms = self._prompted or (DEFAULT_TEMPLATES, False)
        return diagnose_vocabulary(
            vocabulary,
            classifier.text_embeddings[: len(vocabulary)],
            self.image_text.tokenizer if self._prompted else None,
            templates,
            use_synonyms,
            background=getattr(classifier, "background_embedding", None),
            threshold=threshold,
        )

    def explain(
        self, image: Any, box: Sequence[float] | None = None, index: int | None = None, top: int = 10
    ) -> Explanation:
        """Say how the scores of one region came about; `print` the result for a table.

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
        words = self._vocabulary().words + self.competitors
        inputs = self._inputs(image)
        if box is not None:
            return explain_box(self.model, inputs, words, box, top)
        return explain_detection(self.model, inputs, words, index, top)

    def _vocabulary(self) -> Vocabulary:
        if self.vocabulary is None:
            raise ValueError("the detector has no vocabulary yet; call set_vocabulary first")
        return self.vocabulary

    def _inputs(self, image: Any) -> dict[str, Any]:
        """What the network wants of a picture: "image" (3, H, W) at its own size, "height", "width" of the original."""
        pixels = read_image(image)
        height, width = pixels.shape[:2]
        resized = ResizeLongestSide(self.model.architecture.image_size).get_transform(pixels).apply_image(pixels)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        self.model.eval()
        return {"image": tensor, "height": height, "width": width}

    @staticmethod
    def _forms(vocabulary: Vocabulary) -> set[str]:
        """The words as compared: plain, and as they stand in a prompt."""
        return {
            form for word in vocabulary.words for form in (normalize_word(word), normalize_word(prompt_phrase(word)))
        }

    def predict(
        self, image: Any, score_threshold: float = 0.3, max_detections: int = 100
    ) -> Detections | list[Detections]:
        """Detect the words of the vocabulary.

        Args:
            image: path, bytes, PIL image, (H, W), (H, W, 3) array, or a list of these.
            score_threshold: lowest score to return, in 0..1.
            max_detections: most detections to return for a picture.

        Returns:
            Detections with boxes and masks in pixels of the upright original, best first; a list for a list.

        Raises:
            ValueError: no vocabulary is set.
            ImageError: the picture cannot be read.
        """
        words = self._vocabulary().words
        if isinstance(image, (list, tuple)):
            return [self.predict(one, score_threshold, max_detections) for one in image]
        inputs = self._inputs(image)
        outputs = self.model.inference([inputs], min_score=score_threshold, max_detections=max_detections)
        instances = outputs[0]["instances"].to("cpu")
        labels = instances.pred_classes.numpy()
        return Detections(
            boxes=instances.pred_boxes.tensor.numpy(),
            scores=instances.scores.numpy(),
            labels=labels,
            names=[words[i] for i in labels],
            masks=instances.pred_masks.numpy() if instances.has("pred_masks") else None,
            image_size=(inputs["height"], inputs["width"]),
        )


def read_detector(
    folder: str | Path, changes: dict[str, Any] | None = None
) -> tuple[OpenVocabularyRCNN, ImageTextModel, list[str]]:
    """The network of a folder written by `save_detector` on the CPU, its image-text model, and its base names.

    Args:
        changes: fields of `DetectorConfig` that replace the folder's.

    Raises:
        ValueError: the folder, a file in it, or a field or tensor of it is missing or not as it should be.
    """
    folder = Path(folder)
    config = _read_config(folder)
    image_text = load_checkpoint(folder / IMAGE_TEXT, device="cpu")
    model = build_detector(DetectorConfig.from_dict({**config["architecture"], **(changes or {})}), image_text)
    _load_weights(model, folder / WEIGHTS)
    return model, image_text, config["base_names"]


def save_detector(
    folder: str | Path,
    model: OpenVocabularyRCNN,
    image_text_folder: str | Path,
    architecture: DetectorConfig | dict | None = None,
    base_names: Sequence[str] = (),
    float16: bool = False,
) -> Path:
    """Write a detector checkpoint; every file is written beside its place and renamed, `config.yaml` last.

    Args:
        folder: where; made when missing.
        model: the trained network.
        image_text_folder: open_clip folder that the network was built from; its model and configuration are copied.
        architecture: description that rebuilds the network; None takes the one it was built with.
        base_names: names of the categories trained on, as in the annotation file.
        float16: store weights in half the space; they are loaded as float32.

    Returns:
        The folder.
    """
    folder, source = Path(folder), Path(image_text_folder)
    if not (source / "open_clip_config.json").is_file():
        raise ValueError(f"{source} holds no open_clip_config.json; give the folder that the detector was built from")
    (folder / IMAGE_TEXT).mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("open_clip_*")):
        target = folder / IMAGE_TEXT / file.name
        if file.resolve() == target.resolve():
            continue
        if float16 and file.suffix == ".safetensors":
            with replacing(target) as path:
                save_file(_stored(load_file(file), True), path, {"format": "pt"})
        else:
            with replacing(target) as path:
                shutil.copyfile(file, path)
    skipped = _frozen_prefixes(model)
    tensors = {name: value for name, value in model.state_dict().items() if not name.startswith(skipped)}
    with replacing(folder / WEIGHTS) as path:
        save_file(_stored(tensors, float16), path, {"format": "pt"})
    description = architecture if isinstance(architecture, dict) else asdict(architecture or model.architecture)
    # Through JSON so that tuples and such become plain lists.
    content = json.loads(json.dumps({"format": FORMAT, "architecture": description, "base_names": list(base_names)}))
    write_atomically(folder / CONFIG, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return folder


def _frozen_prefixes(model: OpenVocabularyRCNN) -> tuple[str, ...]:
    """Prefixes of the weights that are exact copies of the image-text model's and are built again from it."""
    return ("roi_heads.image_text_head.",) + (("backbone.net.",) if model.backbone.net.frozen else ())


def _stored(tensors: dict[str, Tensor], float16: bool) -> dict[str, Tensor]:
    def convert(value: Tensor) -> Tensor:
        value = value.detach().cpu().contiguous()
        return value.half() if float16 and value.is_floating_point() else value

    return {name: convert(value) for name, value in tensors.items()}


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} is no detector checkpoint: {CONFIG} is missing; give the folder that holds it")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML ({error}); save the detector again") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), dict):
        raise ValueError(f"{path} has no architecture; save the detector again with save_detector")
    if config.get("format") != FORMAT:
        raise ValueError(f"{path} has format {config.get('format')!r}, but this version reads {FORMAT}; save it again")
    return {"architecture": config["architecture"], "base_names": config.get("base_names") or []}


def _load_weights(model: OpenVocabularyRCNN, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy the whole checkpoint folder")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy or save the checkpoint again") from error
    skipped = _frozen_prefixes(model)
    own = {name: value for name, value in model.state_dict().items() if not name.startswith(skipped)}
    different = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    wrong = sorted(set(own) ^ set(tensors)) + different
    if wrong:
        raise ValueError(
            f"{path} does not fit its own {CONFIG}: {len(wrong)} tensors are missing, unknown or of another shape "
            f"({', '.join(wrong[:3])}); save the detector again"
        )
    # load_state_dict copies into the float32 parameters, so float16 storage comes back as float32.
    model.load_state_dict(tensors, strict=False)
