"""What is done on a device, counted as torch dispatches it: operations, bytes, FLOP, host syncs, memory held.

An operation is what torch dispatches that is no view: on a GPU a kernel, sometimes a few. Its bytes are those of the
tensors that it reads and writes, each once; of a table that rows are looked up in, those rows. cuDNN adds a bias in a
pass of its own, which is counted as one (torch's Convolution.cpp). A kernel of Triton reads or writes each tensor once
unless PASSES says otherwise. FLOP are of products and convolutions, two for a multiplication with an addition; of our
kernels and of packed attention none.
"""

import contextlib
import itertools
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# The host must wait for their results: how many values there are, or the values.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Rows or values of the first tensor, chosen by another one.
LOOKUPS = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather", "aten::index_put_", "aten::scatter_"}
# The first tensor is written only.
WRITES = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_"}
# Products that a value of the result is the sum of.
SUMMED: dict = {
    **dict.fromkeys((aten.mm, aten.bmm), lambda arguments: arguments[0].shape[-1]),
    **dict.fromkeys((aten.addmm, aten.addmm_, aten.baddbmm), lambda arguments: arguments[1].shape[-1]),
    aten.convolution: lambda arguments: arguments[1][0].numel(),
}
# Reads and writes of an argument of our kernels, where it is not one: 0 for tables of which a few values are looked up.
PASSES = {
    "_cross_entropy_kernel": {"logits_ptr": 3},
    "_add_rms_norm_kernel": {"x_ptr": 2},
    "_norm_rope_store_kernel": {"k_ptr": 0, "v_ptr": 0, "cos_ptr": 0, "sin_ptr": 0},
    "_pick_text_kernel": {"seen_ptr": 0},
}


@dataclass
class Count:
    """What was done: operations, bytes and FLOP by name, waits of the host by name and place in the code."""

    operations: Counter = field(default_factory=Counter)
    moved: Counter = field(default_factory=Counter)
    flop: Counter = field(default_factory=Counter)
    syncs: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    # Most bytes of all tensors that were held meanwhile.
    peak: int = 0

    def add(self, other: "Count") -> None:
        for name in ("operations", "moved", "flop", "syncs", "waits"):
            getattr(self, name).update(getattr(other, name))


class Tally(TorchDispatchMode):
    """Counts into `count` what is done on CUDA tensors; `held`: bytes of all tensors there."""

    def __init__(self):
        super().__init__()
        self.count = Count()
        self.held = 0
        # Every value that the host asks for, and the share of the cache's pages that paged attention reads.
        self.answer: float = 1
        self.seen = 1.0
        self._capturing = False
        self._storages: weakref.WeakSet = weakref.WeakSet()

    @contextlib.contextmanager
    def apart(self) -> Iterator[Count]:
        """Count what is done inside by itself."""
        outer, self.count = self.count, Count(peak=self.held)
        try:
            yield self.count
        finally:
            outer.peak = max(outer.peak, self.count.peak)
            self.count = outer

    @contextlib.contextmanager
    def capture(self) -> Iterator[Count]:
        """The same for a graph, in which the host must not wait."""
        self._capturing = True
        try:
            with self.apart() as count:
                yield count
        finally:
            self._capturing = False

    def add(self, count: Count) -> None:
        self.count.add(count)

    def sync(self, what: str) -> None:
        """The host waits for all that was launched; RuntimeError while a graph is captured, as on a GPU."""
        if self._capturing:
            raise RuntimeError(f"{what} at {_place()}, while a CUDA graph is captured")
        self.count.syncs[f"{what} at {_place()}"] += 1

    def wait(self, what: str) -> None:
        """The host waits for a stream or event, not for all."""
        self.count.waits[f"{what} at {_place()}"] += 1

    def launched(self, kernel: str, arguments: dict) -> None:
        passes = PASSES.get(kernel, {})
        if kernel == "_paged_attention_kernel":
            passes = {"k_ptr": self.seen, "v_ptr": self.seen}
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        self._done(kernel, int(sum(passes.get(name, 1) * _nbytes(tensor) for name, tensor in tensors.items())))

    def _done(self, name: str, moved: int, flop: int = 0, operations: int = 1) -> None:
        self.count.operations[name] += operations
        self.count.moved[name] += moved
        self.count.flop[name] += flop

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        # There is no page-locked memory without a driver.
        if func in (aten.pin_memory.default, aten._pin_memory.default, aten.record_stream.default):
            return args[0]
        if func.namespace == "medmax":
            # One operation for torch, and what it is made of for us.
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **kwargs)
        if func is not torch.ops.prim.device.default:
            # In inference mode operations made of others come here whole.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        kwargs.pop("pin_memory", None)
        given = args, {name: value for name, value in kwargs.items() if name != "out"}
        inputs = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(tensor.is_cuda for tensor in inputs)
        if on_gpu and func in WAITING:
            self.sync(func.name())
        if func is aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            kind: type = bool if args[0].dtype == torch.bool else float if args[0].is_floating_point() else int
            return kind(self.answer)
        if on_gpu and func is aten.equal.default:
            return True
        if on_gpu and func.overloadpacket in INDEXING:
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                self.sync("an index of booleans")
            # x[i] = 1 makes a tensor of the host out of 1, which torch copies (TensorAdvancedIndexing.cpp).
            if any(not tensor.is_cuda for tensor in inputs):
                self.sync(f"{func.name()} with a tensor of the host")
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in outputs:
            self._hold(tensor)
        self._copied(func, args, kwargs, outputs)
        if (on_gpu or any(tensor.is_cuda for tensor in outputs)) and not _only_looks(func):
            moved = _traffic(func, inputs, outputs)
            flop = 2 * out.numel() * SUMMED[func.overloadpacket](args) if func.overloadpacket in SUMMED else 0
            bias = func is aten.convolution.default and args[2] is not None
            self._done(func.name(), moved, flop)
            if bias:
                self._done("bias of a convolution", 2 * _nbytes(out))
        return out

    def _copied(self, func, args, kwargs, outputs) -> None:
        """Copies between host and device for which the host waits."""
        if func is aten._to_copy.default:
            source, target, free = args[0], outputs[0], kwargs.get("non_blocking", False)
        elif func is aten.copy_.default:
            source, target, free = args[1], args[0], (*args, False)[2]
        else:
            return
        if source.device != target.device and not free:
            self.sync(f"copy from {source.device.type} to {target.device.type}")

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if not tensor.is_cuda or storage in self._storages:
            return
        size = storage.nbytes()
        self._storages.add(storage)
        self.held += size
        self.count.peak = max(self.count.peak, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size


def _only_looks(func) -> bool:
    """Views and allocations: nothing runs on the device."""
    returns, takes = func._schema.returns, func._schema.arguments
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    name = func._schema.name
    return (aliases and not any(a.alias_info and a.alias_info.is_write for a in takes)) or name in (
        "aten::empty",
        "aten::empty_strided",
        "aten::empty_like",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::detach",
        "aten::_unsafe_view",
        "aten::lift_fresh",
        "prim::device",
    )


def _traffic(func, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    name = func._schema.name
    if name in LOOKUPS:
        # As many values are read as written; one that works in place ends with the values.
        values = inputs[-1:] if name.endswith("_") else outputs
        return 2 * sum(map(_nbytes, values)) + sum(map(_nbytes, inputs[1:]))
    if name in WRITES:
        inputs = inputs[1:]
    return sum(map(_nbytes, itertools.chain(inputs, outputs)))


def _nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's values, those that are there several times (strides of 0) once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def _place() -> str:
    """File and function of this project's code that was left last."""
    frames = [f for f in traceback.extract_stack() if "medmax_fast" in f.filename or "/kernels/" in f.filename]
    frames = [f for f in frames if "/benchmarks/" not in f.filename and "site-packages" not in f.filename] or frames
    return f"{'/'.join(frames[-1].filename.split('/')[-2:])}, {frames[-1].name}" if frames else "the caller"
