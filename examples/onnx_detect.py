"""Detect words in one picture with an exported detector: needs onnxruntime, numpy and pillow, nothing else.

python examples/onnx_detect.py detector.onnx words.npz picture.jpg [lowest score, 0.3]

The two files are made by: python tools/export.py --output detector.onnx --vocabulary "cat, taco" --words words.npz
"""

import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def detect(session: onnxruntime.InferenceSession, words: dict[str, np.ndarray], picture: Image.Image, least: float):
    """(name, score, (x1, y1, x2, y2), mask) of each detection, in pixels of the picture; mask (height, width) bool."""
    about = session.get_modelmeta().custom_metadata_map
    if about["image_text_sha256"] != str(words["image_text_sha256"]):
        raise ValueError("these words were embedded by another model than the detector's; export them together")
    scale = int(about["image_size"]) / max(picture.size)
    small = picture.resize([max(1, int(side * scale + 0.5)) for side in picture.size], Image.Resampling.BILINEAR)
    inputs = {name: words[name] for name in ("text_embeddings", "is_base", "num_reported")}
    inputs["image"] = np.asarray(small).transpose(2, 0, 1)[None]
    boxes, scores, labels, *masks = session.run(None, inputs)
    scores = np.interp(scores, words["calibration_scores"], words["calibration_shares"])
    factor = np.array(picture.size, np.float32) / np.array(small.size, np.float32)
    found = []
    for i in np.flatnonzero(scores >= least):
        box = boxes[i] * np.tile(factor, 2)
        mask = paste(masks[0][i], box, picture.size) if masks else None
        found.append((str(words["names"][labels[i]]), float(scores[i]), tuple(box.tolist()), mask))
    return found


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(M, M) probabilities that cover a box -> (height, width) bool, read at the centres of the pixels."""
    side = len(mask)
    padded = np.pad(mask, 1)  # outside the box is 0
    at, weight = [], []
    for low, high, pixels in ((box[1], box[3], size[1]), (box[0], box[2], size[0])):
        place = np.clip((np.arange(pixels) + 0.5 - low) / (high - low) * side + 0.5, 0, side + 1 - 1e-4)
        at.append(place.astype(int))
        weight.append(place - place.astype(int))
    (y, x), (wy, wx) = at, weight
    rows = padded[y] * (1 - wy)[:, None] + padded[y + 1] * wy[:, None]
    return rows[:, x] * (1 - wx) + rows[:, x + 1] * wx >= 0.5


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    picture = ImageOps.exif_transpose(Image.open(sys.argv[3])).convert("RGB")
    least = float(sys.argv[4]) if len(sys.argv) > 4 else 0.3
    for name, score, box, mask in detect(session, dict(np.load(sys.argv[2])), picture, least):
        print(f"{score:.2f} {name}", *(round(side) for side in box), "" if mask is None else f"{mask.sum()} pixels")
