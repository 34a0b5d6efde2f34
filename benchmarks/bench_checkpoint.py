"""Checkpoints: seconds and peak memory of loading, converting and merging, beside the forms that hold a whole model.

A synthetic bf16 checkpoint of 2 GB (`--quick`: a few MB) is converted, joined from four shards, split, merged, loaded.
Every measurement is a process of its own that first does the same with a small checkpoint, so that imports do not
count. `peak_mb` is how far resident memory rose at most, pages of mapped files included; `anonymous_mb` the part that
the system could not take back at will. `group_mb` is the largest tensor, twice where the target needs a changed copy of
it beside its source: joined, cut or merged; of loading, the model in its dtype. Files are in the page cache on both
sides; `stream` also compares the checksums of the source, writes those of the target, and waits for the disk.

The other sides: transformers' from_pretrained (seconds up to the first logits, median of three, for both); whole state
dicts in memory as in the published conversion; peft's merge_and_unload with save_pretrained. `same` compares the
result: conversions bit for bit, merged weights against fp64, logits with those of the first row.
"""

import contextlib
import json
import math
import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.harness import parse_arguments, report
from medmax_fast.cli import main as medmax
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.convert import write_checkpoint
from medmax_fast.model.files import SafetensorsFile
from medmax_fast.model.init import SHAPES, RandomCheckpoint
from medmax_fast.model.layout import LAYER_KEYS, ModelShape, keys, to_hf
from medmax_fast.model.load import load_model
from medmax_fast.runtime import InputError

SHAPE = SHAPES["1b"]
SMALL = ModelShape(dim=128, layers=2, heads=4, kv_heads=4, hidden=352, vocab_size=0)
RANK, MB = 16, 1e6


def status(*names: str) -> list[float]:
    """Figures of /proc/self/status in MB."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = dict(line.split(":", 1) for line in file)
    return [int(found[name].split()[0]) * 1024 / MB for name in names]


def measured(work, small: tuple, arguments: tuple) -> dict:
    """Run work(*arguments) in this process after work(*small): seconds, memory above that before, what it returned."""
    work(*small)
    Path("/proc/self/clear_refs").write_text("5")
    resident, anonymous = status("VmRSS", "RssAnon")
    most, done = [anonymous], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], *status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    with open(os.devnull, "w", encoding="ascii") as null, contextlib.redirect_stdout(null):
        value = work(*arguments)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    peak = status("VmHWM")[0] - resident
    return {"seconds": seconds, "peak_mb": peak, "anonymous_mb": most[0] - anonymous, "value": value}


def alone(work, small: tuple, arguments: tuple) -> dict:
    """`measured` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, work, small, arguments).result()


# ---- what is measured; each takes paths and returns something small ----


def ours_init(folder: str, shape: ModelShape, shards: int) -> None:
    with tempfile.TemporaryDirectory() as text:
        generator = torch.Generator().manual_seed(0)
        write_checkpoint(RandomCheckpoint(Path(text), shape, generator, torch.bfloat16), folder, "chameleon", shards)


def ours_convert(source: str, target: str, layout: str, *flags: str) -> None:
    assert medmax(["convert", "--input", source, "--output", target, "--to", layout, *flags]) == 0


def whole_convert(source: str, target: str) -> None:
    """Chameleon to Hugging Face with both state dicts in memory."""
    opened = open_checkpoint(source)
    shards = [torch.load(shard.path, weights_only=True) for shard in opened.shards]
    state = {}
    for key in keys(opened.shape.layers):
        state[key.hf] = to_hf(key, [shard.pop(key.chameleon) for shard in shards], opened.shape).contiguous()
    Path(target).mkdir()
    save_file(state, Path(target) / "model.safetensors", metadata={"format": "pt"})


def ours_merge(base: str, adapter: str, target: str) -> None:
    assert medmax(["merge", "--ckpt", base, "--adapter", adapter, "--output", target]) == 0


def peft_merge(base: str, adapter: str, target: str) -> None:
    from peft import PeftModel
    from transformers import ChameleonForConditionalGeneration

    model = ChameleonForConditionalGeneration.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target)


def first_logits(model) -> list[float]:
    ids = torch.arange(8712, 8728)[None]
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state)[0, -1].float().tolist()


def ours_load(path: str, dtype: torch.dtype) -> list[float]:
    return first_logits(load_model(path, "cpu", dtype))


def stock_load(path: str, dtype: torch.dtype) -> list[float]:
    from transformers import ChameleonForConditionalGeneration

    return first_logits(ChameleonForConditionalGeneration.from_pretrained(path, dtype=dtype))


# ---- comparing results ----


def reader(folder: str):
    """name -> tensor of a checkpoint, or of a folder with nothing but model.safetensors."""
    with contextlib.suppress(InputError):
        return open_checkpoint(folder).tensor
    return SafetensorsFile(Path(folder) / "model.safetensors").tensor


def bitwise(source: str, result: str) -> str:
    """Whether two checkpoints hold the same bits."""
    read = reader(result)
    opened = open_checkpoint(source)
    equal = all(torch.equal(opened.tensor(name), read(name)) for name in opened.names())
    return "bitwise" if equal else "DIFFERS"


def worst_merge(base: str, adapter: str, merged: str) -> str:
    """The largest error of a merged weight against fp64, in units of bf16's last place of base or result."""
    read, pairs, worst = reader(merged), SafetensorsFile(Path(adapter) / "adapter_model.safetensors"), 0.0
    opened = open_checkpoint(base)
    for weight in opened.names():
        tensor, name = opened.tensor(weight).double(), f"base_model.model.{weight.removesuffix('.weight')}"
        exact = tensor.clone()
        if f"{name}.lora_A.weight" in pairs.names():
            a, b = (pairs.tensor(f"{name}.lora_{part}.weight").double() for part in "AB")
            exact += b @ a
        unit = torch.exp2(exact.abs().maximum(tensor.abs()).clamp(min=1e-30).log2().floor() - 7)
        worst = max(worst, ((read(weight).double() - exact).abs() / unit).max().item())
    return f"{worst:.3f} ulp"


def write_adapter(folder: Path, shape: ModelShape) -> None:
    """A peft adapter of random pairs on every projection."""
    folder.mkdir()
    generator, state = torch.Generator().manual_seed(1), {}
    for key in keys(shape.layers):
        if "_proj." in key.hf:
            rows, columns = key.size(shape)
            name = f"base_model.model.{key.hf.removesuffix('.weight')}"
            state[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * columns**-0.5
            state[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({key.hf.split(".")[1] for key in LAYER_KEYS if "_proj." in key.hf})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


# what, form, work, names of folders, further arguments, how many times the largest tensor is in memory by design
WRITING = (
    ("4 shards -> 1", "stream", ours_convert, ("four", "one"), ("chameleon", "--shards", "1"), 2),
    ("4 shards -> hf", "stream", ours_convert, ("four", "joined"), ("hf",), 2),
    ("1 file -> hf", "stream", ours_convert, ("one", "hf"), ("hf",), 1),
    ("1 file -> hf", "whole", whole_convert, ("one", "whole"), (), 1),
    ("hf -> 1 file", "stream", ours_convert, ("hf", "back"), ("chameleon",), 1),
    ("hf -> 4 shards", "stream", ours_convert, ("hf", "again"), ("chameleon", "--shards", "4"), 2),
    ("merge LoRA", "stream", ours_merge, ("hf", "adapter", "merged"), (), 2),
    ("merge LoRA", "peft", peft_merge, ("hf", "adapter", "peft"), (), 2),
)
LOADING = (
    ("medmax, hf", ours_load, "hf"),
    ("medmax, 1 file", ours_load, "one"),
    ("medmax, 4 shards", ours_load, "four"),
    ("from_pretrained", stock_load, "hf"),
)


def run(root: Path, shape: ModelShape, repeats: int) -> list[dict]:
    """All rows, in `root`, which needs about ten times the checkpoint's size."""
    sizes = [math.prod(key.size(shape)) for key in keys(shape.layers)]
    for size, of in (("small", SMALL), ("large", shape)):
        (root / size).mkdir()
        write_adapter(root / size / "adapter", of)
        ours_init(str(root / size / "four"), of, 4)

    def row(what: str, form: str, work, names: tuple, more: tuple, group: int) -> dict:
        small, large = [(*(str(root / size / name) for name in names), *more) for size in ("small", "large")]
        found = alone(work, small, large)
        value = found.pop("value")
        figures = {name: round(figure, 2) for name, figure in found.items()}
        figures["group_mb"] = round(group / MB, 2)
        figures["peak_by_group"] = round(found["peak_mb"] * MB / group, 2)
        return {"what": what, "form": form, **figures, "value": value}

    rows = []
    for what, form, work, names, more, copies in WRITING:
        # bf16 takes two bytes.
        rows.append(row(what, form, work, names, more, copies * 2 * max(sizes)))
        paths = [str(root / "large" / name) for name in names]
        rows[-1]["same"] = worst_merge(*paths) if what == "merge LoRA" else bitwise(*paths)
        del rows[-1]["value"]
    for dtype in (torch.bfloat16, torch.float32):
        expected = None
        for form, work, name in LOADING:
            what = f"load as {str(dtype).removeprefix('torch.')}"
            timed = [row(what, form, work, (name,), (dtype,), sum(sizes) * dtype.itemsize) for _ in range(repeats)]
            found = sorted(timed, key=lambda row: row["seconds"])[repeats // 2]
            logits = torch.tensor(found.pop("value"))
            expected = logits if expected is None else expected
            rows.append(found | {"same": f"{(logits - expected).abs().max():.1e} in logits"})
    return rows


if __name__ == "__main__":
    flags = parse_arguments(__doc__.splitlines()[0])
    torch.set_num_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        of = SMALL if flags.quick else SHAPE
        report("checkpoint", run(Path(folder), of, 1 if flags.quick else 3), flags.output, shape=str(of))
