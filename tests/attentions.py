"""Attention implementations that tests run on a GPU, and why one of them cannot run on the machine at hand."""

from importlib.util import find_spec

import pytest
import torch

DTYPES_16 = (torch.bfloat16, torch.float16)
# As in model/attention.py; the module that each needs.
ON_A_GPU = {
    "sdpa": "torch",
    "torch_varlen": "torch.nn.attention.varlen",
    "flash_attn": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
}


def need(name: str) -> None:
    """Skip the test where the attention of this name cannot run; "auto" always can."""
    if name == "auto":
        return
    if find_spec(ON_A_GPU[name]) is None:
        pytest.skip(f"{ON_A_GPU[name]} is not installed")
    if name == "flash_attn_3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FlashAttention 3 is for capability 9")
