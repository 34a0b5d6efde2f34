"""Building a token store: rows per second of `medmax build` against the plain path, a row at a time in Python.

Three inputs of the same rows: text with images that are joined by path from the tokenizer's Parquet, ready `tokens` in
Parquet, ready `tokens` in JSONL. Rows are image first, a question of 4 to 20 words and an answer of 5 to 120, about
1,150 ids. Every form runs in a process of its own, so that its peak memory is its own too (in it the interpreter with
its libraries, and of the codes table what has been touched). `mb_per_s` counts the bytes of the input, of the first
form with its codes; `verified` that the ids equal those of the plain path.
"""

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.harness import parse_arguments, report
from medmax_fast.cli import main as medmax
from medmax_fast.config import BuildConfig
from medmax_fast.data.build import build
from medmax_fast.data.codes import CodeTable
from medmax_fast.data.rows import read_rows
from medmax_fast.data.sequences import count_images, expand, open_tokenizer, ready_ids
from medmax_fast.data.store import IDS_FILE, OFFSETS_FILE, StoreWriter
from medmax_fast.files import hash_file
from medmax_fast.vocab import EOT_TEXT, IMAGE_CODES

WORDS = "the lung field shows a small nodule in left upper lobe with no sign of effusion or collapse stain is positive"
_BATCH = 512


def plain_build(config: BuildConfig) -> None:
    """The plain path: one thread of Python, NumPy per row; text is still encoded in batches."""
    tokenizer = open_tokenizer(config.ckpt)
    layout, source = tokenizer.layout, Path(config.input)
    hash_file(source)
    Path(config.output).mkdir()
    table = CodeTable(config.codes, layout.num_codes, config.output) if config.codes else None
    with StoreWriter(config.output, layout) as writer:
        rows = iter(read_rows(source, ("text", "tokens", "image_path", "task", "source")))
        while batch := [row for _, row in zip(range(_BATCH), rows, strict=False)]:
            texts = iter(tokenizer.encode_batch([v["text"] for _, v in batch if not v.get("tokens")]))
            for number, values in batch:
                if values.get("tokens"):
                    ids = ready_ids(values["tokens"], layout)
                else:
                    text = next(texts)
                    codes = table.find(values["image_path"], source.parent)
                    ids = expand(text, [codes] * count_images(text, layout), layout)
                writer.append(ids, f"{source.name}:{number}", values["task"], values["source"])
        writer.close()


def make_inputs(folder: Path, count: int) -> dict[str, tuple[Path, str, int]]:
    """Name -> (input, codes, bytes read) of each form of `count` rows, and a checkpoint for its tokenizer."""
    import pyarrow
    from pyarrow import parquet

    with contextlib.redirect_stdout(io.StringIO()):
        assert medmax(["init", str(folder / "ckpt")]) == 0
    tokenizer = open_tokenizer(folder / "ckpt")
    rng = np.random.default_rng(0)
    words = np.array(WORDS.split())
    say = lambda low, high: " ".join(rng.choice(words, rng.integers(low, high)))  # noqa: E731
    text = [f"<image>{say(4, 20)}?{EOT_TEXT}{say(5, 120)}." for _ in range(count)]
    codes = rng.integers(0, tokenizer.layout.num_codes, (count, IMAGE_CODES)).astype(np.uint16)
    names = [f"images/{i:07d}.png" for i in range(count)]
    parts = [json.dumps({"text": t, "image_path": n, "task": "vqa", "source": "made"}) for t, n in zip(text, names)]  # noqa: B905
    (folder / "text.jsonl").write_text("\n".join(parts) + "\n")
    (folder / "codes").mkdir()
    lists = pyarrow.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * IMAGE_CODES, codes.ravel())
    parquet.write_table(pyarrow.table({"img_path": names, "img_tokens": lists}), folder / "codes" / "c.parquet")
    tokens = [
        expand(ids, [one], tokenizer.layout).astype(np.int32)
        for ids, one in zip(tokenizer.encode_batch(text), codes, strict=True)
    ]
    with open(folder / "tokens.jsonl", "w") as file:
        for t, ids in zip(text, tokens, strict=True):
            row = {"text": t, "tokens": ids.tolist(), "task": "vqa", "source": "made"}
            file.write(json.dumps(row) + "\n")
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])]).astype(np.int32)
    ready = pyarrow.ListArray.from_arrays(offsets, np.concatenate(tokens))
    columns = {"text": text, "tokens": ready, "task": ["vqa"] * count, "source": ["made"] * count}
    parquet.write_table(pyarrow.table(columns), folder / "tokens.parquet", row_group_size=10_000)
    forms = {"text + codes": ("text.jsonl", "codes"), "tokens, Parquet": ("tokens.parquet", "")}
    forms["tokens, JSONL"] = ("tokens.jsonl", "")
    sizes = {
        n: (folder / n).stat().st_size for n in ("text.jsonl", "tokens.parquet", "tokens.jsonl", "codes/c.parquet")
    }
    return {
        form: (
            folder / name,
            str(folder / codes) if codes else "",
            sizes[name] + sizes["codes/c.parquet"] * bool(codes),
        )
        for form, (name, codes) in forms.items()
    }


def measured(config: BuildConfig, plain: bool) -> dict:
    """Seconds, peak resident bytes and a hash of the ids and offsets of one build, in this process."""
    work = functools.partial(plain_build if plain else build, config)
    # Libraries are imported before the clock starts.
    import pyarrow.parquet  # noqa: F401

    open_tokenizer(config.ckpt)
    start, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    digest = hashlib.sha256()
    for name in (IDS_FILE, OFFSETS_FILE):
        digest.update(hash_file(Path(config.output) / name).encode())
    # Of this address space alone; getrusage would count what the process was forked from.
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "sha256": digest.hexdigest()}


def in_own_process(config: BuildConfig, plain: bool) -> dict:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(measured, config, plain).result()


def main() -> None:
    arguments = parse_arguments("build: rows per second")
    count = 2_000 if arguments.quick else 20_000
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for form, (path, codes, size) in make_inputs(folder, count).items():
            variants = [("plain", True, 1), ("1 worker", False, 1), ("2 workers", False, 2)]
            best: dict[str, dict] = {}
            # In turns, so that a slow spell of the machine does not fall on one of them.
            for turn in range(3):
                for label, plain, workers in variants:
                    output = folder / f"{turn}-{len(table)}-{workers}-{plain}"
                    config = BuildConfig(str(path), str(folder / "ckpt"), str(output), codes=codes, workers=workers)
                    found = in_own_process(config, plain)
                    if label not in best or found["seconds"] < best[label]["seconds"]:
                        best[label] = found
            for label, found in best.items():
                assert found["sha256"] == best["plain"]["sha256"], (form, label)
                table.append(
                    {
                        "input": form,
                        "form": label,
                        "rows_per_s": count / found["seconds"],
                        "mb_per_s": size / found["seconds"] / 1e6,
                        "speedup": best["plain"]["seconds"] / found["seconds"],
                        "cpu_us_per_row": found["cpu"] / count * 1e6,
                        "peak_mb": found["peak"],
                        "verified": True,
                    }
                )
    report("build", table, arguments.output, rows_built=count, load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
