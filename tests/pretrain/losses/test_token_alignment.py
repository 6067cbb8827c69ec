"""Token alignment against cosines written out, and its extremes."""

import math

import pytest
import torch

from pretrain.losses.token_alignment import token_alignment, token_cosines


def test_it_is_the_mean_negative_cosine_of_each_image():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
    for image in range(3):
        total = 0.0
        for s, t in zip(student[image].tolist(), teacher[image].tolist(), strict=True):
            dot = sum(a * b for a, b in zip(s, t, strict=True))
            total += dot / math.sqrt(sum(a * a for a in s)) / math.sqrt(sum(b * b for b in t))
        assert token_alignment(student, teacher)[image].item() == pytest.approx(-total / 5, abs=1e-12)


def test_equal_directions_are_the_minimum_and_lengths_do_not_count():
    tokens = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(token_alignment(3 * tokens, tokens), torch.full((2,), -1.0))
    torch.testing.assert_close(token_alignment(-tokens, tokens), torch.full((2,), 1.0))
    student = (2 * tokens).requires_grad_()
    token_alignment(student, tokens).sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(tokens), atol=1e-7, rtol=0)


def test_no_gradient_reaches_the_teacher_and_half_precision_is_computed_in_float32():
    student, teacher = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    token_alignment(student, teacher).sum().backward()
    assert student.grad.any() and teacher.grad is None
    assert token_cosines(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_tokens_that_do_not_correspond_are_refused():
    with pytest.raises(ValueError, match=r"student tokens \(1, 2, 3\) and teacher tokens \(1, 3, 3\)"):
        token_alignment(torch.ones(1, 2, 3), torch.ones(1, 3, 3))
