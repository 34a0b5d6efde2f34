"""What one step does on the device: feed ids, pick the next ones; captured once per batch size as CUDA graphs.

Every stream lives in a slot. All that a step needs of it lies in tensors indexed by slot (`Slots`), so a step is a
function of a list of slots alone: nothing comes from the host but that list, and that only when it changes. Three
functions make a step: `decode` feeds the last id of each stream, `pick_text` and `pick_image` choose the next from the
state that it left. On a GPU each is captured for a few batch sizes and replayed; short lists are filled up with slot
0, which belongs to nobody. On a CPU the same functions run as they are.

A text stream that picks boi or eos falls asleep on the device: until the host, which reads the ids one step later, has
seen it, the stream is fed the same id at the same place again, and its picks are -1. So nobody waits for the host, and
the host for no more than the step before the last.

Shapes: S slots, B streams of a step, R samples that pick, V vocabulary, C model width, P pages of a stream.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed

from medmax_fast.generate import grammar
from medmax_fast.generate.cache import KVCache, to_device
from medmax_fast.generate.pages import PAGE, Lease
from medmax_fast.kernels.sampling import pick_image, pick_text
from medmax_fast.model.layout import MAX_POSITIONS
from medmax_fast.vocab import TextTokenizer

# Batch sizes that graphs are captured for.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
MAX_STREAMS = BUCKETS[-1]


class Slots:
    """Per slot: the last id and its position, whether the stream is awake, its pages, and how its sample picks."""

    def __init__(self, vocab_size: int, width: int, device: torch.device, dtype: torch.dtype):
        count = MAX_STREAMS + 1

        def zeros(*size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(count, *size, dtype=dtype, device=device)

        self.device = device
        # Of a Python number torch makes a tensor of the host: to copy that into a place of its own is a wait for the
        # device, and an error while a graph is captured.
        self.true = torch.ones((), dtype=torch.bool, device=device)
        self.last_S, self.position_S = zeros(dtype=torch.int64), zeros(dtype=torch.int64)
        self.awake_S = zeros(dtype=torch.bool)
        self.table_SP = zeros(MAX_POSITIONS // PAGE, dtype=torch.int32)
        self.hidden_SC = zeros(width, dtype=dtype)
        self.seen_SV = zeros(vocab_size, dtype=torch.bool)
        # boi may be picked for positions below this.
        self.boi_limit_S = zeros(dtype=torch.int64)
        # (repetition penalty, temperature, top-p) and (guidance of text, of image, temperature, top-p).
        self.text_S3, self.image_S4 = zeros(3, dtype=torch.float32), zeros(4, dtype=torch.float32)
        self.text_S3[0], self.image_S4[0] = 1, 1
        # The random number that decides the id at a position.
        self.uniform_SP = zeros(MAX_POSITIONS, dtype=torch.float32)

    def open(self, slot: int, lease: Lease) -> None:
        """Give a slot its pages."""
        row = np.zeros(self.table_SP.shape[1], dtype=np.int32)
        row[: len(lease.pages)] = lease.pages
        self.table_SP[slot] = to_device(torch.from_numpy(row), self.device)

    def configure(self, slot: int, request, ids: list[int], rules: grammar.Rules, uniform: np.ndarray | None) -> None:
        """How the sample of a slot picks; ids: its prompt; uniform: float32 [positions], None where it is greedy."""
        cool = 0.0 if uniform is None else 1.0
        text = (request.repetition_penalty, cool * request.temperature, request.top_p)
        image = (request.guidance_text, request.guidance_image, cool * request.image_temperature, request.image_top_p)
        self.text_S3[slot] = to_device(torch.tensor(text), self.device)
        self.image_S4[slot] = to_device(torch.tensor(image), self.device)
        self.boi_limit_S[slot].fill_(grammar.image_limit(rules))
        if uniform is not None:
            self.uniform_SP[slot] = to_device(torch.from_numpy(uniform), self.device)
        self.seen_SV[slot].fill_(False)
        self.seen_SV[slot, to_device(torch.tensor(ids), self.device)] = self.true

    def place(self, slots: list[int], last: list[int], positions: list[int]) -> None:
        """Say what the last ids of these streams are, and wake them."""
        index, last, positions = to_device(torch.tensor([slots, last, positions]), self.device)
        self.last_S[index], self.position_S[index], self.awake_S[index] = last, positions, self.true

    def see(self, slot: int, new: int) -> None:
        """Count an id as part of a slot's sequence that was not picked here."""
        self.seen_SV[slot, new].fill_(True)


@dataclass
class Picked:
    """Ids on their way to the host: int64, in the order of the samples that picked."""

    ids: torch.Tensor
    copied: torch.cuda.Event | None

    def read(self) -> list[int]:
        """Wait for the copy of this step, not for later steps."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.ids.tolist()


class Steps:
    """The three functions of a step over one cache."""

    def __init__(self, cache: KVCache, tokenizer: TextTokenizer):
        self.cache, self.decoder, self.layout = cache, cache.decoder, tokenizer.layout
        device, vocab = self.decoder.device, self.decoder.shape.vocab_size
        self.slots = Slots(vocab, self.decoder.shape.dim, device, self.decoder.dtype)
        masks = [grammar.text_mask(self.layout, tokenizer.unwritable, boi) for boi in (False, True)]
        # Embeddings beyond the tokenizer's ids are never allowed.
        allowed = np.zeros((2, vocab), dtype=bool)
        allowed[:, : self.layout.vocab_size] = masks
        self._allowed_AV = torch.from_numpy(allowed).to(device)
        self._image_head = self.decoder.head[self.layout.image_start : self.layout.image_end]
        self._graphs: dict[tuple[str, int], _Captured] = {}
        self._memory = None

    def prefill(self, slots: list[int], leases: list[Lease], ids: list[list[int]]) -> None:
        """Compute what is not cached of these sequences, in one packed pass, and keep their last states."""
        slots_, device = self.slots, self.decoder.device
        plan = self.cache.prefill(leases, [len(i) for i in ids])
        new = [i for lease, row in zip(leases, ids, strict=True) for i in row[lease.cached :]]
        states = self.cache.run_prefill(to_device(torch.tensor(new), device), plan)
        slots_.hidden_SC[to_device(torch.tensor(slots), device)] = states

    def decode(self, slots: list[int]) -> None:
        """Feed the last id of each of these streams."""
        self._run("decode", self._decode, slots)

    def pick_text(self, slots: list[int]) -> Picked:
        """The next id of the samples whose main streams these are."""
        return self._read(self._run("pick_text", self._pick_text, slots), len(slots))

    def pick_image(self, groups: list[tuple[int, int, int]]) -> Picked:
        """The next image id of samples by the slots of their full, image-conditioned and unconditioned streams.

        The three may coincide. All of them get the id.
        """
        flat = [slot for group in groups for slot in group]
        return self._read(self._run("pick_image", self._pick_image, flat, 3), len(groups))

    def _decode(self, slots_B: torch.Tensor) -> None:
        s = self.slots
        s.hidden_SC[slots_B] = self.cache.run_decode(s.last_S[slots_B], s.position_S[slots_B], s.table_SP[slots_B])

    def _pick_text(self, slots_R: torch.Tensor) -> torch.Tensor:
        s = self.slots
        logits = s.hidden_SC[slots_R] @ self.decoder.head.T
        position, awake = s.position_S[slots_R], s.awake_S[slots_R]
        rules = (position + 1 < s.boi_limit_S[slots_R]).long()
        uniform = s.uniform_SP[slots_R, position]
        new = pick_text(logits, self._allowed_AV, rules, s.seen_SV, slots_R, s.text_S3[slots_R], uniform)
        new = self._agreed(new)
        s.last_S[slots_R] = torch.where(awake, new, s.last_S[slots_R])
        s.position_S[slots_R] = position + awake
        s.seen_SV[slots_R, s.last_S[slots_R]] = s.true
        s.awake_S[slots_R] = awake & (new >= self.layout.text_start)
        return torch.where(awake, new, -1)

    def _pick_image(self, slots_3R: torch.Tensor) -> torch.Tensor:
        s, groups_R3 = self.slots, slots_3R.view(-1, 3)
        full_R = groups_R3[:, 0]
        # Contiguous, or torch takes the states of the three for a batch each, and reads the head for every one.
        logits_3RV = s.hidden_SC[groups_R3.T.contiguous()] @ self._image_head.T
        position = s.position_S[full_R]
        code = self._agreed(pick_image(logits_3RV, s.image_S4[full_R], s.uniform_SP[full_R, position]))
        new = code + self.layout.image_start
        # Streams of a group may coincide; they get the same values. Slot 0 stays where it is.
        s.position_S[groups_R3] = s.position_S[groups_R3] + s.awake_S[groups_R3]
        s.last_S[groups_R3] = new[:, None].expand(-1, 3)
        s.seen_SV[full_R, new] = s.true
        return torch.where(code < 0, -1, new)

    def _agreed(self, ids_R: torch.Tensor) -> torch.Tensor:
        """Over several ranks the ids of the first."""
        if self.decoder.world > 1:
            distributed.broadcast(ids_R, group=self.decoder.group, group_src=0)
        return ids_R

    def _run(self, name: str, work: Callable, slots: list[int], per: int = 1) -> torch.Tensor | None:
        """work(slots), `per` slots for each of a batch; on a GPU from a graph."""
        device = self.decoder.device
        if device.type == "cpu":
            return work(torch.tensor(slots))
        size = next(bucket for bucket in BUCKETS if bucket * per >= len(slots)) * per
        if (name, size) not in self._graphs:
            graph = _Captured(work, size, device, self._memory)
            # Graphs are replayed one after the other, so they can share their memory.
            self._memory = graph.memory
            self._graphs[name, size] = graph
        return self._graphs[name, size](slots)

    def _read(self, ids: torch.Tensor, count: int) -> Picked:
        if ids.device.type == "cpu":
            return Picked(ids, None)
        host = torch.empty(count, dtype=ids.dtype, pin_memory=True)
        host.copy_(ids[:count], non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Picked(host, event)


class _Captured:
    """One function of `size` slots as a CUDA graph; what it returns is written over by the next replay."""

    def __init__(self, work: Callable, size: int, device: torch.device, memory):
        self.slots = torch.zeros(size, dtype=torch.int64, device=device)
        self._last: list[int] = [0] * size
        # Triton compiles and cuBLAS sets itself up before the capture, on another stream as torch asks for; slot 0,
        # which all of it runs on, is nobody's.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                work(self.slots)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=memory, capture_error_mode="thread_local"):
            self.out = work(self.slots)
        self.memory = self.graph.pool()

    def __call__(self, slots: list[int]) -> torch.Tensor | None:
        if slots != self._last[: len(slots)] or any(self._last[len(slots) :]):
            self._last = slots + [0] * (len(self.slots) - len(slots))
            self.slots.copy_(to_device(torch.tensor(self._last), self.slots.device))
        self.graph.replay()
        return self.out
