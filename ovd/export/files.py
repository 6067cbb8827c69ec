"""Export a detector or the towers of an image-text model to ONNX or `torch.export`, and vocabularies for them.

The graphs are in `ovd/export/detector.py` and `ovd/export/towers.py`; a consumer is `examples/onnx_detect.py`.
"""

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovd.detector import OpenVocabularyDetector
from ovd.export.detector import BakedDetector, TensorDetector, vocabulary_tensors
from ovd.export.program import check_target, project_version, weights_hash, write_program
from ovd.export.towers import ImageEmbedder, TextEmbedder
from ovd.modeling.rcnn import OpenVocabularyRCNN
from pretrain.atomic import write_atomically
from pretrain.modeling.checkpoint import ImageTextModel

FORMAT = 2  # 1 had no vlm_background
OUTPUTS = ("boxes", "scores", "labels", "masks")


def export_detector(detector: OpenVocabularyDetector, path: str | Path, bake_vocabulary: bool = False) -> Path:
    """Write a detector as one file for any vocabulary, or with its present vocabulary inside.

    Inputs: image (1, 3, H, W) uint8 RGB, its longer side `image_size` of the description (scaled bilinearly with
    anti-aliasing; smaller pictures work too); and unless baked in, text_embeddings (C, D), is_base (C,) bool,
    num_reported (1,) int64, vlm_background (D,), as `save_vocabulary` writes them. Outputs: boxes (N, 4) xyxy pixels of
    the image given, scores (N,) before calibration, labels (N,) int64, and with a mask head masks (N, M, M) in 0..1
    that cover their boxes; best first.

    Args:
        detector: any; it is left as it is.
        path: ends in .onnx or .pt2. A description is written beside it, `<stem>.json`.
        bake_vocabulary: keep the detector's present words, names and embeddings, in the file.

    Raises:
        ValueError: another suffix, a missing package, no vocabulary to bake in, or too large for ONNX.
    """
    path = check_target(path)
    if bake_vocabulary and detector.vocabulary is None:
        raise ValueError("there is no vocabulary to put into the file; call set_vocabulary first")
    model = copy.deepcopy(detector.model).cpu().float().eval().requires_grad_(False)
    model.roi_heads.distillation = None  # training's alone
    module: torch.nn.Module = TensorDetector(model)
    inputs: dict[str, Tensor] = {"image": _example_picture(model)}
    dynamic = {"image": (2, 3)}
    if bake_vocabulary:
        module = BakedDetector(module, vocabulary_tensors(detector))
    else:
        dim = model.roi_heads.box_predictor.cls_score.embed_dim
        example = torch.nn.functional.normalize(torch.ones(7, dim), dim=-1)
        inputs |= {"text_embeddings": example, "is_base": torch.arange(7) < 3, "num_reported": torch.tensor([5])}
        inputs["vlm_background"] = example[0]
        dynamic |= {"text_embeddings": (0,), "is_base": (0,)}
    outputs = OUTPUTS if model.roi_heads.mask_on else OUTPUTS[:3]
    description = describe_detector(detector, bake_vocabulary)
    return write_program(path, module.eval(), inputs, outputs, dynamic, description)


def _example_picture(model: OpenVocabularyRCNN) -> Tensor:
    """A picture to trace with: what is true of its sides by coincidence, the exporter would take for a rule.

    So they differ, are no multiples of anything, and fill no window.
    """
    net, divisor = model.backbone.net, model.backbone.size_divisibility
    window = net.window_size or 1
    units = range(1, -(-model.architecture.image_size // divisor) + 1)
    tokens = {n: n * divisor // net.patch_size for n in units}
    fitting = [n for n, count in tokens.items() if count > window and (window == 1 or count % window)]
    if len(fitting) < 2:
        raise ValueError(
            f"image_size {model.architecture.image_size} is too small to export with windows of {window} patches; "
            "build the detector with a larger image_size, or window_size 0"
        )
    height, width = (n * divisor - 3 for n in fitting[-2:])
    return torch.zeros(1, 3, height, width, dtype=torch.uint8)


def describe_detector(detector: OpenVocabularyDetector, bake_vocabulary: bool) -> dict[str, Any]:
    """What a consumer has to know of an exported detector."""
    heads = detector.model.roi_heads
    predictor = heads.box_predictor
    description = {
        "format": FORMAT,
        "kind": "detector",
        "project_version": project_version(),
        "weights_sha256": weights_hash(detector.model),
        "vocabulary": "baked" if bake_vocabulary else "input",
        "embed_dim": predictor.cls_score.embed_dim,
        "image_text_sha256": detector.image_text.fingerprint,
        "image_size": detector.model.architecture.image_size,
        "resize": "longer side to image_size, bilinear, anti-aliased",
        "pixels": "uint8 RGB; normalised inside",
        "mean": list(detector.image_text.mean),
        "std": list(detector.image_text.std),
        "boxes": "x1 y1 x2 y2 in pixels of the image given",
        "masks": "probabilities on a grid that covers the box; inside from 0.5" if heads.mask_on else "none",
        "score_threshold": predictor.test_score_thresh,
        "nms_threshold": predictor.test_nms_thresh,
        "max_detections": predictor.test_topk_per_image,
        "alpha": heads.alpha,
        "beta": heads.beta,
    }
    if bake_vocabulary:
        description |= {"names": list(detector.vocabulary.words), "competitors": list(detector.competitors)}
        scores, shares = _calibration(detector)
        description |= {"calibration_scores": scores.tolist(), "calibration_shares": shares.tolist()}
    return description


def save_vocabulary(detector: OpenVocabularyDetector, path: str | Path) -> Path:
    """Write the detector's present vocabulary as inputs of its exported file.

    The arrays: names (strings), text_embeddings (C, D) float32, is_base (C,) bool, num_reported (1,) int64,
    vlm_background (D,) float32 (the image-text score's background; zeros for none), calibration_scores and
    calibration_shares (K,): interpolation between them gives the share of detections of a score that are right (0 and 1
    where nothing was calibrated), and format and image_text_sha256, which must be those of the file's description.

    Args:
        path: ends in .npz.

    Raises:
        ValueError: another suffix, or no vocabulary.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"vocabulary file {path} does not end in .npz; name it so")
    if detector.vocabulary is None:
        raise ValueError("there is no vocabulary to write; call set_vocabulary first")
    scores, shares = _calibration(detector)
    arrays = {name: value.numpy() for name, value in vocabulary_tensors(detector).items()}
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        format=np.array(FORMAT),
        names=np.array(detector.vocabulary.words),
        calibration_scores=scores,
        calibration_shares=shares,
        image_text_sha256=np.array(detector.image_text.fingerprint),
        **arrays,
    )
    return write_atomically(path, buffer.getvalue())


def _calibration(detector: OpenVocabularyDetector) -> tuple[np.ndarray, np.ndarray]:
    """The curve from scores to shares for the present vocabulary; the identity where there is none."""
    if detector.calibration is None:
        return np.array([0.0, 1.0]), np.array([0.0, 1.0])
    return detector.calibration.curve(len(detector.vocabulary), detector._current().compete)


def export_towers(image_text: ImageTextModel, folder: str | Path, suffix: str = ".onnx") -> tuple[Path, Path]:
    """Write `image_tower` and `text_tower`, each with its description beside it.

    The image tower takes image (N, 3, S, S) uint8 RGB, the text tower tokens (N, context length) int64; both give
    embeddings (N, D) of length 1.

    Args:
        folder: made when missing.
        suffix: .onnx or .pt2.

    Raises:
        ValueError: as `export_detector`.
    """
    folder = Path(folder)
    for name in ("image_tower", "text_tower"):
        check_target(folder / f"{name}{suffix}")
    towers = copy.copy(image_text)
    towers.model = copy.deepcopy(image_text.model).cpu().float().eval().requires_grad_(False)
    size, tokens = towers.image_size, towers.tokenizer(["a", "b", "c"])
    common = {
        "format": FORMAT,
        "project_version": project_version(),
        "image_text_sha256": towers.fingerprint,
        "embed_dim": towers.embed_dim,
    }
    image = {
        "kind": "image tower",
        "image_size": size,
        "resize": towers.preprocess.get("resize_mode", "squash"),
        "interpolation": towers.preprocess.get("interpolation", "bicubic"),
        "pixels": "uint8 RGB; normalised inside",
        "mean": list(towers.mean),
        "std": list(towers.std),
    }
    text = {"kind": "text tower", "context_length": tokens.shape[1], "tokenizer": type(towers.tokenizer).__name__}
    jobs = (
        ("image_tower", ImageEmbedder, {"image": torch.zeros(3, 3, size, size, dtype=torch.uint8)}, image),
        ("text_tower", TextEmbedder, {"tokens": tokens}, text),
    )
    paths = [
        write_program(
            folder / f"{name}{suffix}",
            kind(towers).eval(),
            inputs,
            ("embeddings",),
            {next(iter(inputs)): (0,)},
            {**common, **more},
        )
        for name, kind, inputs, more in jobs
    ]
    return paths[0], paths[1]
