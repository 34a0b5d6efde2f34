"""Cross-entropy in place: both paths against float64, at most twice the error of torch's own at the same precision."""

import random

import pytest
import torch
from accuracy import EPS32, assert_same
from torch.nn import functional as F

from medmax_fast.kernels import cross_entropy
from medmax_fast.kernels.blocks import override
from medmax_fast.kernels.cross_entropy import cross_entropy_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu(required=False), pytest.mark.usefixtures("bf16_to_nearest", "poisoned")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLS = ["torch", "triton"]
# Rows and vocabulary: one id, less than a block, a block, one more, odd and several blocks, the real one.
SHAPES = [(3, 1), (1, 2), (7, 50), (2, 4096), (3, 4097), (5, 9001), (2, 65536)]


def make(S, V, dtype=torch.float32, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(S, V, generator=generator) * spread).to(DEVICE, dtype)
    targets = torch.randint(0, V, (S,), generator=generator).to(DEVICE)
    weights = torch.rand(S, generator=generator).mul(2).to(DEVICE)
    weights[::3] = 0
    return logits, targets, weights


def exact(logits, targets, weights, z_loss):
    """Losses, log sum exp and gradient in float64, written out."""
    x = logits.double()
    highest = x.amax(1, keepdim=True)
    e = (x - highest).exp()
    lse = highest + e.sum(1, keepdim=True).log()
    losses = (lse - x.gather(1, targets[:, None]))[:, 0]
    onehot = F.one_hot(targets, x.shape[1])
    return losses, lse[:, 0], weights.double()[:, None] * (e / e.sum(1, keepdim=True) * (1 + 2 * z_loss * lse) - onehot)


def torch_own(logits, targets, weights, z_loss):
    """What a model would run without the kernel: an fp32 copy, F.cross_entropy, autograd, the gradient cast back."""
    leaf = logits.clone().requires_grad_()
    x = leaf.float()
    losses, lse = F.cross_entropy(x, targets, reduction="none"), x.logsumexp(1)
    ((losses + z_loss * lse**2) * weights).sum().backward()
    return losses.detach(), lse.detach(), leaf.grad


def assert_as_good_as_torch(losses, lse, gradient, logits, targets, weights, z_loss=0.0):
    right = exact(logits, targets, weights, z_loss)
    own = torch_own(logits, targets, weights, z_loss)
    assert losses.dtype == torch.float32 and gradient.dtype == logits.dtype
    for found, theirs, want in zip((losses, lse, gradient), own, right, strict=True):
        error, limit = (found.double() - want).abs(), 2 * (theirs.double() - want).abs()
        # The worst value, and of a few dozen the mean, is luck: two units in the last place are always allowed. So is
        # what fp32 makes of a row's sum, which all values of the row share.
        # A GPU's logarithm of a number near 1, the loss of a likely target, is off by two of its 24 bits.
        slack = 2 * torch.finfo(found.dtype).eps * want.abs().max() + (2 * EPS32 if found.ndim == 1 else 0)
        shared = slack if want.numel() < 500 else EPS32 * want.abs().mean()
        assert error.max() <= max(limit.max(), slack), (error.max(), limit.max(), slack)
        assert error.mean() <= limit.mean() + shared, (error.mean(), limit.mean(), shared)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, z_loss, impl):
    logits, targets, weights = make(*shape, dtype)
    gradient = logits.clone()
    losses, lse = cross_entropy_(gradient, targets, weights, z_loss, gradient=True, impl=impl)
    assert_as_good_as_torch(losses, lse, gradient, logits, targets, weights, z_loss)
    assert (gradient[::3] == 0).all() and (shape[1] == 1 or len(logits) == 1 or gradient[1].abs().max() > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_values(dtype, fresh_seed):
    """Another shape and other values on every run."""
    draw = random.Random(fresh_seed)
    logits, targets, weights = make(draw.randint(10, 40), draw.randint(1000, 20000), dtype, seed=fresh_seed)
    z_loss, gradient = draw.choice([0.0, 1e-4]), logits.clone()
    losses, lse = cross_entropy_(gradient, targets, weights, z_loss, gradient=True, impl="triton")
    assert_as_good_as_torch(losses, lse, gradient, logits, targets, weights, z_loss)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_block_of_rows_or_of_the_vocabulary_changes_only_rounding(impl, monkeypatch):
    logits, targets, weights = make(7, 333)
    monkeypatch.setattr(cross_entropy, "REF_ELEMENTS", 700)
    gradient = logits.clone()
    with override("cross_entropy", BLOCK=32):
        losses, lse = cross_entropy_(gradient, targets, weights, 1e-3, gradient=True, impl=impl)
    assert_as_good_as_torch(losses, lse, gradient, logits, targets, weights, 1e-3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradient_the_logits_stay_and_without_weights_they_are_one(dtype, impl):
    logits, targets, weights = make(5, 300, dtype)
    kept = logits.clone()
    losses, lse = cross_entropy_(kept, targets, weights, 1e-3, impl=impl)
    assert torch.equal(kept, logits) and losses.isfinite().all()
    gradient, weighted = logits.clone(), logits.clone()
    assert_same(cross_entropy_(gradient, targets, None, 1e-3, gradient=True, impl=impl)[0], losses)
    assert_same(cross_entropy_(weighted, targets, weights, 1e-3, gradient=True, impl=impl)[0], losses)
    assert_as_good_as_torch(losses, lse, gradient, logits, targets, torch.ones_like(weights), 1e-3)
    assert not torch.equal(gradient, weighted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits(dtype, impl):
    # Row 0: everything at 3e4; row 1: at -3e4; row 2: both; row 3: one far above all others, which is the target.
    logits, targets, weights = make(4, 5000, dtype)
    logits[0] += 3e4
    logits[1] -= 3e4
    logits[2] = torch.where(logits[2] > 0, 3e4, -3e4)
    logits[3, targets[3]] = 3e4
    weights[:] = 1
    gradient = logits.clone()
    losses, lse = cross_entropy_(gradient, targets, weights, gradient=True, impl=impl)
    assert_as_good_as_torch(losses, lse, gradient, logits, targets, weights)
    assert losses[3] == 0 and (gradient[3] == 0).all()
    # The guard: where a probability is exp(x - lse), the rounding of lse at 3e4 shows.
    rough = (logits[0].float() - lse[0]).exp()
    right = exact(logits, targets, weights, 0.0)[-1][0]
    away = torch.arange(5000, device=DEVICE) != targets[0]
    assert (rough - right).abs()[away].max() > 4 * (gradient[0] - right).abs()[away].max() or dtype != torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
def test_infinities_and_nan(impl):
    logits, targets, _ = make(7, 5000)
    targets[:] = 4500
    logits[0, :4200] = -torch.inf
    logits[1, 4500] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 17] = torch.nan
    logits[4, 4999] = torch.inf
    logits[5, 4500] = torch.nan
    gradient = logits.clone()
    losses, lse = cross_entropy_(gradient, targets, gradient=True, impl=impl)
    for row in (0, 6):
        weights = torch.ones(1, device=DEVICE)
        parts = (t[row : row + 1] for t in (losses, lse, gradient, logits, targets))
        assert_as_good_as_torch(*parts, weights)
    assert (gradient[0, :4200] == 0).all()
    assert losses[1] == torch.inf and gradient[1, 4500] == -1 and gradient[1].isfinite().all()
    assert losses[2:6].isnan().all() and gradient[2:6].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_and_nothing_beside_them(dtype, impl):
    logits, targets, weights = make(4, 777, dtype)
    targets[:2] = torch.tensor([0, 776])
    expected = logits.clone()
    losses, lse = cross_entropy_(expected, targets, weights, 1e-3, gradient=True, impl=impl)
    wide = torch.full((10, 1001), 7.0, dtype=dtype, device=DEVICE)
    part = wide[1:9:2, 100:877]
    part.copy_(logits)
    assert_same(cross_entropy_(part, targets, weights, 1e-3, gradient=True, impl=impl)[0], losses)
    assert_same(part, expected)
    part.fill_(7.0)
    assert (wide == 7.0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_out_of_range_gives_nan_and_touches_nothing_else(impl):
    logits, targets, weights = make(8, 100)
    # Next to each end, IGNORE, and beyond what an int32 holds, whose low half is a column.
    wrong = torch.tensor([-1, 100, -100, 2**62 + 5, -(2**63), 2**32 + 7], device=DEVICE)
    targets[1:7] = wrong
    wide = torch.full((8, 300), 7.0, device=DEVICE)
    part = wide[:, 100:200]
    part.copy_(logits)
    losses, lse = cross_entropy_(part, targets, weights, gradient=True, impl=impl)
    assert losses[1:7].isnan().all() and part[1:7].isnan().all()
    good = [0, 7]
    assert_as_good_as_torch(losses[good], lse[good], part[good].clone(), logits[good], targets[good], weights[good])
    part.fill_(7.0)
    assert (wide == 7.0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_no_rows(impl):
    for gradient in (False, True):
        logits = torch.ones(0, 9, dtype=torch.bfloat16, device=DEVICE)
        targets = torch.ones(0, dtype=torch.int64, device=DEVICE)
        for found in cross_entropy_(logits, targets, gradient=gradient, impl=impl):
            assert found.shape == (0,) and found.dtype == torch.float32


X, T, W = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2)


@pytest.mark.parametrize(
    ("logits", "targets", "weights", "impl", "message"),
    [
        (X[0], T, W, "auto", r"logits \[3\]"),
        (X[:, :0], T, W, "auto", "V of at least 1"),
        (X.double(), T, W, "auto", "float64"),
        (X, T[:1], W, "auto", r"targets \[1\]"),
        (X, T.int(), W, "auto", "int32"),
        (X, T, W[:1], "auto", r"weights \[1\]"),
        (X, T, W.half(), "auto", "weights .*float16"),
        (X, T, torch.ones(2, 2)[:, 0], "auto", "contiguous"),
        (X, T, W.to("meta"), "auto", "weights on meta"),
        (torch.ones(3, 2).t(), T, W, "auto", "contiguous rows"),
        (torch.ones(1, 3).expand(2, 3), T, W, "auto", "do not overlap"),
        (X.clone().requires_grad_(), T, W, "auto", "autograd follows"),
        (X, T, W, "cuda", "impl 'cuda'"),
    ],
)
def test_bad_arguments(logits, targets, weights, impl, message):
    before = logits.detach().clone()
    with pytest.raises(ValueError, match=message):
        cross_entropy_(logits, targets, weights, gradient=True, impl=impl)
    assert torch.equal(before, logits)


def test_the_logits_of_a_leaf_may_be_written_without_grad():
    logits, targets, _ = make(2, 5)
    logits.requires_grad_()
    with torch.no_grad():
        cross_entropy_(logits, targets, gradient=True)
    assert logits.sum(1).abs().max() < 1e-6
