"""Sections of bench_generate without a stage of `medmax bench`: the company's influence on ids, and 8-bit weights."""

import importlib.util
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.stages.generate_forms import compare, row_losses, text_prompts, write
from benchmarks.stages.generate_sections import Bench, text_rows
from medmax_fast.generate.cache import position_bytes
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.pages import PAGE, pages_of
from medmax_fast.model.decoder import Decoder


def agreement(bench: Bench) -> Iterator[tuple[list[dict], list[dict]]]:
    models, count, rows = bench.models, bench.size.requests, []
    lengths = np.random.default_rng(0).integers(8, bench.size.prompt, count)
    prompts = [text_prompts(models.layout, 1, length, i)[0] for i, length in enumerate(lengths)]
    for dtype in (torch.float32, torch.bfloat16):
        decoder = models.decoder if dtype == models.dtype else Decoder.load(models.checkpoint, models.device, dtype)
        for picks in ("greedy", "sampled"):
            found = {}
            for company, batch in (("alone", 1), ("together", count)):
                engine = models.engine(batch, bench.size.prompt + bench.size.agreement_new, decoder)
                found[company] = write(engine, prompts, bench.size.agreement_new, batch == 1, greedy=picks == "greedy")
            precision = str(dtype).removeprefix("torch.")
            row = {"row": f"{precision}, {picks}", "batch": count, "requests": count}
            rows.append(row | compare(found["together"], found["alone"]))
    yield rows, []


def quantize(bench: Bench) -> Iterator[tuple[list[dict], list[dict]]]:
    if importlib.util.find_spec("torchao") is None:
        print("quantize: torchao is not installed, nothing is measured")
        return
    models, size = bench.models, bench.size
    kinds = ("none", "int8", "fp8") if models.device.type == "cuda" else ("none", "int8")
    room = size.quantize_batch * pages_of(size.prompt + size.new) * PAGE * position_bytes(models.decoder) / 1e9
    options = {"device": models.device.type, "cache_gb": room}
    engines = {kind: Engine.from_checkpoint(models.checkpoint, quantize=kind, **options) for kind in kinds}
    free = {"greedy": False, "top_p": 1.0, "repetition_penalty": 1.0}
    prompts = text_prompts(models.layout, size.quantize_batch, size.prompt // 2, 0)
    # By an engine of its own: what one has written it finds in its cache.
    drawn = write(models.engine(len(prompts), size.prompt + size.new), prompts, size.new, **free)
    written = [prompt + new for prompt, new in zip(prompts, drawn, strict=True)]
    losses = {kind: row_losses(engine, written) for kind, engine in engines.items()}
    forms = {kind: partial(write, engine) for kind, engine in engines.items()}
    rows, _, ids = text_rows(bench, forms, size.quantize_batch)
    before, likeliest = losses["none"]
    for kind, row in rows.items():
        row["times"] = row["ids_per_s"] / rows["none"]["ids_per_s"]
        row |= {"weight_bytes": engines[kind].decoder.step_bytes(), "cross_entropy": losses[kind][0]}
        row["cross_entropy_change"] = losses[kind][0] - before
        row["likeliest_differing"] = float((losses[kind][1] != likeliest).double().mean())
        row |= compare(ids[kind], ids["none"])
    yield list(rows.values()), []
