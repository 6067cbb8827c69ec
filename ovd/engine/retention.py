"""Run a detector before and after fine-tuning over the same pictures and compare them, word by word group.

Both look for all categories of the ground truth. A word counts as trained on (fusion weight alpha) for the detector
whose base names have it, as for a user who sets this vocabulary. The comparison itself is `evaluation/retention`'s.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ovd.data.lvis import load_lvis, read_ground_truth
from ovd.data.mapper import OpenVocabularyMapper
from ovd.detections import Detections
from ovd.detector import OpenVocabularyDetector, read_detector
from ovd.detector_folder import read_prompting
from ovd.evaluation.retention import RetentionReport, retention_report
from ovd.text.embeddings import Prompting, embed_vocabulary
from ovd.text.vocabulary import Vocabulary, normalize_word, prompt_phrase
from pretrain.atomic import write_atomically

TASKS = ("bbox", "segm")


def detect_categories(
    detector: str | Path,
    annotations: str | Path,
    image_root: str | Path,
    device: torch.device | str = "cpu",
    prompting: Prompting | None = None,
    limit: int | None = None,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> list[dict[str, Any]]:
    """Detections of a file's categories in its pictures, in the LVIS results form.

    Args:
        detector: folder.
        annotations, image_root: LVIS file and the folder of its pictures.
        prompting: how the categories become prompts; None takes the way that the detector was trained with.
        limit: only the first so many pictures; None for all.
        progress: wraps the list of pictures for display (`tqdm`-like).
    """
    model, image_text, base_names = read_detector(detector)
    prompts = prompting or read_prompting(detector)
    found = OpenVocabularyDetector(model.to(device), image_text, base_names)
    categories = sorted(read_ground_truth(annotations)["categories"], key=lambda c: c["id"])
    vocabulary = Vocabulary.from_categories(categories)
    embeddings = embed_vocabulary(vocabulary, image_text, prompts.templates, prompts.use_synonyms)
    known = {normalize_word(prompt_phrase(name)) for name in base_names}
    is_base = torch.tensor([normalize_word(prompt_phrase(c["name"])) in known for c in categories])
    found.model.set_text_embeddings(embeddings.to(device), is_base.to(device))
    mapper = OpenVocabularyMapper(is_train=False, image_size=model.architecture.image_size)
    records = load_lvis(annotations, image_root)[0][:limit]
    ids = [c["id"] for c in categories]
    results: list[dict[str, Any]] = []
    for record in progress(records) if progress else records:
        instances = found.model.inference([mapper(record)])[0]["instances"]
        results += Detections.from_instances(instances).to_coco(record["image_id"], ids)
    return results


def first_pictures(ground_truth: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """The ground truth of the first pictures by id; all of it for None."""
    if limit is None:
        return ground_truth
    images = sorted(ground_truth["images"], key=lambda image: image["id"])[:limit]
    kept = {image["id"] for image in images}
    annotations = [a for a in ground_truth["annotations"] if a["image_id"] in kept]
    return {**ground_truth, "images": images, "annotations": annotations}


def compare(
    annotations: str | Path,
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
    fine_tuned: Sequence[str | int],
    samples: int = 1000,
    limit: int | None = None,
) -> dict[str, RetentionReport]:
    """Reports by task: "bbox", and "segm" where both and all annotations have masks.

    Raises:
        ValueError: see `retention_report`.
    """
    ground_truth = first_pictures(read_ground_truth(annotations), limit)
    masks = all(one.get("segmentation") for one in [*before, *after, *ground_truth["annotations"]])
    return {
        task: retention_report(ground_truth, before, after, fine_tuned, task, samples=samples)
        for task in (TASKS if masks else TASKS[:1])
    }


def write_reports(reports: dict[str, RetentionReport], output: str | Path) -> Path:
    """Write retention.md and retention.json into a folder; returns the former."""
    output, text, plain = Path(output), "# Before and after fine-tuning\n", {}
    for task, report in reports.items():
        for metric in ("AP", "AP50", "AR"):
            text += f"\n## {'Boxes' if task == 'bbox' else 'Masks'}, {metric}\n\n{report.to_markdown(metric)}"
        plain[task] = {
            f"{group}: {metric}": {
                "words": row.words,
                **{name: None if v.value != v.value else vars(v) for name, v in vars(row).items() if name != "words"},
            }
            for (group, metric), row in report.rows.items()
        }
    write_atomically(output / "retention.json", json.dumps(plain, indent=1) + "\n")
    return write_atomically(output / "retention.md", text)
