"""The text classifier."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovd.modeling.text_classifier import TextClassifier


def test_logits_are_scaled_cosines_with_the_background_last() -> None:
    torch.manual_seed(0)
    classifier = TextClassifier(8, 4, scale=20.0)
    words, features = torch.randn(3, 4) * 5, torch.randn(6, 8)
    classifier.set_text_embeddings(words)
    region = features @ classifier.projection.weight.T + classifier.projection.bias
    for column, vector in enumerate([*words, classifier.background_embedding]):
        expected = 20.0 * F.cosine_similarity(region, vector[None])
        torch.testing.assert_close(classifier(features)[:, column], expected)


def test_vocabulary_is_not_in_the_state_dict() -> None:
    classifier = TextClassifier(8, 4)
    before = set(classifier.state_dict())
    classifier.set_text_embeddings(torch.randn(7, 4))
    assert set(classifier.state_dict()) == before and "text_embeddings" not in before


def test_half_precision_features_keep_similarities_in_float32() -> None:
    classifier = TextClassifier(8, 4)
    classifier.set_text_embeddings(torch.randn(3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier(torch.randn(2, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.zeros(0, 4), "at least one class"),
        (torch.ones(2, 5), "5 wide.*4 dimensions"),
        (torch.tensor([[1.0, 0, 0, 0], [float("nan"), 0, 0, 0]]), r"classes \[1\] are not finite"),
        (torch.zeros(2, 4), "all zeros"),
    ],
)
def test_bad_embeddings_get_a_clear_error(embeddings: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextClassifier(8, 4).set_text_embeddings(embeddings)


def test_running_without_a_vocabulary_says_so() -> None:
    with pytest.raises(ValueError, match="no vocabulary yet"):
        TextClassifier(8, 4)(torch.zeros(1, 8))


def test_a_fixed_background_is_the_last_class_and_has_no_gradient() -> None:
    torch.manual_seed(0)
    background = torch.randn(4) * 3
    classifier = TextClassifier(8, 4, scale=20.0, background_embedding=background)
    words, features = torch.randn(3, 4), torch.randn(6, 8)
    classifier.set_text_embeddings(words)
    region = features @ classifier.projection.weight.T + classifier.projection.bias
    torch.testing.assert_close(classifier(features)[:, 3], 20.0 * F.cosine_similarity(region, background[None]))
    assert "background_embedding" in classifier.state_dict()
    assert "background_embedding" not in dict(classifier.named_parameters())


def test_a_fixed_background_moves_with_the_vocabulary_and_stays_without_a_new_one() -> None:
    classifier = TextClassifier(8, 4, background_embedding=torch.tensor([1.0, 0, 0, 0]))
    classifier.set_text_embeddings(torch.randn(3, 4), torch.tensor([0.0, 2, 0, 0]))
    classifier.set_text_embeddings(torch.randn(2, 4))
    assert classifier.background_embedding.tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="learned"):
        TextClassifier(8, 4).set_text_embeddings(torch.randn(3, 4), torch.randn(4))


def test_sigmoid_scores_of_a_subset_are_the_full_vocabularys_columns() -> None:
    torch.manual_seed(0)
    classifier, words = TextClassifier(8, 4, classification="sigmoid"), torch.randn(7, 4)
    features, subset = torch.randn(5, 8), [5, 0, 3]
    classifier.set_text_embeddings(words)
    full = classifier.probabilities(classifier(features))
    classifier.set_text_embeddings(words[subset])
    part = classifier.probabilities(classifier(features))
    torch.testing.assert_close(part[:, :-1], full[:, subset])
    assert (part[:, -1] == 0).all()


def test_softmax_scores_of_a_subset_are_not() -> None:
    torch.manual_seed(0)
    classifier, words, features = TextClassifier(8, 4), torch.randn(7, 4), torch.randn(5, 8)
    classifier.set_text_embeddings(words)
    full = classifier.probabilities(classifier(features))
    torch.testing.assert_close(full.sum(dim=1), torch.ones(5))
    classifier.set_text_embeddings(words[:3])
    assert not torch.allclose(classifier.probabilities(classifier(features))[:, :3], full[:, :3])


def test_sigmoid_starts_near_no_for_every_class_and_trains_all_its_parameters() -> None:
    torch.manual_seed(0)
    classifier = TextClassifier(8, 4, scale=1.0, classification="sigmoid")
    classifier.set_text_embeddings(torch.randn(5, 4))
    scores = classifier.probabilities(classifier(torch.randn(3, 8)))[:, :-1]
    assert scores.max() < 0.03
    scores.sum().backward()
    assert all(p.grad is not None for p in classifier.parameters())


def test_unknown_classification_is_named() -> None:
    with pytest.raises(ValueError, match="classification is 'tanh'; choose one of softmax, sigmoid"):
        TextClassifier(8, 4, classification="tanh")


def classifier_at(log_scale: float, **options) -> tuple[TextClassifier, torch.Tensor, torch.Tensor]:
    """A classifier of 3 words in 4 dimensions, features of 6 regions, and the word each of them is least like."""
    torch.manual_seed(0)
    classifier, features = TextClassifier(8, 4, scale=100.0, **options), torch.randn(6, 8)
    classifier.set_text_embeddings(torch.randn(3, 4))
    with torch.no_grad():
        wrong = classifier(features)[:, :3].argmin(dim=1)
        classifier.log_scale.fill_(log_scale)
    return classifier, features, wrong


@pytest.mark.parametrize("above", [0.0, 1e-6, 0.3])
def test_a_scale_at_or_above_its_limit_has_the_gradient_of_the_limit(above: float) -> None:
    classifier, features, wrong = classifier_at(math.log(100) + above)
    logits = classifier(features)
    F.cross_entropy(logits, wrong).backward()
    cosines = logits.detach().double().numpy() / 100
    probabilities = np.exp(100 * cosines - (100 * cosines).max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    # d loss / d log s = s * (mean cosine under the softmax - cosine of the target)
    expected = 100 * ((probabilities * cosines).sum(axis=1) - cosines[np.arange(6), wrong]).mean()
    assert expected > 1 and classifier.log_scale.grad.item() == pytest.approx(expected, rel=1e-4)
    assert np.abs(cosines).max() <= 1 + 1e-6


@pytest.mark.parametrize("classification", ["softmax", "sigmoid"])
def test_a_scale_above_its_limit_comes_back_down_when_that_lowers_the_loss(classification: str) -> None:
    classifier, features, wrong = classifier_at(math.log(100) + 0.3, classification=classification)
    optimizer = torch.optim.SGD([classifier.log_scale], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        logits = classifier(features)[:, :3]
        if classification == "sigmoid":
            F.binary_cross_entropy_with_logits(logits, F.one_hot(wrong, 3).float()).backward()
        else:
            F.cross_entropy(logits, wrong).backward()
        optimizer.step()
    assert classifier.log_scale.item() < math.log(100) - 1e-3


def test_a_scale_that_one_step_lifts_above_its_limit_still_follows_the_next() -> None:
    classifier, features, wrong = classifier_at(math.log(100))
    optimizer = torch.optim.SGD([classifier.log_scale], lr=1e-3)
    right, lifted = classifier(features).argmax(dim=1), []
    for targets in (right, wrong):
        optimizer.zero_grad()
        # Cooler, so that even regions of the right word have a gradient that asks for a larger scale.
        F.cross_entropy(classifier(features) / 100, targets).backward()
        optimizer.step()
        lifted.append(classifier.log_scale.item() - math.log(100))
    assert lifted[0] > 1e-5 and lifted[1] < -1e-5


def test_gradients_of_two_passes_may_be_taken_after_both() -> None:
    classifier, features, wrong = classifier_at(math.log(100) + 0.3)
    losses = [
        F.cross_entropy(classifier(part), target)
        for part, target in zip(features[:2, None], wrong[:2, None], strict=True)
    ]
    sum(losses).backward()
    assert classifier.log_scale.grad.item() > 0


def test_a_kept_scale_above_its_limit_detects_as_at_the_limit_and_is_not_changed_by_it() -> None:
    classifier, features, _ = classifier_at(math.log(100) + 0.3)
    classifier.eval()
    above = classifier(features)
    assert classifier.log_scale.item() == pytest.approx(math.log(100) + 0.3)
    with torch.no_grad():
        classifier.log_scale.fill_(math.log(100))
    torch.testing.assert_close(above, classifier(features))
