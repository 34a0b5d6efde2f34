"""Keys and values of every running stream in pages, and the attention over them.

One tensor per layer for keys and one for values, [pages, heads, PAGE, D], allocated once: a stream's row of the page
table says which pages are its own, so nothing moves when streams come and go, and streams share the pages of a common
beginning (generate/pages.py). A page outside of every row is never read; page 0 takes what nobody reads.

Shapes: T ids of a packed prefill, B streams of a decode step, G key/value heads, D head width, P pages of a stream.
"""

from dataclasses import dataclass

import torch

from medmax_fast.generate.pages import PAGE, Lease, PagePool
from medmax_fast.kernels.norm_rope_store import norm_rope_store
from medmax_fast.kernels.paged_attention import paged_attention
from medmax_fast.model.attention import varlen_attention
from medmax_fast.model.decoder import QK_NORM_EPS, Decoder, Layer


@dataclass(frozen=True)
class Prefill:
    """Where the ids of a packed prefill go, and what they see: index tensors on the device.

    positions_T, places_T: of each new id; cu_new, cu_all: int32 [n+1], boundaries of the new ids and of all positions
    of each stream; all_places: of every position, in the order of the streams; longest_new, longest_all: ids.
    """

    positions_T: torch.Tensor
    places_T: torch.Tensor
    cu_new: torch.Tensor
    cu_all: torch.Tensor
    all_places: torch.Tensor
    longest_new: int
    longest_all: int


class KVCache:
    """The pages of `positions` positions for one decoder. InputError if they do not fit."""

    def __init__(self, decoder: Decoder, positions: int):
        self.decoder = decoder
        shape = decoder.shape
        pages = positions // PAGE + 1
        self.pool = PagePool(pages)
        size = (shape.layers, 2, pages, shape.kv_heads // decoder.world, PAGE, shape.head_dim)
        self.kv = torch.empty(size, device=decoder.device, dtype=decoder.dtype)
        # The page that dead rows read and write.
        self.kv[:, :, 0].zero_()

    def copy_page(self, lease: Lease) -> None:
        """Do the copy that a lease asks for, in all layers."""
        if lease.copy:
            source, target = lease.copy
            self.kv[:, :, target].copy_(self.kv[:, :, source])

    def prefill(self, leases: list[Lease], lengths: list[int]) -> Prefill:
        """The plan of one packed pass that computes positions cached..length-1 of each lease."""
        places = [_places(lease, length) for lease, length in zip(leases, lengths, strict=True)]
        new = [length - lease.cached for lease, length in zip(leases, lengths, strict=True)]
        positions = [torch.arange(lease.cached, n) for lease, n in zip(leases, lengths, strict=True)]
        device = self.decoder.device
        return Prefill(
            to_device(torch.cat(positions), device),
            to_device(torch.cat([place[lease.cached :] for lease, place in zip(leases, places, strict=True)]), device),
            to_device(_boundaries(new), device),
            to_device(_boundaries(lengths), device),
            to_device(torch.cat(places), device),
            max(new),
            max(lengths),
        )

    def run_prefill(self, ids_T: torch.Tensor, plan: Prefill) -> torch.Tensor:
        """Last hidden states [n, C] of a packed pass."""
        pages, offsets = plan.all_places // PAGE, plan.all_places % PAGE

        def attend(index: int, layer: Layer, qkv_TK: torch.Tensor) -> torch.Tensor:
            q_THD = self._store(index, layer, qkv_TK, plan.positions_T, plan.places_T)
            k, v = (self.kv[index, half][pages, :, offsets] for half in (0, 1))
            out = varlen_attention(
                q_THD, k, v, plan.cu_new, plan.longest_new, cu_seqlens_k=plan.cu_all, max_seqlen_k=plan.longest_all
            )
            return out.flatten(1)

        return self.decoder(ids_T, attend)[plan.cu_new[1:].long() - 1]

    def run_decode(self, ids_B: torch.Tensor, positions_B: torch.Tensor, table_BP: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, C] of one new id per stream; table_BP: int32, the pages of each."""
        page_B = table_BP.gather(1, (positions_B // PAGE)[:, None])[:, 0]
        places_B = page_B.long() * PAGE + positions_B % PAGE
        lengths_B = (positions_B + 1).int()

        def attend(index: int, layer: Layer, qkv_BK: torch.Tensor) -> torch.Tensor:
            q_BHD = self._store(index, layer, qkv_BK, positions_B, places_B)
            return paged_attention(q_BHD, self.kv[index, 0], self.kv[index, 1], table_BP, lengths_B).flatten(1)

        return self.decoder(ids_B, attend)

    def _store(self, index: int, layer: Layer, qkv_TK, positions_T, places_T) -> torch.Tensor:
        affine = layer.q_weight, layer.q_bias, layer.k_weight, layer.k_bias
        tables = self.decoder.cos_PF, self.decoder.sin_PF
        pages = self.kv[index, 0], self.kv[index, 1]
        return norm_rope_store(qkv_TK, *affine, *tables, positions_T, places_T, *pages, QK_NORM_EPS)


def position_bytes(decoder: Decoder) -> int:
    """Bytes of keys and values of one position, on one rank."""
    shape = decoder.shape
    return 2 * shape.layers * shape.kv_dim // decoder.world * decoder.dtype.itemsize


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; to a GPU through pinned memory, without waiting for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _places(lease: Lease, length: int) -> torch.Tensor:
    """Place (page * PAGE + offset) of positions 0..length-1, int64."""
    return (torch.tensor(lease.pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length]


def _boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()
