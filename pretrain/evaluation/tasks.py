"""From a command line's choices to a measured result: reads a task's data, runs it, describes what was measured."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore, read_table, select_split
from pretrain.evaluation.batch_noise import analyse_batches
from pretrain.evaluation.encoder import Encoder, resize_image_tower
from pretrain.evaluation.hit_at_k import HITS, evaluate_hits, label_rows, read_synonyms
from pretrain.evaluation.image_folders import LabelledImages, read_image_folder
from pretrain.evaluation.imagenet import IMAGENET_TASKS, read_imagenet
from pretrain.evaluation.prompts import check_templates, imagenet_templates, read_templates
from pretrain.evaluation.retrieval import evaluate_retrieval, read_karpathy
from pretrain.evaluation.zero_shot import classify
from pretrain.modeling.checkpoint import ImageTextModel

TASKS = ("table", "folder", *IMAGENET_TASKS, "retrieval", "hits", "noise")
TABLE_TEMPLATES = ["{}", "a {}", "a drawing of a {}", "a picture of a {}"]


@dataclass
class TaskOptions:
    """What to measure. Which fields a task reads is in `run_task`."""

    task: str = "table"
    data: Path | None = None  # folder of images; for `table` what its paths are relative to
    table: Path | None = None
    split: str = "test"
    names: Path | None = None
    captions: Path | None = None
    captions_per_image: int = 5
    templates: Path | None = None
    template: list[str] | None = None
    labels: str | None = None
    pairs: int = 512
    batches: int = 10


def build_encoder(
    checkpoint: ImageTextModel, device: torch.device, image_size: int | None = None, batch_size: int = 256,
    workers: int = 0, progress: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Encoder:  # fmt: skip
    """A loaded checkpoint, on `device`, with its own preprocessing, at its own or another image size.

    Raises:
        ValueError: if the image tower cannot take the size, or open_clip does not know the preprocessing.
    """
    if image_size is not None:
        resize_image_tower(checkpoint.model, image_size)
    return Encoder(
        checkpoint.model.to(device), checkpoint.tokenizer, checkpoint.preprocess, device, autocast, batch_size,
        workers, progress,
    )  # fmt: skip


def run_task(encoder: Encoder, options: TaskOptions) -> dict:
    """Measure one task.

    `table`: table, data, split. `folder`: data, names. ImageNet's: data. `retrieval`: captions, data, split,
    captions_per_image. `hits`: table, data, split, names, labels (a column; None: `labels` where there is one, else
    `caption`). `noise`: table, data, split, pairs, batches. All: templates (a file) or template (a list); one of them,
    for retrieval and noise a single one.

    Returns:
        The result's own fields and the task, its sources and its templates.

    Raises:
        ConfigError: if something the task needs is missing or cannot be used.
    """
    if options.templates and options.template:
        raise ConfigError("both a file of templates and single templates are given: leave one of them out")
    own = read_templates(options.templates) if options.templates else None
    own = own or (check_templates(options.template, "--template") if options.template else None)
    about = {"task": options.task}
    if options.task == "retrieval":
        data = read_karpathy(
            _needed(options.captions, "--captions FILE.json", "retrieval"), _images_root(options), options.split,
            options.captions_per_image,
        )  # fmt: skip
        templates = own or ["{}"]
        result = evaluate_retrieval(encoder, data, ImageStore(options.data), templates).to_dict()
        about |= {"data": str(options.captions), "split": options.split, "captions_left_out": data.left_out}
    elif options.task in ("hits", "noise"):
        templates = own or (TABLE_TEMPLATES if options.task == "hits" else ["{}"])
        result = (_hits if options.task == "hits" else _noise)(encoder, options, templates)
        about |= {"table": str(options.table), "split": options.split}
    else:
        images = _labelled_images(options)
        templates = own or (TABLE_TEMPLATES if options.task == "table" else imagenet_templates())
        store = ImageStore(images.root)
        result = classify(encoder, images.images, images.labels, store, images.classes, templates).to_dict()
        if options.task == "table":
            about |= {"table": str(options.table), "split": options.split}
        else:
            about |= {"data": str(options.data)}
    size = encoder.model.visual.image_size
    size = size if isinstance(size, int) else size[0]  # a pair in open_clip's towers, a number in some older ones
    return {**about, "templates": templates, "image_size": size, "preprocess": dict(encoder.preprocess), **result}


def describe(result: Mapping) -> str:
    """The result as a few lines of text."""
    where = f"split {result['split']}" if "split" in result else f"{result['task']}, {result['data']}"
    where += "" if (space := result.get("space", "z")) == "z" else f" in the space {space}"
    broken = f", {result['broken']} could not be read and are left out" if result["broken"] else ""
    if "mean_r1" in result:
        head = f"{result['images']} images with {result['captions']} captions of {where}{broken}"
        rows = [f"{'':13}{'R@1':>9}{'R@5':>9}{'R@10':>9}"]
        for name in ("image_to_text", "text_to_image"):
            values = "".join(f"{result[f'{name}_r{k}']:9.2%}" for k in (1, 5, 10))
            rows.append(f"{name.replace('_', ' '):13}{values}")
        return "\n".join([head, *rows, f"mean of the two R@1: {result['mean_r1']:.2%}"])
    if "diagonal_mean" in result or "hit_at_1" in result:
        return (_describe_noise if "diagonal_mean" in result else _describe_hits)(result, where, broken)
    partly = result["classes"] - result["classes_with_images"]
    head = f"{result['images']} images of {where}, {result['classes']} classes"
    head += (f" ({partly} of them without images)" if partly else "") + broken
    return (
        f"{head}\ntop-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   mean per class "
        f"{result['mean_per_class']:.2%}   chance {result['chance']:.2%}"
    )


def _describe_hits(result: Mapping, where: str, broken: str) -> str:
    some = f", {result['left_out']} without a label are left out" if result["left_out"] else ""
    hits = "   ".join(f"hit@{k} {result[f'hit_at_{k}']:.2%}" for k in HITS)
    return (
        f"{result['images']} images of {where}, {result['labels_per_image']:.2f} labels each, {result['classes']} "
        f"classes with {result['names']} names{broken}{some}\n{hits}   chance {result['chance']:.2%}"
    )


def _describe_noise(result: Mapping, where: str, broken: str) -> str:
    return (
        f"{result['batches']} batches of {result['pairs']} pairs of {where}{broken}\n"
        f"probability of the own text {result['diagonal_mean']:.3f}, of the likeliest other "
        f"{result['off_diagonal_max']:.3f}, of any other {result['off_diagonal_mean']:.4f}\n"
        f"{result['confusable']:.1f} other texts a batch with at least {result['threshold']:g} (scale "
        f"{result['logit_scale']:.1f})"
    )


def _hits(encoder: Encoder, options: TaskOptions, templates: list[str]) -> dict:
    table = read_table(_needed(options.table, "--table FILE.csv", "hits"))
    column = options.labels or ("labels" if "labels" in table[0] else "caption")
    names = read_synonyms(options.names) if options.names else None
    data = label_rows(select_split(table, options.split, str(options.table)), table, column, names)
    store = ImageStore(options.data or options.table.parent)
    return {**evaluate_hits(encoder, data, store, templates).to_dict(), "labels": column}


def _noise(encoder: Encoder, options: TaskOptions, templates: list[str]) -> dict:
    if len(templates) != 1:
        raise ConfigError(f"noise takes one template for the captions, not {len(templates)}")
    table = read_table(_needed(options.table, "--table FILE.csv", "noise"))
    rows = select_split(table, options.split, str(options.table))
    captions = [templates[0].replace("{}", row["caption"]) for row in rows]
    store = ImageStore(options.data or options.table.parent)
    images = [row["image"] for row in rows]
    return analyse_batches(encoder, images, captions, store, options.pairs, options.batches).to_dict()


def _labelled_images(options: TaskOptions) -> LabelledImages:
    if options.task == "table":
        table = read_table(_needed(options.table, "--table FILE.csv", "table"))
        rows = select_split(table, options.split, str(options.table))
        classes = sorted({row["caption"] for row in table})
        index = {name: i for i, name in enumerate(classes)}
        root = options.data or options.table.parent
        return LabelledImages(root, [row["image"] for row in rows], [index[row["caption"]] for row in rows], classes)
    if options.task == "folder":
        return read_image_folder(_images_root(options), options.names)
    return read_imagenet(options.task, _images_root(options))


def _images_root(options: TaskOptions) -> Path:
    root = _needed(options.data, "--data FOLDER", options.task)
    if not root.is_dir():
        raise ConfigError(f"no folder of images at {root}")
    return root


def _needed(value: Path | None, option: str, task: str) -> Path:
    if value is None:
        raise ConfigError(f"task {task} needs {option}")
    return value
