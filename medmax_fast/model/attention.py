"""The one seam between the language model and attention: variable-length, causal, packed.

transformers calls `packed_attention` for every layer once `register()` has been called and the model was given
`attn_implementation=NAME`. A packed batch is one row of T ids holding n sequences whose boundaries are `cu_seqlens`
(int32 [n+1], starting at 0 and ending at T); no position attends across a boundary. Implementations, first that
fits: FlashAttention 3 (fp16/bf16 on Hopper), flash_attn (fp16/bf16 on a GPU), torch.nn.attention.varlen (the same,
built in), and scaled dot-product attention sequence by sequence (any dtype, any device; it reads the boundaries on the
host, so on a GPU every layer waits for it).

Shapes: T ids, H query heads, D head width, B batch rows.
"""

import functools
import importlib.util
import inspect
import itertools

import torch
from torch.nn import functional as F

NAME = "medmax_varlen"


def available(device: torch.device, dtype: torch.dtype) -> str:
    """The implementation used for this device and dtype: flash_attn_3, flash_attn, torch_varlen or sdpa."""
    if torch.device(device).type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    if (
        importlib.util.find_spec("flash_attn_interface") is not None
        and torch.cuda.get_device_capability(device)[0] == 9
    ):
        return "flash_attn_3"
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash_attn"
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return "torch_varlen"
    return "sdpa"


def varlen_attention(
    q_THD: torch.Tensor,
    k_THD: torch.Tensor,
    v_THD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
    impl: str = "auto",
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> torch.Tensor:
    """Causal attention within each packed sequence, [T, H, D].

    cu_seqlens: int32 [n+1]; max_seqlen: the longest sequence; scale: of q.k (default D ** -0.5). k and v may have
    fewer heads than q (each serves H / H_kv of them). cu_seqlens_k, max_seqlen_k: of keys and values where a sequence
    has more of them than queries, which then are its last ones.
    """
    if impl == "auto":
        impl = available(q_THD.device, q_THD.dtype)
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    bounds = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen_k}
    if impl == "flash_attn_3":
        from flash_attn_interface import flash_attn_varlen_func as flash_attn_3

        out = flash_attn_3(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, **bounds, softmax_scale=scale, causal=True)
        # Early releases return the log-sum-exp as well.
        return out[0] if isinstance(out, tuple) else out
    if impl == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, **bounds, softmax_scale=scale, causal=True
        )
    k_THD, v_THD = _repeat_heads(k_THD, q_THD.shape[1]), _repeat_heads(v_THD, q_THD.shape[1])
    if impl == "torch_varlen":
        return _torch_varlen(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, scale)
    assert impl == "sdpa", impl
    out = torch.empty_like(q_THD) if not torch.is_grad_enabled() else None
    pieces = []
    spans_q, spans_k = (list(itertools.pairwise(cu.tolist())) for cu in (cu_seqlens, cu_seqlens_k))
    for span_q, span_k in zip(spans_q, spans_k, strict=True):
        q = q_THD[slice(*span_q)].transpose(0, 1)[None]
        k, v = (x[slice(*span_k)].transpose(0, 1)[None] for x in (k_THD, v_THD))
        piece = F.scaled_dot_product_attention(q, k, v, scale=scale, **_causal(q.shape[2], k.shape[2], q.device))
        piece = piece[0].transpose(0, 1)
        if out is None:
            pieces.append(piece)
        else:
            out[slice(*span_q)] = piece
    return torch.cat(pieces) if out is None else out


def _causal(queries: int, keys: int, device: torch.device) -> dict:
    """How sdpa is told that the last query sees every key; its own `is_causal` lets the first one see the first."""
    if queries == keys:
        return {"is_causal": True}
    return {"attn_mask": torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)}


def _torch_varlen(q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, scale):
    from torch.nn.attention.varlen import varlen_attn

    arguments = (q_THD, k_THD, v_THD, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
    if _takes_window():
        return varlen_attn(*arguments, scale=scale, window_size=(-1, 0))
    # torch 2.10 has no scale: its own D ** -0.5 is undone on q.
    if scale is not None:
        arguments = (q_THD * (scale * q_THD.shape[-1] ** 0.5), *arguments[1:])
    return varlen_attn(*arguments, is_causal=True)


@functools.cache
def _takes_window() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


def _repeat_heads(x_THD: torch.Tensor, heads: int) -> torch.Tensor:
    return x_THD if x_THD.shape[1] == heads else x_THD.repeat_interleave(heads // x_THD.shape[1], dim=1)


def packed_attention(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q, k, v [B, H, T, D] in, [B, T, H, D] out.

    With `cu_seq_lens_q` the batch is one packed row, without it every row of the batch is one sequence. A padding mask
    is refused rather than ignored.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes cu_seq_lens_q and max_length_q, not a padding mask")
    assert dropout == 0.0, "attention dropout is not supported"
    batch, heads, length, width = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    elif batch != 1:
        raise ValueError(f"a packed batch is one row, got {batch}")
    q, k, v = (x.transpose(1, 2).reshape(batch * length, -1, width) for x in (query, key, value))
    assert max_length_q is not None, "cu_seq_lens_q and max_length_q go together"
    out = varlen_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling)
    return out.reshape(batch, length, heads, width), None


def _keep_mask(*_, attention_mask=None, **__):
    """transformers' mask interface: hand a padding mask on, so that packed_attention can refuse it."""
    return attention_mask


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _keep_mask)
