"""What a token store holds, as plain numbers: the data behind `medmax inspect` and the report's packing figure.

Ids are looked at in blocks of 4 M and names as they come from Parquet; what stays in memory is 50 bytes a row for the
plans of packs and 1 for what is wrong with it. 1.7 billion ids take seconds, most of it the comparisons.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medmax_fast.data.codes import perplexity
from medmax_fast.data.collate import target_counts
from medmax_fast.data.packing import plan_epoch
from medmax_fast.data.store import ROWS_FILE, TokenStore
from medmax_fast.files import require_file
from medmax_fast.progress import Progress
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES, IdLayout

CAPACITIES = (2048, 4096, 8192, 16384, 32768)
HISTOGRAM_BINS = 40
# The published trainer cuts rows here, then pads a batch to its longest row.
PUBLISHED_CUT = 2048
BATCHES = (1, 4, 8, 16)
# What can be wrong with a row: one bit each.
NO_EOT, UNBALANCED, ODD_IMAGE = 1, 2, 4
_BLOCK = 1 << 22
# Images named in the reasons of one row.
_NAMED = 4


@dataclass(frozen=True)
class RowChecks:
    """What a look at every row found.

    faults: uint8 [N], bits of NO_EOT, UNBALANCED and ODD_IMAGE per row. images: begin-of-image ids in all rows.
    codes: int64 [num_codes], how often each image code occurs.
    """

    faults: np.ndarray
    images: int
    codes: np.ndarray


def store_summary(store: TokenStore, capacities: Sequence[int] = CAPACITIES, checks: RowChecks | None = None) -> dict:
    """Counts and packing of a store, as a dict that JSON can hold.

    rows, ids, supervised (ids that the loss counts), images; `codes_used` and `code_perplexity` (see data/codes.py) of
    the codebook's `codes_known`; longest and mean length; `suspicious_rows`, and of those
    `rows_without_eot`, `rows_unbalanced` (another number of boi than eoi) and `rows_with_odd_images` (a boi that is
    not followed by exactly 1,024 codes and eoi, or codes outside of an image); `rows_cut_as_published` and
    `ids_cut_as_published`, what a cut at `published_cut` ids takes; `tasks` and `sources`: one dict each of name,
    rows, ids, supervised; `packing`: per capacity the packs, the fill (ids in packs / room in packs) and the rows that
    are too long for it; `padding`: per batch size the share of a padded batch of shuffled rows that holds no id, of
    rows cut as published and of whole ones; `lengths`: histogram `edges` [bins + 1] and `rows` [bins].
    checks: what `check_rows` returned, if it was called already.
    """
    lengths = store.lengths
    checks = checks or check_rows(store)
    supervised = target_counts(store.ids, store.offsets, store.layout.eot)
    counts, edges = np.histogram(lengths, bins=HISTOGRAM_BINS, range=(0, max(int(lengths.max(initial=0)), 1)))
    cut = np.minimum(lengths, PUBLISHED_CUT)
    return {
        "rows": len(store),
        "ids": int(lengths.sum()),
        "supervised": int(supervised.sum()),
        "images": checks.images,
        "codes_used": int(np.count_nonzero(checks.codes)),
        "codes_known": len(checks.codes),
        "code_perplexity": perplexity(checks.codes),
        "longest": int(lengths.max(initial=0)),
        "mean_length": float(lengths.mean()) if len(store) else 0.0,
        "suspicious_rows": int(np.count_nonzero(checks.faults)),
        "rows_without_eot": int(np.count_nonzero(checks.faults & NO_EOT)),
        "rows_unbalanced": int(np.count_nonzero(checks.faults & UNBALANCED)),
        "rows_with_odd_images": int(np.count_nonzero(checks.faults & ODD_IMAGE)),
        "published_cut": PUBLISHED_CUT,
        "rows_cut_as_published": int((lengths > PUBLISHED_CUT).sum()),
        "ids_cut_as_published": int((lengths - cut).sum()),
        **_per_name(store, lengths, supervised),
        "packing": [_packing(lengths, capacity) for capacity in capacities],
        "padding": [
            {"batch": size, "padding_cut": padding(cut, size), "padding_whole": padding(lengths, size)}
            for size in BATCHES
        ],
        "lengths": {"edges": edges.tolist(), "rows": counts.tolist()},
    }


def padding(lengths: np.ndarray, batch: int) -> float:
    """Share of a batch, padded to its longest row, that holds no id: 1 - mean length / expected longest of `batch`.

    Exact over all orders of the rows (all of one batch if there are fewer): the k-th shortest of n rows is at least as
    long as all of a random batch with probability C(k, batch) / C(n, batch). A shorter last batch is left out.
    """
    count = len(lengths)
    if count == 0:
        return 0.0
    ascending, rank = np.sort(lengths).astype(np.float64), np.arange(1, count + 1, dtype=np.float64)
    covers = np.ones(count)
    for i in range(min(batch, count)):
        covers *= np.maximum(rank - i, 0) / (count - i)
    return max(0.0, float(1 - ascending.mean() / (ascending * np.diff(covers, prepend=0)).sum()))


def check_rows(store: TokenStore) -> RowChecks:
    """Look at every row for what training would not expect."""
    faults, images = np.zeros(len(store), np.uint8), 0
    layout, offsets = store.layout, store.offsets
    codes = np.zeros(layout.num_codes, np.int64)
    first = 0
    with Progress("checking rows", len(store)) as bar:
        while first < len(store):
            last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _BLOCK, "right")) - 1)
            ids = np.asarray(store.ids[offsets[first] : offsets[last]])
            faults[first:last], found = _check_block(ids, offsets[first : last + 1] - offsets[first], layout)
            images += found
            # Counting all ids is faster than picking the codes out first.
            codes += np.bincount(ids, minlength=layout.image_end)[layout.image_start : layout.image_end]
            first = last
            bar.update(first)
    return RowChecks(faults, images, codes)


def _check_block(ids: np.ndarray, bounds: np.ndarray, layout: IdLayout) -> tuple[np.ndarray, int]:
    """(faults uint8 [R], images) of the rows ids[bounds[r]:bounds[r + 1]]."""

    def per_row(positions: np.ndarray) -> np.ndarray:
        return np.bincount(np.searchsorted(bounds, positions, "right") - 1, minlength=len(bounds) - 1)

    code = (ids >= layout.image_start) & (ids < layout.image_end)
    # Stretches of one kind, codes or other ids, that begin anew with each row.
    edge = np.empty(len(ids) + 1, bool)
    np.not_equal(code[1:], code[:-1], out=edge[1:-1])
    edge[bounds] = True
    edges = np.flatnonzero(edge)
    begins, ends = (side[code[edges[:-1]]] for side in (edges[:-1], edges[1:]))
    # A stretch that touches an end of the block has no room for its marker there.
    whole = (ends - begins == IMAGE_CODES) & (begins > 0) & (ends < len(ids))
    rows = np.searchsorted(bounds, begins, "right") - 1
    whole[whole] = (ids[begins[whole] - 1] == layout.boi) & (ids[ends[whole]] == layout.eoi)
    whole &= (begins > bounds[rows]) & (ends < bounds[rows + 1])
    boi, eoi = per_row(np.flatnonzero(ids == layout.boi)), per_row(np.flatnonzero(ids == layout.eoi))
    images, stretches = per_row(begins[whole]), per_row(begins)
    faults = (per_row(np.flatnonzero(ids == layout.eot)) == 0) * NO_EOT
    faults |= (boi != eoi) * UNBALANCED
    faults |= ((images != boi) | (images != stretches)) * ODD_IMAGE
    return faults.astype(np.uint8), int(boi.sum())


def suspicious_rows(store: TokenStore, checks: RowChecks) -> Iterator[dict]:
    """One dict per row with a fault, in order: row, key, task, source, ids (its length), reasons (list of str)."""
    first = 0
    for table in _row_tables(store, ("key", "task", "source")):
        found = np.flatnonzero(checks.faults[first : first + table.num_rows])
        if len(found):
            names = table.take(found).to_pylist()
            for row, named in zip((first + found).tolist(), names, strict=True):
                reasons = _reasons(store.row(row), int(checks.faults[row]), store.layout)
                yield {"row": row, **named, "ids": int(store.lengths[row]), "reasons": reasons}
        first += table.num_rows


def _reasons(ids: np.ndarray, faults: int, layout: IdLayout) -> list[str]:
    boi = np.flatnonzero(ids == layout.boi)
    reasons = ["no eot"] if faults & NO_EOT else []
    if faults & UNBALANCED:
        reasons.append(f"{len(boi)} boi, {np.count_nonzero(ids == layout.eoi)} eoi")
    if not faults & ODD_IMAGE:
        return reasons
    code = (ids >= layout.image_start) & (ids < layout.image_end)
    other = np.append(np.flatnonzero(~code), len(ids))
    ends = other[np.searchsorted(other, boi, "right")]
    odd = []
    for i, (begin, end) in enumerate(zip(boi.tolist(), ends.tolist(), strict=True), 1):
        if end - begin - 1 != IMAGE_CODES:
            odd.append(f"image {i} of {end - begin - 1} codes")
        elif end == len(ids) or ids[end] != layout.eoi:
            odd.append(f"no eoi after image {i}")
    if stray := int(np.count_nonzero(code) - (ends - boi - 1).sum()):
        odd.insert(0, f"{stray} codes without boi")
    if len(odd) > _NAMED:
        odd[_NAMED:] = [f"{len(odd) - _NAMED} more"]
    return reasons + odd


def _row_tables(store: TokenStore, columns: Sequence[str]) -> Iterator:
    """Names of the rows in order, as tables of up to 64 K rows."""
    import pyarrow
    from pyarrow import parquet

    path = require_file(store.path / ROWS_FILE)
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=list(columns)):
                yield pyarrow.Table.from_batches([batch])
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: corrupt Parquet ({str(error).splitlines()[0]})") from error


def _per_name(store: TokenStore, lengths: np.ndarray, supervised: np.ndarray) -> dict[str, list[dict]]:
    """`tasks` and `sources`: rows, ids and supervised ids of each name, in order of the names."""
    totals: dict[str, dict[str, np.ndarray]] = {
        kind: defaultdict(lambda: np.zeros(3, np.int64)) for kind in ("task", "source")
    }
    first = 0
    for table in _row_tables(store, tuple(totals)):
        rows = slice(first, first + table.num_rows)
        for kind, names in totals.items():
            column = table.column(kind).combine_chunks().dictionary_encode()
            index = column.indices.to_numpy(zero_copy_only=False)
            # Sums in float64 are exact up to 2^53 ids.
            sums = [np.bincount(index)] + [np.bincount(index, weights=n[rows]) for n in (lengths, supervised)]
            for i, name in enumerate(column.dictionary.to_pylist()):
                names[name] += [int(total[i]) for total in sums]
        first += table.num_rows
    return {
        f"{kind}s": [
            {kind: name, **dict(zip(("rows", "ids", "supervised"), names[name].tolist(), strict=True))}
            for name in sorted(names)
        ]
        for kind, names in totals.items()
    }


def _packing(lengths: np.ndarray, capacity: int) -> dict:
    plan = plan_epoch(lengths, capacity, seed=0, epoch=0)
    room = len(plan) * capacity
    fill = float(lengths[plan.rows].sum() / room) if room else 0.0
    return {"capacity": capacity, "packs": len(plan), "fill": fill, "too_long": int((lengths > capacity).sum())}
