"""What was counted on a GPU that is not there, for roofline.md."""

from medmax_fast.bench.table import number
from medmax_fast.page import plain, table

ABOUT = """Counted by `python -m benchmarks.count`: the CUDA side of the code run on fake tensors without a GPU; nothing
is timed. Bytes are those that operations read and write, each operand once, whatever the caches do. Beside the floor
they say how far the code itself is from it; products wait for the bytes of all other operations. Host syncs are those
of a step after the graphs have been captured, or of a whole pass."""
# Operations that are named, from the one that moves most.
NAMED = 6


def sections(result: dict) -> list[str]:
    """Two tables in Markdown: every stage, and what moves most in it beside the products."""
    versions = result["environment"]["versions"]
    heading = f"torch {versions['torch']}, triton {versions['triton']}."
    stages, parts = [], []
    for row in result["rows"]:
        name = {"stage": plain(row["stage"]), "shape": plain(row["shape"])}
        stages.append(name | cells(row))
        others = [part for part in row["largest"] if part["flop"] == 0][:NAMED]
        words = [f"{short(part['operation'])} {gigabytes(part['bytes'])} in {part['times']:,}" for part in others]
        parts.append(name | {"GB, in so many operations": plain(", ".join(words))})
    return ["## What the code does", ABOUT, heading, table(stages), "Most of what products wait for:", table(parts)]


def cells(row: dict) -> dict[str, str]:
    """One stage as cells of the first table."""
    beside = row["times_floor_bytes"] if row["bound"] == "bytes" else row["times_floor_flop"]
    return {
        "operations": f"{row['operations']:,}",
        "GB": gigabytes(row["moved_bytes"]),
        "GB beside products": gigabytes(row["moved_bytes"] - row["product_bytes"]),
        "TFLOP": number(row["flop"] / 1e12),
        "times the floor's": f"{beside:.3f} ({row['bound']})",
        "host syncs": str(sum(row["syncs"].values())),
        "memory, GB": gigabytes(row["memory_bytes"]),
    }


def gigabytes(size: int) -> str:
    return number(size / 1e9)


def short(name: str) -> str:
    return name.removeprefix("aten::").removeprefix("torch_attn::").strip("_").removesuffix("_kernel")
