"""What the public function of every kernel decides first: the kernel, or the torch reference beside it."""

import torch

try:
    import triton
except ImportError:
    triton = None

# TRITON_INTERPRET=1, read by triton when a kernel is defined: kernels then take CPU tensors, but are far too slow to be
# chosen by "auto".
INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def use_triton(impl: str, tensor: torch.Tensor) -> bool:
    """Whether `impl` means the kernel for tensors where `tensor` is; "auto" does so on a GPU.

    Raises ValueError for another word than "auto", "triton" or "torch", RuntimeError where "triton" cannot run.
    """
    if impl == "auto":
        return tensor.is_cuda and triton is not None and not INTERPRETED
    if impl == "torch":
        return False
    if impl != "triton":
        raise ValueError(f"impl {impl!r}: expected 'auto', 'triton' or 'torch'")
    if triton is None:
        raise RuntimeError("impl='triton': triton is not installed (pip install triton, or use impl='auto')")
    if not tensor.is_cuda and not INTERPRETED:
        raise RuntimeError(f"impl='triton': the tensors are on {tensor.device}, expected a GPU (or TRITON_INTERPRET=1)")
    return True
