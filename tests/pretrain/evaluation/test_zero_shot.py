"""Zero-shot classification against a naive version (against open_clip's own: tests/parity)."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.config import ConfigError
from pretrain.data.folder import ImageStore, read_table, select_split
from pretrain.data.tokenizer import build_tokenizer
from pretrain.data.transforms import evaluation_view, normalise
from pretrain.evaluation.encoder import OWN_PREPROCESS, Encoder
from pretrain.evaluation.zero_shot import ZeroShotResult, class_features, classify, evaluate_zero_shot
from pretrain.modeling.clip import set_context_length, set_image_size

NAMES = ["red circle", "blue square", "axe", "a very long name of many words that is cut at the end of the text"]
TEMPLATES = ["{}", "a photo of a {}.", "a {} on white"]
CPU = torch.device("cpu")


def encoder_of(model, batch_size=512, tokenizer=None):
    return Encoder(model, tokenizer or build_tokenizer(16), OWN_PREPROCESS, CPU, batch_size=batch_size)


def test_chance_is_one_in_the_number_of_classes():
    result = ZeroShotResult(0.5, 0.9, 10, 8)
    assert result.chance == 0.125
    assert {"top1": 0.5, "top5": 0.9, "images": 10, "classes": 8, "chance": 0.125}.items() <= result.to_dict().items()


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
    for batch_size in (512, 6, 5, 1):
        features = class_features(encoder_of(model, batch_size), NAMES, TEMPLATES)
        torch.testing.assert_close(features, naive, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_classes_of_the_same_name_are_exactly_equal(model):
    features = class_features(encoder_of(model, batch_size=2), ["missile", "axe", "missile"], TEMPLATES)
    assert torch.equal(features[0], features[2]) and not torch.equal(features[0], features[1])


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


def test_the_models_text_length_and_a_given_tokenizer_are_used(model, pairs_table):
    set_context_length(model, 8)
    lengths = []

    def tokenizer(texts):
        tokens = build_tokenizer(8)(texts)
        lengths.append(tokens.shape[1])
        return tokens

    set_image_size(model, 32)
    rows = select_split(read_table(pairs_table), "val", "t.csv")
    classes, store = sorted({row["caption"] for row in rows}), ImageStore(pairs_table.parent)
    own = evaluate_zero_shot(model, rows, classes, store, ["{}"], CPU)
    assert evaluate_zero_shot(model, rows, classes, store, ["{}"], CPU, tokenizer=tokenizer) == own
    assert lengths == [8]


def test_given_mean_and_deviation_reach_the_tower(model, pairs_table):
    set_image_size(model, 32)
    rows, seen = select_split(read_table(pairs_table), "val", "t.csv")[:1], []
    model.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    store, preprocess = ImageStore(pairs_table.parent), {"mean": (0.0,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
    evaluate_zero_shot(model, rows, [rows[0]["caption"]], store, ["{}"], CPU, preprocess=preprocess)
    expected = evaluation_view(store.read(rows[0]["image"]), 32).float() / 255 / 0.5
    torch.testing.assert_close(seen[0][0], expected)


def test_broken_images_are_counted_named_and_left_out_of_the_denominator(model, pairs_table, tmp_path, capsys):
    set_image_size(model, 32)
    rows = select_split(read_table(pairs_table), "train", "t.csv")
    classes = sorted({row["caption"] for row in rows})
    whole = evaluate_zero_shot(model, rows[3:], classes, ImageStore(pairs_table.parent), ["{}"], CPU)
    (tmp_path / "cut.png").write_bytes((pairs_table.parent / rows[0]["image"]).read_bytes()[:60])
    bad = [{"image": str(tmp_path / "cut.png"), "caption": rows[0]["caption"]}]
    bad.append({"image": "absent.png", "caption": rows[0]["caption"]})
    for batch_size in (2, 64):
        result = evaluate_zero_shot(
            model, bad + rows[3:], classes, ImageStore(pairs_table.parent), ["{}"], CPU, batch_size
        )
        assert (result.top1, result.top5, result.images) == (whole.top1, whole.top5, len(rows) - 3)
        assert (result.broken, whole.broken) == (2, 0)
        assert "cut.png cannot be read as an image" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of the 2 images could be read; for example: .*cut.png"):
        evaluate_zero_shot(model, bad, classes, ImageStore(pairs_table.parent), ["{}"], CPU)


def test_accuracy_per_class_weighs_classes_alike_and_skips_those_without_images(model, pairs_table):
    """One right class with 9 copies, one wrong with 1: top-1 9/10, per class 1/2; a third class has no image."""
    set_image_size(model, 32)
    rows = select_split(read_table(pairs_table), "val", "t.csv")[:2]
    model.encode_text = lambda tokens: torch.eye(3, 32)[: len(tokens)]  # a unit vector for each class in turn
    model.encode_image = lambda images: torch.eye(3, 32)[:1].expand(len(images), 32)  # the first class, always
    images = [rows[0]["image"]] * 9 + [rows[1]["image"]]
    result = classify(encoder_of(model), images, [0] * 9 + [1], ImageStore(pairs_table.parent), ["a", "b", "c"], ["{}"])
    assert (result.top1, result.mean_per_class) == pytest.approx((0.9, 0.5))
    assert (result.classes, result.classes_with_images, result.top5) == (3, 2, 1)


def test_a_model_that_knows_nothing_gets_chance(model, pairs_table):
    set_image_size(model, 32)
    rows = select_split(read_table(pairs_table), "val", "t.csv")
    classes = sorted({row["caption"] for row in rows})
    model.encode_text = lambda tokens: torch.ones(len(tokens), 32)
    result = evaluate_zero_shot(model, rows, classes, ImageStore(pairs_table.parent), ["{}"], CPU)
    assert (result.top1, result.top5) == pytest.approx((1 / 12, 5 / 12))


@pytest.mark.parametrize(("rows", "classes", "templates"), [(0, 2, 1), (2, 0, 1), (2, 2, 0)])
def test_nothing_to_classify_is_one_clear_error(model, pairs_table, rows, classes, templates):
    with pytest.raises(ConfigError, match="no image to classify|give at least one of each"):
        classify(
            encoder_of(model), ["a.png"] * rows, [0] * rows, ImageStore(pairs_table.parent), ["a", "b"][:classes],
            ["{}"][:templates],
        )  # fmt: skip


def test_classes_are_unit_vectors(model):
    with torch.no_grad():
        features = class_features(encoder_of(model), NAMES, TEMPLATES)
    torch.testing.assert_close(features, F.normalize(features, dim=-1))
