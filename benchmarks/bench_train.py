"""One optimizer step of LoRA fine-tuning as a waterfall: every row adds one technique to the row named by `on`.

    PYTHONPATH=. python -m benchmarks.bench_train [--only train,others] [--size tiny|7b] [--quick] [--pack-length N]
        [--repeats N] [--output FILE.json]

The first row is the shape of the published training: one padded row of data at a time, stock transformers, logits of
every id in fp32. All rows of a run train the same weights on the same data (stages/train_parts.py): AdamW and clipping
run, with a learning rate of 0. Each must give the loss and the gradient of the first one, which stand beside its speed;
none is printed otherwise. Weights are random, and the adapter's B is not zero, so that A has a gradient.

Where the first row differs from the published one: the id mask of image codes is left out, which would make the loss
of image targets infinite; the loss is divided by the targets of the step and not of each batch, or batches could not be
compared; dropout is 0 and no cache of keys is built. In 16 bits adapters are too, as under DeepSpeed.

`--only train` runs the first row, packed, all fused around peft's modules and with ours, long packs, and selective
recomputation; `others` is the rest. Where DeepSpeed is not installed there is no row of it, and those that follow run
in plain torch: the fact `deepspeed` says which.

tokens_per_s counts real ids, padding does not count. mfu: medmax_fast/training/speed.py. floor_share: the time of the
products alone, the head on supervised ids only, at the rate of one large product measured in the same run, over the
time taken. memory_gib: most held during a step, in tensors on a GPU, resident in the whole process on a CPU. A row that
does not fit the GPU, or that fails, says so in `note`; with one that fails the exit status is 1. --output is written
after every row.
"""

import argparse
import contextlib
import importlib.util
import sys
from pathlib import Path

import torch

from benchmarks.harness import Roofline, environment, evidence, report, timed
from benchmarks.sections import FAILURES, failure, forget, section_parser
from benchmarks.stages.train_parts import (
    Model,
    Row,
    engine_step,
    leave_group,
    make_batches,
    make_rows,
    recomputing,
    step_flop,
    torch_step,
)
from medmax_fast.data.collate import target_counts
from medmax_fast.files import write_json
from medmax_fast.model.attention import available
from medmax_fast.model.init import SHAPES, make_tokenizer
from medmax_fast.runtime import pick_device, pick_dtype
from medmax_fast.training import engine as ds
from medmax_fast.training.speed import flops_per_token, mfu, peak_flops, peak_memory_gib
from medmax_fast.vocab import IdLayout

LONG_PACK = 16384
# Rows of data of a step, by size; those of 7b fill two packs of LONG_PACK to nine tenths.
ROWS = {"7b": 28, "tiny": 16}
# Largest difference of loss and gradient from the first row, relative. In bf16, 32 layers of width 512 were off by
# 0.001 and 0.06 on a CPU; a part of the model left out, or of another sign, moves the gradient by its size.
LOSS_BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
GRADIENT_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.25}
# Rows of section `train`, and what the common table calls them.
STAGE_ROWS = {
    "published: padded batch of 1": "published: padded, one row at a time",
    "packed": "packed",
    "fused qk-norm and RoPE": "packed, fused around peft's modules",
    "fused LoRA": "packed, fused",
    "DeepSpeed ZeRO-2": "packed, fused",
    f"packs of {LONG_PACK}": "packed, fused",
    "recompute selective": "packed, fused, selective recomputation",
}


def waterfall(gpu: bool, liger: bool, long_packs: bool, deepspeed: bool) -> list[Row]:
    first = Row("published: padded batch of 1")
    head = first.then("head on targets only", all_logits=False)
    packed = head.then("packed", batches="packed")
    norm = packed.then("fused RMSNorm", norm="ours")
    mlp = norm.then("fused SwiGLU", mlp="ours")
    all_fused = mlp.then("fused qk-norm and RoPE", attention="ours")
    rows = [first, first.then("padded batch of 8", batches="padded 8"), head, packed, norm, mlp, all_fused]
    if liger:
        rows.append(all_fused.then("liger's RMSNorm instead", norm="liger"))
        rows.append(all_fused.then("liger's SwiGLU instead", mlp="liger"))
    if gpu:
        rows.append(packed.then("packed, compiled layers", compiled=True))
        rows.append(all_fused.then("fused, compiled layers", compiled=True))
    last = all_fused.then("fused LoRA", adapter="ours")
    rows.append(last)
    if deepspeed:
        last = last.then("DeepSpeed ZeRO-2", engine=True)
        rows.append(last)
    if long_packs:
        last = last.then(f"packs of {LONG_PACK}", batches="long")
        rows.append(last)
    return [*rows, *(last.then(f"recompute {kind}", recompute=kind) for kind in ("selective", "layers"))]


def step_form(row: Row, lengths: dict[str, int]) -> str:
    """What the common table calls a row of section `train`; `lengths`: of packs, by the name that Row.batches gives."""
    packs = f", packs of {lengths[row.batches]:,}" if row.batches in lengths else ""
    return STAGE_ROWS[row.name] + ", DeepSpeed ZeRO-2" * row.engine + packs


def long_forms() -> list[str]:
    """Of our steps of 7B on packs of LONG_PACK, with DeepSpeed and without."""
    rows = [row for deepspeed in (True, False) for row in waterfall(True, False, True, deepspeed)]
    forms = [step_form(row, {"long": LONG_PACK}) for row in rows if row.name in STAGE_ROWS and row.batches == "long"]
    return list(dict.fromkeys(forms))


def section_of(row: Row) -> str:
    return "train" if row.name in STAGE_ROWS else "others"


def chosen(rows: list[Row], only: list[str]) -> list[Row]:
    """Those of the sections `only`, and the first, which the others are compared with."""
    return [row for row in rows if section_of(row) in only or row is rows[0]]


def data_shape(rows: int, tokens: int) -> str:
    return f"{rows} rows, {tokens:,} ids"


def floors() -> list[dict]:
    """The products of a step of 7B, in the names of the evidence; loads nothing."""
    shape, rows = SHAPES["7b"], ROWS["7b"]
    layout = IdLayout.from_vocab(make_tokenizer(shape.vocab_size)["model"]["vocab"])
    ids, offsets = make_rows(rows, layout, 1)
    targets = int(target_counts(ids, offsets, layout.eot).sum())
    flop = step_flop(shape, False, len(ids), targets)
    return [{"stage": "train", "shape": data_shape(rows, len(ids)), "moved_bytes": 0, "flop": flop}]


def reset_peak_memory(device: torch.device) -> bool:
    """Whether peak_memory_gib counts from now on; on a CPU Linux must allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure(model: Model, row: Row, batches: list[dict], targets: int, first: dict, repeats: int) -> dict:
    """Loss, gradient, memory and time of a row; AssertionError if one of the first two is not that of `first`."""
    model.dress(row)
    gradients: dict[str, torch.Tensor] = {}
    build = engine_step if row.engine else torch_step
    with recomputing(model, row.recompute), build(model, row, batches, targets) as step:
        loss = step(gradients)
        # Lengths have all been seen and the optimizer has its state.
        counted = reset_peak_memory(model.device)
        step(None)
        memory = peak_memory_gib(model.device) if counted else None
        seconds = timed(lambda: step(None), repeats, warmup=0)
    if not first:
        first |= {"loss": loss, "gradients": gradients}
    by_loss = abs(loss / first["loss"] - 1)
    by_gradient = apart(gradients, first["gradients"], model.device)
    assert by_loss <= LOSS_BOUND[model.dtype], f"{row.name}: loss {loss}, the first row has {first['loss']}"
    assert by_gradient <= GRADIENT_BOUND[model.dtype], f"{row.name}: its gradient differs by {by_gradient:.2g}"
    compared = {"loss": loss, "loss_difference": by_loss, "gradient_difference": by_gradient}
    return {**seconds, "memory_gib": memory, **compared, "note": ""}


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], device: torch.device) -> float:
    """The norm of the difference of all gradients over that of the expected ones, in float64 on the device."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for name, grad in expected.items():
        right = grad.to(device).double()
        difference = found[name].to(device).double() - right
        sums += torch.stack([difference.square().sum(), right.square().sum()])
    difference, norm = sums.sqrt().tolist()
    return difference / norm


def rates(seconds: dict, first: dict, before: dict, facts: dict) -> dict:
    """Speeds of a row from its seconds, and how many times as fast it is as the first row and as the one it is on."""
    middle = seconds["p50_s"]
    tokens_per_s = facts["tokens"] / middle
    return {
        "tokens_per_s": tokens_per_s,
        "target_tokens_per_s": facts["targets"] / middle,
        "times_first": first["p50_s"] / middle,
        "times_on": before["p50_s"] / middle if before.get("p50_s") else None,
        "mfu": mfu(tokens_per_s, facts["flop_per_token"], facts["peak_flop_per_s"], 1),
        "floor_share": facts["floor_s"] / middle,
    }


# Of every row, empty where it did not fit.
KEYS = ("row", "on", "p20_s", "p50_s", "p80_s", "tokens_per_s", "target_tokens_per_s", "times_first", "times_on")
KEYS += ("mfu", "floor_share", "memory_gib", "fill", "loss", "loss_difference", "gradient_difference", "note")


def run(arguments: argparse.Namespace, size: str, pack_length: int) -> tuple[list[dict], dict]:
    """(rows of the table, facts of the run)."""
    device, quick = pick_device("auto"), arguments.quick
    dtype, gpu, seven = pick_dtype("auto", device), device.type == "cuda", size == "7b"
    liger, deepspeed = (importlib.util.find_spec(name) is not None for name in ("liger_kernel", "deepspeed"))
    long_packs = seven and pack_length < LONG_PACK
    rows = chosen(waterfall(gpu, gpu and liger, long_packs, deepspeed), arguments.only)
    if any(row.engine for row in rows):
        ds.start_processes(device, dtype)
    roofline = Roofline.measure(device.type, quick)
    model = Model(size, device, dtype)
    shrink, count = (16, 6) if quick else (1, ROWS[size])
    ids, offsets = make_rows(count, model.layout, shrink)
    lengths = {"packed": pack_length} | ({"long": LONG_PACK} if long_packs else {})
    batches = make_batches(ids, offsets, model.layout, lengths, device)
    tokens, targets = len(ids), sum(batch["target_tokens"] for batch in batches["packed"])
    flop = step_flop(model.shape, False, tokens, targets)
    facts = {
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "attention": available(device, dtype),
        "deepspeed": deepspeed,
        "rows_of_data": count,
        "tokens": tokens,
        "targets": targets,
        "pack_length": pack_length,
        "flop_per_token": flops_per_token(model.shape, full=False),
        "peak_flop_per_s": peak_flops(device, dtype),
        "product_flop_per_s": roofline.product,
        "floor_s": flop / roofline.product,
        "failed": {},
        "evidence": [],
    }
    repeats = arguments.repeats or (2 if quick else 3 if seven else 5)
    first: dict = {}
    found: dict[str, dict] = {}
    for row in rows:
        forget()
        mine = batches[row.batches]
        line = dict.fromkeys(KEYS) | {"row": row.name, "on": row.on, "note": ""}
        line["fill"] = tokens / sum(batch["input_ids"].numel() for batch in mine)
        try:
            line |= measure(model, row, mine, targets, first, repeats)
        except FAILURES as error:
            fits = not isinstance(error, torch.OutOfMemoryError)
            line["note"] = f"failed: {failure(row.name, error)}" if fits else "out of memory"
            # All that follows would be compared with the first row.
            if fits or not first:
                reasons = facts["failed"].get(section_of(row), "")
                facts["failed"][section_of(row)] = f"{reasons}; {row.name} {line['note']}".removeprefix("; ")
        found[row.name] = line
        if line["p50_s"]:
            line |= rates(line, next(iter(found.values())), found.get(row.on, {} if row.on else line), facts)
            if row.name in STAGE_ROWS:
                facts["evidence"].append(step_evidence(step_form(row, lengths), line, facts, flop, roofline))
        if arguments.output:
            result = {"benchmark": "train", **facts, "environment": environment(), "rows": list(found.values())}
            write_json(arguments.output, result)
        if not first:
            break
    return list(found.values()), facts


def step_evidence(form: str, line: dict, facts: dict, flop: float, roofline: Roofline) -> dict:
    """A row of the common table, with the MFU and the memory that this benchmark alone has."""
    beside = facts["evidence"][0] if facts["evidence"] else {"form": form, "p50_s": line["p50_s"]}
    row = evidence(
        "train",
        data_shape(facts["rows_of_data"], facts["tokens"]),
        form,
        line,
        roofline,
        flop=flop,
        items=(facts["tokens"], "ids"),
        beside=(beside["form"], beside["p50_s"]),
        quality={name: line[name] for name in ("loss_difference", "gradient_difference")},
    )
    return row | {name: line[name] for name in ("mfu", "memory_gib")}


def main() -> int:
    parser = section_parser(
        "optimizer step: time, memory, loss, gradient, technique by technique", ("train", "others"), sized=True
    )
    parser.add_argument("--pack-length", type=int, help="ids per pack (default: what the unfused rows have room for)")
    parser.add_argument("--repeats", type=int, help="timed steps of each row (default: 3 of 7b, 5 of tiny)")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    size = arguments.size or ("7b" if gpu else "tiny")
    roomy = gpu and size == "7b" and torch.cuda.get_device_properties(0).total_memory > 120e9
    pack_length = arguments.pack_length or (8192 if roomy else 256 if arguments.quick else 4096)
    # DeepSpeed prints there, and the last line belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        rows, facts = run(arguments, size, pack_length)
    tokens, floor = facts["tokens"], facts["floor_s"]
    print(f"floor: {floor:.3g} s of products at the {facts['product_flop_per_s'] / 1e12:.3g} TFLOP/s of one large one")
    if peak := facts["peak_flop_per_s"]:
        seconds = tokens * facts["flop_per_token"] / peak
        print(f"at an MFU of 1: {seconds:.3g} s, {tokens / seconds:,.0f} tokens/s")
    if not gpu:
        print("no GPU: fused parts run as their torch references here, which shows that they are equal, not how fast")
    report("train", rows, arguments.output, **facts)
    return int(bool(facts["failed"]))


if __name__ == "__main__":
    status = main()
    leave_group()
    sys.exit(status)
