"""A picture not yet added up: what a convolution made, its bias and a residual, until someone reads the sum.

On a GPU each of these additions is a pass over all values of its own. Who reads the sum next can do them on the way:
group_norm.py does. Here are the value that is handed on and what it means, in plain torch.

Shapes: B pictures, C channels, H x W pixels.
"""

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Sum:
    """A picture not yet added up: (x + shift) + (residual + residual_shift), any of which but x may be missing.

    x_BCHW, residual_BCHW: [B, C, H, W], alike in shape, dtype and device. shift, residual_shift: [C] each, float32 or
    the pictures' dtype, contiguous: biases that convolutions left out. Where something is added to x its memory
    belongs to the sum, which is written over it if it is channels last without gaps: a sum is read once.
    """

    def __init__(
        self,
        x_BCHW: torch.Tensor,
        shift: torch.Tensor | None = None,
        residual_BCHW: torch.Tensor | None = None,
        residual_shift: torch.Tensor | None = None,
    ):
        self.x_BCHW, self.shift = x_BCHW, shift
        self.residual_BCHW, self.residual_shift = residual_BCHW, residual_shift

    def __add__(self, other: "torch.Tensor | Sum") -> "Sum":
        """The sum of two pictures, neither of which has a residual yet."""
        other = other if isinstance(other, Sum) else Sum(other)
        assert self.residual_BCHW is None and other.residual_BCHW is None
        return Sum(self.x_BCHW, self.shift, other.x_BCHW, other.shift)

    # Whatever comes first, the residual is what is not written over.
    __radd__ = __add__

    @property
    def complete(self) -> bool:
        """Whether nothing is added to x."""
        return self.shift is None and self.residual_BCHW is None


def sum_ref(x: Sum) -> torch.Tensor:
    """The sum in plain torch: in fp32, rounded once to the pictures' dtype; x itself where nothing is added to it."""
    if x.complete:
        return x.x_BCHW
    total = _shifted(x.x_BCHW.float(), x.shift)
    if x.residual_BCHW is not None:
        total = total + _shifted(x.residual_BCHW.float(), x.residual_shift)
    return total.to(x.x_BCHW.dtype)


def _shifted(x_BCHW: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    return x_BCHW if shift is None else x_BCHW + shift.float()[:, None, None]


def check_sum(x: Sum) -> None:
    """Raises ValueError for parts that do not fit the picture that they are added to."""
    x_BCHW, residual = x.x_BCHW, x.residual_BCHW
    alike = f"{list(x_BCHW.shape)} of {x_BCHW.dtype} on {x_BCHW.device}"
    if x_BCHW.ndim != 4 or x_BCHW.dtype not in FLOAT_DTYPES:
        raise ValueError(f"input {alike}: expected [B, C, H, W] of float32, float16 or bfloat16")
    C = x_BCHW.shape[1]
    if residual is not None:
        found = f"{list(residual.shape)} of {residual.dtype} on {residual.device}"
        if found != alike:
            raise ValueError(f"residual {found}: expected {alike}")
    elif x.residual_shift is not None:
        raise ValueError("residual_shift without a residual")
    for shift in (x.shift, x.residual_shift):
        if shift is not None and (shift.shape != (C,) or shift.device != x_BCHW.device):
            raise ValueError(f"shift {list(shift.shape)} on {shift.device}: expected [{C}] on {x_BCHW.device}")
        if shift is not None and shift.dtype not in (x_BCHW.dtype, torch.float32):
            raise ValueError(f"shift {shift.dtype}: expected float32 or the input's {x_BCHW.dtype}")
