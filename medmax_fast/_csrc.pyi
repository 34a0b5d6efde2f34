"""Types of the extension built from csrc/; what the arrays hold is told in medmax_fast.data, where each is called."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

# Ids of a store, in either of its widths.
_Ids: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]
_Long: TypeAlias = NDArray[np.int64]
_Float: TypeAlias = NDArray[np.float32]

class Prefetcher:
    def __init__(
        self,
        ids: _Ids,
        offsets: _Long,
        rows: _Long,
        weights: _Float | None,
        plan_offsets: _Long,
        order: _Long,
        eot: int,
        policy: str,
        max_length: int,
        length: int,
        pad: int,
        threads: int,
        keep: int,
        input_ids: _Long,
        labels: _Long,
        position_ids: _Long,
        loss_weights: _Float | None,
        cu_seqlens: NDArray[np.int32],
    ) -> None: ...
    # slot, ids, sequences, longest, targets
    def next(self) -> tuple[int, int, int, int, int] | None: ...
    def close(self) -> None: ...

def plan_packs(lengths: _Long, capacity: int, seed: int, epoch: int) -> tuple[_Long, _Long]: ...
def share_packs(lengths: _Long, rows: _Long, offsets: _Long, packs_per_step: int, world: int) -> NDArray[np.int32]: ...
def lanczos_weights(
    in_size: int, out_size: int, first: int, count: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
def resample(
    pixels: NDArray[np.uint8],
    full_height: int,
    full_width: int,
    top: int,
    left: int,
    out: NDArray[np.uint8],
    threads: int = 1,
    plain: bool = False,
) -> None: ...
def has_avx2() -> bool: ...
def pack_boundaries(
    ids: _Ids, offsets: _Long, rows: _Long, max_length: int, length: int, cu_seqlens: NDArray[np.int32]
) -> tuple[int, int]: ...
def fill_pack(
    ids: _Ids,
    offsets: _Long,
    rows: _Long,
    cu_seqlens: NDArray[np.int32],
    eot: int,
    threads: int,
    input_ids: _Long,
    labels: _Long,
    position_ids: _Long,
    policy: str = "first-eot",
    pad: int = 1,
    weights: _Float | None = None,
    loss_weights: _Float | None = None,
) -> int: ...
def count_targets(
    ids: _Ids,
    offsets: _Long,
    rows: _Long,
    max_length: int,
    eot: int,
    threads: int,
    counts: _Long,
    policy: str = "first-eot",
) -> None: ...
def expand_rows(
    text: NDArray[np.int32] | _Long | _Ids,
    text_offsets: _Long,
    ready: NDArray[np.uint8],
    codes: list[NDArray[np.uint16]],
    images: _Long,
    image_offsets: _Long,
    special: _Long,
    wide: bool,
    threads: int,
) -> tuple[_Ids, _Long, NDArray[np.uint8], _Long]: ...
def json_ids_16(text: bytes, key: str, limit: int) -> tuple[NDArray[np.uint16], _Long, _Long]: ...
def json_ids_32(text: bytes, key: str, limit: int) -> tuple[NDArray[np.uint32], _Long, _Long]: ...
