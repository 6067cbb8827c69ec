"""Zero-shot classification against a naive version and open_clip's own."""

import open_clip
import pytest
import torch
import torch.nn.functional as F

from pretrain.data.folder import ImageStore, read_table, select_split
from pretrain.data.tokenizer import build_tokenizer
from pretrain.data.transforms import evaluation_view, normalise
from pretrain.evaluation.zero_shot import ZeroShotResult, class_features, evaluate_zero_shot, topk_hits
from pretrain.modeling.clip import set_context_length, set_image_size

NAMES = ["red circle", "blue square", "axe", "a very long name of many words that is cut at the end of the text"]
TEMPLATES = ["{}", "a photo of a {}.", "a {} on white"]
CPU = torch.device("cpu")


def test_hits_on_hand_made_similarities():
    similarities = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.7, 0.8, 0.1]])
    labels = torch.tensor([0, 0, 0])  # first, last, second place
    assert [topk_hits(similarities, labels, k) for k in (1, 2, 3, 5)] == [1, 2, 3, 3]


def test_chance_is_one_in_the_number_of_classes():
    result = ZeroShotResult(0.5, 0.9, 10, 8)
    assert result.chance == 0.125
    assert result.to_dict() == {"top1": 0.5, "top5": 0.9, "images": 10, "classes": 8, "chance": 0.125}


@torch.no_grad()
def naive_class_features(model, names, templates):
    rows = []
    for name in names:
        total = torch.zeros(model.text.text_projection.shape[1])
        for template in templates:
            feature = model.encode_text(build_tokenizer(16)([template.replace("{}", name)]))[0]
            total += feature / feature.norm()
        rows.append(total / total.norm())
    return torch.stack(rows)


@torch.no_grad()
def test_class_features_equal_a_naive_version_in_any_batching(model):
    naive = naive_class_features(model, NAMES, TEMPLATES)
    for batch_size in (512, 5, 1):
        torch.testing.assert_close(
            class_features(model, NAMES, TEMPLATES, CPU, batch_size), naive, atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_class_features_equal_open_clips_classifier(model):
    templates = [lambda name, t=t: t.format(name) for t in TEMPLATES]
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, templates, num_classes_per_batch=2)
    torch.testing.assert_close(class_features(model, NAMES, TEMPLATES, CPU), theirs.T, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def naive_accuracies(model, rows, classes, store, size):
    """One image at a time: the rank of the true class among all."""
    text = naive_class_features(model, classes, TEMPLATES)
    ranks = []
    for row in rows:
        feature = model.encode_image(normalise(evaluation_view(store.read(row["image"]), size)[None]))[0]
        scores = (text @ (feature / feature.norm())).tolist()
        ranks.append(sum(score > scores[classes.index(row["caption"])] for score in scores))
    return sum(r < 1 for r in ranks) / len(ranks), sum(r < 5 for r in ranks) / len(ranks)


@pytest.mark.parametrize("size", [32, 160])
@pytest.mark.parametrize("batch_size", [5, 256])
def test_accuracies_equal_a_naive_version(model, pairs_table, size, batch_size):
    set_image_size(model, size)
    rows = select_split(read_table(pairs_table), "train", "t.csv")
    classes, store = sorted({row["caption"] for row in rows}), ImageStore(pairs_table.parent)
    result = evaluate_zero_shot(model, rows, classes, store, TEMPLATES, CPU, batch_size)
    assert (result.top1, result.top5) == pytest.approx(naive_accuracies(model, rows, classes, store, size))
    assert (result.images, result.classes, result.chance) == (36, 12, 1 / 12)
    assert 0 < result.top5 < 1  # untrained towers: neither nothing nor everything, so the comparison says something


def test_the_mode_of_the_towers_is_put_back_and_nothing_is_learned(model, pairs_table):
    set_image_size(model, 32)
    rows = select_split(read_table(pairs_table), "val", "t.csv")
    classes = sorted({row["caption"] for row in rows})
    for training in (True, False):
        model.train(training)
        evaluate_zero_shot(model, rows, classes, ImageStore(pairs_table.parent), ["{}"], CPU)
        assert model.training is training
    assert all(p.grad is None for p in model.parameters())


def test_the_models_text_length_and_a_given_tokenizer_are_used(model):
    set_context_length(model, 8)
    lengths = []

    def tokenizer(texts):
        tokens = build_tokenizer(8)(texts)
        lengths.append(tokens.shape[1])
        return tokens

    with torch.no_grad():
        assert torch.equal(
            class_features(model, NAMES, ["{}"], CPU), class_features(model, NAMES, ["{}"], CPU, 9, tokenizer)
        )
    assert lengths == [8]


def test_given_mean_and_deviation_reach_the_tower(model, pairs_table):
    set_image_size(model, 32)
    rows, seen = select_split(read_table(pairs_table), "val", "t.csv")[:1], []
    model.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    store = ImageStore(pairs_table.parent)
    evaluate_zero_shot(model, rows, [rows[0]["caption"]], store, ["{}"], CPU, mean=(0.0,) * 3, std=(0.5,) * 3)
    expected = evaluation_view(store.read(rows[0]["image"]), 32).float() / 255 / 0.5
    torch.testing.assert_close(seen[0][0], expected)


def test_classes_are_unit_vectors(model):
    with torch.no_grad():
        features = class_features(model, NAMES, TEMPLATES, CPU)
    torch.testing.assert_close(features, F.normalize(features, dim=-1))
