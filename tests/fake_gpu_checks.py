"""What the tally of benchmarks/counting says of small pieces of code, as JSON; a process of its own of test_count."""

import contextlib
import json

from benchmarks.counting.fake_gpu import fake_gpu, prepare

prepare()

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch._subclasses.fake_tensor import DynamicOutputShapeException  # noqa: E402
from torch.nn import functional as F  # noqa: E402

KEYS = ("operations", "moved", "flop", "syncs", "waits")


@triton.jit
def _double_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, mask=i < size), mask=i < size)


def launch(x, out):
    _double_kernel[(8,)](x, out, 1024, BLOCK=128)


def graph(x):
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        x.add_(x)
    for _ in range(3):
        captured.replay()


def refused(x):
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x[x > 0] = x.sum()
    except RuntimeError as error:
        assert "while a CUDA graph is captured" in str(error)
    else:
        raise AssertionError("a graph was captured with a wait in it")


def backward(x, weight):
    weight.requires_grad_()
    (x @ weight).sum().backward()
    assert weight.grad.is_cuda and weight.grad.shape == weight.shape


def main() -> None:
    pieces = {
        # 1,024 float32 on the GPU each.
        "add": lambda x, y: x + y,
        "in place": lambda x, y: x.add_(y),
        "out": lambda x, y: torch.add(x, y, out=y),
        "view": lambda x, _: x.view(2, 512)[0].t(),
        "fill": lambda x, _: x.zero_(),
        "expanded": lambda x, _: x + x[:1].expand(1024),
        "rows": lambda x, i: x.view(256, 4)[torch.zeros(8, dtype=torch.int64, device="cuda")],
        "item": lambda x, _: x.sum().item(),
        "where": lambda x, _: x.nonzero(),
        "booleans": lambda x, _: x[x > 0],
        "element": lambda x, _: x.__setitem__(0, 1),
        "element of an index": lambda x, i: x.__setitem__(torch.zeros(1, dtype=torch.int64, device="cuda"), 1),
        "slice": lambda x, _: x.__setitem__(slice(0, 2), 1),
        "to the host": lambda x, _: x.cpu(),
        "from the host": lambda x, _: torch.zeros(4).to("cuda"),
        "from pinned memory": lambda x, _: torch.zeros(4).pin_memory().to("cuda", non_blocking=True),
        "made of a list": lambda x, _: torch.tensor([1.0, 2.0], device="cuda"),
        "synchronize": lambda x, _: torch.cuda.synchronize(),
        "event": lambda x, _: torch.cuda.Event().synchronize(),
        "kernel": launch,
        "graph": lambda x, _: graph(x),
        "refused": lambda x, _: refused(x),
        "product": lambda x, y: x.view(32, 32) @ y.view(32, 32),
        "backward": lambda x, y: backward(x.view(32, 32), y.view(32, 32).detach()),
        "convolution": lambda x, y: F.conv2d(x.view(1, 4, 16, 16), y[:144].view(4, 4, 3, 3), padding=1),
        "with bias": lambda x, y: F.conv2d(x.view(1, 4, 16, 16), y[:144].view(4, 4, 3, 3), y[:4], padding=1),
    }
    found = {}
    with fake_gpu() as tally:
        for name, piece in pieces.items():
            x, y = (torch.empty(1024, device="cuda") for _ in range(2))
            for mode in ("", "inference: "):
                if mode and name in ("backward", "refused"):
                    continue
                # How many values there are is not known of fake ones.
                unknown = contextlib.suppress(DynamicOutputShapeException)
                with torch.inference_mode(bool(mode)), tally.apart() as count, unknown:
                    piece(x, y)
                found[mode + name] = {key: sum(getattr(count, key).values()) for key in KEYS}
        before = tally.held
        with tally.apart() as count:
            kept = [torch.empty(1 << 20, device="cuda") for _ in range(3)]
            kept = kept[:1]
        found["memory"] = {"peak": count.peak - before, "held": tally.held - before, "kept": len(kept)}
    print(json.dumps(found))


main()
