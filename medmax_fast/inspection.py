"""`medmax inspect`: what a token store or a checkpoint holds, and what is wrong with it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from medmax_fast import figures
from medmax_fast.config import InspectConfig
from medmax_fast.data.store import MANIFEST_FILE, TokenStore
from medmax_fast.data.summary import RowChecks, check_rows, store_summary, suspicious_rows
from medmax_fast.files import atomic_path
from medmax_fast.runtime import InputError

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
    if not path.is_dir():
        found = "a file" if path.exists() else "no such folder"
        raise InputError(f"{path}: {found}, expected the folder of a token store or of a checkpoint")
    raise InputError(
        f"{path}: neither a token store ({MANIFEST_FILE}) nor a checkpoint (config.json, or models/ and tokenizer/)"
    )


def inspect_store(config: InspectConfig) -> dict:
    """Counts, lengths and packing of a token store, and which of its rows look wrong.

    Draws histogram.png, packing.png and, if there are images, codes.png, and lists every suspicious row in
    suspicious.jsonl, in `output` or the store itself; the result names these files, and the first of the rows.
    """
    store, folder = TokenStore(config.path), Path(config.output or config.path)
    checks = check_rows(store)
    summary = store_summary(store, checks=checks)
    drawn = {name: str(draw(folder / f"{name}.png")) for name, (_, draw) in store_figures(summary, checks).items()}
    shown: list[dict] = []
    with atomic_path(folder / "suspicious.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in suspicious_rows(store, checks):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if len(shown) < SHOWN_ROWS:
                shown.append({**row, "reasons": "; ".join(row["reasons"])})
    return {
        "store": config.path,
        **summary,
        **drawn,
        "suspicious": str(folder / "suspicious.jsonl"),
        "first_suspicious": shown,
    }


def store_figures(summary: dict, checks: RowChecks) -> dict[str, tuple[str, Callable[[Path], Path]]]:
    """Name -> (caption, what draws it at a path) of a store's figures; of one without images none of its codes.

    Batches are padded as published, after the cut.
    """
    lengths, cut = summary["lengths"], summary["published_cut"]
    note = f"{summary['rows']:,} rows, mean {summary['mean_length']:,.0f}, longest {summary['longest']:,} ids"
    fill = {row["capacity"]: row["fill"] for row in summary["packing"]}
    padded = {row["batch"]: 1 - row["padding_cut"] for row in summary["padding"]}
    histogram = partial(figures.token_histogram, lengths["rows"], lengths["edges"], note=note, cut=cut)
    packing = partial(figures.packing, fill, padded)
    found: dict[str, tuple[str, Callable[[Path], Path]]] = {
        "histogram": ("Row lengths", histogram),
        "packing": ("Packing", packing),
    }
    if summary["codes_used"]:
        note = f"{summary['codes_used']:,} of {summary['codes_known']:,} codes occur, "
        note += f"perplexity {summary['code_perplexity']:,.0f}"
        found["codes"] = ("Image codes", partial(figures.code_usage, checks.codes, note=note))
    return found
