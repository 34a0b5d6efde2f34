"""`medmax generate`: prompts from a JSONL file to outputs.jsonl and PNGs, or one prompt answered on the terminal.

Under torchrun the ranks share the layers of one model; the first one reads and writes. Finished answers go to a hidden
journal at once, so that a run that was stopped goes on after them; outputs.jsonl is written when all are there.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import distributed

from medmax_fast.config import GenerateConfig
from medmax_fast.files import SETTINGS_FILE, hash_file, open_output, require_file, require_new
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.requests import PicturePiece, Request, Result, TextPiece
from medmax_fast.generate.writer import OUTPUTS, Writer, count_rejected, picture_name, read_journal
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.progress import Progress
from medmax_fast.runtime import InputError, TooManyRejected, info, kept, pick_device, rank_and_world, require_at_least

# What runs where, how much at a time and what is shown meanwhile does not change the output.
_NOT_SETTINGS = ("output", "prompt", "image", "batch_size", "device", "cache_gb", "preview")


def generate(config: GenerateConfig) -> dict:
    """Run the prompts of a file into a folder, or one prompt to the terminal; returns a summary."""
    if bool(config.prompts) == bool(config.prompt):
        raise InputError("give either --prompts FILE or --prompt TEXT")
    if config.prompts and not config.output:
        raise InputError("--prompts needs --output, the folder for outputs.jsonl and the pictures")
    if config.cache_gb < 0:
        raise InputError(f"--cache-gb {config.cache_gb}: expected 0 or more")
    require_at_least(config, 1, "batch_size")
    try:
        _request(config, "flags", token_ids=[]).check()
    except InputError as error:
        name, _, rest = str(error).partition(" ")
        raise InputError(f"--{name.replace('_', '-')} {rest}") from error
    return _generate_file(config) if config.prompts else _generate_one(config)


def _generate_file(config: GenerateConfig) -> dict:
    requests = read_prompts(config.prompts, config)
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    settings["prompts_sha256"] = hash_file(config.prompts)
    group = _join(config.device)
    output, ours = Path(config.output), rank_and_world()[0] == 0
    # A folder that is there is looked at before a model is loaded, a new one is made only after that.
    found = _agree(_look_up(output, settings) if ours else None, group)
    if isinstance(found, InputError):
        raise found
    finished, done = found
    if finished:
        return _summary(output, len(requests))
    engine = _open_engine(config, group)
    events = engine.stream([request for request in requests if request.id not in done], config.batch_size)
    if not ours:
        # The other ranks compute what the first one writes.
        return {"events": sum(1 for _ in events)}
    writer = Writer(open_output(output, "generate", settings), engine, config.preview)
    if done:
        info(f"generate: {len(done)} of {len(requests)} prompts are already answered in {config.output}")
    with kept(lambda: _kept(output, len(requests))):
        with Progress("generate (prompts)", len(requests), len(done), count_rejected(output)) as bar:
            writer.write(events, bar)
        writer.finish([request.id for request in requests])
    return _summary(output, len(requests))


def _look_up(output: Path, settings: dict) -> tuple[bool, set[str]] | InputError:
    """Whether a folder has all answers, and the prompts that it has answers to; or what is wrong with it."""
    try:
        if not (output / SETTINGS_FILE).exists():
            require_new(output)
            return False, set()
        open_output(output, "generate", settings)
    except InputError as error:
        return error
    return read_journal(output)


def _kept(output: Path, prompts: int) -> str:
    """What an interrupted run keeps."""
    finished, done = read_journal(output)
    return f"{prompts if finished else len(done)} of {prompts} answers are kept in {output}"


def _summary(output: Path, prompts: int) -> dict:
    """What the command returns; TooManyRejected if there are prompts that could not be run."""
    rejected = count_rejected(output)
    summary = {"prompts": prompts, "rejected": rejected, "output": str(output / OUTPUTS)}
    if rejected:
        raise TooManyRejected(summary, 0)
    return summary


def _generate_one(config: GenerateConfig) -> dict:
    pieces = [{"type": "image", "path": config.image}] if config.image else []
    pieces.append({"type": "text", "text": config.prompt})
    engine = _open_engine(config, _join(config.device))
    request = _request(config, "prompt", content=pieces)
    writer = Writer(Path(config.output or "."), engine, config.preview)
    if rank_and_world()[0]:
        return {"events": sum(1 for _ in engine.stream([request]))}
    for event in engine.stream([request]):
        if isinstance(event, TextPiece):
            print(event.text, end="", flush=True)
        elif isinstance(event, PicturePiece) and writer.picture(event):
            print(f"\n[picture: {writer.folder / picture_name(event.id, event.number)}]", flush=True)
        elif isinstance(event, Result):
            result = event
    if result.error:
        raise InputError(result.error)
    print()
    content = writer.content(result)
    answer = " ".join(piece.get("text") or f"[picture: {piece['path']}]" for piece in content)
    pictures = [piece["path"] for piece in content if "path" in piece]
    return {"answer": answer, "pictures": pictures, "token_ids": result.token_ids, "printed": ["answer"]}


def _join(device: str):
    """The process group of all ranks, or None for a single process."""
    rank, world = rank_and_world()
    if world == 1:
        return None
    device = pick_device(device)
    options = {"device_id": device} if device.type == "cuda" else {}
    if device.type == "cuda":
        # Kernels and graphs run on the current device.
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world, **options)
    return distributed.group.WORLD


def _agree(value, group):
    """The first rank's value on every rank."""
    box = [value]
    if group is not None:
        distributed.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def _open_engine(config: GenerateConfig, group) -> Engine:
    """The model; InputError, before it is loaded, for a checkpoint that cannot draw what is to be drawn."""
    checkpoint = open_checkpoint(config.ckpt, config.vqgan)
    if config.mode != "text" and not checkpoint.draws:
        raise InputError(f"{config.ckpt}: no VQGAN decoder, so it cannot draw; --vqgan gives it one")
    return Engine.from_checkpoint(checkpoint, config.device, config.precision, config.quantize, config.cache_gb, group)


def read_prompts(path: str, config: GenerateConfig) -> list[Request]:
    """Requests of a prompts file; image paths are absolute or relative to it. InputError names the bad line."""
    folder, requests, seen = require_file(path).parent, [], set()
    for number, line in enumerate(require_file(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line.decode())
            # Half of a surrogate pair, as \ud83d alone, is no text that could be encoded or written.
            json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(row, dict) or "id" not in row:
            raise InputError(f"{where}: expected an object with id and content or token_ids")
        if ("content" in row) == ("token_ids" in row):
            raise InputError(f"{where}: expected either content or token_ids")
        key = "content" if "content" in row else "token_ids"
        if not isinstance(row[key], list):
            raise InputError(f"{where}: {key} is {type(row[key]).__name__}, expected a list")
        if str(row["id"]) in seen:
            raise InputError(f"{where}: id {row['id']!r} occurs twice")
        seen.add(str(row["id"]))
        requests.append(_request(config, str(row["id"]), **{key: _resolve(row[key], folder)}))
    if not requests:
        raise InputError(f"{path}: no prompts")
    return requests


def _request(config: GenerateConfig, request_id: str, **prompt) -> Request:
    shared = {f.name for f in fields(Request)} & {f.name for f in fields(GenerateConfig)}
    return Request(request_id, **prompt, **{name: getattr(config, name) for name in shared})


def _resolve(pieces: list, folder: Path) -> list:
    return [
        {**p, "path": str(folder / p["path"])} if isinstance(p, dict) and isinstance(p.get("path"), str) else p
        for p in pieces
    ]
