"""Keys and values of every running stream, one preallocated tensor for all layers.

Streams live in slots 0..n-1 without gaps (the last one moves into the place of one that ends), so a decode step
reads a view of the cache and copies nothing. The tensor grows by half when a sequence or the number of streams
outgrows it.

Shapes: L layers, S slots, H key/value heads, C positions, D head width, T ids of a packed prefill.
"""

import torch
from torch.nn import functional as F

from medmax_fast.model.attention import varlen_attention


class KVCache:
    """The attention module hands queries, keys and values to `attend`, layer by layer."""

    def __init__(self, layers: int, heads: int, width: int, device: torch.device, dtype: torch.dtype):
        self.lengths: list[int] = []
        self._kv = torch.zeros(2, layers, 0, heads, 0, width, device=device, dtype=dtype)
        self._prefill: tuple[list[int], torch.Tensor, int] | None = None

    def open(self, count: int, longest: int) -> list[int]:
        """Reserve `count` new slots with room for `longest` positions; returns their numbers."""
        first = len(self.lengths)
        self.lengths += [0] * count
        self._reserve(first + count, longest)
        return list(range(first, first + count))

    def close(self, slot: int) -> int:
        """Free a slot; returns the number of the slot whose stream now lives in it (itself if it was the last)."""
        last = len(self.lengths) - 1
        if slot != last:
            self._kv[:, :, slot].copy_(self._kv[:, :, last])
            self.lengths[slot] = self.lengths[last]
        self.lengths.pop()
        return last

    def begin_prefill(self, slots: list[int], cu_seqlens: torch.Tensor) -> None:
        """The next forward pass is one packed row whose sequences fill these empty slots."""
        sizes = cu_seqlens.diff().tolist()
        for slot, size in zip(slots, sizes, strict=True):
            self.lengths[slot] = size
        self._reserve(len(self.lengths), max(sizes))
        self._prefill = (slots, cu_seqlens, max(sizes))

    def begin_decode(self, count: int) -> None:
        """The next forward pass adds one id to each of the slots 0..count-1."""
        self._prefill = None
        self._reserve(len(self.lengths), max(self.lengths[:count]) + 1)
        device = self._kv.device
        self._positions = torch.tensor(self.lengths[:count], device=device)
        self._longest = max(self.lengths[:count]) + 1
        reach = torch.arange(self._longest, device=device)
        self._mask = (reach[None, :] <= self._positions[:, None])[:, None, None, :]
        self._rows = torch.arange(count, device=device)
        for slot in range(count):
            self.lengths[slot] += 1

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Store this layer's keys and values and attend; q, k, v [B, H, T, D] in, [B, T, H, D] out."""
        keys, values = self._kv[0, layer], self._kv[1, layer]
        if self._prefill is not None:
            slots, cu_seqlens, longest = self._prefill
            bounds = cu_seqlens.tolist()
            for slot, start, end in zip(slots, bounds[:-1], bounds[1:], strict=True):
                keys[slot, :, : end - start] = key[0, :, start:end]
                values[slot, :, : end - start] = value[0, :, start:end]
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            return varlen_attention(q, k, v, cu_seqlens, longest, scale)[None]
        count = len(self._rows)
        keys[self._rows, :, self._positions] = key[:, :, 0]
        values[self._rows, :, self._positions] = value[:, :, 0]
        k, v = keys[:count, :, : self._longest], values[:count, :, : self._longest]
        grouped = query.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(query, k, v, attn_mask=self._mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    def _reserve(self, slots: int, positions: int) -> None:
        have_slots, have_positions = self._kv.shape[2], self._kv.shape[4]
        if slots <= have_slots and positions <= have_positions:
            return
        slots = have_slots if slots <= have_slots else max(slots, have_slots * 3 // 2)
        positions = have_positions if positions <= have_positions else max(positions, have_positions * 3 // 2)
        shape = list(self._kv.shape)
        shape[2], shape[4] = slots, positions
        grown = self._kv.new_zeros(shape)
        grown[:, :, :have_slots, :, :have_positions] = self._kv
        self._kv = grown
