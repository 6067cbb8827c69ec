"""Measure a detector by the LVIS or COCO protocol, with the text embeddings shuffled beside it as a control.

The control keeps boxes, masks and network and only gives each class another class's text: what remains above it is
what the words contribute.
"""

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from detectron2.evaluation import inference_on_dataset

from ovd.data.lvis import base_novel_split, read_ground_truth
from ovd.evaluation.coco_evaluator import evaluate_coco_results
from ovd.evaluation.lvis_evaluator import OpenVocabularyEvaluator
from ovd.evaluation.results import markdown_table
from ovd.modeling.rcnn import OpenVocabularyRCNN
from ovd.text.embeddings import embed_vocabulary
from ovd.text.vocabulary import Vocabulary
from pretrain.modeling.checkpoint import ImageTextModel

COLUMNS = ("AP", "AP50", "APr", "APc", "APf")
COCO_COLUMNS = ("AP", "AP50", "AP50_base", "AP50_novel")
PROTOCOLS = ("lvis", "coco")


def derangement(size: int, seed: int = 0) -> np.ndarray:
    """A permutation of `size` without fixed points, so that no class keeps its own text (size 1 has none: identity)."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(size)
    shuffled = np.empty(size, dtype=np.int64)
    shuffled[order] = np.roll(order, 1)  # one cycle through all classes
    return shuffled


def evaluate_detector(
    model: OpenVocabularyRCNN,
    image_text: ImageTextModel,
    loader: Iterable,
    annotations: str,
    templates: list[str],
    output: Path,
    use_synonyms: bool = True,
    control: bool = True,
    protocol: str = "lvis",
    samples: int = 0,
    fixed_ap: bool = False,
) -> dict[str, dict[str, dict[str, float]]]:
    """Run the detector over a data set with the data set's own categories as vocabulary.

    Args:
        loader: batches of the pictures of `annotations`.
        output: folder for results and tables, one sub-folder per row.
        use_synonyms: average the text embeddings of a category's name and synonyms.
        control: also run with shuffled text embeddings.
        protocol: "lvis" (300 detections a picture, labels may be incomplete as the file says) or "coco" (100 a picture
            and class, everything is labelled; OV-COCO is measured so). Files of `output` other than the detections are
            LVIS's either way.
        samples: resamples of the pictures for the intervals in each row's metrics.json and summary.md; 0 for none.
        fixed_ap: also measure AP_fixed, APr_fixed, …; see `OpenVocabularyEvaluator`.

    Returns:
        {"model": {"bbox": metrics, "segm": metrics}, "shuffled text": …}, metrics in 0–1; empty metrics on every
        process but the first.

    Raises:
        ValueError: another protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"evaluation.protocol is {protocol!r}: choose {' or '.join(PROTOCOLS)}")
    ground_truth = read_ground_truth(annotations)
    categories = sorted(ground_truth["categories"], key=lambda c: c["id"])
    base = {c["id"] for c in base_novel_split(categories)[0]}
    is_base = torch.tensor([c["id"] in base for c in categories])
    embeddings = embed_vocabulary(Vocabulary.from_categories(categories), image_text, templates, use_synonyms)
    rows = {"model": embeddings}
    if control:
        rows["shuffled text"] = embeddings[torch.from_numpy(derangement(len(embeddings)))]
    results = {}
    for name, matrix in rows.items():
        model.set_text_embeddings(matrix.to(model.device), is_base.to(model.device))
        folder = output / name.replace(" ", "_")
        evaluator = OpenVocabularyEvaluator(ground_truth, folder, samples=samples, fixed_ap=fixed_ap)
        with _quiet("detectron2.evaluation.evaluator"):
            # A plain dict: Detectron2 gives an empty OrderedDict or None where another process has the metrics.
            results[name] = dict(inference_on_dataset(model, loader, evaluator) or {})
        if protocol == "coco":
            detections = folder / "detections.json"
            split = {c["id"]: c["id"] in base for c in categories}
            results[name] = {t: evaluate_coco_results(ground_truth, detections, split, t) for t in results[name]}
    return results


@contextlib.contextmanager
def _quiet(name: str):
    """Only warnings from a chatty logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def results_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: one line per row and task, AP columns in percent."""
    rows = {
        f"{name}, {'box' if task == 'bbox' else 'mask'}": metrics
        for name, tasks in results.items()
        for task, metrics in tasks.items()
    }
    if all("APr" in metrics for metrics in rows.values()):
        return markdown_table(rows, columns=COLUMNS, header="LVIS protocol, percent")
    return markdown_table(rows, columns=COCO_COLUMNS, header="COCO protocol, percent")
