"""Expected hits against hand-made matrices and against every possible order of tied candidates."""

from itertools import permutations

import pytest
import torch

from pretrain.evaluation.ranking import expected_hits


def by_all_orders(scores, right, k):
    """Share of the storage orders of the candidates in which a stable sort puts a right one among the first k."""
    hits = [
        any(right[i] for i in sorted(order, key=lambda i: -scores[i])[:k]) for order in permutations(range(len(scores)))
    ]
    return sum(hits) / len(hits)


def test_without_ties_a_hit_is_the_place_of_the_best_right_candidate():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.7, 0.8, 0.1]])
    right = torch.eye(1, 3, dtype=torch.bool).expand(3, 3)  # candidate 0: in first, last, second place
    found = [expected_hits(scores, right, k).tolist() for k in (1, 2, 3, 5)]
    assert found == [[1, 0, 0], [1, 0, 1], [1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("seed", range(8))
def test_ties_count_as_the_average_over_all_orders(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (3, 6), generator=generator).float()
    right = torch.rand(3, 6, generator=generator) < 0.4
    for k in (1, 2, 3, 5, 6, 9):
        expected = [by_all_orders(s, r, k) for s, r in zip(scores.tolist(), right.tolist(), strict=True)]
        assert expected_hits(scores, right, k).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("label", [0, 3, 9])
def test_a_model_that_scores_everything_alike_gets_chance_wherever_the_right_one_is_stored(label):
    right = torch.arange(10)[None] == label
    assert expected_hits(torch.ones(1, 10), right, 1).item() == pytest.approx(1 / 10)
    assert expected_hits(torch.ones(1, 10), right, 5).item() == pytest.approx(5 / 10)


def test_scores_that_are_not_numbers_never_help():
    nan, right = float("nan"), torch.tensor([[True, False, False]])
    assert expected_hits(torch.tensor([[nan, 0.0, 0.0]]), right, 1).item() == 0
    assert expected_hits(torch.tensor([[nan, nan, nan]]), right, 3).item() == 0
    assert expected_hits(torch.tensor([[1.0, nan, 0.0]]), right, 1).item() == 0
    assert expected_hits(torch.tensor([[1.0, nan, 0.0]]), right, 2).item() == 1


def test_a_query_without_a_right_candidate_is_a_miss():
    assert expected_hits(torch.rand(2, 4), torch.zeros(2, 4, dtype=torch.bool), 4).tolist() == [0, 0]


def test_no_first_place_at_all_is_refused():
    with pytest.raises(ValueError, match="k is 0"):
        expected_hits(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), 0)
