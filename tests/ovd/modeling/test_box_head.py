"""The box predictor's choice of classes that count, and the distilled head."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ovd.losses.detection import independent_classification_loss
from ovd.modeling.box_head import DistilledHead, TextBoxPredictor
from ovd.modeling.text_classifier import TextClassifier


def predictor(count: int = 6, classification: str = "sigmoid", **fields) -> TextBoxPredictor:
    torch.manual_seed(0)
    model = TextBoxPredictor(8, TextClassifier(8, 4, classification=classification), **fields)
    model.set_text_embeddings(torch.randn(count, 4))
    return model


def sampled(classes: list[int], verified: list[int] | None = None, count: int = 6) -> Instances:
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(len(classes), 1)
    instances = Instances((20, 20), proposal_boxes=Boxes(boxes), gt_boxes=Boxes(boxes))
    instances.gt_classes = torch.tensor(classes, dtype=torch.long)
    if verified is not None:
        instances.verified_classes = (
            F.one_hot(torch.tensor(verified), count).amax(dim=0).bool().expand(len(classes), -1)
        )
    return instances


def loss_of(model: TextBoxPredictor, proposals: list[Instances], features: torch.Tensor) -> torch.Tensor:
    with EventStorage():
        return model.losses(model(features), proposals)["loss_cls"]


def test_sampled_classes_hold_those_of_the_batch_and_as_many_as_asked() -> None:
    model = predictor(federated_loss="sampled", federated_classes=4)
    for seed in range(10):
        torch.manual_seed(seed)
        counted = model.counted_classes(torch.tensor([2, 2, 5]), [])
        assert counted.shape == (6,) and counted[2] and counted[5] and counted.sum() == 4


def test_sampled_classes_follow_the_frequencies() -> None:
    model = predictor(federated_loss="sampled", federated_classes=2)
    model.set_class_counts([1, 1, 1, 1, 1, 10**12])
    torch.manual_seed(0)
    assert all(model.counted_classes(torch.tensor([2]), [])[5] for _ in range(20))


@pytest.mark.parametrize("classes", [[0, 1], [6, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_more_federated_classes_than_words_counts_what_there_is(classes: list[int]) -> None:
    counted = predictor(federated_loss="sampled", federated_classes=50).counted_classes(torch.tensor(classes), [])
    assert counted.sum() >= 5  # the background takes one place, as in Detectron2


def test_verified_absences_are_the_only_ones_that_count() -> None:
    model = predictor(federated_loss="verified", background_weight=1.0)
    features = torch.randn(3, 8)
    found = loss_of(model, [sampled([2, 6], verified=[2, 4]), sampled([0], verified=[5])], features)
    logits, total = model(features)[0], 0.0
    for region, (own, checked) in enumerate([(2, {2, 4}), (None, {2, 4}), (0, {0, 5})]):
        for c in checked:
            total += F.binary_cross_entropy_with_logits(logits[region, c], torch.tensor(float(c == own)))
    torch.testing.assert_close(found, total / 3)


def test_without_a_federated_loss_every_class_counts() -> None:
    model, features = predictor(), torch.randn(2, 8)
    expected = independent_classification_loss(model(features)[0], torch.tensor([1, 6]))
    torch.testing.assert_close(loss_of(model, [sampled([1, 6])], features), expected)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="federated_loss is 'fed'"):
        predictor(federated_loss="fed")
    with pytest.raises(ValueError, match="'sampled' leaves classes out, which a softmax cannot"):
        predictor(classification="softmax", federated_loss="sampled")
    with pytest.raises(ValueError, match="no 'verified_classes'"):
        loss_of(predictor(federated_loss="verified"), [sampled([1])], torch.randn(1, 8))
    with pytest.raises(ValueError, match="2 counts for 6 classes"):
        predictor().set_class_counts([3, 4])


def test_the_distilled_head_scores_cosines_over_the_words_alone() -> None:
    torch.manual_seed(0)
    head = DistilledHead(nn.Flatten(), 12, 4, scale=10.0)
    words, pooled = torch.randn(3, 4), torch.randn(5, 3, 2, 2)
    head.set_text_embeddings(words)
    region = pooled.flatten(1) @ head.projection.weight.T + head.projection.bias
    cosines = torch.stack([F.cosine_similarity(region, word[None]) for word in words], dim=1)
    scores = head.probabilities(pooled)
    torch.testing.assert_close(scores[:, 1:], (10.0 * cosines).softmax(dim=1))
    assert (scores[:, 0] == 0).all() and "text_embeddings" not in head.state_dict()


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_box_loss_is_quadratic_below_its_beta(beta: float) -> None:
    model = predictor(classification="softmax", smooth_l1_beta=beta)
    proposals = sampled([0, 3])
    deltas = torch.tensor(
        [[0.4, -0.2, 3.0, 0.0], [0.0, 0.0, 0.0, -2.0]]
    )  # the boxes are right as they are: all is error
    with EventStorage():
        loss = model.losses((torch.zeros(2, 7), deltas), [proposals])["loss_box_reg"]
    error = deltas.abs()
    each = torch.where(error < 1, error**2 / 2, error - 0.5) if beta else error
    torch.testing.assert_close(loss, each.sum() / 2)
