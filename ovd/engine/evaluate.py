"""Measure a detector by the LVIS or COCO protocol, with the text embeddings shuffled beside it as a control.

The control keeps boxes, masks and network and only gives each class another class's text: what remains above it is
what the words contribute.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import inference_on_dataset

from ovd.arguments import whole
from ovd.data.lvis import base_novel_split, read_ground_truth
from ovd.engine.run_text import embed_once
from ovd.evaluation.coco_evaluator import CocoEvaluator
from ovd.evaluation.lvis_evaluator import OpenVocabularyEvaluator
from ovd.evaluation.results import markdown_table
from ovd.modeling.rcnn import OpenVocabularyRCNN
from ovd.modeling.setting_ranges import check_setting
from ovd.precision import PRECISIONS, find_dtype
from ovd.text.embeddings import Prompting
from ovd.text.vocabulary import Vocabulary
from pretrain.config import ConfigError
from pretrain.modeling.checkpoint import ImageTextModel

COLUMNS = ("AP", "AP50", "APr", "APc", "APf")
FIXED_COLUMNS = ("AP_fixed", "APr_fixed", "APc_fixed", "APf_fixed")
COCO_COLUMNS = ("AP", "AP50", "AP50_base", "AP50_novel")
PROTOCOLS = ("lvis", "coco")
LVIS_DETECTIONS = 300  # of a picture, at most, that AP looks at
# Of the region heads, and of their box predictor (Detectron2's names): what evaluation may choose anew.
FUSION_SETTINGS = ("alpha", "beta", "objectness_delta", "detector_temperature")
INFERENCE_SETTINGS = {
    "nms_threshold": "test_nms_thresh", "score_threshold": "test_score_thresh",
    "detections_per_image": "test_topk_per_image",
}  # fmt: skip


def derangement(size: int, seed: int = 0) -> np.ndarray:
    """A permutation of `size` without fixed points, so that no class keeps its own text (size 1 has none: identity)."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(size)
    shuffled = np.empty(size, dtype=np.int64)
    shuffled[order] = np.roll(order, 1)  # one cycle through all classes
    return shuffled


def check_evaluation(measured: Mapping[str, Any]) -> None:
    """Refuse a configuration's evaluation that no detector can be measured by: before a training that it would end.

    Args:
        measured: cfg.evaluation; what it lacks is left as it is.

    Raises:
        ConfigError: a value that a setting cannot have, or two that exclude each other; the message names the field.
    """
    check_settings(measured.get("fusion"), measured.get("inference"))
    for name in ("control", "fixed_ap"):
        if not isinstance(value := measured.get(name, False), bool):
            raise ConfigError(f"evaluation.{name} is {value!r}, but it is on or off; choose true or false")
    precision = measured.get("precision", "float32")
    if precision not in PRECISIONS:
        raise ConfigError(f"evaluation.precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    try:
        whole(measured.get("samples", 0), "evaluation.samples", 0)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_protocol(measured.get("protocol", "lvis"), measured.get("fixed_ap", False))


def check_settings(fusion: Mapping[str, float] | None, inference: Mapping[str, float] | None) -> None:
    """Refuse what `apply_settings` cannot use, without a detector.

    Raises:
        ConfigError: no such setting, or a value that it cannot have; the message names the field.
    """
    for group, given, known in (("fusion", fusion, FUSION_SETTINGS), ("inference", inference, INFERENCE_SETTINGS)):
        if not isinstance(given, Mapping | None):
            raise ConfigError(f"evaluation.{group} is {given!r}: give settings by name, of {', '.join(known)}")
        for name, value in (given or {}).items():
            if name not in known:
                raise ConfigError(f"evaluation.{group}.{name} is no setting of {group}: {', '.join(known)}")
            try:
                check_setting(name, value, f"evaluation.{group}.{name}")
            except ValueError as error:
                raise ConfigError(str(error)) from error


def apply_settings(
    model: OpenVocabularyRCNN,
    fusion: Mapping[str, float] | None,
    inference: Mapping[str, float] | None,
    fixed_ap: bool,
) -> None:
    """Give a detector other settings than it was saved with; its weights stay.

    Args:
        fusion: by a name of `FUSION_SETTINGS`; None: none.
        inference: by a name of `INFERENCE_SETTINGS`; None: none.
        fixed_ap: that is to be measured too.

    Raises:
        ConfigError: see `check_settings` and `check_fixed_ap`.
    """
    check_settings(fusion, inference)
    heads = model.roi_heads
    for name, value in (fusion or {}).items():
        setattr(heads, name, value)
    for name, value in (inference or {}).items():
        setattr(heads.box_predictor, INFERENCE_SETTINGS[name], value)
    check_fixed_ap(fixed_ap, heads.box_predictor.test_topk_per_image)


def check_fixed_ap(fixed_ap: bool, kept: int) -> None:
    """Refuse fixed AP of a detector that keeps only what AP itself looks at.

    Args:
        kept: detections of a picture, at most.

    Raises:
        ConfigError: it does.
    """
    if fixed_ap and kept <= LVIS_DETECTIONS:
        raise ConfigError(
            f"evaluation.fixed_ap looks at the best 10,000 detections of a class, but this detector keeps {kept} a "
            "picture: add evaluation.inference.detections_per_image=1000"
        )


def evaluate_detector(
    model: OpenVocabularyRCNN,
    image_text: ImageTextModel,
    loader: Iterable,
    annotations: str,
    prompting: Prompting,
    output: Path,
    control: bool = True,
    protocol: str = "lvis",
    samples: int = 0,
    fixed_ap: bool = False,
    text_cache: str | Path | None = None,
    precision: str = "float32",
) -> dict[str, dict[str, dict[str, float]]]:
    """Run the detector over a data set with the data set's own categories as vocabulary.

    The image-text score has no empty prompt beside them (but that of `vlm_background`), as it has in
    `OpenVocabularyDetector.predict` beside words among which nothing competes: the AP of one class is of another score
    than `predict` gives for it alone, unless its fusion weight is 0.

    Args:
        loader: batches of the pictures of `annotations`.
        prompting: how the categories become prompts.
        output: folder for results and tables, one sub-folder per row.
        control: also run with shuffled text embeddings.
        protocol: "lvis" (300 detections a picture, labels may be incomplete as the file says) or "coco" (100 a picture
            and class, everything is labelled; OV-COCO is measured so).
        samples: resamples of the pictures for the intervals in each row's metrics.json and summary.md; 0 for none.
        fixed_ap: also measure AP_fixed, APr_fixed, …, which are LVIS's; see `OpenVocabularyEvaluator`.
        text_cache: folder that keeps the categories' text embeddings; see `embed_vocabulary`.
        precision: of matrix products, see `OpenVocabularyDetector.set_precision`.

    Returns:
        {"model": {"bbox": metrics, "segm": metrics}, "shuffled text": …}, metrics in 0–1; empty metrics on every
        process but the first.

    Raises:
        ValueError: another protocol, fixed AP of COCO's, or no such precision on this device.
    """
    _check_protocol(protocol, fixed_ap)
    dtype = find_dtype(precision, model.device)
    autocast = torch.autocast(model.device.type, dtype, enabled=dtype is not None)
    ground_truth = read_ground_truth(annotations)
    categories = sorted(ground_truth["categories"], key=lambda c: c["id"])
    base = {c["id"] for c in base_novel_split(categories)[0]}
    split = {c["id"]: c["id"] in base for c in categories}
    is_base = torch.tensor(list(split.values()))
    embeddings = embed_once(Vocabulary.from_categories(categories), image_text, prompting, text_cache)
    rows = {"model": embeddings}
    if control:
        rows["shuffled text"] = embeddings[torch.from_numpy(derangement(len(embeddings)))]
    results = {}
    for name, matrix in rows.items():
        model.set_text_embeddings(matrix.to(model.device), is_base.to(model.device))
        folder = output / name.replace(" ", "_")
        if protocol == "coco":
            evaluator = CocoEvaluator(ground_truth, folder, split, samples=samples)
        else:
            evaluator = OpenVocabularyEvaluator(ground_truth, folder, samples=samples, fixed_ap=fixed_ap)
        with _sparing("detectron2.evaluation.evaluator"), autocast:
            # A plain dict: Detectron2 gives an empty OrderedDict or None where another process has the metrics.
            results[name] = dict(inference_on_dataset(model, loader, evaluator) or {})
    return results


def _check_protocol(protocol: str, fixed_ap: bool) -> None:
    if protocol not in PROTOCOLS:
        raise ConfigError(f"evaluation.protocol is {protocol!r}: choose {' or '.join(PROTOCOLS)}")
    if protocol == "coco" and fixed_ap:
        raise ConfigError("evaluation.fixed_ap is of the LVIS protocol: set it to False with evaluation.protocol=coco")


class _NowAndThen(logging.Filter):
    """Of Detectron2's reports how far it is, one in so many seconds; nothing else below a warning."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.last = seconds, time.monotonic()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        if record.levelno >= logging.WARNING:
            return True
        due = record.getMessage().startswith("Inference done") and time.monotonic() - self.last >= self.seconds
        self.last = time.monotonic() if due else self.last
        return due


@contextlib.contextmanager
def _sparing(name: str, seconds: float = 30.0) -> Iterator[None]:
    """Let a chatty logger say how far it is and when it will be done, now and then."""
    logger, sparing = logging.getLogger(name), _NowAndThen(seconds)
    logger.addFilter(sparing)
    try:
        yield
    finally:
        logger.removeFilter(sparing)


def results_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: one line per row and task, AP columns in percent."""
    rows = {
        f"{name}, {'box' if task == 'bbox' else 'mask'}": metrics
        for name, tasks in results.items()
        for task, metrics in tasks.items()
    }
    if all("APr" in metrics for metrics in rows.values()):
        fixed = [name for name in FIXED_COLUMNS if any(name in metrics for metrics in rows.values())]
        return markdown_table(rows, columns=[*COLUMNS, *fixed], header="LVIS protocol, percent")
    return markdown_table(rows, columns=COCO_COLUMNS, header="COCO protocol, percent")
