"""The numbers that only speed depends on, block sizes, warps, stages, of every kernel by the GPU's compute capability.

One table, read at launch: nothing is tuned at import or while a model runs. `python -m benchmarks.tune` measures
candidates on the GPU at hand and prints the lines to put here; `python -m benchmarks.bench_aot` compiles every entry
for its capability and reports registers, spills and how many programs fit a multiprocessor, which needs no GPU.

Not here is what fixes the order of sums that must be the same on every card: BLOCK and WARPS of sampling.py (the id
drawn depends on them), PROGRAMS of rms_norm.py and PARTS of lora.py (a weight's gradient), MIN_CHUNK and MAX_CHUNKS of
group_norm.py.

80 is for A100, 90 for H100 and H200, 100 for B200. Any other capability takes the nearest lower entry, else the lowest.
"""

import torch

ALL = (80, 90, 100)
# Where the tensors are on a CPU, that is in triton's interpreter.
INTERPRETER = 90
# What triton takes of any kernel.
OPTIONS = ("num_warps", "num_stages", "maxnreg")
AOT = "not measured; registers, spills, occupancy: aot_triton3.9_202611.json"


class Entry:
    """Numbers of a kernel by name, and their evidence: the file of benchmarks/results/ that they were measured in."""

    def __init__(self, evidence: str, **numbers: int):
        self.evidence, self.numbers = evidence, numbers


# Names in capitals are the kernel's constants or enter its plan (TILE: values of a tile); the others launch options.
TABLE: dict[str, dict[int, Entry]] = {
    "vq_measure": dict.fromkeys(ALL, Entry(AOT, BLOCK_N=32, BLOCK_D=64, num_warps=4)),
    "vq_screen": dict.fromkeys(ALL, Entry(AOT, BLOCK_N=128, BLOCK_K=32, BLOCK_D=64, num_warps=8, num_stages=2)),
    # Small blocks, because few latents are left to the search.
    "vq_search": dict.fromkeys(ALL, Entry(AOT, BLOCK_N=32, BLOCK_K=64, BLOCK_D=16, num_warps=4, num_stages=2)),
    "shift": dict.fromkeys(ALL, Entry(AOT, BLOCK=1024, num_warps=4)),
    "span": dict.fromkeys(ALL, Entry(AOT, BLOCK=256, num_warps=4)),
    # BLOCK_J divides the 1,536 bytes of a row of the real encoder. One row a program: of several, triton 3.6 lays the
    # gather out with neighbouring lanes in different rows, and exchanges the weights at each tap.
    "resample": dict.fromkeys(ALL, Entry(AOT, BLOCK_ROWS=1, BLOCK_J=512, num_warps=4)),
    # BLOCK_C: channels that a tile aims at.
    "group_norm": dict.fromkeys(ALL, Entry(AOT, TILE=4096, BLOCK_C=128, num_warps=8, num_stages=1)),
    # HEADS: that a program loops over with the cosines of its tokens in registers; 1,024 programs for 4,096 tokens of
    # 32 heads, several on each of 132 multiprocessors.
    "norm_rope": dict.fromkeys(ALL, Entry(AOT, TILE=2048, HEADS=8, num_warps=4, num_stages=1)),
    "cross_entropy": dict.fromkeys(ALL, Entry(AOT, BLOCK=4096, num_warps=8, num_stages=1)),
    # TILE and MAX_R: of short rows; a long one is a tile of its own. WARP: values of a warp.
    "rms_norm": dict.fromkeys(ALL, Entry(AOT, TILE=1024, MAX_R=32, WARP=256, num_stages=1)),
    # A load of 16 bytes of each 16-bit tensor to a thread.
    "swiglu": dict.fromkeys(ALL, Entry(AOT, TILE=1024, num_warps=4, num_stages=1)),
    # Of ranks up to 64 in 16 bits; a higher one has fewer columns in a tile, fp32 half of both.
    "lora_down": dict.fromkeys(ALL, Entry(AOT, BLOCK_T=32, BLOCK_K=128, num_warps=4, num_stages=2)),
    "lora_weight": dict.fromkeys(ALL, Entry(AOT, BLOCK_T=32, BLOCK_K=128, num_warps=4, num_stages=2)),
    "lora_input": dict.fromkeys(ALL, Entry(AOT, BLOCK_T=32, BLOCK_K=128, num_warps=4, num_stages=1)),
    "norm_rope_store": dict.fromkeys(ALL, Entry(AOT, TILE=1024, num_warps=4, num_stages=1)),
    # TILE in bytes, with one query head four vectors of K to a lane and four of V; MAX_ROWS: query heads of a program.
    "paged_attention": dict.fromkeys(ALL, Entry(AOT, TILE=8192, MAX_ROWS=8, num_warps=4, num_stages=1)),
    # PROGRAMS: that should run at once, several on each of 132 multiprocessors; MAX_SPLITS: shares of a stream.
    "paged_splits": dict.fromkeys(ALL, Entry(AOT, PROGRAMS=528, MAX_SPLITS=64)),
    "paged_combine": dict.fromkeys(ALL, Entry(AOT, num_warps=4, num_stages=1)),
}

_found: dict[tuple[str, torch.device], Entry] = {}
_overrides: dict[str, dict[str, int]] = {}


def entry(op: str, capability: int) -> Entry:
    """The table's entry of `op` for a capability such as 90."""
    entries = TABLE[op]
    return entries[max((known for known in entries if known <= capability), default=min(entries))]


def blocks(op: str, device: torch.device) -> dict[str, int]:
    """The numbers of `op` for tensors on `device`, which must name a GPU that is in use, or be the CPU; a copy."""
    found = _found.get((op, device))
    if found is None:
        capability = INTERPRETER
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            capability = 10 * major + minor
        found = _found[op, device] = entry(op, capability)
    return {**found.numbers, **_overrides.get(op, {})}


class override:
    """`with override("swiglu", TILE=2048):` launches with other numbers than the table's; for the tuner and for tests.

    Raises ValueError for a name that is neither the kernel's in the table nor a launch option.
    """

    def __init__(self, op: str, **numbers: int):
        known = [*entry(op, INTERPRETER).numbers, *OPTIONS]
        if unknown := numbers.keys() - set(known):
            raise ValueError(f"{op}: {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
        self.op, self.numbers = op, numbers

    def __enter__(self) -> None:
        self.before = _overrides.get(self.op, {})
        _overrides[self.op] = self.before | self.numbers

    def __exit__(self, *_) -> None:
        _overrides[self.op] = self.before
