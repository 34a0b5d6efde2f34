"""`medmax generate`: prompts from a JSONL file to outputs.jsonl and PNGs, or one prompt answered on the terminal."""

import json
from dataclasses import asdict, fields
from pathlib import Path

from PIL import Image

from medmax_fast.config import GenerateConfig
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.requests import Request, Result
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.runtime import (
    InputError,
    TooManyRejected,
    atomic_path,
    hash_file,
    log,
    open_output,
    progress,
    require_file,
)

# What runs where and how many at a time does not change the output.
_NOT_SETTINGS = ("output", "prompt", "image", "batch_size", "device")


def generate(config: GenerateConfig) -> dict:
    """Run the prompts of a file into a folder, or one prompt to the terminal; returns a summary."""
    if bool(config.prompts) == bool(config.prompt):
        raise InputError("give either --prompts FILE or --prompt TEXT")
    if config.prompts:
        if not config.output:
            raise InputError("--prompts needs --output, the folder for outputs.jsonl and the pictures")
        return _generate_file(config)
    return _generate_one(config)


def _generate_file(config: GenerateConfig) -> dict:
    requests = read_prompts(config.prompts, config)
    engine = Engine.from_checkpoint(open_checkpoint(config.ckpt, config.vqgan), config.device, config.precision)
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    settings["prompts_sha256"] = hash_file(config.prompts)
    output = open_output(config.output, "generate", settings)
    results: list[Result] = []
    if not (output / "outputs.jsonl").exists():
        # The engine reports through a callback; a generator over its batches keeps one progress bar for all.
        for start in progress(range(0, len(requests), config.batch_size), "generating batches"):
            results += engine.generate(requests[start : start + config.batch_size], config.batch_size)
        _write_results(results, output, engine)
    rejected = _count_lines(output / "rejected.jsonl")
    summary = {"prompts": len(requests), "rejected": rejected, "output": str(output / "outputs.jsonl")}
    if rejected:
        raise TooManyRejected(summary, 0)
    return summary


def _generate_one(config: GenerateConfig) -> dict:
    pieces = [{"type": "image", "path": config.image}] if config.image else []
    pieces.append({"type": "text", "text": config.prompt})
    engine = Engine.from_checkpoint(open_checkpoint(config.ckpt, config.vqgan), config.device, config.precision)
    result = engine.generate([_request(config, "prompt", content=pieces)])[0]
    if result.error:
        raise InputError(result.error)
    content = _save_pictures(result, Path(config.output or "."), engine)
    answer = " ".join(piece.get("text") or f"[picture: {piece['path']}]" for piece in content)
    return {"answer": answer, "pictures": [p["path"] for p in content if "path" in p], "token_ids": result.token_ids}


def read_prompts(path: str, config: GenerateConfig) -> list[Request]:
    """Requests of a prompts file; image paths are absolute or relative to it. InputError names the bad line."""
    folder, requests, seen = require_file(path).parent, [], set()
    for number, line in enumerate(require_file(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(row, dict) or "id" not in row:
            raise InputError(f"{where}: expected an object with id and content or token_ids")
        if ("content" in row) == ("token_ids" in row):
            raise InputError(f"{where}: expected either content or token_ids")
        key = "content" if "content" in row else "token_ids"
        if not isinstance(row[key], list):
            raise InputError(f"{where}: {key} is a {type(row[key]).__name__}, expected a list")
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


def _write_results(results: list[Result], output: Path, engine: Engine) -> None:
    bad = [result for result in results if result.error]
    if bad:
        with atomic_path(output / "rejected.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
            for result in bad:
                log(f"{result.id}: {result.error}")
                file.write(json.dumps({"id": result.id, "reason": result.error}, ensure_ascii=False) + "\n")
    with atomic_path(output / "outputs.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
        for result in results:
            if not result.error:
                content = _save_pictures(result, output, engine)
                row = {"id": result.id, "token_ids": result.token_ids, "content": content}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _save_pictures(result: Result, folder: Path, engine: Engine) -> list[dict]:
    """The result's content with every picture written as a PNG beside it and named in its place."""
    content, drawn = [], 0
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in result.id)
    for piece in result.content:
        if piece["type"] == "image":
            name = f"{stem}-{drawn}.png"
            drawn += 1
            with atomic_path(folder / name) as temporary:
                Image.fromarray(engine.decode_image(piece["codes"])).save(temporary, format="PNG")
            piece = {"type": "image", "path": name}
        content.append(piece)
    return content


def _count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
