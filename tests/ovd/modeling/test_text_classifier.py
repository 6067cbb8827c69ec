"""The text classifier."""

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
