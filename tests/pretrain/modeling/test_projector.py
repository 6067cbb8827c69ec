"""Projectors and their batch norm (over several processes: tests/distributed/test_clip_rocket.py)."""

import pytest
import torch
from torch import nn

from pretrain.modeling.projector import GlobalBatchNorm, Projector


def kinds(projector: Projector) -> list[str]:
    return [type(part).__name__ for part in projector]


def test_a_projector_is_linear_batch_norm_and_relu_in_turn():
    projector = Projector(5, 7, 3)
    assert kinds(projector) == ["Linear", "GlobalBatchNorm", "ReLU"] * 2 + ["Linear"]
    assert [tuple(p.weight.shape) for p in projector if isinstance(p, nn.Linear)] == [(7, 5), (7, 7), (3, 7)]
    assert [p.bias is not None for p in projector if isinstance(p, nn.Linear)] == [False, False, True]
    assert kinds(Projector(5, 7, 3, layers=1)) == ["Linear"] and Projector(5, 7, 3, layers=1)[0].bias is None


@pytest.mark.parametrize(("last", "affine"), [("affine", True), ("plain", False)])
def test_the_last_norm_standardises(last, affine):
    torch.manual_seed(0)
    projector = Projector(5, 7, 3, last_norm=last)
    assert projector[-1].affine is affine
    rows = projector(torch.randn(64, 5))
    torch.testing.assert_close(rows.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.var(0, unbiased=False), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("affine", [True, False])
def test_statistics_exchanged_with_a_copy_are_torchs_over_both_halves(affine):
    """A "process" that sees the other half of the batch: its gather is given what the other would send."""
    torch.manual_seed(0)
    rows, reference = torch.randn(10, 4, dtype=torch.float64), nn.BatchNorm1d(4, affine=affine).double()
    mine, theirs = rows[:5], rows[5:]
    sent = [theirs.mean(0, keepdim=True), (theirs - rows.mean(0)).square().mean(0, keepdim=True)]
    norm = GlobalBatchNorm(4, affine, gather=lambda own: torch.cat([own, sent.pop(0)])).double()
    torch.testing.assert_close(norm(mine), reference(rows)[:5])
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)


def test_half_precision_rows_are_normalised_in_single():
    norm = GlobalBatchNorm(4)
    with torch.autocast("cpu", torch.bfloat16):
        rows = norm(torch.randn(8, 4).bfloat16() + 100)
    assert rows.dtype == torch.float32 and rows.mean(0).abs().max() < 1e-3


def test_what_cannot_be_built_is_named():
    with pytest.raises(ValueError, match="layers is 0"):
        Projector(5, 7, 3, layers=0)
    with pytest.raises(ValueError, match="'batch': use none, affine or plain"):
        Projector(5, 7, 3, last_norm="batch")
