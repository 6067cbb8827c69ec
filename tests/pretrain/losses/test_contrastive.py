"""The contrastive loss against open_clip's ClipLoss, a NumPy version and its value for empty features."""

import math
import os
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.losses.contrastive import info_nce, over_chunks, similarity
from pretrain.losses.focal import focal_contrastive


def oracle_features() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    image = F.normalize(torch.randn(6, 16), dim=-1)
    return image, F.normalize(torch.randn(6, 16), dim=-1)


def naive_info_nce(image: np.ndarray, text: np.ndarray, scale: float) -> float:
    """-log of the true pair's share, averaged over rows and columns, one pair at a time."""
    total = 0.0
    for i in range(len(image)):
        row = [math.exp(scale * float(image[i] @ text[j])) for j in range(len(text))]
        column = [math.exp(scale * float(image[j] @ text[i])) for j in range(len(image))]
        total += -math.log(row[i] / sum(row)) - math.log(column[i] / sum(column))
    return total / (2 * len(image))


def test_equals_open_clip_on_the_oracle():
    image, text = oracle_features()
    loss = info_nce(image, text, 14.2857)
    torch.testing.assert_close(loss, ClipLoss()(image, text, 14.2857), atol=1e-6, rtol=1e-6)
    assert loss.item() == pytest.approx(6.858957290649414, abs=1e-6)


@pytest.mark.parametrize(("pairs", "dims", "scale"), [(1, 4, 10.0), (2, 3, 1.0), (7, 5, 14.3), (12, 32, 30.0)])
def test_equals_a_naive_version(pairs, dims, scale):
    torch.manual_seed(pairs)
    image, text = (F.normalize(torch.randn(pairs, dims), dim=-1) for _ in range(2))
    naive = naive_info_nce(image.double().numpy(), text.double().numpy(), scale)
    assert info_nce(image, text, scale).item() == pytest.approx(naive, rel=1e-5, abs=1e-6)


def test_gradients_equal_open_clips():
    ours, theirs = [], []
    for loss, grads in ((info_nce, ours), (ClipLoss(), theirs)):
        image, text = (f.requires_grad_() for f in oracle_features())
        scale = torch.tensor(14.2857, requires_grad=True)
        loss(image, text, scale).backward()
        grads += [image.grad, text.grad, scale.grad]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_uninformative_features_give_log_batch():
    same = F.normalize(torch.ones(9, 4), dim=-1)
    assert info_nce(same, same, 20.0).item() == pytest.approx(math.log(9), rel=1e-6)


def test_is_symmetric_in_image_and_text():
    image, text = oracle_features()
    assert info_nce(image, text, 5.0).item() == pytest.approx(info_nce(text, image, 5.0).item(), rel=1e-6)


def test_similarities_stay_float32_under_bfloat16_autocast():
    image, text = oracle_features()
    plain = similarity(image, text, 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert (image @ text.T).dtype == torch.bfloat16  # what would happen without care
        inside = similarity(image, text, 50.0)
        loss = info_nce(image, text, 50.0)
    assert inside.dtype == torch.float32 and torch.equal(inside, plain)
    assert torch.equal(loss, info_nce(image, text, 50.0))


def test_bfloat16_features_are_compared_in_float32():
    image, text = (f.bfloat16() for f in oracle_features())
    assert torch.equal(info_nce(image, text, 14.0), info_nce(image.float(), text.float(), 14.0))


def loss_and_gradients(dtype: torch.dtype, pairs: int = 11, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(pairs)
    image, text = (
        F.normalize(torch.randn(pairs, 6, generator=generator, dtype=dtype), dim=-1).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(20.0, dtype=dtype, requires_grad=True)
    loss = info_nce(image, text, scale, **options)
    loss.backward()
    return [loss.detach(), image.grad, text.grad, scale.grad]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 10, 11, 50])
def test_chunks_give_the_same_loss_and_gradients(dtype, tolerance, chunk_size):
    whole = loss_and_gradients(dtype)
    for a, b in zip(loss_and_gradients(dtype, chunk_size=chunk_size), whole, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("options", [{"gather": True}, {"gather": True, "chunk_size": 4}])
def test_one_process_gathers_nothing(options):
    for a, b in zip(loss_and_gradients(torch.float64, **options), loss_and_gradients(torch.float64), strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-12)


def test_chunks_of_extreme_similarities_stay_finite():
    """A scale of 1,000: exponentials of the similarities overflow, their log-sum-exps must not."""
    image, text = (f.requires_grad_() for f in oracle_features())
    loss = info_nce(image, text, 1000.0, chunk_size=2)
    loss.backward()
    torch.testing.assert_close(loss, info_nce(image, text, 1000.0))
    assert image.grad.isfinite().all() and text.grad.isfinite().all()


def test_gradients_of_chunks_by_finite_differences():
    image, text = (f[:4].double().requires_grad_() for f in oracle_features())
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *given: info_nce(*given, chunk_size=3), (image, text, scale))


class Peak(TorchDispatchMode):
    """Counts the bytes that tensors made inside hold at once; the largest count is `peak`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._storages:
                storage = tensor.untyped_storage()
                self._storages.add(storage._cdata)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self._count(-size)

    def _count(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_bytes(pairs: int, loss=info_nce, **options) -> int:
    """Of a forward and backward pass."""
    image, text = (F.normalize(torch.randn(pairs, 8), dim=-1).requires_grad_() for _ in range(2))
    with Peak() as seen:
        loss(image, text, 10.0, **options).backward()
    return seen.peak


@pytest.mark.parametrize("loss", [info_nce, focal_contrastive])
def test_memory_follows_the_chunk_not_the_square_of_the_batch(loss):
    small, large = (peak_bytes(pairs, loss, chunk_size=32) for pairs in (512, 1024))
    matrix = 4 * 1024 * 1024
    assert peak_bytes(1024, loss) > 3 * matrix  # the logits, their softmax, gradients of both
    assert large < 2.2 * small and large < 0.4 * matrix  # eight chunks of 32 x 1,024 are a quarter of it


def test_nothing_of_a_chunk_is_kept_between_forward_and_backward():
    calls = []

    def square(rows, factor):
        calls.append(len(rows))
        return (factor * rows.square()).sum()

    rows = torch.arange(5.0, requires_grad=True)
    parts = over_chunks(square, 2, (rows,), 3.0)
    assert calls == [2, 2, 1]
    sum(parts).backward()
    assert sorted(calls) == [1, 1, 2, 2, 2, 2]  # again in the backward pass
    assert torch.equal(rows.grad, 6 * rows.detach())


def test_a_negative_chunk_is_refused():
    with pytest.raises(ValueError, match="chunk_size is -2: give a number of rows, or 0 for all at once"):
        over_chunks(torch.sum, -2, (torch.ones(3),))


# In a process of its own: autograd knows only devices that were there at the first backward pass of its process.
ON_XLA = """
import sys, torch, torch_xla
from pretrain.losses.contrastive import info_nce
from pretrain.losses.focal import focal_contrastive
given, results = torch.load(sys.argv[1]), []
for loss in (info_nce, focal_contrastive):
    image, text, scale = (tensor.to(torch_xla.device()).requires_grad_() for tensor in given)
    value = loss(image, text, scale, chunk_size=4, gather=True)
    value.backward()
    torch_xla.sync()
    results.append([tensor.detach().cpu() for tensor in (value, image.grad, text.grad, scale.grad)])
torch.save(results, sys.argv[2])
"""


@pytest.mark.skipif(find_spec("torch_xla") is None, reason="torch-xla is not installed")
def test_chunks_on_xla_equal_the_whole_on_the_cpu(tmp_path):
    given = (*oracle_features(), torch.tensor(14.2857))
    torch.save(given, tmp_path / "given.pt")
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "PJRT_DEVICE": "CPU"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling takes a quarter of the time
    command = [sys.executable, "-c", ON_XLA, str(tmp_path / "given.pt"), str(tmp_path / "results.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for loss, results in zip((info_nce, focal_contrastive), torch.load(tmp_path / "results.pt"), strict=True):
        image, text, scale = (tensor.clone().requires_grad_() for tensor in given)
        value = loss(image, text, scale)
        value.backward()
        for a, b in zip(results, (value.detach(), image.grad, text.grad, scale.grad), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
