"""How good a study's trained towers are: zero-shot accuracy and, where a study asks, what else OTTER and others report.

All runs of a study are judged by this one piece of code, from their checkpoints, at the same image size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pretrain.config import PretrainConfig
from pretrain.data.folder import ImageStore, withhold_words
from pretrain.data.pairs import Pairs, load_pairs
from pretrain.data.tokenizer import build_tokenizer
from pretrain.engine.device import Device
from pretrain.evaluation.encoder import OWN_PREPROCESS, Encoder
from pretrain.evaluation.hit_at_k import evaluate_hits, label_rows
from pretrain.evaluation.retrieval import CaptionedImages, evaluate_retrieval
from pretrain.evaluation.zero_shot import classify, evaluate_zero_shot
from pretrain.modeling.checkpoint import load_checkpoint
from pretrain.modeling.clip import set_context_length, set_image_size
from pretrain.objectives import caption_reader

Rows = Sequence[Mapping[str, str]]


def judged_encoder(config: PretrainConfig, checkpoint: Path, size: int) -> Encoder:
    """A checkpoint at `size` pixels and the text length it was trained at last."""
    device = Device(config.run.device, config.run.precision).torch_device
    model = load_checkpoint(checkpoint).model  # afresh for every size: positions are resampled once
    if model.visual.image_size[0] != size:
        set_image_size(model, size)
    set_context_length(model, config.phases[-1].context_length)
    return Encoder(model.to(device), build_tokenizer(model.context_length), OWN_PREPROCESS, device)


def judged_pairs(config: PretrainConfig) -> Pairs:
    """The evaluation rows; nothing is kept in memory."""
    data = replace(config.data, preload=False, backgrounds=None)
    return load_pairs(data, config.evaluation.splits, caption_reader=caption_reader(config))


def zero_shot(config: PretrainConfig, checkpoint: Path, size: int) -> dict[str, dict[str, float]]:
    """Zero-shot accuracy by split."""
    encoder, pairs = judged_encoder(config, checkpoint, size), judged_pairs(config)
    return {
        split: evaluate_zero_shot(
            encoder.model, rows, pairs.classes, pairs.store, config.evaluation.templates, encoder.device
        ).to_dict()
        for split, rows in pairs.evaluation.items()
    }


def further_measures(config: PretrainConfig, checkpoint: Path, size: int, split: str) -> dict[str, float]:
    """Flat hit@K and retrieval on a split, and the accuracy on concepts that training never saw, as fractions.

    Unseen are the rows that `data.withhold` keeps out of training; they are classified among their own names.
    """
    encoder, pairs = judged_encoder(config, checkpoint, size), judged_pairs(config)
    rows, templates = pairs.evaluation[split], config.evaluation.templates
    every_row = [{"caption": name} for name in pairs.classes]
    hits = evaluate_hits(encoder, label_rows(rows, every_row, "caption"), pairs.store, templates)
    captions = CaptionedImages([r["image"] for r in rows], [r["caption"] for r in rows], list(range(len(rows))), 0)
    retrieval = evaluate_retrieval(encoder, captions, pairs.store).to_dict()
    found = {name.replace("_at_", "@"): value for name, value in hits.to_dict().items() if name.startswith("hit_at_")}
    found |= {f"text to image R@{k}": retrieval[f"text_to_image_r{k}"] for k in (1, 5)}
    found["retrieval, mean R@1"] = retrieval["mean_r1"]
    if config.data.withhold:
        found |= _unseen(encoder, rows, pairs.store, config)
    return found


def _unseen(encoder: Encoder, rows: Rows, store: ImageStore, config: PretrainConfig) -> dict[str, float]:
    words = Path(config.data.withhold).read_text(encoding="utf-8").splitlines()
    kept = {id(row) for row in withhold_words(list(rows), words)[0]}
    unseen = [row for row in rows if id(row) not in kept]
    names = sorted({row["caption"] for row in unseen})
    place = {name: index for index, name in enumerate(names)}
    result = classify(
        encoder, [row["image"] for row in unseen], [place[row["caption"]] for row in unseen], store, names,
        config.evaluation.templates,
    )  # fmt: skip
    title = f"unseen, of {len(names)}"
    return {f"{title}: top-1": result.top1, f"{title}: top-5": result.top5}
