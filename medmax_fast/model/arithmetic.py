"""torch's global switches of arithmetic, set for the time of a call and put back."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextlib.contextmanager
def repeatable(device: torch.device, convolutions: str = "ieee", exact_attention: bool = True) -> Iterator[None]:
    """On a GPU: fp32 matrix products without TF32, and the same cuDNN algorithms in every run.

    convolutions: `ieee`, or `tf32` for torch's default. exact_attention: no fused attention kernels, which make fp32
    products of their own out of TF32 ones.
    """
    conv, matmul, cudnn = torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.cudnn
    before = conv.fp32_precision, matmul.fp32_precision, cudnn.benchmark, cudnn.deterministic
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            if exact_attention:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            conv.fp32_precision, matmul.fp32_precision = convolutions, "ieee"
            cudnn.benchmark, cudnn.deterministic = False, True
            yield
        finally:
            conv.fp32_precision, matmul.fp32_precision, cudnn.benchmark, cudnn.deterministic = before
