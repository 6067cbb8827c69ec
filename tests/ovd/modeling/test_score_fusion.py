"""Score fusion against published-rule numbers worked out in numpy, and its algebra."""

import pytest
import torch

from ovd.modeling import score_fusion
from ovd.modeling.score_fusion import apply_objectness, background_first, background_last, fuse_scores

IS_BASE = torch.tensor([True, False, False])


def random_scores(rows: int = 6, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(rows, 1 + classes).softmax(1), torch.randn(rows, 1 + classes).softmax(1)


def test_matches_the_numbers_of_the_published_rule() -> None:
    detector = torch.tensor([[2.0, 1, 0, -1], [0.5, 3, 0.2, 0.1]]).softmax(1)
    image_text = torch.tensor([[0.0, 3, 1, 2], [0, 1, 4, 0.5]]).softmax(1)
    expected = torch.tensor([[0.543459, 0.283711, 0.073549, 0.099281], [0.093349, 0.410235, 0.451591, 0.044825]])
    fused = fuse_scores(detector, image_text, IS_BASE, alpha=0.35, beta=0.65)
    torch.testing.assert_close(fused, expected, atol=2e-6, rtol=0)


def test_rows_sum_to_one() -> None:
    torch.testing.assert_close(fuse_scores(*random_scores(), IS_BASE).sum(1), torch.ones(6))


def test_weight_zero_leaves_the_detector() -> None:
    z, p = random_scores()
    torch.testing.assert_close(fuse_scores(z, p, IS_BASE, 0.0, 0.0), z)


def test_weight_one_takes_the_image_text_score_of_a_class() -> None:
    z, p = random_scores()
    fused = fuse_scores(z, p, IS_BASE, 1.0, 1.0)
    expected = torch.cat([z[:, :1], p[:, 1:]], dim=1)
    torch.testing.assert_close(fused, expected / expected.sum(1, keepdim=True))


def test_image_text_background_is_not_used() -> None:
    z, p = random_scores()
    without = p.clone()
    without[:, 0] = 0
    torch.testing.assert_close(fuse_scores(z, p, IS_BASE), fuse_scores(z, without, IS_BASE))


def test_background_is_the_detectors_before_renormalisation() -> None:
    z, p = random_scores()
    for alpha, beta in ((0.35, 0.65), (1.0, 0.0)):
        fused = fuse_scores(z, p, IS_BASE, alpha, beta)
        weight = torch.tensor([alpha, beta, beta])
        classes = torch.exp((1 - weight) * z[:, 1:].log() + weight * p[:, 1:].log())
        total = z[:, 0] + classes.sum(dim=1)
        torch.testing.assert_close(fused[:, 0] * total, z[:, 0])
        torch.testing.assert_close(fused[:, 1:] * total[:, None], classes)


def test_base_classes_have_alpha_and_novel_ones_beta() -> None:
    z, p = random_scores()
    fused = fuse_scores(z, p, IS_BASE, 0.0, 1.0)
    expected = torch.cat([z[:, :2], p[:, 2:]], dim=1)
    torch.testing.assert_close(fused, expected / expected.sum(dim=1, keepdim=True))


def test_parts_give_what_the_whole_gives(monkeypatch) -> None:
    z, p = random_scores(11)
    whole = fuse_scores(z, p, IS_BASE)
    monkeypatch.setattr(score_fusion, "_VALUES_AT_ONCE", 9)
    assert torch.equal(fuse_scores(z, p, IS_BASE), whole)
    assert fuse_scores(z[:0], p[:0], IS_BASE).shape == (0, 4)


def test_gradients_pass_through() -> None:
    z, p = random_scores()
    z.requires_grad_()
    fuse_scores(z, p, IS_BASE)[:, 1].sum().backward()
    assert torch.isfinite(z.grad).all() and (z.grad != 0).any()


def test_permuting_classes_permutes_columns() -> None:
    z, p = random_scores()
    order = torch.tensor([2, 0, 1])
    columns = torch.cat([torch.tensor([0]), order + 1])
    permuted = fuse_scores(z[:, columns], p[:, columns], IS_BASE[order])
    torch.testing.assert_close(permuted, fuse_scores(z, p, IS_BASE)[:, columns])


def test_underflow_gives_zeros_not_nan() -> None:
    zeros = torch.zeros(1, 4)
    assert torch.equal(fuse_scores(zeros, zeros, IS_BASE), zeros)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(2, 3), IS_BASE), "must be the same"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), IS_BASE[:2]), "one entry for each class"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), IS_BASE, 1.5), "alpha is 1.5"),
        ((torch.full((2, 4), -1.0), torch.zeros(2, 4), IS_BASE), "softmax of the logits first"),
    ],
)
def test_bad_input_gets_a_clear_error(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse_scores(*arguments)


def test_objectness_multiplies_rows() -> None:
    scores = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    out = apply_objectness(scores, torch.tensor([0.5, 1.0]), 3.0)
    torch.testing.assert_close(out, torch.tensor([[0.0625, 0.0625], [0.2, 0.8]]))
    assert torch.equal(apply_objectness(scores, torch.tensor([0.5, 1.0]), 0.0), scores)


def test_background_conversions_are_inverse() -> None:
    scores = torch.tensor([[1.0, 2.0, 9.0]])  # Detectron2: background (9) last
    assert background_first(scores).tolist() == [[9.0, 1.0, 2.0]]
    assert torch.equal(background_last(background_first(scores)), scores)
