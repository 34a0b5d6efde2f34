"""`medmax inspect`: what a token store or a checkpoint holds, and what is wrong with it."""

import json
from pathlib import Path

from medmax_fast import figures
from medmax_fast.config import InspectConfig
from medmax_fast.data.store import MANIFEST_FILE, TokenStore
from medmax_fast.data.summary import check_rows, store_summary, suspicious_rows
from medmax_fast.runtime import InputError, atomic_path

# Suspicious rows that are printed; all of them are in suspicious.jsonl.
SHOWN_ROWS = 20


def inspect(config: InspectConfig) -> dict:
    """Describe the folder; InputError if it is neither a token store nor a checkpoint."""
    path = Path(config.path)
    if (path / MANIFEST_FILE).exists():
        return inspect_store(config)
    if (path / "config.json").exists() or (path / "models").is_dir():
        from medmax_fast.model.describe import describe_checkpoint

        if config.output:
            raise InputError(f"--output {config.output}: only for a token store; of a checkpoint nothing is written")
        return describe_checkpoint(config)
    raise InputError(
        f"{path}: neither a token store ({MANIFEST_FILE}) nor a checkpoint (config.json, or models/ and tokenizer/)"
    )


def inspect_store(config: InspectConfig) -> dict:
    """Counts, lengths and packing of a token store, and which of its rows look wrong.

    Draws histogram.png and lists every suspicious row in suspicious.jsonl, in `output` or the store itself; the
    result names the first of them.
    """
    store, folder = TokenStore(config.path), Path(config.output or config.path)
    checks = check_rows(store)
    summary = store_summary(store, checks=checks)
    draw_store(summary, folder / "histogram.png")
    shown = []
    with atomic_path(folder / "suspicious.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in suspicious_rows(store, checks):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if len(shown) < SHOWN_ROWS:
                shown.append({**row, "reasons": "; ".join(row["reasons"])})
    return {
        "store": config.path,
        **summary,
        "histogram": str(folder / "histogram.png"),
        "suspicious": str(folder / "suspicious.jsonl"),
        "first_suspicious": shown,
    }


def draw_store(summary: dict, path: Path) -> Path:
    """The histogram of a store; batches are padded as published, after the cut."""
    note = f"{summary['rows']:,} rows, mean {summary['mean_length']:,.0f}, longest {summary['longest']:,} ids"
    fill = {row["capacity"]: row["fill"] for row in summary["packing"]}
    padded = {row["batch"]: 1 - row["padding_cut"] for row in summary["padding"]}
    lengths = summary["lengths"]
    return figures.store_overview(lengths["rows"], lengths["edges"], fill, padded, path, note, summary["published_cut"])
