"""The self-tests, run in a process of their own.

    python -m medmax_fast.doctor.selftest          # one line of JSON per test, as it ends

Of their own, because a kernel that fails leaves no usable GPU behind in its process, and because without a GPU Triton
interprets kernels only if TRITON_INTERPRET=1 is set before it is imported.
"""

import json
import math
import os
import subprocess
import time
from collections.abc import Callable

import torch

from medmax_fast.doctor.cases import EXTENSION, KERNELS, Draw, Found
from medmax_fast.doctor.child import answers

# What a kernel that does not work here may raise, beside Triton's own.
ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
# Triton compiles what starts a kernel with the C compiler, in a process of its own.
ERRORS += (OSError, RuntimeError, TypeError, ValueError, subprocess.SubprocessError)


def main() -> None:
    """Print the outcome of every test that can run here."""
    out, device = answers(), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from medmax_fast.kernels.launch import INTERPRETED, triton

    tests = [(name, test, "C++", "cpu") for name, test in EXTENSION.items()]
    if triton is not None:
        # Also beside a GPU, if the user has set it.
        runs, device = ("Triton, interpreted", "cpu") if INTERPRETED else ("Triton", device)
        tests += [(name, test, runs, device) for name, test in KERNELS.items()]
    print(json.dumps({"tests": len(tests)}), file=out)
    for test in tests:
        print(json.dumps(run_test(*test)), file=out)


def run_test(name: str, test: Callable[[Draw], Found], runs: str, device: str) -> dict:
    """test, runs (what was tested), passed, difference and allowed (None if it failed before), seconds, error."""
    from medmax_fast.kernels.launch import triton

    errors = ERRORS if triton is None else (*ERRORS, triton.TritonError)
    start = time.monotonic()
    # Memory that is allocated and not filled holds NaN, or the largest integer.
    torch.use_deterministic_algorithms(True, warn_only=True)
    difference, allowed, error = None, None, ""
    try:
        difference, allowed = test(Draw(device))
        if not math.isfinite(difference):
            difference, error = None, "values that are not finite"
    except errors as problem:
        error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
    finally:
        torch.use_deterministic_algorithms(False)
    passed = difference is not None and allowed is not None and difference <= allowed
    row = {"test": name, "runs": runs, "passed": passed, "difference": difference, "allowed": allowed}
    return row | {"seconds": round(time.monotonic() - start, 3), "error": error}


if __name__ == "__main__":
    main()
