"""Detect words in one picture with an exported detector: needs onnxruntime, numpy and pillow, nothing else.

python examples/onnx_detect.py detector.onnx words.npz picture.jpg [--threshold 0.3]

The two files are made by: python tools/export.py --output detector.onnx --vocabulary "cat, taco" --words words.npz
"""

import argparse

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def detect(session: onnxruntime.InferenceSession, words: dict[str, np.ndarray], picture: Image.Image, least=None):
    """(name, score, (x1, y1, x2, y2), mask) of each detection, in pixels of the picture; mask (height, width) bool.

    Scores below `least` are left out; None is 0.5 of calibrated scores and 0.3 of others, as in the package itself.
    """
    about = session.get_modelmeta().custom_metadata_map
    if about["format"] != str(words.get("format", 1)):  # the first words had none
        raise ValueError("these words and the detector were exported by different versions; export them together")
    if about["image_text_sha256"] != str(words["image_text_sha256"]):
        raise ValueError("these words were embedded by another model than the detector's; export them together")
    if least is None:  # without a calibration the curve leaves scores as they are
        least = 0.3 if np.array_equal(words["calibration_scores"], words["calibration_shares"]) else 0.5
    scale = int(about["image_size"]) / max(picture.size)
    small = picture.resize([max(1, int(side * scale + 0.5)) for side in picture.size], Image.BILINEAR)
    given = {**words, "image": np.asarray(small).transpose(2, 0, 1)[None]}
    boxes, scores, labels, *masks = session.run(None, {one.name: given[one.name] for one in session.get_inputs()})
    boxes = boxes * np.tile(np.divide(picture.size, small.size), 2)
    scores = np.interp(scores, words["calibration_scores"], words["calibration_shares"])
    found = np.flatnonzero(scores >= least)
    pasted = [paste(masks[0][i], boxes[i], picture.size) if masks else None for i in found]
    return list(zip(words["names"][labels[found]], scores[found], boxes[found], pasted, strict=True))


def paste(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(M, M) probabilities that cover a box -> (height, width) bool, read at the centres of the pixels."""
    # The picture's corners in cells of the mask, which gets a border of zeros: outside the box is nothing.
    corners = ((np.array([(0, 0), size]) - box[:2]) / (box[2:] - box[:2]) * len(mask) + 1).ravel()
    return np.asarray(Image.fromarray(np.pad(mask, 1)).transform(size, Image.EXTENT, corners, Image.BILINEAR)) >= 0.5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("detector", "words", "picture"):
        parser.add_argument(name)
    parser.add_argument("--threshold", type=float, help="lowest score (default: 0.5 of calibrated scores, else 0.3)")
    given = parser.parse_args()
    session = onnxruntime.InferenceSession(given.detector, providers=["CPUExecutionProvider"])
    picture = ImageOps.exif_transpose(Image.open(given.picture)).convert("RGB")
    for name, score, box, mask in detect(session, dict(np.load(given.words)), picture, given.threshold):
        print(f"{score:.2f} {name}", *box.round().astype(int), "" if mask is None else f"{mask.sum()} pixels")
