"""Train a detector on base categories: Detectron2's loop and hooks, a leak check before the first step.

Where training starts: (1) the run folder's own state, with --resume; (2) the detector that the config names
(fine-tuning), or (3) the image-text checkpoint that it names. A resumed run sees the pictures, crops and sampled
regions that it would have seen without the stop.
"""

import copy
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from omegaconf import OmegaConf

from ovd.data.leak_check import check_leaks
from ovd.data.lvis import base_novel_split, read_ground_truth
from ovd.detector import IMAGE_TEXT, OpenVocabularyDetector, read_detector, save_detector
from ovd.detector_folder import write_base_words
from ovd.engine import finetune
from ovd.engine.checkpointer import AtomicCheckpointer
from ovd.engine.evaluate import apply_settings, check_evaluation, evaluate_detector, results_table
from ovd.engine.loader import seed_all
from ovd.engine.processes import wrap_for_processes
from ovd.engine.run_check import check_run, made_for
from ovd.engine.run_text import CACHE, embed_once, run_prompting
from ovd.engine.step import DetectorTrainer, autocast_dtype
from ovd.modeling.rcnn import OpenVocabularyRCNN
from ovd.text.vocabulary import Vocabulary
from pretrain.atomic import write_atomically
from pretrain.config import ConfigError
from pretrain.engine.checkpoint import STATE_FILE
from pretrain.engine.run_folder import RunFolder, file_fingerprint
from pretrain.modeling.checkpoint import ImageTextModel, load_checkpoint

logger = logging.getLogger(__name__)


class LeakError(ValueError):
    """Novel classes were found in what is meant to be base-only training."""


@dataclass
class BaseVocabulary:
    """The categories trained on."""

    names: list[str]
    embeddings: torch.Tensor  # (C, D), normalised
    image_counts: list[int]  # training pictures with each class, for federated losses
    image_text: str  # fingerprint of the model that embedded them


def check_training_data(cfg: Any, output: Path) -> None:
    """Prove that no novel class is in the training annotations or vocabulary; the proof is in leak_check.json.

    Novel are the rare categories of `cfg.evaluation.annotations` and, where the full LVIS list has more, of LVIS v1.

    Raises:
        LeakError: if one is, naming the first findings.
    """
    from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

    training = read_ground_truth(cfg.data.train_annotations)
    evaluated = read_ground_truth(cfg.evaluation.annotations)["categories"]
    novel = {c["id"]: c for c in base_novel_split(evaluated)[1]}
    if cfg.data.lvis_ids:
        # Every rare LVIS class counts, not only those that are evaluated.
        novel = {c["id"]: c for c in base_novel_split(LVIS_CATEGORIES)[1]} | novel
    # Every word whose text is embedded for training, not only the classes' names.
    synonyms = cfg.text.use_synonyms
    words = [w for c in training["categories"] for w in (c["name"], *(c.get("synonyms", ()) if synonyms else ()))]
    report = check_leaks(training, list(novel.values()), words)
    if comm.is_main_process():
        write_atomically(output / "leak_check.json", json.dumps(report.to_dict(), indent=1) + "\n")
    if not report.ok:
        first = "; ".join(str(f) for f in report.findings[:3])
        raise LeakError(
            f"{cfg.data.train_annotations} leaks novel classes ({len(report.findings)} findings, for example {first}); "
            "filter it with ovd.data.lvis.filter_to_base"
        )
    logger.info("leak check passed: %s", ", ".join(f"{k} {v}" for k, v in report.counts.items()))


def base_vocabulary(cfg: Any, image_text: ImageTextModel) -> BaseVocabulary:
    """Names and text embeddings (kept in the run folder) of the training categories, in the order of their ids."""
    ground_truth = read_ground_truth(cfg.data.train_annotations)
    categories = sorted(ground_truth["categories"], key=lambda c: c["id"])
    pictures = Counter(i for i, _ in {(a["category_id"], a["image_id"]) for a in ground_truth["annotations"]})
    vocabulary = Vocabulary.from_categories(categories)
    embeddings = embed_once(vocabulary, image_text, run_prompting(cfg), Path(cfg.train.output) / CACHE)
    counts = [pictures[c["id"]] for c in categories]
    return BaseVocabulary([c["name"] for c in categories], embeddings, counts, image_text.fingerprint)


def resolve_device(name: str) -> str:
    """ "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"train.device is {name} and PyTorch sees no GPU: use train.device=cpu, or check the driver")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def train(cfg: Any, resume: bool = False) -> Path:
    """Train as the config says and return the detector's checkpoint folder.

    Reads cfg.model, cfg.data.{train, train_annotations, lvis_ids}, cfg.text.{templates, use_synonyms}, cfg.optimizer,
    cfg.schedule, cfg.evaluation.annotations, cfg.train.{output, max_iter, log_every, checkpoint_every, device, amp,
    clip_norm, seed, half}.

    Raises:
        LeakError: see `check_training_data`.
        ConfigError: the folder already holds a run and `resume` is off, or it holds a pretraining run; or see
            `check_run`.
        FloatingPointError: a loss is not finite; the message has the step and all losses.
    """
    output = Path(cfg.train.output)
    _check_output(output, resume)
    output.mkdir(parents=True, exist_ok=True)
    seed_all(cfg.train.seed)  # the same new weights in every process; the steps seed their own draws
    device = resolve_device(cfg.train.device)
    check_run(cfg, device)
    start = cfg.model.get("detector")  # only where a detector is fine-tuned
    if start is not None and comm.is_main_process():
        finetune.prepare_data(cfg, output)
    comm.synchronize()
    if cfg.data.get("base_only", True):
        check_training_data(cfg, output)
    image_text_folder = Path(cfg.model.image_text) if start is None else finetune.detector_folder(start) / IMAGE_TEXT
    vocabulary = base_vocabulary(cfg, load_checkpoint(image_text_folder, device))
    annotations = cfg.data.train_annotations
    if comm.is_main_process():
        run = RunFolder(output, OmegaConf.to_yaml(plain(cfg)), {annotations: file_fingerprint(annotations)})
        run.close()  # Detectron2's writers log from here on
    model: OpenVocabularyRCNN = instantiate(cfg.model).to(device)
    model.set_text_embeddings(vocabulary.embeddings.to(device), torch.ones(len(vocabulary.names), dtype=torch.bool))
    model.roi_heads.box_predictor.set_class_counts(vocabulary.image_counts)
    _run_loop(cfg, model, output, resume, vocabulary.image_text)
    folder = output / "detector"
    if comm.is_main_process():
        _save(cfg, model, image_text_folder, vocabulary.names, folder)
    comm.synchronize()
    return folder


def _check_output(output: Path, resume: bool) -> None:
    # Both halves would write config.yaml, metrics.jsonl and summary.md.
    if found := next((name for name in (STATE_FILE, "checkpoint") if (output / name).exists()), None):
        raise ConfigError(f"{output} holds a pretraining run ({found}): set train.output elsewhere")
    if not resume and (output / "last_checkpoint").exists():
        raise ConfigError(f"{output} already holds a run: add --resume to continue it, or set train.output elsewhere")


def _save(cfg: Any, model: OpenVocabularyRCNN, image_text: Path, names: list[str], folder: Path) -> None:
    """Write the detector; a fine-tuned one knows the words of before too, and may go only part of the way."""
    target = folder
    if "detector" in cfg.model:
        names = finetune.joined_names(read_detector(image_text.parent)[2], names)
        if cfg.finetune.interpolation < 1:
            target = folder.parent / finetune.TUNED
    save_detector(
        target, model, image_text, base_names=names, float16=cfg.train.half, prompting=run_prompting(cfg)
    )  # fmt: skip
    if target != folder:
        finetune.interpolate(cfg, folder.parent, folder)
    write_base_words(folder, model.device)


def _run_loop(cfg: Any, model: OpenVocabularyRCNN, output: Path, resume: bool, teacher: str) -> None:
    model.train()
    main = comm.is_main_process()
    optimizer = instantiate(_filled(cfg.optimizer, model=model))
    wrapped = wrap_for_processes(model)
    dtype = autocast_dtype(cfg.train.amp, next(model.parameters()).device)
    trainer = DetectorTrainer(wrapped, None, optimizer, dtype, cfg.train.get("clip_norm", 0.0), cfg.train.seed)
    checkpointer = AtomicCheckpointer(model, str(output), save_to_disk=main, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.schedule)),
            hooks.PeriodicCheckpointer(checkpointer, cfg.train.checkpoint_every, max_to_keep=1) if main else None,
            hooks.PeriodicWriter(_writers(cfg, output), period=cfg.train.log_every) if main else None,
        ]
    )
    checkpointer.resume_or_load("", resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    loader = _filled(made_for(model.architecture.image_size, cfg.data.train, "data.train"), start_step=start)
    if "regions" in loader.get("mapper", ()):
        loader.mapper.regions_teacher = teacher  # regions of another image-text model are refused
    trainer.data_loader = instantiate(loader)
    trainer.train(start, cfg.train.max_iter)


def _writers(cfg: Any, output: Path) -> list:
    """Terminal, metrics.jsonl and TensorBoard."""
    window = cfg.train.log_every
    return [
        CommonMetricPrinter(cfg.train.max_iter, window_size=window),
        JSONWriter(str(output / "metrics.jsonl"), window_size=window),
        TensorboardXWriter(str(output / "tensorboard"), window_size=window),
    ]


def _filled(description: Any, **arguments: Any) -> Any:
    """A copy of a lazy call with the arguments that only exist now, as Detectron2's configs do it."""
    description = copy.deepcopy(description)
    for name, value in arguments.items():
        description[name] = value
    return description


def plain(cfg: Any) -> Any:
    """The config as plain containers; callables become their dotted names."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): convert(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(v) for v in value]
        return f"{value.__module__}.{value.__qualname__}" if callable(value) else value

    return OmegaConf.create(convert(OmegaConf.to_container(cfg, resolve=False)))


def evaluate(cfg: Any, detector_folder: str | Path) -> dict[str, dict[str, dict[str, float]]]:
    """Measure a detector checkpoint on cfg.evaluation's data; prints the table and writes it into the run folder.

    Raises:
        ConfigError: a setting of cfg.evaluation, or a size of its pictures, that this detector cannot be measured with.
    """
    check_evaluation(cfg.evaluation)
    device = resolve_device(cfg.train.device)
    detector = OpenVocabularyDetector.from_checkpoint(detector_folder, device=device)
    measured = cfg.evaluation
    fixed_ap = measured.get("fixed_ap", False)
    apply_settings(detector.model, measured.get("fusion"), measured.get("inference"), fixed_ap)
    pictures = made_for(detector.model.architecture.image_size, cfg.data.test, "data.test")
    output = Path(cfg.train.output) / "evaluation"
    if "detector" in cfg.model and comm.is_main_process():
        finetune.prepare_data(cfg, Path(cfg.train.output))
    comm.synchronize()
    results = evaluate_detector(
        detector.model, detector.image_text, instantiate(pictures), measured.annotations, run_prompting(cfg), output,
        measured.control, measured.get("protocol", "lvis"),
        measured.get("samples", 0), fixed_ap, Path(cfg.train.output) / CACHE,
        measured.get("precision", "float32"),
    )  # fmt: skip
    if not comm.is_main_process():  # the first process has gathered everything
        return results
    table = results_table(results)
    summary = f"# Detector evaluation\n\n- detector: {detector_folder}\n- data: {cfg.evaluation.annotations}\n\n{table}"
    write_atomically(Path(cfg.train.output) / "summary.md", summary)
    return results
