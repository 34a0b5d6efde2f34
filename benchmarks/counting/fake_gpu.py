"""A GPU that computes nothing: the CUDA side of the code runs on fake tensors, which have shapes and no values.

`prepare()` must come before torch is imported, so it runs in a process of its own (python -m benchmarks.count); then
`with fake_gpu() as tally:` makes torch believe in one H200. Tensors of any size cost no memory, Triton's kernels are
not launched but told to the tally, streams and events do nothing, and a CUDA graph counts on replay what was counted
when it was captured. Where the code asks the device for a value, the tally counts a host sync and answers 1 (or True).

For a build of torch without CUDA only.
"""

import contextlib
import ctypes
import importlib.util
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

CAPABILITY, NAME = (9, 0), "NVIDIA H200"
# 141 GB, as NVIDIA's data sheet has it.
MEMORY = 141 * 10**9


def prepare() -> None:
    """Compile and load what torch lacks; RuntimeError with what the compiler said."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise RuntimeError("torch is not installed")
    torch = Path(found.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/fake_gpu.so"
        command = [
            "g++",
            "-shared",
            "-fPIC",
            "-std=c++20",
            f"-I{torch}/include",
            str(Path(__file__).with_suffix(".cpp")),
        ]
        command += ["-o", library, f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-lc10", "-ltorch_cpu"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"g++: {run.stderr[-2000:]}")
        # Global: torch's own library looks the functions up here first.
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


class Stream:
    """Of torch.cuda: all work is done in order anyway."""

    cuda_stream = 0

    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other: "Stream") -> None:
        pass


class Event:
    def __init__(self, *_, **__):
        pass

    def record(self, *_) -> None:
        pass


@contextlib.contextmanager
def fake_gpu() -> Iterator:
    """Code inside finds one GPU; gives the Tally of what is done on it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime.jit import JITFunction

    from benchmarks.counting.tally import Tally

    if torch.version.cuda:
        raise RuntimeError(f"torch {torch.__version__}: counting on a GPU that is not there needs a build without CUDA")
    tally = Tally()

    class Fake(FakeTensorMode):
        # Values of the host are not copied to a real GPU.
        avoid_device_init = True

    class Graph:
        def __init__(self):
            self.counted = None

        def pool(self):
            return 0

        def replay(self) -> None:
            tally.add(self.counted)

    @contextlib.contextmanager
    def capture(graph: Graph, **_) -> Iterator[None]:
        with tally.capture() as graph.counted:
            yield

    waits = {name: lambda *_, name=name: tally.wait(name) for name in ("stream", "event")}
    stream = type("Stream", (Stream,), {"synchronize": waits["stream"]})
    event = type("Event", (Event,), {"synchronize": waits["event"]})
    current = stream()
    parts = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_name": lambda *_: NAME,
        "get_device_properties": lambda *_: SimpleNamespace(name=NAME, total_memory=MEMORY, major=9, minor=0),
        "mem_get_info": lambda *_: (MEMORY - tally.held, MEMORY),
        "memory_allocated": lambda *_: tally.held,
        "memory_reserved": lambda *_: tally.held,
        "max_memory_allocated": lambda *_: tally.count.peak,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: tally.sync("torch.cuda.synchronize"),
        "current_stream": lambda *_: current,
        "Stream": stream,
        "Event": event,
        "CUDAGraph": Graph,
        "graph": capture,
        **{name: lambda *_: contextlib.nullcontext() for name in ("stream", "device", "device_of")},
    }

    def launch(kernel: JITFunction, *arguments, grid, warmup, **named) -> None:
        tally.launched(kernel.__name__, {**dict(zip(kernel.arg_names, arguments, strict=False)), **named})

    def apply(module: torch.nn.Module, change, recurse: bool = True) -> torch.nn.Module:
        """What Module.to does; torch's own swaps tensors, which fake ones do not allow."""
        for child in module.children():
            child._apply(change)
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(change(weight.detach()), weight.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
        return module

    with contextlib.ExitStack() as stack:
        for name, part in parts.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, part))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", apply))
        # The address of a fake tensor is 0, which tells a view from a copy no less.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
        # Arrays of the host come into it as they are.
        stack.enter_context(Fake(allow_non_fake_inputs=True))
        stack.enter_context(tally)
        yield tally
