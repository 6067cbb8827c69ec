"""Does a right answer come among the first k? With equal scores: its probability when ties are broken at random.

A model that gives every candidate the same score so gets exactly chance, in whatever order the candidates are stored
(McSherry and Najork, Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied Scores,
ECIR 2008). Suffixes: Q queries, C candidates.
"""

import torch


def expected_hits(scores_QC: torch.Tensor, right_QC: torch.Tensor, k: int) -> torch.Tensor:
    """Probability that at least one right candidate is among the k highest, equal scores in random order.

    Args:
        scores_QC: larger is better. A score that is not a number ranks below a number for a right candidate and above
            it for a wrong one, so a broken model never gains by it.
        right_QC: bool, which candidates are right; a row without any is a miss.
        k: at least 1; more than C counts as C.

    Returns:
        (Q,) float64 in 0–1; 0 or 1 where the best right candidate has no equal.

    Raises:
        ValueError: if k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}: the number of first places is at least 1")
    best_Q1 = scores_QC.masked_fill(~right_QC, -torch.inf).amax(1, keepdim=True)
    tied_QC = (scores_QC == best_Q1) & torch.isfinite(best_Q1)
    tied = tied_QC.sum(1)
    tied_wrong = (tied_QC & ~right_QC).sum(1)
    ahead = scores_QC.shape[1] - (scores_QC < best_Q1).sum(1) - tied
    places = (min(k, scores_QC.shape[1]) - ahead).clamp(min=0)
    # Drawing `places` of the tied candidates without replacement: the chance that all of them are wrong.
    miss = torch.ones(len(scores_QC), dtype=torch.float64, device=scores_QC.device)
    for drawn in range(min(k, scores_QC.shape[1])):
        share = (tied_wrong - drawn).clamp(min=0).double() / (tied - drawn).clamp(min=1)
        miss = torch.where((drawn < places) & (tied > 0), miss * share, miss)
    return 1 - miss
