"""How far a kernel's result may be from the exact one, and from that of another compilation of the same kernel."""

import torch

# Distance of neighbouring fp32 numbers at 1.
EPS32 = 2.0**-23


def assert_as_good(found, own, exact, rows: int, largest: float | None = None) -> None:
    """`found` is within twice the error that torch's `own` result has in the same dtype, on average and at worst.

    exact: float64, of the same shape. What is luck comes on top. At worst: one rounding to the dtype of the largest
    value (`largest`, else that of `exact`) and three of fp32, which all is computed in, with a GPU's quick divisions
    and exponentials. On average: what as many draws leave to chance as there are rows, whose values share an error of
    fp32 each, and as there are values, which are rounded one by one.
    """
    assert found.shape == own.shape == exact.shape and found.dtype == own.dtype and exact.dtype == torch.float64
    away, own_away = ((y.double() - exact).abs() for y in (found, own))
    sizes, eps = exact.abs(), torch.finfo(found.dtype).eps
    largest = sizes.max() if largest is None else largest
    worst = 2 * own_away.max() + largest * (eps + 3 * EPS32)
    mean = 2 * own_away.mean() + sizes.mean() * (4 * EPS32 / rows**0.5 + eps / sizes.numel() ** 0.5)
    assert away.max() <= worst, (away.max().item(), own_away.max().item(), worst.item())
    # The mean of one value is the worst.
    assert away.numel() == 1 or away.mean() <= mean, (away.mean().item(), own_away.mean().item(), mean.item())


def assert_same(found, expected) -> None:
    """Equal to the bit in the interpreter (NaN to NaN); on a GPU to a few units in the last place of the largest value.

    There other strides, another alignment or a result left out are another compilation, which may add up in another
    order and fuse other operations. What one compilation computes twice is compared with torch.equal instead.
    """
    assert found.shape == expected.shape and found.dtype == expected.dtype
    slack = 0.0
    if found.is_cuda:
        slack = 8 * torch.finfo(found.dtype).eps * expected.detach().nan_to_num(0).abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=slack, equal_nan=True)
